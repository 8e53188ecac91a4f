"""Decoded histories of hot users, by a budget of bytes."""

import collections
import threading
import types
from typing import Any

import numpy as np

from laser_jax.vault.state import State

#: Memory of an entry beside its columns.
_OVERHEAD = 600


class Cached:
    """What is kept of a user.

    Attributes:
      stamp: of the state at which it was last known to be right.
      entries: of the user in the parts, the epoch of their page numbers, and the number of schemas.
      columns: `time` and every scalar field, read-only, of the newest events in the parts.
      shared: the same, for readers: nobody can put in or take out a column.
      complete: whether these are all.
      size: bytes.
    """

    __slots__ = ("columns", "complete", "entries", "shared", "size", "stamp")

    def __init__(self, stamp: int, entries: Any, columns: dict[str, np.ndarray], complete: bool):
        self.stamp = stamp
        self.entries = entries
        self.columns = columns
        self.shared = types.MappingProxyType(columns)
        self.complete = complete
        self.size = sum(column.nbytes for column in columns.values()) + _OVERHEAD


def version_of(state: State, entries: Any) -> Any:
    """What has to be equal for a history to be the same."""
    return state.epoch, len(state.manifest["schemas"]), entries


class HistoryCache:
    """The newest events of users as the parts hold them, of those asked for most often. Safe to share among threads.

    Users that are asked for once do not push out those who come again: a user is taken in only if it was asked for more
    often, lately, than the one that would have to go (as in TinyLFU, with exact counts).

    Attributes:
      hits, misses: look-ups so far.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.hits = 0
        self.misses = 0
        self._size = 0
        self._entries: collections.OrderedDict[Any, Cached] = collections.OrderedDict()
        self._asked: dict[Any, int] = {}
        self._lock = threading.Lock()

    def find(self, user: Any, state: State) -> Cached | None:
        """What is known of a user, if it is what the parts of this state hold."""
        with self._lock:
            self._asked[user] = self._asked.get(user, 0) + 1
            found = self._entries.get(user)
            if found is None:
                self.misses += 1
                return None
            self._entries.move_to_end(user)
            self.hits += 1
        if found.stamp != state.stamp:
            if found.entries != version_of(state, state.entries(user)):
                return None
            found.stamp = state.stamp
        return found

    def keep(self, user: Any, found: Cached) -> None:
        """Takes in what was read of a user, if it is worth more than what has to go for it."""
        if found.size > self.budget // 8:
            return
        with self._lock:
            old = self._entries.pop(user, None)
            if old is not None:
                self._size -= old.size
            self._forget_counts()
            worth = self._asked.get(user, 0)
            while self._size + found.size > self.budget:
                oldest = next(iter(self._entries))
                if self._asked.get(oldest, 0) >= worth and old is None:
                    # It stays, and is not the first to go the next time: others are looked at too.
                    self._entries.move_to_end(oldest)
                    return
                self._size -= self._entries.pop(oldest).size
            for column in found.columns.values():
                column.flags.writeable = False  # readers share it
            self._size += found.size
            self._entries[user] = found

    def _forget_counts(self) -> None:
        """Halves the counts now and then: what matters is how often a user was asked for lately."""
        if len(self._asked) > 1024 + 16 * len(self._entries):
            self._asked = {user: count // 2 for user, count in self._asked.items() if count > 1}

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
