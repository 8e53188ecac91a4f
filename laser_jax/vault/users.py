"""From a user's key to a slot: the hash table in memory, for int64 and for string keys."""

from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault.part import hash_string

_MASK = 2**64 - 1


def splitmix64(keys: np.ndarray) -> np.ndarray:
    """The 64-bit hash of int64 keys, uint64 [N]; one to one."""
    z = keys.astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _splitmix64_one(key: int) -> int:
    z = (key + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class _Buckets:
    """Slots in order of hash, found by the leading bits of the hash: about one slot a bucket."""

    def __init__(self, hashes: np.ndarray):
        """`hashes` uint64 [U], ascending."""
        bits = min(max(len(hashes), 2).bit_length(), 32)
        self._shift = 64 - bits
        edges = np.arange(1 << bits, dtype=np.uint64) << np.uint64(self._shift)
        self._start = np.append(np.searchsorted(hashes, edges), len(hashes)).astype(np.int64)
        self.longest = int(np.diff(self._start).max())

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return self._start.nbytes

    def one(self, value: int) -> range:
        """Slots that a hash may be in."""
        bucket = value >> self._shift
        return range(self._start[bucket], self._start[bucket + 1])

    def many(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First slot and one past the last slot that each hash may be in."""
        bucket = (values >> np.uint64(self._shift)).astype(np.int64)
        return self._start[bucket], self._start[bucket + 1]


class IntUsers:
    """Slots of int64 users."""

    def __init__(self, keys: np.ndarray, hashes: np.ndarray):
        """`keys` int64 [U], each once, in order of their `hashes` uint64 [U]."""
        self.keys = keys
        self._buckets = _Buckets(hashes)

    @classmethod
    def merge(cls, parts: list[np.ndarray]) -> tuple["IntUsers", np.ndarray, np.ndarray]:
        """See merge_users; `parts` are the keys of each part, each once."""
        keys = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        hashes = splitmix64(keys)
        order = np.argsort(hashes, kind="stable")
        new = changes(hashes[order])
        first = order[new]
        return cls(keys[first], hashes[first]), order, new

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return self.keys.nbytes + self._buckets.num_bytes

    def __len__(self) -> int:
        return len(self.keys)

    def values(self) -> np.ndarray:
        """All keys, int64 [U], by slot."""
        return self.keys.copy()

    def key(self, slot: int) -> int:
        """Key of a slot."""
        return int(self.keys[slot])

    def find_one(self, user: Any) -> int:
        """Slot of a user, -1 if unknown."""
        if isinstance(user, bool) or not isinstance(user, (int, np.integer)):
            raise SchemaError(f"user {user!r}: this vault's users are int64")
        user = int(user)
        for slot in self._buckets.one(_splitmix64_one(user)):
            if self.keys[slot] == user:
                return slot
        return -1

    def find(self, users: Any) -> np.ndarray:
        """Slots int64 [B] of users, -1 where unknown."""
        array = np.asarray(users)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise SchemaError(f"users of type {array.dtype} and shape {array.shape}: need int64 [B]")
        # uint64 ids beyond int64 are nobody's, and must not wrap to somebody's.
        beyond = array > np.iinfo(np.int64).max
        array = array.astype(np.int64)
        start, end = self._buckets.many(splitmix64(array))
        found = np.full(len(array), -1, np.int64)
        for step in range(self._buckets.longest):
            slot = start + step
            inside = np.flatnonzero(slot < end)
            hit = inside[self.keys[slot[inside]] == array[inside]]
            found[hit] = slot[hit]
        found[beyond] = -1
        return found


class StringUsers:
    """Slots of string users; keys are compared after the hash."""

    def __init__(self, data: bytes, start: np.ndarray, end: np.ndarray, hashes: np.ndarray):
        """`data` holds key u in the bytes start[u] to end[u]; keys are in order of their `hashes` [U]."""
        self._data = data
        self._start = start
        self._end = end
        self._hashes = hashes
        self._buckets = _Buckets(hashes)

    @classmethod
    def merge(
        cls, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> tuple["StringUsers", np.ndarray, np.ndarray]:
        """See merge_users; `parts` are UTF-8 bytes, offsets [U + 1] and hashes [U] of each part's keys."""
        lengths = np.concatenate([np.diff(offsets) for _, offsets, _ in parts] or [np.zeros(0, np.int64)])
        starts, base = [], 0
        for data, offsets, _ in parts:
            starts.append(offsets[:-1] + base)
            base += len(data)
        data = np.concatenate([data for data, _, _ in parts] or [np.zeros(0, np.uint8)])
        start = np.concatenate(starts or [np.zeros(0, np.int64)])
        hashes = np.concatenate([part_hashes for _, _, part_hashes in parts] or [np.zeros(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        new = changes(hashes[order])
        if not new.all():
            order, new = _tell_apart(order, new, data, start, start + lengths)
        first = order[new]
        users = cls(data.tobytes(), start[first], start[first] + lengths[first], hashes[first])
        return users, order, new

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        tables = self._start.nbytes + self._end.nbytes + self._hashes.nbytes
        return len(self._data) + tables + self._buckets.num_bytes

    def __len__(self) -> int:
        return len(self._start)

    def values(self) -> np.ndarray:
        """All keys, str objects [U], by slot."""
        keys = np.empty(len(self), object)
        keys[:] = [self.key(slot) for slot in range(len(self))]
        return keys

    def key(self, slot: int) -> str:
        """Key of a slot."""
        return self._data[self._start[slot] : self._end[slot]].decode()

    def find_one(self, user: Any) -> int:
        """Slot of a user, -1 if unknown."""
        if not isinstance(user, str):
            raise SchemaError(f"user {user!r}: this vault's users are strings")
        value = hash_string(user)
        for slot in self._buckets.one(value):
            if self._hashes[slot] == value and self.key(slot) == user:
                return slot
        return -1

    def find(self, users: Any) -> np.ndarray:
        """Slots int64 [B] of users, -1 where unknown."""
        if isinstance(users, str):
            raise SchemaError(f"users {users!r}: need a sequence of strings")
        listed = users.tolist() if isinstance(users, np.ndarray) else list(users)
        return np.fromiter((self.find_one(user) for user in listed), np.int64, len(listed))


def merge_users(schema: Schema, parts: list[Any]) -> tuple[IntUsers | StringUsers, np.ndarray, np.ndarray]:
    """The table of all parts' users, for a schema's type of user.

    Returns:
      The table; `order` int64 [E], which sorts the parts' users, laid end to end, by slot (stable); and `new`
      bool [E], True at the first of each slot.
    """
    return IntUsers.merge(parts) if schema.user == "int64" else StringUsers.merge(parts)


def changes(values: np.ndarray) -> np.ndarray:
    """True at the first of each run of equal values."""
    new = np.ones(len(values), bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _tell_apart(
    order: np.ndarray, new: np.ndarray, data: np.ndarray, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts entries of equal hash by key, so that two users whose hashes collide stay two."""
    order, new = order.copy(), new.copy()
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(order))
    for a, b in zip(first[last - first > 1], last[last - first > 1], strict=True):
        run = order[a:b]
        keys = [data[start[entry] : end[entry]].tobytes() for entry in run.tolist()]
        by_key = sorted(range(b - a), key=keys.__getitem__)
        order[a:b] = run[by_key]
        for step in range(1, b - a):
            new[a + step] = keys[by_key[step]] != keys[by_key[step - 1]]
    return order, new
