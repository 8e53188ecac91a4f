"""How the vault's peers turn a user's events into the bytes of a value and back.

Every decoder returns the newest LATEST events, oldest first, as one contiguous numpy array for each of the 8 columns,
time as int64: what a History holds.
"""

import json
import threading
from operator import itemgetter
from typing import Any

import numpy as np
import zstandard
from numba import njit
from numcodecs import blosc

from experiments.bench.vault_data import LATEST, RAW, RAW_BYTES, Columns

RECORD = np.dtype(list(RAW.items()))
_NAMES = tuple(RAW)
_WORDS = ("time", "category", "author", "content_code")
_local = threading.local()
_compressor = zstandard.ZstdCompressor(level=1)
# One thread a call, as in a server that answers many.
blosc.use_threads = False


def encode_json(columns: Columns) -> bytes:
    """A JSON array with an object for each event."""
    rows = zip(*(columns[name].tolist() for name in _NAMES), strict=True)
    return json.dumps([dict(zip(_NAMES, row, strict=True)) for row in rows], separators=(",", ":")).encode()


def decode_json(value: bytes) -> Columns:
    """Parses the newest records only: no record holds an object of its own."""
    records = value[2:-2].rsplit(b"},{", LATEST)[-LATEST:]
    found = json.loads(b"[{" + b"},{".join(records) + b"}]")
    columns = {name: np.fromiter(map(itemgetter(name), found), dtype, len(found)) for name, dtype in RAW.items()}
    columns["time"] = columns["time"].astype(np.int64)
    return columns


def encode_raw(columns: Columns) -> bytes:
    """Records of 28 bytes; the store compresses them."""
    records = np.empty(len(columns["time"]), RECORD)
    for name in _NAMES:
        records[name] = columns[name]
    return records.tobytes()


def decode_raw(value: Any) -> Columns:
    """Columns of the newest records, contiguous."""
    records = np.frombuffer(value, RECORD)[-LATEST:]
    found = {name: np.ascontiguousarray(records[name]) for name in _NAMES if name != "time"}
    found["time"] = records["time"].astype(np.int64)
    return found


def _deltas(time: np.ndarray) -> np.ndarray:
    return np.diff(time, prepend=np.zeros(1, time.dtype))


def encode_packed(columns: Columns) -> bytes:
    """Columns as words with times as differences, one blosc buffer: zstd level 1, bytes shuffled."""
    words = np.empty((7, len(columns["time"])), np.uint32)
    words[0] = _deltas(columns["time"])
    words[1] = columns["item"] & 0xFFFFFFFF
    words[2] = columns["item"] >> 32
    for word, name in enumerate(_WORDS[1:], 3):
        words[word] = columns[name]
    words[6] = columns["dwell"] | columns["action"].astype(np.uint32) << 16 | columns["scene"].astype(np.uint32) << 24
    return blosc.compress(words, b"zstd", 1, blosc.SHUFFLE, 0)


def decode_packed(value: Any) -> Columns:
    """By numcodecs and numpy."""
    words = np.frombuffer(blosc.decompress(value), np.uint32).reshape(7, -1)
    first = max(0, words.shape[1] - LATEST)
    halves = np.empty((words.shape[1] - first, 2), np.uint32)
    halves[:, 0] = words[1, first:]
    halves[:, 1] = words[2, first:]
    small = words[6, first:]
    small_bytes = small.view(np.uint8).reshape(-1, 4)
    return {
        "time": np.cumsum(words[0], dtype=np.int64)[first:],
        "item": halves.reshape(-1).view(np.int64),
        "category": words[3, first:].view(np.int32),
        "author": words[4, first:].view(np.int32),
        "content_code": words[5, first:].view(np.int32),
        "dwell": small.astype(np.uint16),
        "action": small_bytes[:, 2].copy(),
        "scene": small_bytes[:, 3].copy(),
    }


def encode_planes(columns: Columns) -> bytes:
    """Byte planes of all columns with times as differences, zstd level 1: for the decode that the vault has."""
    rows = len(columns["time"])
    planes = np.empty((RAW_BYTES, rows), np.uint8)
    first = 0
    for name, dtype in RAW.items():
        values = _deltas(columns["time"]) if name == "time" else np.ascontiguousarray(columns[name])
        planes[first : first + dtype.itemsize] = values.view(np.uint8).reshape(rows, -1).T
        first += dtype.itemsize
    return _compressor.compress(planes.tobytes())


def planes_of(value: Any) -> np.ndarray:
    """Byte planes uint8 [28, N] of a value, by this thread's one decompressor."""
    try:
        decompress = _local.decompress
    except AttributeError:
        decompress = _local.decompress = zstandard.ZstdDecompressor().decompress
    return np.frombuffer(decompress(value), np.uint8).reshape(RAW_BYTES, -1)


def empty_columns(rows: int) -> Columns:
    """Room for `rows` events, in the order that `unpack` wants."""
    return {name: np.empty(rows, np.int64 if name == "time" else dtype) for name, dtype in RAW.items()}


def decode_planes(value: Any) -> Columns:
    """By one reused zstd context and one compiled loop."""
    planes = planes_of(value)
    rows = planes.shape[1]
    start = max(0, rows - LATEST)
    found = empty_columns(rows - start)
    unpack(planes, start, rows, 0, *found.values())
    return found


@njit(nogil=True, cache=True)
def _word(planes, first, slot):
    low = np.uint32(planes[first, slot]) | np.uint32(planes[first + 1, slot]) << np.uint32(8)
    high = np.uint32(planes[first + 2, slot]) | np.uint32(planes[first + 3, slot]) << np.uint32(8)
    return low | high << np.uint32(16)


@njit(nogil=True, cache=True)
def unpack(planes, start, stop, row, time, item, category, author, content_code, dwell, action, scene):
    """Events start..stop-1 of uint8 [28, N] into rows `row` and on of the columns."""
    at = row - start
    total = np.int64(0)
    for slot in range(start):
        total += np.int64(_word(planes, 0, slot))
    for slot in range(start, stop):
        total += np.int64(_word(planes, 0, slot))
        time[at + slot] = total
    for slot in range(start, stop):
        item[at + slot] = np.int64(
            np.uint64(_word(planes, 4, slot)) | np.uint64(_word(planes, 8, slot)) << np.uint64(32)
        )
    for slot in range(start, stop):
        category[at + slot] = np.int32(_word(planes, 12, slot))
    for slot in range(start, stop):
        author[at + slot] = np.int32(_word(planes, 16, slot))
    for slot in range(start, stop):
        content_code[at + slot] = np.int32(_word(planes, 20, slot))
    for slot in range(start, stop):
        dwell[at + slot] = np.uint16(planes[24, slot]) | np.uint16(planes[25, slot]) << np.uint16(8)
    for slot in range(start, stop):
        action[at + slot] = planes[26, slot]
    for slot in range(start, stop):
        scene[at + slot] = planes[27, slot]


@njit(nogil=True, cache=True)
def count_before(planes, bound):
    """How many events of uint8 [28, N] lie before a time."""
    total = np.int64(0)
    for slot in range(planes.shape[1]):
        total += np.int64(_word(planes, 0, slot))
        if total >= bound:
            return slot
    return planes.shape[1]
