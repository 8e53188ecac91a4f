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

import google_crc32c
import llvmlite.binding
import numpy as np
from numba import njit, types

from laser_jax.vault import kernels
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
def _decode(context, data, offset, length, out):
    """Decompresses pages into the rows of `out`, uint8 [P, bytes]; the first that fails, or -1."""
    size = out.shape[1]
    for page in range(len(offset)):
        source = data.ctypes.data + offset[page]
        target = out.ctypes.data + page * size
        if _decompress(context, source, length[page], target, size) != size:
            return page
    return -1


@njit(nogil=True, cache=True)
def _decode_run(context, data, offset, length, words, wide, count, first_time, last_time, before, n, plan, out, base):
    """Decodes the pages of one run and unpacks its newest n events before a bound.

    Returns:
      The first page that fails or -1, whether it could be decompressed, the first slot taken, the number of events.
    """
    pages = np.empty((len(offset), words, PAGE), np.uint32)
    size = words * PAGE * 4
    for page in range(len(offset)):
        source = data.ctypes.data + offset[page]
        target = pages.ctypes.data + page * size
        if _decompress(context, source, length[page] - CHECKSUM, target, size) != size:
            return page, False, 0, 0
    bad, start, rows = kernels.unpack_run(pages, wide, count, first_time, last_time, before, n, plan, out, base)
    return bad, True, start, rows


def check_pages(data: bytes, offsets: list[int], lengths: list[int]) -> None:
    """Checks the checksum at the end of each page.

    Raises:
      DamagedPage: one does not match.
    """
    value = google_crc32c.value
    for position, (at, size) in enumerate(zip(offsets, lengths, strict=True)):
        end = at + size
        body = end - CHECKSUM
        if end > len(data) or value(data[at:body]) != int.from_bytes(data[body:end], "little"):
            raise DamagedPage(position, "its checksum does not match")


def decode_run(data: bytes, offsets: np.ndarray, lengths: np.ndarray, *run: Any) -> tuple[int, int, int]:
    """Decodes and unpacks the pages of one run, which were checked, in one go.

    Args:
      data, offsets, lengths: as for decode_pages.
      *run: words of a page, then the arguments of kernels.unpack_run but the pages.

    Returns:
      What kernels.unpack_run returns.

    Raises:
      DamagedPage: one cannot be decompressed.
    """
    bad, decoded, start, rows = _decode_run(_context(), np.frombuffer(data, np.uint8), offsets, lengths, *run)
    if not decoded:
        raise DamagedPage(bad, "it cannot be decompressed")
    return bad, start, rows


def _context() -> int:
    """This thread's context."""
    context = getattr(_local, "context", None)
    if context is None:
        context = _local.context = _Context()
    return context.address


def decode_pages(data: bytes, offsets: np.ndarray, lengths: np.ndarray, page_bytes: int) -> np.ndarray:
    """Decodes pages that were checked.

    Args:
      data: holds them.
      offsets, lengths: int64 [P], where they lie, checksums included.
      page_bytes: of a decoded page.

    Returns:
      uint8 [P, page_bytes].

    Raises:
      DamagedPage: one cannot be decompressed.
    """
    out = np.empty((len(offsets), page_bytes), np.uint8)
    bad = _decode(_context(), np.frombuffer(data, np.uint8), offsets, lengths - CHECKSUM, out)
    if bad >= 0:
        raise DamagedPage(bad, "it cannot be decompressed")
    return out
