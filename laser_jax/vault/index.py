"""The index in memory: user -> pages in every part, page -> offset, length, count, first and last time."""

import os
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import Folder, crc32c
from laser_jax.vault.format import CHECKSUM, INDEX_ENTRY, SHARD_PAGES, PageLayout
from laser_jax.vault.users import changes, merge_users


class Part:
    """One part: its directory arrays, checked against the manifest and each other.

    Attributes:
      name: of the part's directory.
      num_pages: P.
      page_base: number of this part's first page in the vault's page table.
    """

    def __init__(self, root: str, entry: dict[str, Any], schema: Schema, page_base: int):
        self.name: str = entry["name"]
        self.entry = entry
        self.num_pages: int = entry["pages"]
        self.page_base = page_base
        self.folder = Folder(os.path.join(root, vault_format.PARTS, self.name), entry["files"])
        num_users = entry["users"]
        self.folder.read("zarr.json")
        for name in ["pages", *(vault_format.vector_path(field.name) for field in schema.vectors)]:
            self.folder.read(f"{name}/zarr.json")
        if schema.vectors:
            self.folder.read("vectors/zarr.json")
        if schema.user == "int64":
            self.users: Any = self.folder.array("users", np.int64, num_users)
        else:
            offsets = self.folder.array("user_offsets", np.int64, num_users + 1)
            hashes = self.folder.array("user_hashes", np.uint64, num_users)
            self.users = (self.folder.array("user_bytes", np.uint8), offsets, hashes)
        self.user_first_page = self.folder.array("user_first_page", np.int64, num_users + 1)
        self.page_count = self.folder.array("page_count", np.uint16, self.num_pages)
        self.page_first_time = self.folder.array("page_first_time", np.int64, self.num_pages)
        self.page_last_time = self.folder.array("page_last_time", np.int64, self.num_pages)
        if self.user_first_page[-1] != self.num_pages or int(self.page_count.sum()) != entry["events"]:
            raise CorruptionError(f"part {self.folder.path}: its directory does not add up to its manifest entry")
        for name in self.folder.files:
            if len(self.folder.files[name]) == 1:
                self.folder.check_size(name)

    def shards(self, array: str) -> list[str]:
        """Paths of the shard files of an array inside the part, in order."""
        return [vault_format.shard_path(array, shard) for shard in range(-(-self.num_pages // SHARD_PAGES))]

    def locations(self, array: str) -> tuple[np.ndarray, np.ndarray]:
        """Offset in its shard file, int64 [P], and length, int32 [P], of every page's bytes."""
        found = [
            self._shard_index(name, min(SHARD_PAGES, self.num_pages - number * SHARD_PAGES))
            for number, name in enumerate(self.shards(array))
        ]
        pairs = np.concatenate(found)
        return pairs[:, 0].astype(np.int64), pairs[:, 1].astype(np.int32)

    def _shard_index(self, name: str, used: int) -> np.ndarray:
        """(offset, length) of the `used` pages of one shard, uint64 [used, 2], checked."""
        path = os.path.join(self.folder.path, name)
        index_size = vault_format.shard_pages(self.num_pages) * INDEX_ENTRY
        data_size = self.folder.check_size(name) - index_size - CHECKSUM
        try:
            with open(path, "rb") as file:
                file.seek(max(data_size, 0))
                data = file.read()
        except OSError as error:
            raise UnavailableError(f"{path} cannot be read: {error}") from error
        if data_size < 0 or crc32c(data[:-CHECKSUM]) != int.from_bytes(data[-CHECKSUM:], "little"):
            raise CorruptionError(f"{path}: the checksum of its shard index does not match")
        pairs = np.frombuffer(data[:-CHECKSUM], "<u8").reshape(-1, 2)[:used]
        outside = (pairs > data_size).any() or (pairs.sum(axis=1) > data_size).any()  # a missing page is 2^64 - 1
        if outside or (pairs[:, 1] <= CHECKSUM).any():
            raise CorruptionError(f"{path}: its shard index misses pages or points outside the file")
        return pairs


class VaultIndex:
    """All parts in one table.

    Attributes:
      parts: in the order of the manifest.
      users: slots of users.
      entry_start: int64 [U + 1], entries of slot s are entry_start[s] to entry_start[s + 1]; one entry for
        each part the user lives in, in order of parts.
      first_page, end_page: int64 [E], the entry's pages in the vault's page table.
      offset, length: where a page's bytes lie in its shard file.
      count, first_time, last_time: of a page's events.
      page_base: int64 [parts + 1], first page of each part.
    """

    def __init__(self, root: str, manifest: dict[str, Any], schema: Schema):
        self.parts: list[Part] = []
        base = 0
        for entry in manifest["parts"]:
            part = Part(root, entry, schema, base)
            self.parts.append(part)
            base += part.num_pages
        self.layout = PageLayout(schema)
        self.page_base = np.array([part.page_base for part in self.parts] + [base], np.int64)
        self.users, order, new = merge_users(schema, [part.users for part in self.parts])
        self.entry_start = np.append(np.flatnonzero(new), len(new))
        self.first_page = joined([part.user_first_page[:-1] + part.page_base for part in self.parts], np.int64)[order]
        self.end_page = joined([part.user_first_page[1:] + part.page_base for part in self.parts], np.int64)[order]
        self.count = joined([part.page_count for part in self.parts], np.uint16)
        self.first_time = joined([part.page_first_time for part in self.parts], np.int64)
        self.last_time = joined([part.page_last_time for part in self.parts], np.int64)
        locations = [part.locations("pages") for part in self.parts]
        self.offset = joined([offset for offset, _ in locations], np.int64)
        self.length = joined([length for _, length in locations], np.int32)
        for part in self.parts:
            del part.users  # now in the table

    def part_of(self, page: int) -> Part:
        """The part that holds a page of the vault's page table."""
        return self.parts[int(np.searchsorted(self.page_base, page, side="right")) - 1]

    def user_of_page(self, page: int) -> Any:
        """Key of the user whose events a page holds; slow, for error messages."""
        entry = int(np.flatnonzero((self.first_page <= page) & (page < self.end_page))[0])
        return self.users.key(int(np.searchsorted(self.entry_start, entry, side="right")) - 1)

    def events_of_users(self) -> np.ndarray:
        """Events of every user, int64 [U], by slot."""
        total = np.concatenate(([0], np.cumsum(self.count, dtype=np.int64)))
        entries = np.concatenate(([0], np.cumsum(total[self.end_page] - total[self.first_page])))
        return np.diff(entries[self.entry_start])

    @property
    def num_bytes(self) -> int:
        """Memory of the tables of users and pages."""
        arrays = (
            self.entry_start,
            self.first_page,
            self.end_page,
            self.count,
            self.first_time,
            self.last_time,
        )
        return self.users.num_bytes + sum(array.nbytes for array in (*arrays, self.offset, self.length))


def select_pages(
    index: VaultIndex, slots: np.ndarray, before: np.ndarray | None, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pages that provably hold each user's newest n events before a time.

    Args:
      index: of the vault.
      slots: int64 [B], -1 for an unknown user.
      before: int64 [B], or None for no bound.
      n: events wanted, >= 1.

    Returns:
      request int64 [R], first page and one past the last page int64 [R]: a run of adjacent pages for each
      part that matters, ordered by request and part.
    """
    known = np.flatnonzero(slots >= 0)
    starts = index.entry_start[slots[known]]
    counts = index.entry_start[slots[known] + 1] - starts
    request = np.repeat(known, counts)
    entry = spans(starts, counts)
    first, end = index.first_page[entry], index.end_page[entry]
    run = np.repeat(np.arange(len(entry)), end - first)
    page = spans(first, end - first)
    if before is not None:
        early = index.first_time[page] < before[request[run]]
        run, page = run[early], page[early]
    if not len(page):
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    owner = request[run]
    first_time = index.first_time[page]
    held = index.count[page].astype(np.int64)
    if before is not None:
        # Of a page that the bound cuts only its first event is sure to lie before it.
        held[index.last_time[page] >= before[owner]] = 1
    if (counts > 1).any():
        newest_first = np.lexsort((-first_time, owner))
    else:
        newest_first = np.lexsort((-page, owner))
    # The newest n are not older than the first time of the page with which n events are sure.
    sure = np.cumsum(held[newest_first])
    sorted_owner = owner[newest_first]
    begins = np.flatnonzero(changes(sorted_owner))
    earlier = sure - held[newest_first]
    earlier -= np.repeat(earlier[begins], np.diff(np.append(begins, len(earlier))))
    needed_times = np.where(earlier < n, first_time[newest_first], np.iinfo(np.int64).max)
    horizon = np.zeros(len(slots), np.int64)
    horizon[sorted_owner[begins]] = np.minimum.reduceat(needed_times, begins)
    wanted = index.last_time[page] >= horizon[owner]
    run, page = run[wanted], page[wanted]
    begins = np.flatnonzero(changes(run))
    ends = np.append(begins[1:], len(run))
    return request[run[begins]], page[begins], page[ends - 1] + 1


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... for each (start, length), laid end to end: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    """Arrays laid end to end; there may be none."""
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)
