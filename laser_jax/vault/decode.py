"""Stored pages -> their bytes, by the C library of blosc2.

Its contexts keep what zstd needs between pages; libraries that set that up for every page take three times as long. It
is called from compiled loops, so that threads decode side by side.
"""

import ctypes
import importlib.util
import os
import sys
import threading
from typing import Any

import llvmlite.binding
import numpy as np
from numba import njit, types

from laser_jax.vault import kernels
from laser_jax.vault.crc import crc32c_of
from laser_jax.vault.format import CHECKSUM, PAGE, PageLayout


class DamagedPage(Exception):
    """A page's bytes are not what was written; says why. Callers name part, page and user."""

    def __init__(self, position: int, why: str):
        super().__init__(why)
        self.position = position


class _Parameters(ctypes.Structure):
    """blosc2_dparams of blosc2.h."""

    _fields_ = [
        ("nthreads", ctypes.c_int16),
        ("schunk", ctypes.c_void_p),
        ("postfilter", ctypes.c_void_p),
        ("postparams", ctypes.c_void_p),
        ("typesize", ctypes.c_int32),
    ]


def _load() -> ctypes.CDLL:
    """The library that the package ships, also made known to the compiler of the loops."""
    # The package itself is not imported: it brings much that is not needed here.
    found = importlib.util.find_spec("blosc2")
    if found is None or found.origin is None:
        raise ImportError("laser_jax.vault needs the package blosc2: pip install blosc2")
    name = {"darwin": "libblosc2.dylib", "win32": "libblosc2.dll"}.get(sys.platform, "libblosc2.so")
    path = os.path.join(os.path.dirname(found.origin), "lib", name)
    llvmlite.binding.load_library_permanently(path)
    library = ctypes.CDLL(path)
    library.blosc2_init()
    library.blosc2_create_dctx.argtypes = [_Parameters]
    library.blosc2_create_dctx.restype = ctypes.c_void_p
    library.blosc2_free_ctx.argtypes = [ctypes.c_void_p]
    library.blosc2_free_ctx.restype = None
    return library


_library = _load()
_decompress = types.ExternalFunction(
    "blosc2_decompress_ctx", types.int32(types.uintp, types.uintp, types.int32, types.uintp, types.int32)
)
_pread = types.ExternalFunction("pread", types.intp(types.int32, types.uintp, types.uintp, types.int64))
#: How far a run came.
_UNREAD, _DAMAGED, _UNCOMPRESSED, _UNPACKED = range(4)


class _Context:
    """A decompression context; one thread's at a time."""

    def __init__(self) -> None:
        self.address: int = _library.blosc2_create_dctx(_Parameters(nthreads=1))

    def __del__(self, free=_library.blosc2_free_ctx) -> None:
        # A default: the module's names may be gone when the interpreter ends.
        free(self.address)


_local = threading.local()


@njit(nogil=True, cache=True)
def _decode(context, data, at, length, out):
    """Checks and decompresses pages into the rows of `out`, uint8 [P, bytes].

    Returns:
      The first page that fails or -1, and whether its checksum was right.
    """
    size = out.shape[1]
    for page in range(len(at)):
        begin, end = at[page], at[page] + length[page] - CHECKSUM
        if end + CHECKSUM > len(data) or end <= begin:
            return page, False
        stored = np.uint32(data[end]) | np.uint32(data[end + 1]) << np.uint32(8)
        stored |= np.uint32(data[end + 2]) << np.uint32(16) | np.uint32(data[end + 3]) << np.uint32(24)
        if crc32c_of(data, begin, end) != stored:
            return page, False
        target = out.ctypes.data + page * size
        if _decompress(context, data.ctypes.data + begin, end - begin, target, size) != size:
            return page, True
    return -1, True


@njit(nogil=True, cache=True)
def _read_run(
    context,
    descriptor,
    offset,
    length,
    count,
    first_time,
    last_time,
    low,
    high,
    words,
    wide,
    before,
    n,
    plan,
    out,
    prefix,
):
    """Reads the adjacent pages low..high-1 of a page table from a file and unpacks their newest n events.

    Returns:
      How far it came (_UNREAD, _DAMAGED, _UNCOMPRESSED or _UNPACKED); the first page that fails, counted from low, or
      -1; the first slot taken, the number of events.
    """
    start = np.int64(offset[low])
    size = np.int64(offset[high - 1]) + np.int64(length[high - 1]) - start
    data = np.empty(size, np.uint8)
    if _pread(descriptor, data.ctypes.data, size, start) != size:
        return _UNREAD, 0, 0, 0
    pages = np.empty((high - low, words, PAGE), np.uint32)
    at = np.empty(high - low, np.int64)
    for page in range(high - low):
        at[page] = np.int64(offset[low + page]) - start
    planes = pages.view(np.uint8).reshape(high - low, words * PAGE * 4)
    bad, checked = _decode(context, data, at, length[low:high], planes)
    if bad >= 0:
        return _UNCOMPRESSED if checked else _DAMAGED, bad, 0, 0
    bad, slot, rows = kernels.unpack_run(
        pages, wide, count[low:high], first_time[low:high], last_time[low:high], before, n, plan, out, prefix
    )
    return _UNPACKED, bad, slot, rows


def read_run(
    descriptor: int,
    table: Any,
    low: int,
    high: int,
    layout: PageLayout,
    before: int,
    n: int,
    plan: np.ndarray,
    out: np.ndarray,
    prefix: np.ndarray,
) -> tuple[int, int, int] | None:
    """Reads, checks, decodes and unpacks the pages of one run, without Python's lock.

    Args:
      descriptor: of the shard file.
      table: a PageTable; low, high: the run's first page in it, and one past the last.
      layout: of the pages.
      before, n, plan, out, prefix: as for kernels.unpack_run.

    Returns:
      What kernels.unpack_run returns; None if the file does not give the bytes: somebody else may say why.

    Raises:
      DamagedPage: one is not what was written.
    """
    came, bad, start, rows = _read_run(
        _context(),
        descriptor,
        table.offset,
        table.length,
        table.count,
        table.first_time,
        table.last_time,
        low,
        high,
        layout.num_words,
        layout.time_words == 2,
        before,
        n,
        plan,
        out,
        prefix,
    )
    if came == _UNPACKED:
        return bad, start, rows
    if came == _UNREAD:
        return None
    raise _damaged(bad, came == _UNCOMPRESSED)


@njit(nogil=True, cache=True)
def read_runs(descriptor, start, size, target, data, first):
    """Reads runs of bytes from files, without Python's lock, from run `first` on.

    Args:
      descriptor: int32 [R], of the file of each run.
      start, size: int64 [R], where it lies there.
      target: int64 [R], where it goes in `data`, uint8.

    Returns:
      The first run that the file does not give, or R.
    """
    for run in range(first, len(start)):
        if _pread(descriptor[run], data.ctypes.data + target[run], size[run], start[run]) != size[run]:
            return run
    return len(start)


def decode_pages(data: np.ndarray, at: np.ndarray, length: np.ndarray, page_bytes: int) -> np.ndarray:
    """Checks and decodes pages.

    Args:
      data: uint8, holds them.
      at, length: int64 [P], where they lie, checksums included.
      page_bytes: of a decoded page.

    Returns:
      uint8 [P, page_bytes].

    Raises:
      DamagedPage: one is not what was written.
    """
    out = np.empty((len(at), page_bytes), np.uint8)
    bad, checked = _decode(_context(), data, at, length, out)
    if bad >= 0:
        raise _damaged(bad, checked)
    return out


def _context() -> int:
    """This thread's context."""
    try:
        return _local.context.address
    except AttributeError:  # the thread's first read
        _local.context = _Context()
        return _local.context.address


def _damaged(page: int, checked: bool) -> DamagedPage:
    return DamagedPage(page, "it cannot be decompressed" if checked else "its checksum does not match")
