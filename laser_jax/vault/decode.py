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
from laser_jax.vault.format import CHECKSUM, PAGE


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
def _decode_run(context, data, offset, length, words, wide, count, first_time, last_time, before, n, plan, out, prefix):
    """Decodes the pages of one run, which lie one after the other in `data`, and unpacks its newest n events.

    Returns:
      The first page that fails or -1; if so, whether its checksum was right, and whether it could be decompressed; the
      first slot taken, the number of events.
    """
    pages = np.empty((len(offset), words, PAGE), np.uint32)
    at = np.empty(len(offset), np.int64)
    for page in range(len(offset)):
        at[page] = np.int64(offset[page]) - np.int64(offset[0])
    bad, checked = _decode(context, data, at, length, pages.view(np.uint8).reshape(len(offset), words * PAGE * 4))
    if bad >= 0:
        return bad, checked, False, 0, 0
    bad, start, rows = kernels.unpack_run(pages, wide, count, first_time, last_time, before, n, plan, out, prefix)
    return bad, True, True, start, rows


def decode_run(data: bytes, offset: np.ndarray, length: np.ndarray, *run: Any) -> tuple[int, int, int]:
    """Checks, decodes and unpacks the pages of one run in one go.

    Args:
      data: the run's pages as they are stored, one after the other.
      offset, length: uint32 [P], where they lie in their file, checksums included.
      *run: words of a page, then the arguments of kernels.unpack_run but the pages.

    Returns:
      What kernels.unpack_run returns.

    Raises:
      DamagedPage: one is not what was written.
    """
    stored = np.frombuffer(data, np.uint8)
    bad, checked, decoded, start, rows = _decode_run(_context(), stored, offset, length, *run)
    if not decoded:
        raise _damaged(bad, checked)
    return bad, start, rows


def decode_pages(data: bytes | np.ndarray, at: np.ndarray, length: np.ndarray, page_bytes: int) -> np.ndarray:
    """Checks and decodes pages.

    Args:
      data: holds them.
      at, length: int64 [P], where they lie, checksums included.
      page_bytes: of a decoded page.

    Returns:
      uint8 [P, page_bytes].

    Raises:
      DamagedPage: one is not what was written.
    """
    stored = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    out = np.empty((len(at), page_bytes), np.uint8)
    bad, checked = _decode(_context(), stored, at, length, out)
    if bad >= 0:
        raise _damaged(bad, checked)
    return out


def _context() -> int:
    """This thread's context."""
    context = getattr(_local, "context", None)
    if context is None:
        context = _local.context = _Context()
    return context.address


def _damaged(page: int, checked: bool) -> DamagedPage:
    return DamagedPage(page, "it cannot be decompressed" if checked else "its checksum does not match")
