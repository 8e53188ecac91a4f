"""Which appended events repeat an earlier one, as far back as a window of the newest events reaches."""

import collections
from typing import Any

import numpy as np

from laser_jax.schema import Schema


class Window:
    """Keys of the newest appended events. Does nothing unless the schema drops duplicates."""

    def __init__(self, schema: Schema, size: int):
        self.active = schema.duplicates == "drop"
        self._schema = schema
        self._size = size
        self._order: collections.deque[Any] = collections.deque()
        self._known: set[Any] = set()

    def keys(self, users: list[Any], columns: dict[str, Any]) -> list[Any]:
        """What has to be equal for two events to be the same one; string fields as lists of strings."""
        if self._schema.event_key is not None:
            return list(zip(users, columns[self._schema.event_key].tolist(), strict=True))
        rows = len(users)
        if not rows:
            return []
        names = [field.name for field in self._schema.fields if field.type != "string"]
        pieces = [np.ascontiguousarray(columns[name]).reshape(rows, -1) for name in ("time", *names)]
        whole = np.concatenate([piece.view(np.uint8).reshape(rows, -1) for piece in pieces], axis=1)
        texts = [columns[field.name] for field in self._schema.fields if field.type == "string"]
        return list(zip(users, [row.tobytes() for row in whole], *texts, strict=True))

    def fresh(self, keys: list[Any], pending: set[Any]) -> np.ndarray:
        """True where an event is neither known nor among `pending`, to which the fresh keys are added; bool [N]."""
        found = np.empty(len(keys), bool)
        for row, key in enumerate(keys):
            found[row] = key not in self._known and key not in pending
            if found[row]:
                pending.add(key)
        return found

    def forget(self, users: set[Any]) -> None:
        """Lets go of the keys of these users' events."""
        self._order = collections.deque(key for key in self._order if key[0] not in users)
        self._known = set(self._order)

    def add(self, keys: list[Any]) -> None:
        """Takes in the keys of events that were written."""
        self._order.extend(keys)
        self._known.update(keys)
        while len(self._order) > self._size:
            self._known.discard(self._order.popleft())
