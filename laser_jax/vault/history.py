"""What a read returns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


class History:
    """Events of one user, oldest first.

    Attributes:
      columns: `time` int64 [N] and the asked fields, [N] or [N, size]; a string field as int32 codes. Read-only where
        they are shared with other readers of the same user.
      as_of: what this read saw: every event with a smaller sequence number, and no other. A later read with this
        `as_of` sees the same.
      scanned: events that were looked at; more than N if some did not meet the conditions of `where`.
      exhausted: whether nothing older is left, so that all events before the bound were looked at.
      dictionary: gives the values of a string field, by code; None for other fields.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        dictionary: Callable[[str], np.ndarray | None],
        as_of: int,
        exhausted: bool,
        scanned: int | None = None,
    ):
        self.columns = columns
        self.as_of = as_of
        self.exhausted = exhausted
        self.scanned = len(self) if scanned is None else scanned
        self.dictionary = dictionary

    def __len__(self) -> int:
        return len(self.columns["time"])

    def __getitem__(self, name: str) -> np.ndarray:
        """Values of a column; strings are decoded."""
        if name not in self.columns:
            raise KeyError(f"{name!r} was not read; columns: {', '.join(self.columns)}")
        values = self.dictionary(name)
        return self.columns[name] if values is None else values[self.columns[name]]

    def __repr__(self) -> str:
        return f"History({len(self)} events, columns: {', '.join(self.columns)})"


class Histories:
    """Events of a batch of users, one user after the other, oldest first each.

    Attributes:
      columns: `time` int64 [N] and the asked fields, [N] or [N, size]; a string field as int32 codes.
      offsets: int64 [B + 1]; user b has the rows offsets[b] to offsets[b + 1].
      as_of: as for History, of the whole batch (of a partitioned vault, a Sequences).
      dictionary: as for History.
    """

    def __init__(
        self,
        columns: dict[str, np.ndarray],
        offsets: np.ndarray,
        dictionary: Callable[[str], np.ndarray | None],
        as_of: Any,
        n: int,
    ):
        """`n` is what was asked for; the others are as said above."""
        self.columns = columns
        self.offsets = offsets
        self.as_of = as_of
        self.dictionary = dictionary
        self._n = n

    def __len__(self) -> int:
        """Number of users B."""
        return len(self.offsets) - 1

    @property
    def num_events(self) -> int:
        """Number of events N of all users together."""
        return int(self.offsets[-1])

    def __getitem__(self, position: int) -> History:
        """The history of the user at a position of the batch."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} in a batch of {len(self)} users")
        position %= len(self)
        rows = slice(self.offsets[position], self.offsets[position + 1])
        columns = {name: column[rows] for name, column in self.columns.items()}
        return History(columns, self.dictionary, self.as_of, len(columns["time"]) < self._n)

    def take(self, positions: Sequence[int]) -> "Histories":
        """The histories of the users at these positions, in this order."""
        starts, ends = self.offsets[:-1][positions], self.offsets[1:][positions]
        offsets = np.concatenate(([0], np.cumsum(ends - starts)))
        rows = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
        columns = {name: column[rows] for name, column in self.columns.items()}
        return Histories(columns, offsets, self.dictionary, self.as_of, self._n)

    def __repr__(self) -> str:
        return f"Histories({len(self)} users, {self.num_events} events, columns: {', '.join(self.columns)})"
