"""One stored page -> its bytes: checksum, blosc frame, zstd.

The frame is that of c-blosc 1, which zarr's `blosc` codec writes. It is taken apart here because libraries that
read it set up a new zstd context for every call, which takes twice as long as decompressing a page of this size; a
thread's context is kept here.
"""

import threading

import google_crc32c
import numpy as np
import zstandard

from laser_jax.vault import kernels
from laser_jax.vault.format import CHECKSUM

_HEADER = 16
#: Flags of a frame: bytes shuffled; stored as they are; blocks of one stream each; format of the streams (zstd).
_SHUFFLED, _STORED, _UNSPLIT, _ZSTD = 0x1, 0x2, 0x10, 4 << 5
_local = threading.local()


class DamagedPage(Exception):
    """A page's bytes are not what was written; says why. Callers name part, page and user."""


def _decompressor() -> zstandard.ZstdDecompressor:
    found = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found


class PageDecoder:
    """Decodes pages of one array.

    Attributes:
      page_bytes: of a decoded page.
      typesize: bytes of a value, by which bytes are shuffled.
    """

    def __init__(self, page_bytes: int, typesize: int):
        self.page_bytes = page_bytes
        self.typesize = typesize
        flags = _UNSPLIT | _ZSTD | (_SHUFFLED if typesize > 1 else 0)
        size = page_bytes.to_bytes(4, "little")
        # A page that is one block of one stream, as all but very wide ones are.
        self._usual = bytes((2, 1, flags, typesize)) + size + size
        self._start = (_HEADER + 4).to_bytes(4, "little")

    def planes(self, stored: bytes) -> bytes:
        """The decoded page as byte planes: byte k of all values, for each k.

        Raises:
          DamagedPage: the checksum does not match, or the frame is none.
        """
        if stored[:12] == self._usual:
            return self._decompressed(self._checked(stored), _HEADER + 8, len(stored) - CHECKSUM, self.page_bytes)
        planes = np.empty(self.page_bytes, np.uint8)
        kernels.shuffle(self.values(stored), self.typesize, planes)
        return planes.tobytes()

    def values(self, stored: bytes) -> np.ndarray:
        """The decoded page as bytes of values one after the other, uint8 [page_bytes].

        Raises:
          DamagedPage: the checksum does not match, or the frame is none.
        """
        stored = self._checked(stored)
        flags, typesize = stored[2], stored[3]
        size, block, total = (int.from_bytes(stored[at : at + 4], "little") for at in (4, 8, 12))
        if size != self.page_bytes or total != len(stored) - CHECKSUM or stored[0] != 2 or block < 1:
            raise DamagedPage("its blosc header makes no sense")
        if flags & _STORED:
            return np.frombuffer(stored, np.uint8, size, _HEADER)
        if flags & 0xE0 != _ZSTD or not flags & _UNSPLIT or (flags & _SHUFFLED and typesize != self.typesize):
            raise DamagedPage("it is compressed in another way than the format says")
        out = np.empty(size, np.uint8)
        for number, begin in enumerate(range(0, size, block)):
            at = int.from_bytes(stored[_HEADER + 4 * number : _HEADER + 4 * number + 4], "little")
            length = int.from_bytes(stored[at : at + 4], "little")
            target = out[begin : begin + block]
            data = self._decompressed(stored, at + 4, at + 4 + length, len(target))
            if flags & _SHUFFLED:
                kernels.unshuffle(np.frombuffer(data, np.uint8), typesize, target)
            else:
                target[:] = np.frombuffer(data, np.uint8)
        return out

    def _checked(self, stored: bytes) -> bytes:
        if len(stored) <= _HEADER + CHECKSUM or google_crc32c.value(stored[:-CHECKSUM]) != int.from_bytes(
            stored[-CHECKSUM:], "little"
        ):
            raise DamagedPage("its checksum does not match")
        return stored

    def _decompressed(self, stored: bytes, begin: int, end: int, size: int) -> bytes:
        data = stored[begin:end]
        if len(data) == size:
            return data  # blosc stores a block as it is when zstd cannot shrink it
        try:
            found = _decompressor().decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise DamagedPage(f"it cannot be decompressed ({error})") from error
        if len(found) != size:
            raise DamagedPage(f"it decompresses to {len(found)} bytes instead of {size}")
        return found
