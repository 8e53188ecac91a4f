"""Makes damaged files of a part anew, byte for byte, from what is whole: for `repair`.

The metadata of every array follows from the schema and the manifest's entry. What the directory says of pages follows
from the pages, and where pages lie in a shard follows from their own headers. What is made is taken only if size and
checksum are those that the manifest recorded; nothing else about a part ever changes.
"""

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorstore as ts

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault.errors import CorruptionError
from laser_jax.vault.files import Folder, crc32c, dump, is_recorded, sync_path
from laser_jax.vault.format import CHECKSUM, DICTIONARIES, INDEX_ENTRY, MAX_SHARD_BYTES, PAGE, PARTS, PageLayout
from laser_jax.vault.hashing import hash_strings
from laser_jax.vault.storage import LocalStorage

#: Pages decoded at once.
_BLOCK_PAGES = 1024
#: Where blosc says, in the header of a page's bytes, how many they are.
_BLOSC_HEADER, _BLOSC_SIZE = 16, 12
_NO_PAGE = np.uint64(2**64 - 1)


def mend_part(storage: LocalStorage, entry: dict[str, Any], schemas: list[Schema]) -> list[str]:
    """Makes files of the part `entry` anew where that is possible; returns their names inside the part."""
    return _Mender(storage, entry, schemas).mend()


def mend_strings(storage: LocalStorage, piece: dict[str, Any]) -> list[str]:
    """Makes the metadata of a dictionary's piece anew where it is damaged; returns the names of the files."""
    folder = Folder(storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
    mended = []
    for name, dtype, length in (
        ("bytes", np.uint8, _plain_length(folder, "bytes")),
        ("offsets", np.int64, piece["values"] + 1),
    ):
        file = f"{name}/zarr.json"
        if _is_damaged(folder, file):
            _replace(folder, file, [dump(vault_format.plain_metadata(np.empty(length, dtype)))], mended)
    return mended


class _Mender:
    """One part at work."""

    def __init__(self, storage: LocalStorage, entry: dict[str, Any], schemas: list[Schema]):
        self._entry = entry
        self._layout = PageLayout(schemas[entry["schema"]], entry["sequence"])
        self._schema = self._layout.schema
        self._folder = Folder(storage, f"{PARTS}/{entry['name']}", entry["files"])
        pages, users = entry["pages"], entry["users"]
        #: Arrays of one chunk: type and length.
        self._arrays = {
            "page_count": (np.uint16, pages),
            "page_first_time": (np.int64, pages),
            "page_last_time": (np.int64, pages),
            "user_first_page": (np.int64, users + 1),
        }
        if entry["sequence"]:
            self._arrays["page_last_sequence"] = (np.int64, pages)
        if entry["covers"]:
            self._arrays["user_covers"] = (np.int32, users)
        if self._schema.user == "int64":
            self._arrays["users"] = (np.int64, users)
        else:
            self._arrays |= {
                "user_hashes": (np.uint64, users),
                "user_bytes": (np.uint8, _plain_length(self._folder, "user_bytes")),
                "user_offsets": (np.int64, users + 1),
            }

    def mend(self) -> list[str]:
        """The names of the files that were made anew."""
        mended: list[str] = []
        folder = self._folder
        for name in folder.files:
            if name.endswith("zarr.json") and _is_damaged(folder, name):
                _replace(folder, name, self._metadata(name.removesuffix("zarr.json").rstrip("/")), mended)
        for name, recorded in folder.files.items():
            if len(recorded) == 1:
                self._mend_shard(name, mended)
        lost = [name for name in self._arrays if _is_damaged(folder, f"{name}/c/0")]
        for name, values in self._derived(lost).items() if lost else ():
            _replace(folder, f"{name}/c/0", [_packed(values)["c/0"], _plain_chunk(values)], mended)
        return mended

    def _metadata(self, array: str) -> Iterator[bytes]:
        """What the zarr.json of an array, or group, may have held: one for each way in which it may have been made."""
        pages, words = self._entry["pages"], self._layout.num_words
        if array == "":
            for version in range(1, vault_format.VERSION + 1):
                yield dump(vault_format.group_metadata(self._layout.to_json() | {"version": version}))
        elif array == "vectors":
            yield dump(vault_format.group_metadata({}))
        elif array in self._arrays:
            dtype, length = self._arrays[array]
            blank = np.zeros(length, dtype)
            yield _packed(blank)["zarr.json"]
            yield dump(vault_format.plain_metadata(blank))
        elif array == "pages":
            for level, shard_bytes in itertools.product(range(10), (MAX_SHARD_BYTES, None)):
                metadata = vault_format.pages_metadata(pages, words, level, shard_bytes)
                yield _created(metadata).read("zarr.json").result().value
        elif array.startswith("vectors/"):
            field = self._schema.field(array.removeprefix("vectors/"))
            for level, shard_bytes in itertools.product(range(10), (MAX_SHARD_BYTES, None)):
                metadata = vault_format.vector_metadata(pages, field.size, field.dtype, level, shard_bytes)
                yield _created(metadata).read("zarr.json").result().value

    def _derived(self, lost: list[str]) -> dict[str, np.ndarray]:
        """Those of the lost arrays of the directory that follow from what is whole."""
        folder, entry = self._folder, self._entry
        known: dict[str, np.ndarray] = {}
        for name, (dtype, length) in self._arrays.items():
            if name not in lost:
                try:
                    known[name] = folder.array(name, dtype, length)
                except CorruptionError:  # its zarr.json is of a kind that cannot be made anew
                    continue
        of_pages = {"page_count", "page_first_time", "page_last_time", "page_last_sequence"}
        if of_pages & set(lost):
            try:
                known = self._from_pages(known.get("page_count")) | known
            except CorruptionError:  # a page is damaged, too
                return {}
        if "user_hashes" in lost and {"user_bytes", "user_offsets"} <= set(known):
            data, ends = known["user_bytes"].tobytes(), known["user_offsets"].tolist()
            users = [data[a:b].decode() for a, b in zip(ends[:-1], ends[1:], strict=True)]
            known["user_hashes"] = hash_strings(users).view(np.uint64)
        if "user_first_page" in lost and {"page_count", "page_first_time", "page_last_time"} <= set(known):
            first_page = _first_pages(known, entry["users"])
            if first_page is not None:
                known["user_first_page"] = first_page
        return {name: known[name] for name in lost if name in known}

    def _from_pages(self, count: np.ndarray | None) -> dict[str, np.ndarray]:
        """What the directory says of every page, from the pages; each is checked as it is decoded.

        Args:
          count: events of each page; None reads it off the first slot that is in use.
        """
        folder, layout = self._folder, self._layout
        for name in folder.files:
            if name.startswith("pages/c/"):
                folder.check_size(name)  # zarr reads a missing shard as zeros
        spec = {"driver": "zarr3", "kvstore": folder.storage.kvstore(f"{folder.name}/pages")}
        found: dict[str, list[np.ndarray]] = {}
        pages = self._entry["pages"]
        for first in range(0, pages, _BLOCK_PAGES):
            try:
                store = ts.open(spec, open=True, read=True).result()
                words = store[first : min(first + _BLOCK_PAGES, pages)].read().result()
            except (ValueError, NotImplementedError) as error:  # any failure of tensorstore
                raise CorruptionError(f"{folder.path}/pages cannot be read: {error}") from error
            if count is None:
                start = (words != 0).any(axis=1).argmax(axis=1)
            else:
                start = PAGE - count[first : first + _BLOCK_PAGES].astype(np.int64)
            times = _joined(words, 0, layout.time_words)
            block = {
                "page_count": (PAGE - start).astype(np.uint16),
                "page_first_time": np.take_along_axis(times, start[:, None], axis=1)[:, 0],
                "page_last_time": times.sum(axis=1),
            }
            if layout.sequence_word >= 0:
                block["page_last_sequence"] = _joined(words, layout.sequence_word, 2).cumsum(axis=1).max(axis=1)
            for name, values in block.items():
                found.setdefault(name, []).append(values)
        made = {name: np.concatenate(values) for name, values in found.items()}
        if int(made["page_count"].sum(dtype=np.int64)) != self._entry["events"]:
            # An event of nothing but zeros, in 1970, looks like a slot that is not in use.
            raise CorruptionError(f"{folder.path}/pages: nobody can tell how many events they hold")
        return made

    def _mend_shard(self, name: str, mended: list[str]) -> None:
        """Makes the index at the end of a shard file anew, if it is damaged and the pages before it say what it was."""
        folder = self._folder
        path = folder.storage.path(f"{folder.name}/{name}")
        array, shard = name.split("/c/")
        if _is_damaged(folder, f"{array}/zarr.json"):  # it could not be made anew
            return
        shard_pages = vault_format.shard_pages(json.loads(folder.read(f"{array}/zarr.json")))
        index_size = shard_pages * INDEX_ENTRY
        data_size = folder.files[name][0] - index_size - CHECKSUM
        if folder.storage.size(f"{folder.name}/{name}") != folder.files[name][0]:
            return
        with open(path, "rb") as file:
            file.seek(data_size)
            index = file.read()
            if crc32c(index[:-CHECKSUM]) == int.from_bytes(index[-CHECKSUM:], "little"):
                return
            used = min(shard_pages, self._entry["pages"] - int(shard.split("/")[0]) * shard_pages)
            pairs = np.full((index_size // INDEX_ENTRY, 2), _NO_PAGE, np.uint64)
            at = 0
            for page in range(used):
                file.seek(at)
                header = file.read(_BLOSC_HEADER)
                size = int.from_bytes(header[_BLOSC_SIZE:], "little") + CHECKSUM
                if at + size > data_size:
                    return
                pairs[page] = at, size
                at += size
            if at != data_size:
                return
            made = pairs.astype("<u8").tobytes()
            file.seek(0)
            replace_file(path, file.read(data_size) + made + crc32c(made).to_bytes(CHECKSUM, "little"))
        mended.append(name)


def _first_pages(known: dict[str, np.ndarray], users: int) -> np.ndarray | None:
    """First page of each user and the number of pages, int64 [users + 1]; None if pages do not say."""
    count, first_time, last_time = (known[name] for name in ("page_count", "page_first_time", "page_last_time"))
    # Only a user's oldest page is partly filled, and a user's times go up.
    begins = count < PAGE
    begins[:1] = True
    begins[1:] |= first_time[1:] < last_time[:-1]
    found = np.flatnonzero(begins) if begins.sum() == users else np.arange(len(count))
    return np.append(found, len(count)).astype(np.int64) if len(found) == users else None


def _joined(words: np.ndarray, word: int, count: int) -> np.ndarray:
    """One or two words of every event as int64 [pages, PAGE]."""
    low = words[:, word].astype(np.int64)
    return low if count == 1 else low | words[:, word + 1].astype(np.int64) << 32


def _plain_length(folder: Folder, name: str) -> int:
    """Bytes of an uncompressed array of bytes, by the size of its file."""
    return folder.files[f"{name}/c/0"][0] - CHECKSUM


def _created(metadata: dict[str, Any]) -> ts.KvStore:
    """Where tensorstore put an array of this metadata: a place in memory that nobody else sees."""
    return _array(metadata).kvstore


def _array(metadata: dict[str, Any]) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "memory", "path": "made/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    return ts.open(spec, create=True, context=ts.Context()).result()


def _packed(values: np.ndarray) -> dict[str, bytes]:
    """The files of an array as laser_jax.vault.part_writer writes it."""
    store = _array(vault_format.packed_metadata(values))
    store.write(values).result()
    return {name: store.kvstore.read(name).result().value for name in ("zarr.json", "c/0")}


def _plain_chunk(values: np.ndarray) -> bytes:
    """The chunk of an array that is not compressed, as vaults of version 1 have it."""
    data = values.tobytes()
    return data + crc32c(data).to_bytes(CHECKSUM, "little")


def _is_damaged(folder: Folder, name: str) -> bool:
    try:
        folder.read(name)
    except CorruptionError:
        return True
    return False


def _replace(folder: Folder, name: str, candidates: Any, mended: list[str]) -> None:
    """Puts the candidate that is what was recorded in the place of a damaged file."""
    for data in candidates:
        if is_recorded(name, data, folder.files[name]):
            replace_file(folder.storage.path(f"{folder.name}/{name}"), data)
            mended.append(name)
            return


def replace_file(path: str, data: bytes) -> None:
    """A whole file in the place of another, durably."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".draft", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".draft", path)
    sync_path(os.path.dirname(path))
