"""The stores that the vault is measured against: how each keeps the values of users, writes them and looks them up."""

import dataclasses
import mmap
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lmdb
import numpy as np
from rocksdict import AccessType, BlockBasedOptions, Cache, DBCompressionType, Options, Rdict, WriteOptions

from experiments.bench import vault_codecs as codecs
from experiments.bench.vault_data import LATEST, RAW, Columns

#: RocksDB's block cache where no store has a cache of its own: RocksDB cannot do without one.
SMALL_CACHE = 8 << 20


@dataclasses.dataclass(frozen=True)
class Layout:
    """What lies in one folder.

    Attributes:
      engine: "rocksdb" or "lmdb".
      encode: from a user's events to a value.
      compression: of RocksDB's blocks.
      pieces: from a number of events to the ends of the values that a user has.
    """

    engine: str
    encode: Callable[[Columns], bytes]
    compression: str = "none"
    pieces: Callable[[int], list[int]] = lambda count: [count]


def halves(count: int) -> list[int]:
    """Two values a user."""
    return [count // 2, count]


LAYOUTS = {
    "rocksdb_json_zstd": Layout("rocksdb", codecs.encode_json, "zstd"),
    "rocksdb_json_lz4": Layout("rocksdb", codecs.encode_json, "lz4"),
    "rocksdb_packed": Layout("rocksdb", codecs.encode_packed),
    "rocksdb_planes": Layout("rocksdb", codecs.encode_planes),
    "rocksdb_raw": Layout("rocksdb", codecs.encode_raw, "zstd"),
    "rocksdb_two": Layout("rocksdb", codecs.encode_planes, "none", halves),
    "lmdb_packed": Layout("lmdb", codecs.encode_packed),
    "lmdb_planes": Layout("lmdb", codecs.encode_planes),
}


def key_of(user: int, piece: int = 0) -> bytes:
    """Key of one of a user's values: in order of user and piece."""
    return user.to_bytes(8, "big") + piece.to_bytes(2, "big")


def rocksdb_options(compression: str, cache_bytes: int) -> Options:
    """Keys and values as plain bytes, checksums verified, data blocks of one value (or several small ones)."""
    options = Options(raw_mode=True)
    table = BlockBasedOptions()
    table.set_block_cache(Cache(cache_bytes))
    options.set_block_based_table_factory(table)
    options.set_compression_type(getattr(DBCompressionType, compression)())
    return options


class RocksDBWriter:
    """Bulk load, compacted at the end so that every value lies in one sorted file of the last level."""

    def __init__(self, path: str, layout: Layout):
        options = rocksdb_options(layout.compression, SMALL_CACHE)
        options.create_if_missing(True)
        options.prepare_for_bulk_load()
        options.set_max_background_jobs(os.cpu_count())
        self._layout = layout
        self._db = Rdict(path, options)
        without_log = WriteOptions()
        without_log.disable_wal = True
        self._db.set_write_options(without_log)

    def add(self, user: int, columns: Columns) -> None:
        """All events of a user."""
        begin = 0
        for piece, end in enumerate(self._layout.pieces(len(columns["time"]))):
            value = {name: column[begin:end] for name, column in columns.items()}
            self._db[key_of(user, piece)] = self._layout.encode(value)
            begin = end

    def close(self) -> None:
        """Makes it durable and tidy."""
        self._db.flush()
        self._db.compact_range(None, None)
        self._db.close()


class LmdbWriter:
    """One transaction for some thousand users; a compacted copy at the end, without pages that came free meanwhile."""

    def __init__(self, path: str, layout: Layout):
        self._path = path
        self._encode = layout.encode
        shutil.rmtree(path + ".draft", ignore_errors=True)
        self._env = lmdb.open(path + ".draft", map_size=1 << 40)
        self._waiting: list[tuple[bytes, bytes]] = []

    def add(self, user: int, columns: Columns) -> None:
        """All events of a user."""
        self._waiting.append((key_of(user), self._encode(columns)))
        if len(self._waiting) == 5000:
            self._write()

    def close(self) -> None:
        """Writes what waits, and the copy."""
        self._write()
        os.makedirs(self._path)
        self._env.copy(self._path, compact=True)
        self._env.close()
        shutil.rmtree(self._path + ".draft")

    def _write(self) -> None:
        with self._env.begin(write=True) as transaction:
            for key, value in sorted(self._waiting):
                transaction.put(key, value)
        self._waiting = []


class MemmapWriter:
    """A file for each column, users one after the other."""

    def __init__(self, path: str):
        os.makedirs(path, exist_ok=True)
        self._path = path
        self._files = {name: open(os.path.join(path, name), "wb") for name in RAW}
        self._rows: list[tuple[int, int, int]] = []
        self._end = 0

    def add(self, user: int, columns: Columns) -> None:
        """All events of a user."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(columns[name]))
        self._rows.append((user, self._end, self._end + len(columns["time"])))
        self._end = self._rows[-1][-1]

    def close(self) -> None:
        """Writes where each user lies."""
        for file in self._files.values():
            file.close()
        np.save(os.path.join(self._path, "rows.npy"), np.array(self._rows, np.int64))


class RocksDBStore:
    """One get a lookup."""

    def __init__(self, path: str, decode: Callable[[Any], Columns], cache_bytes: int = SMALL_CACHE):
        self.path = path
        # The compression is written in the files.
        self._db = Rdict(path, rocksdb_options("none", cache_bytes), access_type=AccessType.read_only())
        self._read = self._db.get
        self._decode = decode
        self.close = self._db.close

    def get(self, user: int) -> Columns:
        """The newest events of a user."""
        return self._decode(self._read(key_of(user)))

    def read(self, keys: list[bytes]) -> list[bytes]:
        """Several values at once, by RocksDB's MultiGet."""
        return self._read(keys)

    def unmap(self) -> None:
        """Nothing is mapped."""


class LmdbStore:
    """One read transaction; values are decoded where they lie."""

    def __init__(self, path: str, decode: Callable[[Any], Columns]):
        self.path = path
        self._decode = decode
        self._open()

    def _open(self) -> None:
        # Read-ahead would bring megabytes for every value, where the kernel is set so.
        self._env = lmdb.open(self.path, readonly=True, lock=False, readahead=False)
        self._transaction = self._env.begin(buffers=True)

    def get(self, user: int) -> Columns:
        """The newest events of a user."""
        return self._decode(self._transaction.get(key_of(user)))

    def unmap(self) -> None:
        """Opens it anew: the kernel keeps pages that are mapped."""
        self.close()
        self._open()

    def close(self) -> None:
        """Ends the transaction and unmaps the file."""
        self._transaction.abort()
        self._env.close()


class MemmapStore:
    """Slices of uncompressed columns: what no store can beat by much."""

    def __init__(self, path: str):
        self.path = path
        rows = np.load(os.path.join(path, "rows.npy"))
        self._rows = {user: (max(start, end - LATEST), end) for user, start, end in rows.tolist()}
        self._columns = {name: np.memmap(os.path.join(path, name), dtype, "r") for name, dtype in RAW.items()}
        self._plain = {name: column.view(np.ndarray) for name, column in self._columns.items() if name != "time"}
        self._time = self._columns["time"].view(np.ndarray)
        for column in self._columns.values():
            column._mmap.madvise(mmap.MADV_RANDOM)

    def get(self, user: int) -> Columns:
        """The newest events of a user."""
        start, end = self._rows[user]
        found = {name: column[start:end].copy() for name, column in self._plain.items()}
        found["time"] = self._time[start:end].astype(np.int64)
        return found

    def unmap(self) -> None:
        """Drops the pages that this process has mapped."""
        for column in self._columns.values():
            column._mmap.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """The mappings go with the arrays."""


class Cached:
    """A store behind decoded histories in memory, the least lately used of which go first."""

    def __init__(self, store: Any, cache_bytes: int):
        self._get = store.get
        self._free = cache_bytes
        self._held: OrderedDict[int, Columns] = OrderedDict()

    def get(self, user: int) -> Columns:
        """The newest events of a user; shared, not to be written into."""
        found = self._held.get(user)
        if found is not None:
            self._held.move_to_end(user)
            return found
        found = self._held[user] = self._get(user)
        self._free -= _bytes_of(found)
        while self._free < 0:
            self._free += _bytes_of(self._held.popitem(last=False)[1])
        return found


def _bytes_of(columns: Columns) -> int:
    # And the dict, key and array objects, as Python counts them.
    return sum(column.nbytes for column in columns.values()) + 1300
