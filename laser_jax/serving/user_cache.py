"""What a model has read of users' histories: the work that depends on neither candidates nor the time of a request."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from laser_jax.assembly import Columns
from laser_jax.serving.exported import Events

#: Of an entry, beside its arrays.
_OVERHEAD = 1000


@dataclasses.dataclass(frozen=True)
class _Entry:
    columns: Columns
    events: Events

    @property
    def num_bytes(self) -> int:
        return self.events.num_bytes + sum(array.nbytes for array in self.columns.values()) + _OVERHEAD


class UserCache:
    """The events of the users that came last, by a budget of bytes. Safe to share among threads.

    What is kept is compared with the history that the vault gives, column by column: it serves for the events that are
    the same, and only the others are looked up. So nothing that is written, forgotten, merged or dropped is missed, in
    whatever way it came about.

    Attributes:
      hits, extended, misses: histories that were there as a whole, in part, and not at all.
    """

    def __init__(self, budget: int, look_up: Callable[[Columns], Events]):
        """
        Args:
          budget: bytes, 0 to keep nothing.
          look_up: the columns of some events -> what the model reads of them, each event by itself.
        """
        self._budget, self._look_up = budget, look_up
        self._entries: OrderedDict[int | str, _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0
        self.hits = self.extended = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, user: int | str, columns: Columns) -> Events:
        """What the model reads of a user's history.

        Args:
          columns: of the history, oldest event first.
        """
        with self._lock:
            entry = self._entries.get(user)
            if entry is not None:
                self._entries.move_to_end(user)
        count = len(columns["time"])
        first, same = (0, 0) if entry is None else _overlap(entry.columns, columns)
        self._count(same, count)
        if same == count:
            return entry.events.part(first, first + same) if same else self._look_up(columns)
        # Of a batch of users these are parts of arrays that hold all of them, which would stay with what is kept.
        columns = {name: values.copy() for name, values in columns.items()}
        if same:
            new = self._look_up({name: values[same:] for name, values in columns.items()})
            events = _joined(entry.events.part(first, first + same), new)
        else:
            events = self._look_up(columns)
        # A request about the past does not push out what those about the present need.
        if entry is None or entry.columns["time"][-1] <= columns["time"][-1]:
            self._keep(user, _Entry(columns, events))
        return events

    def _count(self, same: int, count: int) -> None:
        with self._lock:
            if same == count:
                self.hits += 1
            elif same:
                self.extended += 1
            else:
                self.misses += 1

    def _keep(self, user: int | str, entry: _Entry) -> None:
        if entry.num_bytes > self._budget:
            return
        with self._lock:
            old = self._entries.pop(user, None)
            self.num_bytes += entry.num_bytes - (0 if old is None else old.num_bytes)
            self._entries[user] = entry
            while self.num_bytes > self._budget:
                self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes


def _overlap(old: Columns, new: Columns) -> tuple[int, int]:
    """Where the new events begin among the old ones, and how many of them are the same from there on; or (0, 0)."""
    times, wanted = old["time"], new["time"]
    if not len(times) or not len(wanted):
        return 0, 0
    # Events of equal time: the new ones may begin at any of these.
    low, high = np.searchsorted(times, wanted[0], "left"), np.searchsorted(times, wanted[0], "right")
    for first in range(int(low), int(high)):
        same = min(len(times) - first, len(wanted))
        if all(np.array_equal(old[name][first : first + same], values[:same]) for name, values in new.items()):
            return first, same
    return 0, 0


def _joined(old: Events, new: Events) -> Events:
    return Events(
        np.concatenate([old.time, new.time]),
        np.concatenate([old.embeddings, new.embeddings]),
        {name: np.concatenate([rows, new.compared[name]]) for name, rows in old.compared.items()},
    )
