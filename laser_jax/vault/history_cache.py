"""Decoded histories of hot users, by a budget of bytes."""

import collections
import threading
from collections.abc import Hashable
from typing import Any

import numpy as np

#: Memory of an entry beside its columns.
_OVERHEAD = 600


class HistoryCache:
    """The newest events of users as the parts hold them, the last used ones. Safe to share among threads.

    Attributes:
      hits, misses: look-ups so far.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.hits = 0
        self.misses = 0
        self._size = 0
        self._entries: collections.OrderedDict[Any, tuple[Hashable, dict[str, np.ndarray], bool, int]]
        self._entries = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, user: Any, version: Hashable) -> tuple[dict[str, np.ndarray], bool] | None:
        """Columns of a user and whether they are all that the parts hold; None if this version is not here."""
        with self._lock:
            entry = self._entries.get(user)
            if entry is None or entry[0] != version:
                self.misses += 1
                return None
            self._entries.move_to_end(user)
            self.hits += 1
            return entry[1], entry[2]

    def keep(self, user: Any, version: Hashable, columns: dict[str, np.ndarray], complete: bool) -> None:
        """Takes in what was read of a user; lets go of those not used for longest."""
        size = sum(column.nbytes for column in columns.values()) + _OVERHEAD
        if size > self.budget // 8:
            return
        for column in columns.values():
            # Readers get views.
            column.flags.writeable = False
        with self._lock:
            old = self._entries.pop(user, None)
            self._size += size - (old[3] if old else 0)
            self._entries[user] = (version, columns, complete, size)
            while self._size > self.budget:
                _, (_, _, _, freed) = self._entries.popitem(last=False)
                self._size -= freed

    def clear(self) -> None:
        """Lets go of everything."""
        with self._lock:
            self._entries.clear()
            self._size = 0

    def stats(self) -> dict[str, int]:
        """Budget, bytes, users, hits and misses."""
        return {
            "budget_bytes": self.budget,
            "bytes": self._size,
            "users": len(self._entries),
            "hits": self.hits,
            "misses": self.misses,
        }
