"""Decoded histories of hot users, by a budget of bytes."""

import threading
import types
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from laser_jax.vault.state import State

#: Memory of an entry beside the values in its columns: 8 arrays and what holds them, as Python counts it.
_OVERHEAD = 1900
#: A look-up that misses takes as long as one that reads so many bytes more.
_LOOKUP_BYTES = 20_000


class Cached:
    """What is kept of a user.

    Attributes:
      stamp: of the state at which it was last known to be right.
      entries: of the user in the parts, the epoch of their page numbers, and the number of schemas.
      columns: `time` and every scalar field, read-only, of the newest events in the parts: nobody can put in or take
        out one.
      rows: number of events. complete: whether these are all.
      size: bytes. uses: how often it was asked for, lately.
    """

    __slots__ = ("columns", "complete", "entries", "rows", "size", "stamp", "uses")

    def __init__(
        self, stamp: int, entries: Any, columns: Mapping[str, np.ndarray], complete: bool, size: int, uses: int
    ):
        self.stamp = stamp
        self.uses = uses
        self.entries = entries
        self.columns = columns
        self.rows = len(columns["time"])
        self.complete = complete
        self.size = size


def _worth(uses: int, size: int) -> float:
    """What keeping an entry saves, for each of its bytes: a look-up costs something, and every event more."""
    return uses * (_LOOKUP_BYTES + size) / size


def version_of(state: State, entries: Any) -> Any:
    """What has to be equal for a history to be the same."""
    return state.epoch, len(state.manifest["schemas"]), entries


class HistoryCache:
    """The newest events of users as the parts hold them, of those asked for most often. Safe to share among threads.

    Users that are asked for once do not push out those who come again: a user is taken in only if it was asked for more
    often, lately and for the bytes that it takes, than those that would have to go (as in TinyLFU, with exact counts).
    A hit touches as little memory as it can: one table and the entry.

    Attributes:
      hits, misses: look-ups so far.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.hits = 0
        self.misses = 0
        self._size = 0
        self._entries: OrderedDict[Any, Cached] = OrderedDict()
        self._strangers: dict[Any, int] = {}
        self._lock = threading.Lock()

    def find(self, user: Any, state: State) -> Cached | None:
        """What is known of a user, if it is what the parts of this state hold."""
        found = self._entries.get(user)
        if found is None:
            self.misses += 1
            self._strangers[user] = self._strangers.get(user, 0) + 1
            if len(self._strangers) > 1024 + 16 * len(self._entries):
                self._forget_strangers()
            return None
        found.uses += 1
        if found.stamp != state.stamp:
            if found.entries != version_of(state, state.entries(user)):
                self.misses += 1
                return None
            found.stamp = state.stamp
        self.hits += 1
        return found

    def keep(
        self, user: Any, state: State, entries: Any, columns: dict[str, np.ndarray], complete: bool, event_bytes: int
    ) -> None:
        """Takes in what was read of a user, if it is worth more than what has to go for it.

        Args:
          user: the key.
          state: that it was read from.
          entries: of the user in it.
          columns: `time` and every scalar field of the newest events in the parts; readers share them from now on.
          complete: whether these are all events.
          event_bytes: of an event in all columns.
        """
        size = len(columns["time"]) * event_bytes + _OVERHEAD
        if size > self.budget // 8:
            return
        with self._lock:
            old = self._entries.pop(user, None)
            if old is not None:
                self._size -= old.size
                uses = old.uses
            else:
                uses = self._strangers.get(user, 0)
            worth = _worth(uses, size)
            while self._size + size > self.budget:
                other, entry = self._entries.popitem(last=False)
                if old is None and _worth(entry.uses, entry.size) >= worth:
                    # It stays, is the last to be looked at again, and lives on what it is asked for until then.
                    entry.uses -= entry.uses // 4
                    self._entries[other] = entry
                    return
                self._size -= entry.size
            for column in columns.values():
                column.flags.writeable = False
            shared = types.MappingProxyType(dict(columns))  # whoever read them has the other dict
            self._size += size
            self._entries[user] = Cached(state.stamp, version_of(state, entries), shared, complete, size, uses)
            self._strangers.pop(user, None)

    def _forget_strangers(self) -> None:
        """Halves the counts: what matters is how often a user was asked for lately."""
        with self._lock:
            # A list of them first, which no other thread's miss comes in between.
            self._strangers = {user: count // 2 for user, count in list(self._strangers.items()) if count > 1}

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
