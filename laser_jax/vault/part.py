"""One part, opened: its directory arrays, checked against the manifest and each other."""

import copy
import json
import re
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault.errors import CorruptionError
from laser_jax.vault.files import Folder, crc32c
from laser_jax.vault.format import CHECKSUM, INDEX_ENTRY, PARTS, PageLayout
from laser_jax.vault.storage import KvStorage, LocalStorage


class Part:
    """What is known of a part without reading a page.

    Attributes:
      name: of the part's directory. number: by which parts are ordered, part of the name.
      entry: of the manifest.
      layout: of its pages; layout.schema is the schema it was written with.
      num_pages: P. num_users: U.
      shard_pages: pages in a shard file of each sharded array, by its path inside the part.
      page_count, first_time, last_time, last_sequence: of each page.
      offset, length: uint32 [P], where a page's bytes lie in its shard file (local storage only).
    """

    def __init__(self, storage: LocalStorage | KvStorage, entry: dict[str, Any], schemas: list[Schema]):
        self.name: str = entry["name"]
        self.number = part_number(self.name)
        self.entry = entry
        self.layout = PageLayout(schemas[entry["schema"]], entry["sequence"])
        self.schema = self.layout.schema
        self.num_pages: int = entry["pages"]
        self.num_users: int = entry["users"]
        self.folder = Folder(storage, f"{PARTS}/{self.name}", entry["files"])
        folder = self.folder
        folder.read("zarr.json")
        arrays = ["pages", *(vault_format.vector_path(field.name) for field in self.schema.vectors)]
        self.shard_pages = {
            name: vault_format.shard_pages(json.loads(folder.read(f"{name}/zarr.json"))) for name in arrays
        }
        if self.schema.vectors:
            folder.read("vectors/zarr.json")
        self._users: PartUsers | None = None
        users = self.users
        self.page_count = folder.array("page_count", np.uint16, self.num_pages)
        self.first_time = folder.array("page_first_time", np.int64, self.num_pages)
        self.last_time = folder.array("page_last_time", np.int64, self.num_pages)
        if entry["sequence"]:
            self.last_sequence = folder.array("page_last_sequence", np.int64, self.num_pages)
        else:
            self.last_sequence = np.cumsum(self.page_count, dtype=np.int64) + (entry["first_sequence"] - 1)
        if users.first_page[-1] != self.num_pages or int(self.page_count.sum()) != entry["events"]:
            raise CorruptionError(f"part {folder.path}: its directory does not add up to its manifest entry")
        for name in folder.files:
            if len(folder.files[name]) == 1:
                folder.check_size(name)
        if storage.local:
            self.offset, self.length = self.locations("pages")
        else:
            self.offset = self.length = np.zeros(self.num_pages, np.uint32)

    def reopened(self) -> "Part":
        """The same part, to be put into another page table."""
        return copy.copy(self)

    def shards(self, array: str) -> list[str]:
        """Paths of the shard files of an array inside the part, in order."""
        return [vault_format.shard_path(array, shard) for shard in range(-(-self.num_pages // self.shard_pages[array]))]

    def locations(self, array: str) -> tuple[np.ndarray, np.ndarray]:
        """Offset in its shard file and length of every page's bytes, uint32 [P] each (uint64 for vectors)."""
        size = self.shard_pages[array]
        found = [
            self._shard_index(name, size, min(size, self.num_pages - number * size))
            for number, name in enumerate(self.shards(array))
        ]
        pairs = np.concatenate(found)
        dtype = np.uint32 if array == "pages" else np.uint64
        return pairs[:, 0].astype(dtype), pairs[:, 1].astype(dtype)

    @property
    def users(self) -> "PartUsers":
        """The users of the part; read from its files unless they are at hand."""
        found = self._users
        if found is None:
            found = self._users = PartUsers(self)
        return found

    def release_users(self) -> None:
        """Lets go of what `users` keeps: the index has it."""
        self._users = None

    def user_of_page(self, page: int) -> Any:
        """Key of the user whose events a page of the part holds."""
        users = self.users
        return users.key(int(np.searchsorted(users.first_page, page, side="right")) - 1)

    def _shard_index(self, name: str, pages: int, used: int) -> np.ndarray:
        """(offset, length) of the `used` pages of one shard with room for `pages`, uint64 [used, 2], checked."""
        path = f"{self.folder.path}/{name}"
        size = self.folder.check_size(name)
        index_size = pages * INDEX_ENTRY
        data_size = size - index_size - CHECKSUM
        data = self.folder.storage.tail_of(f"{self.folder.name}/{name}", size, index_size + CHECKSUM)
        if data_size < 0 or crc32c(data[:-CHECKSUM]) != int.from_bytes(data[-CHECKSUM:], "little"):
            raise CorruptionError(f"{path}: the checksum of its shard index does not match")
        pairs = np.frombuffer(data[:-CHECKSUM], "<u8").reshape(-1, 2)[:used]
        outside = (pairs > data_size).any() or (pairs.sum(axis=1) > data_size).any()  # a missing page is 2^64 - 1
        if outside or (pairs[:, 1] <= CHECKSUM).any():
            raise CorruptionError(f"{path}: its shard index misses pages or points outside the file")
        if (pairs[1:, 0] != pairs[:-1].sum(axis=1)).any():
            # A run of pages is read in one go.
            raise CorruptionError(f"{path}: its pages do not lie one after the other, as this package writes them")
        return pairs


class PartUsers:
    """Who has pages in a part.

    Attributes:
      keys: int64 [U]; of string users the hashes.
      texts: of string users the UTF-8 bytes of all keys, and offsets int64 [U + 1] into them; else None.
      first_page: int64 [U + 1], pages of user u are first_page[u] to first_page[u + 1].
      covers: int32 [U], see laser_jax.vault.format.
    """

    def __init__(self, part: Part):
        folder, size = part.folder, part.num_users
        self.texts: tuple[np.ndarray, np.ndarray] | None = None
        if part.schema.user == "int64":
            self.keys = folder.array("users", np.int64, size)
        else:
            self.keys = folder.array("user_hashes", np.uint64, size).view(np.int64)
            self.texts = (folder.array("user_bytes", np.uint8), folder.array("user_offsets", np.int64, size + 1))
        self.first_page = folder.array("user_first_page", np.int64, size + 1)
        if part.entry["covers"]:
            self.covers = folder.array("user_covers", np.int32, size)
        else:
            self.covers = np.broadcast_to(np.int32(part.number), size)

    def key(self, position: int) -> Any:
        """Key of the user at a position of the part."""
        if self.texts is None:
            return int(self.keys[position])
        data, offsets = self.texts
        return data[offsets[position] : offsets[position + 1]].tobytes().decode()

    def all(self) -> list[Any]:
        """All keys."""
        if self.texts is None:
            return self.keys.tolist()
        data, ends = self.texts[0].tobytes(), self.texts[1].tolist()
        return [data[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]


def part_number(name: str) -> int:
    """The number in a part's name."""
    match = re.fullmatch(r"part-(\d+)-[0-9a-f]+", name)
    if match is None:
        raise CorruptionError(f"{name!r} is not the name of a part")
    return int(match[1])
