"""Decoded histories of hot users, by a budget of bytes."""

import collections
import threading
from typing import Any

import numpy as np

from laser_jax.vault.state import State

#: Memory of an entry beside its columns.
_OVERHEAD = 600


class Cached:
    """What is kept of a user.

    Attributes:
      stamp: of the state at which it was last known to be right.
      entries: of the user in the parts, and the epoch of their page numbers.
      columns: `time` and every scalar field, read-only, of the newest events in the parts.
      complete: whether these are all.
      size: bytes.
    """

    __slots__ = ("columns", "complete", "entries", "size", "stamp")

    def __init__(self, stamp: int, entries: Any, columns: dict[str, np.ndarray], complete: bool):
        self.stamp = stamp
        self.entries = entries
        self.columns = columns
        self.complete = complete
        self.size = sum(column.nbytes for column in columns.values()) + _OVERHEAD


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
        self._entries: collections.OrderedDict[Any, Cached] = collections.OrderedDict()
        self._lock = threading.Lock()

    def find(self, user: Any, state: State) -> Cached | None:
        """What is known of a user, if it is what the parts of this state hold."""
        with self._lock:
            found = self._entries.get(user)
            if found is None:
                self.misses += 1
                return None
            self._entries.move_to_end(user)
        if found.stamp != state.stamp:
            if found.entries != (state.epoch, state.entries(user)):
                self.misses += 1
                return None
            found.stamp = state.stamp
        self.hits += 1
        return found

    def keep(self, user: Any, found: Cached) -> None:
        """Takes in what was read of a user; lets go of those not used for longest."""
        if found.size > self.budget // 8:
            return
        for column in found.columns.values():
            # Readers share it.
            column.flags.writeable = False
        with self._lock:
            old = self._entries.pop(user, None)
            self._size += found.size - (old.size if old else 0)
            self._entries[user] = found
            while self._size > self.budget:
                self._size -= self._entries.popitem(last=False)[1].size

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
