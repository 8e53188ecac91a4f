"""A growing dictionary: ids get rows of a table as they come, and give them back when they stay away.

An id is admitted once it was met in `admit` steps; until then, and where the table is full, it reads the row of what
was never seen. A row whose id was not met for `keep` steps may go to another id, which starts afresh: the step
re-initialises row and optimizer state. Memory is bounded: as many ids wait for admission as there are rows; when there
are more, those not met for the longest are forgotten.

Knows no jax. All is decided by the order of batches, so that it is exact under resume and the same for any number of
processes.
"""

import dataclasses

import numpy as np
from numba import njit

WAITING = -1  # in place of a row: not admitted yet


@njit(nogil=True, cache=True)
def _slot(key, mask, bits):
    return np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits)) & mask


@njit(nogil=True, cache=True)
def _find(ids, slots, bits, keys, found):
    """The entry of each id, or -1."""
    mask = (1 << bits) - 1
    for i in range(len(ids)):
        slot = _slot(ids[i], mask, bits)
        while slots[slot] >= 0 and keys[slots[slot]] != ids[i]:
            slot = (slot + 1) & mask
        found[i] = slots[slot]


@njit(nogil=True, cache=True)
def _insert(ids, entries, slots, bits):
    """Ids that are not there yet, at these entries."""
    mask = (1 << bits) - 1
    for i in range(len(ids)):
        slot = _slot(ids[i], mask, bits)
        while slots[slot] >= 0:
            slot = (slot + 1) & mask
        slots[slot] = entries[i]


@dataclasses.dataclass(frozen=True)
class Assigned:
    """What the ids of a step read.

    Attributes:
      ids: int64 [U], as they were given. rows: int64 [U], 0 for those without a row. fresh: bool [U], rows given out
        in this step.
    """

    ids: np.ndarray
    rows: np.ndarray
    fresh: np.ndarray


class IdDictionary:
    """Ids of one table.

    Args:
      num_rows: of the table, row 0 for what has none.
      admit: steps in which an id must have been met. keep: steps without the id after which its row may be taken (0:
        never).

    Attributes:
      refused: how often an id was due for a row, or was new, when there was no room for it.
    """

    def __init__(self, num_rows: int, admit: int = 1, keep: int = 0):
        if num_rows < 2 or admit < 1 or keep < 0:
            raise ValueError(f"rows={num_rows} (at least 2), admit={admit} (at least 1), keep={keep} (at least 0)")
        self.num_rows, self.admit, self.keep = num_rows, admit, keep
        self._size = 2 * num_rows  # entries: as many may wait as can have rows
        self._bits = int(np.ceil(np.log2(2 * self._size)))
        self._keys = np.zeros(self._size, np.int64)
        self._row = np.zeros(self._size, np.int32)
        self._count = np.zeros(self._size, np.int32)
        self._seen = np.zeros(self._size, np.int32)
        self._used = 0  # entries 0 .. used-1 are in use
        self._free = np.arange(num_rows - 1, 0, -1, dtype=np.int32)  # given out from the end
        self._num_free = num_rows - 1
        self._swept = 0  # step of the newest search for stale rows
        self.refused = 0
        self._index()

    def _index(self) -> None:
        self._slots = np.full(1 << self._bits, -1, np.int32)
        _insert(self._keys[: self._used], np.arange(self._used, dtype=np.int32), self._slots, self._bits)

    def __len__(self) -> int:
        """Ids that have a row."""
        return self.num_rows - 1 - self._num_free

    @property
    def waiting(self) -> int:
        """Ids that were met but not often enough."""
        return self._used - len(self)

    @property
    def num_bytes(self) -> int:
        """Of memory, whatever comes."""
        arrays = (self._keys, self._row, self._count, self._seen, self._free, self._slots)
        return sum(array.nbytes for array in arrays)

    def _entries(self, ids: np.ndarray) -> np.ndarray:
        found = np.empty(len(ids), np.int64)
        _find(ids.astype(np.int64), self._slots, self._bits, self._keys, found)
        return found

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Rows of ids [N], int64, 0 for those without one; changes nothing."""
        found = self._entries(ids)
        rows = np.where(found >= 0, self._row[found], 0)
        return np.maximum(rows, 0).astype(np.int64)

    def counts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps in which each of the ids [N] was met since it is known, and the newest of them; 0 for the unknown."""
        found = self._entries(ids)
        return np.where(found >= 0, self._count[found], 0), np.where(found >= 0, self._seen[found], 0)

    def assign(self, ids: np.ndarray, step: int) -> Assigned:
        """Rows for the ids that a step meets; counts them, admits some.

        Args:
          ids: int64 [U], distinct; their order is that in which rows are given out.
          step: counts from 1 and only grows.
        """
        ids = ids.astype(np.int64)
        found = self._entries(ids)
        new = np.flatnonzero(found < 0)
        if self._used + len(new) > self._size:
            self._forget_waiting(step, len(new), ids)
            found = self._entries(ids)
            new = np.flatnonzero(found < 0)
        room = self._size - self._used
        self.refused += max(len(new) - room, 0)
        new = new[:room]
        entries = np.arange(self._used, self._used + len(new), dtype=np.int32)
        self._keys[entries], self._row[entries] = ids[new], WAITING
        self._count[entries] = 0
        _insert(ids[new], entries, self._slots, self._bits)
        self._used += len(new)
        found[new] = entries
        known = found >= 0
        self._count[found[known]] += 1
        self._seen[found[known]] = step
        due = known & (self._row[found] == WAITING) & (self._count[found] >= self.admit)
        due = np.flatnonzero(due)
        if len(due) > self._num_free:
            if self._evict(step):  # entries move
                found = self._entries(ids)
            self.refused += max(len(due) - self._num_free, 0)
            due = due[: self._num_free]
        given = self._free[self._num_free - len(due) : self._num_free][::-1]
        self._num_free -= len(due)
        self._row[found[due]] = given
        fresh = np.zeros(len(ids), bool)
        fresh[due] = True
        rows = np.where(found >= 0, self._row[found], 0)
        return Assigned(ids, np.maximum(rows, 0).astype(np.int64), fresh)

    def _evict(self, step: int) -> bool:
        """Takes rows from ids that stayed away; a search of all, so at most once in a tenth of `keep` steps."""
        if not self.keep or (self._swept and step - self._swept < max(self.keep // 10, 1)):
            return False
        self._swept = step
        stale = (self._row[: self._used] > 0) & (self._seen[: self._used] < step - self.keep)
        freed = np.sort(self._row[: self._used][stale])[::-1]
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)
        self._keep_entries(~stale)
        return True

    def _forget_waiting(self, step: int, needed: int, ids: np.ndarray) -> None:
        """Drops half of the waiting ids, or as many as are needed if that is more, those away for longest first."""
        waiting = self._row[: self._used] == WAITING
        waiting[self._entries(ids)[self._entries(ids) >= 0]] = False  # not those of this very step
        away = np.where(waiting, self._seen[: self._used], np.iinfo(np.int32).max)
        drop = min(max(needed, int(waiting.sum()) // 2), int(waiting.sum()))
        gone = np.argsort(away, kind="stable")[:drop]
        keep = np.ones(self._used, bool)
        keep[gone] = False
        self._keep_entries(keep)

    def _keep_entries(self, keep: np.ndarray) -> None:
        kept = int(keep.sum())
        for array in (self._keys, self._row, self._count, self._seen):
            array[:kept] = array[: self._used][keep]
            array[kept:] = 0
        self._used = kept
        self._index()

    def restart(self, step: int) -> None:
        """Counts steps anew: what was step `step` is now step 0."""
        self._seen[: self._used] -= step
        self._swept = self.refused = 0

    def state(self) -> dict[str, np.ndarray]:
        """Everything, as arrays whose shapes depend on num_rows alone; alike for dictionaries that behave alike."""
        numbers = np.array([self._used, self._num_free, self._swept, self.refused], np.int64)
        free = np.where(np.arange(len(self._free)) < self._num_free, self._free, 0)  # what was given out stays behind
        arrays = {"keys": self._keys, "row": self._row, "count": self._count, "seen": self._seen, "free": free}
        return {name: array.copy() for name, array in {**arrays, "numbers": numbers}.items()}

    def load(self, state: dict[str, np.ndarray]) -> None:
        """Becomes what `state` was taken from.

        A smaller table's state may be loaded: its ids keep their rows, and the further rows are free.

        Raises:
          ValueError: it is of a larger table.
        """
        rows = len(state["free"]) + 1
        if rows > self.num_rows:
            raise ValueError(f"the dictionary has {rows} rows, the table {self.num_rows}: a table can grow, not shrink")
        for name in ("keys", "row", "count", "seen"):
            array = getattr(self, f"_{name}")
            array[:] = 0
            array[: len(state[name])] = state[name]
        self._used, num_free, self._swept, self.refused = (int(number) for number in state["numbers"])
        further = np.arange(self.num_rows - 1, rows - 1, -1, dtype=np.int32)
        free = np.r_[further, state["free"][:num_free]].astype(np.int32)  # the old table's rows are given out first
        self._num_free = len(free)
        self._free[: len(free)] = free
        self._index()
