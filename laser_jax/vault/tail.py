"""Events that are in no part yet, in memory: those of one or several successive log files."""

import itertools
import threading
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import kernels
from laser_jax.vault.origins import Written
from laser_jax.vault.unpacking import SEQUENCE

_FIRST_ROWS = 1 << 10
_FIRST_USERS = 1 << 8


class Tail:
    """Rows in the order of their sequence numbers, those of a user linked into a chain.

    Attributes:
      first_sequence: sequence number of the first row; the others follow without a gap.
      size: number of rows N.
      origins: of its batches, see laser_jax.vault.origins.
    """

    def __init__(self, schema: Schema, first_sequence: int):
        self.schema = schema
        self.first_sequence = first_sequence
        self.size = 0
        self.origins: dict[str, Written] = {}
        self._slots: dict[Any, int] = {}
        self._lock = threading.Lock()
        shapes = {"time": (np.dtype(np.int64), ()), "previous": (np.dtype(np.int64), ())}
        for field in schema.fields:
            shapes["field " + field.name] = (field.dtype, () if field.size is None else (field.size,))
        self._rows = {name: np.empty((_FIRST_ROWS, *shape), dtype) for name, (dtype, shape) in shapes.items()}
        self._width = sum(array.nbytes for array in self._rows.values()) // _FIRST_ROWS
        self._newest = np.full(_FIRST_USERS, -1, np.int64)
        self._count = np.zeros(_FIRST_USERS, np.int64)
        self._ordered = np.ones(_FIRST_USERS, bool)

    @property
    def next_sequence(self) -> int:
        """Number that the next event gets."""
        return self.first_sequence + self.size

    @property
    def num_users(self) -> int:
        """Number of users with events here."""
        return len(self._slots)

    @property
    def num_bytes(self) -> int:
        """Memory in use, about."""
        return self.size * self._width + len(self._slots) * 150

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last time of its events; None if there are none."""
        times = self._rows["time"][: self.size]
        return (int(times.min()), int(times.max())) if len(times) else None

    def __contains__(self, user: Any) -> bool:
        return user in self._slots

    def users(self, start: int = 0) -> list[Any]:
        """Users with events here, in order of their first one, from number `start` on."""
        with self._lock:
            return list(itertools.islice(self._slots, start, None))

    def append(self, users: list[Any], columns: dict[str, np.ndarray], origin: tuple[str, int] | None = None) -> None:
        """Adds rows.

        Args:
          users: keys of the N rows.
          columns: `time` int64 [N] and every field, strings as int32 codes.
          origin: (client, number) that they came with.
        """
        if not users:
            return
        with self._lock:
            end = self.size + len(users)
            if end > len(self._rows["time"]):
                self._rows = {name: _grown(array, end, self.size) for name, array in self._rows.items()}
            slots = self._slots
            found = np.array([slots.setdefault(user, len(slots)) for user in users], np.int64)
            if len(slots) > len(self._newest):
                known = min(len(self._newest), len(slots))
                self._newest = _grown(self._newest, len(slots), known, -1)
                self._count = _grown(self._count, len(slots), known, 0)
                self._ordered = _grown(self._ordered, len(slots), known, True)
            self._rows["time"][self.size : end] = columns["time"]
            for field in self.schema.fields:
                self._rows["field " + field.name][self.size : end] = columns[field.name]
            rows = self._rows
            kernels.chain_rows(
                found, self.size, rows["time"], rows["previous"], self._newest, self._count, self._ordered
            )
            self.size = end
            if origin is not None:
                client, number = origin
                known = self.origins.get(client, Written())
                self.origins[client] = known.adding([(number, number)], self.next_sequence).trimmed()

    def read(self, user: Any, names: list[str], before: int, as_of: int, n: int) -> dict[str, np.ndarray] | None:
        """The newest n events of a user with time < before and sequence number < as_of, by (time, sequence number).

        Args:
          user: the key.
          names: fields to read; `time` and the sequence numbers always come.
          before, as_of, n: as said.

        Returns:
          Columns, or None if there are no such events.
        """
        slot = self._slots.get(user)
        if slot is None:
            return None
        with self._lock:
            all_rows = self._rows
            rows = kernels.walk_rows(
                self._newest[slot],
                self._ordered[slot],
                self._count[slot],
                all_rows["previous"],
                all_rows["time"],
                before,
                as_of - self.first_sequence,
                n,
            )
        # Rows that are there are never changed.
        if not len(rows):
            return None
        found = {"time": all_rows["time"][rows], SEQUENCE: rows + self.first_sequence}
        for name in names:
            found[name] = all_rows["field " + name][rows]
        return found


def _grown(array: np.ndarray, size: int, used: int, fill: Any = None) -> np.ndarray:
    """A copy with room for `size` rows and as many again."""
    bigger = np.empty((2 * size, *array.shape[1:]), array.dtype)
    bigger[:used] = array[:used]
    if fill is not None:
        bigger[used:] = fill
    return bigger
