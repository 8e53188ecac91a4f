"""Files of a vault: checksums, small zarr arrays, and getting things durably onto the disk."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np

from laser_jax.vault import format as vault_format
from laser_jax.vault.decode import decode_pages
from laser_jax.vault.errors import CorruptionError, LockedError, MissingError, UnavailableError
from laser_jax.vault.format import CHECKSUM
from laser_jax.vault.storage import KvStorage, LocalStorage, must_read

#: How long a killed writer's worker may hold the lock.
_ORPHAN_SECONDS = 10.0
#: How the name of an array's one chunk ends; and the CRC-32C of anything that is followed by its own CRC-32C.
_CHUNK = "c/0"
_OF_CHUNKS = 0x48674BC7


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of some bytes, as zarr's crc32c codec computes it."""
    return google_crc32c.value(bytes(data))


def checksum_of(name: str, data: bytes) -> int:
    """What the manifest records of a small file.

    The one chunk of an array ends in the checksum of what is before it, and is recorded by that: a checksum of all of
    it would be the same number for every chunk.
    """
    return crc32c(data[:-CHECKSUM] if name.endswith(_CHUNK) else data)


def is_recorded(name: str, data: bytes, recorded: list[int]) -> bool:
    """Whether a small file is what the manifest recorded, [size, checksum]."""
    size, checksum = recorded
    if len(data) != size:
        return False
    if not name.endswith(_CHUNK):
        return crc32c(data) == checksum
    # Before version 3 it recorded the number that all chunks share.
    return crc32c(data) == _OF_CHUNKS and checksum in (_OF_CHUNKS, int.from_bytes(data[-CHECKSUM:], "little"))


def dump(value: Any) -> bytes:
    """JSON in the one spelling that this package writes."""
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def write_file(path: str, data: bytes) -> None:
    """Creates a file with its directories; it is durable after `sync_tree`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def write_array(path: str, array: np.ndarray) -> None:
    """Writes a 1-d array, at least one value long, as a zarr v3 array of one chunk."""
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    write_file(os.path.join(path, "zarr.json"), dump(vault_format.plain_metadata(array)))
    write_file(os.path.join(path, "c", "0"), data + crc32c(data).to_bytes(CHECKSUM, "little"))


def write_strings(path: str, prefix: str, values: list[str]) -> None:
    """Writes strings as arrays `bytes` (UTF-8, never empty, as zarr wants it) and `offsets` [values + 1]."""
    encoded = [value.encode() for value in values]
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in encoded], out=offsets[1:])
    joined = b"".join(encoded) or b"\0"
    write_array(os.path.join(path, prefix + "bytes"), np.frombuffer(joined, np.uint8))
    write_array(os.path.join(path, prefix + "offsets"), offsets)


def inventory(path: str, shards: list[str]) -> dict[str, list[int]]:
    """Sizes of the files below `path`, and checksums of all but the shards: these have one for every page."""
    found: dict[str, list[int]] = {}
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            whole = os.path.join(folder, name)
            relative = os.path.relpath(whole, path)
            if relative in shards:
                found[relative] = [os.path.getsize(whole)]
                continue
            with open(whole, "rb") as file:
                data = file.read()
            found[relative] = [len(data), checksum_of(relative, data)]
    return found


class Folder:
    """A part or a dictionary piece, read by the manifest's inventory: returns what was written, or fails."""

    def __init__(self, storage: LocalStorage | KvStorage, name: str, files: dict[str, list[int]]):
        self.storage = storage
        self.name = name
        self.files = files

    @property
    def path(self) -> str:
        """Its path or URL."""
        return self.storage.path(self.name)

    def read(self, name: str) -> bytes:
        """The bytes of a small file; CorruptionError unless size and checksum are as in the manifest."""
        path = f"{self.path}/{name}"
        if name not in self.files:
            raise CorruptionError(f"{path}: the manifest lists no such file")
        data = must_read(self.storage, f"{self.name}/{name}")
        if not is_recorded(name, data, self.files[name]):
            size = self.files[name][0]
            raise CorruptionError(f"{path}: {len(data)} bytes do not match the {size} bytes and crc32c in the manifest")
        return data

    def array(self, name: str, dtype: Any, length: int | None = None) -> np.ndarray:
        """A 1-d array of one chunk; `length` is checked if given."""
        # Other zarr readers go by it too: damage there is damage.
        metadata = json.loads(self.read(f"{name}/zarr.json"))
        data = self.read(f"{name}/c/0")
        dtype = np.dtype(dtype)
        if any(codec["name"] == "blosc" for codec in metadata["codecs"]):
            whole = np.zeros(1, np.int64), np.array([len(data)])
            array = decode_pages(np.frombuffer(data, np.uint8), *whole, metadata["shape"][0] * dtype.itemsize)[0].view(
                dtype
            )
        else:
            array = np.frombuffer(data[:-CHECKSUM], dtype)
        if length is not None and len(array) != length:
            raise CorruptionError(f"{self.path}/{name}: {len(array)} values instead of {length}")
        return array

    def check_size(self, name: str) -> int:
        """Size of a shard file; CorruptionError if it is missing or of another size than written."""
        path = f"{self.path}/{name}"
        if name not in self.files:
            raise CorruptionError(f"{path}: the manifest lists no such shard")
        wanted = self.files[name][0]
        if not self.storage.local:
            return wanted
        size = self.storage.size(f"{self.name}/{name}")
        if size is None:
            raise MissingError(f"{path} is missing")
        if size != wanted:
            raise CorruptionError(f"{path}: {size} bytes instead of {wanted}")
        return size


def sync_path(path: str) -> None:
    """Flushes one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: str) -> None:
    """Flushes every file and directory below `path`, and `path` itself, to the disk."""
    files, folders = [], []
    for folder, _, names in os.walk(path, topdown=False):
        files.extend(os.path.join(folder, name) for name in names)
        folders.append(folder)
    # Together: a disk commits many waiting flushes at once.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(sync_path, files))
        list(pool.map(sync_path, folders))


def try_flock(descriptor: int, exclusive: bool) -> bool:
    """Takes a shared or exclusive lock of an open file, if nobody's is in the way."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def writer_lock(path: str) -> Iterator[int]:
    """Holds the lock of the vault at `path`, or LockedError; gives its descriptor. A dead writer's lock is free."""
    name = os.path.join(path, vault_format.LOCK)
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be written: {error}") from error
    try:
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while not try_flock(descriptor, exclusive=True):
            holder = os.pread(descriptor, 20, 0)
            if _is_alive(holder) or time.monotonic() > deadline:
                raise LockedError(
                    f"{path} is being written by another writer (process {holder.decode() or 'unknown'} holds {name}): "
                    "close that one first"
                )
            time.sleep(0.02)  # the writer was killed, and its worker is about to notice
        if not os.path.exists(name) or not os.path.samestat(os.fstat(descriptor), os.stat(name)):
            raise LockedError(f"{path} was removed by another writer at this moment: try again")
        with contextlib.suppress(OSError):  # a full disk must not keep anybody from making room
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _is_alive(process: bytes) -> bool:
    if not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
