"""The index in memory: user -> pages in every part, page -> offset, length, count, times, sequence number.

All of it is made of arrays that never change once a reader can see them: a page table to which parts are only added,
and one or a few hash tables of users, each over some of the parts.
"""

from typing import Any

import numpy as np

from laser_jax.vault import index_kernels
from laser_jax.vault.part import Part, PartUsers

_COLUMNS = {
    "offset": np.uint32,
    "length": np.uint32,
    "count": np.uint16,
    "first_time": np.int64,
    "last_time": np.int64,
    "last_sequence": np.int64,
}


class PageTable:
    """Pages of all parts, numbered through.

    Attributes:
      offset, length, count, first_time, last_time, last_sequence: of each page.
    """

    def __init__(self, parts: list[Part]):
        """The table of some parts, in their order; `base` is filled with the number of each part's first page."""
        self.base: dict[str, int] = {}
        self.size = 0
        self._store = {name: np.zeros(0, dtype) for name, dtype in _COLUMNS.items()}
        self._append(parts)

    def extended(self, parts: list[Part]) -> "PageTable":
        """A table with more parts; this one stays as it is. Only the newest table may be extended."""
        table = object.__new__(PageTable)
        table.base = dict(self.base)
        table.size = self.size
        table._store = dict(self._store)
        table._append(parts)
        return table

    def _append(self, parts: list[Part]) -> None:
        end = self.size + sum(part.num_pages for part in parts)
        if len(parts) == 1 and not self.size:
            # As it is: an index of one part is not copied.
            for name in self._store:
                self._store[name] = getattr(parts[0], "page_count" if name == "count" else name)
        if end > len(self._store["count"]):
            # Room to grow only once the table is being extended; a vault that is only read needs none.
            room = end if not self.size else end + end // 4
            for name, array in self._store.items():
                grown = np.zeros(room, array.dtype)
                grown[: self.size] = array[: self.size]
                self._store[name] = grown
        for part in parts:
            self.base[part.name] = self.size
            stop = self.size + part.num_pages
            for name, array in self._store.items():
                values = getattr(part, "page_count" if name == "count" else name)
                if values is not array:
                    array[self.size : stop] = values
            self.size = stop
        for name, array in self._store.items():
            setattr(self, name, array[: self.size])
            for part in parts:
                # One copy in memory: the part's own arrays become views of the table.
                begin = self.base[part.name]
                setattr(part, "page_count" if name == "count" else name, array[begin : begin + part.num_pages])

    @property
    def num_bytes(self) -> int:
        """Memory of the table."""
        return sum(array.nbytes for array in self._store.values())


class UserIndex:
    """Users of some parts, by hash; every user has one entry for each of the parts that it lives in.

    Attributes:
      parts: names of the parts.
      keys: int64 [U], the users or, of strings, their hashes.
      entry_start: int64 [U + 1], entries of user u are entry_start[u] to entry_start[u + 1], by number of the part.
      first_page, end_page: int64 [E], pages of the entry in the page table.
      number, covers: int32 [E], of the part, and from which number on it stands for older parts.
    """

    def __init__(self, parts: list[Part], table: PageTable):
        parts = sorted(parts, key=lambda part: part.number)
        self.parts = [part.name for part in parts]
        self._texts: tuple[bytes, np.ndarray, np.ndarray] | None = None
        if len(parts) == 1:
            self._of_one(parts[0], table.base[parts[0].name])
        else:
            self._of_many(parts, table)
        self._table = new_table(len(self.keys))
        index_kernels.build_table(self.keys, self._table)
        for part in parts:
            part.release_users()

    def _of_one(self, part: Part, base: int) -> None:
        """Every user of a part is there once: most of what the part's files say is taken as it is."""
        users = part.users
        self.keys = users.keys
        self.entry_start = np.arange(len(users.keys) + 1)
        pages = users.first_page + base if base else users.first_page
        self.first_page, self.end_page = pages[:-1], pages[1:]
        self.number = np.broadcast_to(np.int32(part.number), len(users.keys))
        self.covers = users.covers
        if users.texts is not None:
            data, offsets = users.texts
            self._texts = (data.tobytes(), offsets[:-1], offsets[1:])

    def _of_many(self, parts: list[Part], table: PageTable) -> None:
        users = [part.users for part in parts]
        keys = _joined([found.keys for found in users], np.int64)
        group, first, texts = _grouped(keys, users)
        order = np.argsort(group, kind="stable")
        self.keys = keys[first]
        self.entry_start = np.concatenate(([0], np.cumsum(np.bincount(group, minlength=len(first)))))
        bases = [table.base[part.name] for part in parts]
        starts = [found.first_page[:-1] + base for found, base in zip(users, bases, strict=True)]
        ends = [found.first_page[1:] + base for found, base in zip(users, bases, strict=True)]
        numbers = [np.full(part.num_users, part.number, np.int32) for part in parts]
        self.first_page = _joined(starts, np.int64)[order]
        self.end_page = _joined(ends, np.int64)[order]
        self.number = _joined(numbers, np.int32)[order]
        self.covers = _joined([found.covers for found in users], np.int32)[order]
        if texts is not None:
            data, begin, end = texts
            self._texts = (data.tobytes(), begin[first], end[first])

    @property
    def num_bytes(self) -> int:
        """Memory of the index."""
        arrays = [self.keys, self.entry_start, self.first_page, self.end_page, self.number, self.covers, self._table]
        if self._texts is not None:
            arrays.extend(self._texts[1:])
        # Arrays may be views of one memory, or one value that stands for many.
        owned = {}
        for array in arrays:
            while isinstance(array.base, np.ndarray):
                array = array.base
            owned[id(array)] = array.nbytes
        return sum(owned.values()) + (len(self._texts[0]) if self._texts else 0)

    def __len__(self) -> int:
        return len(self.keys)

    def users_of(self, numbers: np.ndarray) -> np.ndarray:
        """Positions of the users who live in one of these parts."""
        if not len(self.keys):
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.logical_or.reduceat(np.isin(self.number, numbers), self.entry_start[:-1]))

    def keys_at(self, positions: np.ndarray) -> Any:
        """Keys of some users: int64 [N], or a list of strings."""
        return self.keys[positions] if self._texts is None else [self.key(position) for position in positions.tolist()]

    def key(self, position: int) -> Any:
        """Key of a user."""
        if self._texts is None:
            return int(self.keys[position])
        data, begin, end = self._texts
        return data[begin[position] : end[position]].decode()

    def find_one(self, user: Any, hashed: int) -> int:
        """Position of a user, -1 if it has none here.

        Args:
          user: the key.
          hashed: the key of an int64 user, or the hash of a string.
        """
        found = index_kernels.find_one(self.keys, self._table, hashed, 0)
        if self._texts is None or found < 0:
            return found
        tried = 0
        while found >= 0 and self.key(found) != user:
            tried += 1
            found = index_kernels.find_one(self.keys, self._table, hashed, tried)
        return found

    def first_entry(self, user: int) -> tuple[int, int, int, int]:
        """Of an int64 user the number of entries, and of the first: part number, first page, one past the last page."""
        return index_kernels.find_entry(
            self.keys, self._table, user, self.entry_start, self.first_page, self.end_page, self.number
        )

    def find(self, users: list[Any] | np.ndarray, hashed: np.ndarray) -> np.ndarray:
        """Positions int64 [B] of users, -1 where they have none here."""
        found = np.empty(len(hashed), np.int64)
        index_kernels.find_many(self.keys, self._table, hashed, found)
        if self._texts is not None:
            for row in np.flatnonzero(found >= 0).tolist():
                if self.key(int(found[row])) != users[row]:
                    found[row] = self.find_one(users[row], int(hashed[row]))
        return found


def new_table(size: int) -> np.ndarray:
    """An empty hash table with room for `size` keys."""
    return np.full(1 << max(int(size * 1.5).bit_length(), 3), -1, np.int32)


def _grouped(keys: np.ndarray, users: list[PartUsers]) -> tuple[np.ndarray, np.ndarray, Any]:
    """Numbers the users: group int64 [E] of each entry, the first entry int64 [U] of each group, and string keys."""
    group = np.empty(len(keys), np.int64)
    groups = index_kernels.group_keys(keys, new_table(len(keys)), group)
    first = _first_of(group, groups)
    if not users or users[0].texts is None:
        return group, first, None
    begins, ends, base = [], [], 0
    for found in users:
        data, offsets = found.texts
        begins.append(offsets[:-1] + base)
        ends.append(offsets[1:] + base)
        base += len(data)
    data = _joined([found.texts[0] for found in users], np.uint8)
    begin, end = _joined(begins, np.int64), _joined(ends, np.int64)
    other = np.flatnonzero(index_kernels.split_equal_hashes(group, first, data, begin, end))
    if len(other):
        # Keys whose hashes collide stay two users.
        extra: dict[bytes, int] = {}
        for entry in other.tolist():
            text = data[begin[entry] : end[entry]].tobytes()
            group[entry] = extra.setdefault(text, groups + len(extra))
        first = _first_of(group, groups + len(extra))
    return group, first, (data, begin, end)


def _first_of(group: np.ndarray, groups: int) -> np.ndarray:
    first = np.empty(groups, np.int64)
    first[group[::-1]] = np.arange(len(group) - 1, -1, -1)
    return first


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    """Arrays laid end to end; there may be none."""
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... for each (start, length), laid end to end: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
