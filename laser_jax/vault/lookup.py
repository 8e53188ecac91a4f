"""Pages of local part files by `pread`: the serving path, and the path that says which page is damaged."""

import os
import threading

import numpy as np
from numcodecs import blosc

from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.files import crc32c
from laser_jax.vault.format import CHECKSUM, SHARD_PAGES
from laser_jax.vault.index import Part, VaultIndex, joined

#: Shard files kept open at most; the rest are opened again when needed.
_OPEN_FILES = 256


class _ShardFile:
    """An open shard file; closes when the last reader lets it go."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class PageReader:
    """Reads runs of pages of one array (`pages` or a vector field's), one pread for each shard they touch.

    Attributes:
      array: path of the array inside a part.
      page_shape: of one page.
      dtype: of its values.
    """

    def __init__(self, index: VaultIndex, array: str, page_shape: tuple[int, int], dtype: np.dtype):
        self._index = index
        self.array = array
        self.page_shape = page_shape
        self.dtype = dtype
        self._files: dict[tuple[str, int], _ShardFile] = {}
        self._lock = threading.Lock()
        if array == "pages":
            self._offset, self._length = index.offset, index.length
        else:
            locations = [part.locations(array) for part in index.parts]
            self._offset = joined([offset for offset, _ in locations], np.int64)
            self._length = joined([length for _, length in locations], np.int32)

    def read(self, first: int, end: int) -> np.ndarray:
        """Pages first..end-1 of the vault's page table, all of one part: [end - first, *page_shape].

        Raises:
          CorruptionError: names part, page and user.
          UnavailableError: the file cannot be read.
        """
        part = self._index.part_of(first)
        pages = np.empty((end - first, *self.page_shape), self.dtype)
        flat = pages.view(np.uint8).reshape(end - first, -1)
        page = first
        while page < end:
            shard = (page - part.page_base) // SHARD_PAGES
            stop = min(end, part.page_base + (shard + 1) * SHARD_PAGES)
            self._read_shard(part, shard, page, stop, flat[page - first : stop - first])
            page = stop
        return pages

    def _read_shard(self, part: Part, shard: int, first: int, end: int, out: np.ndarray) -> None:
        offsets = self._offset[first:end].tolist()
        lengths = self._length[first:end].tolist()
        begin = min(offsets)
        size = max(offset + length for offset, length in zip(offsets, lengths, strict=True)) - begin
        try:
            data = memoryview(os.pread(self._file(part, shard).descriptor, size, begin))
        except FileNotFoundError as error:
            raise self._damage(part, shard, first, "its shard file is missing") from error
        except OSError as error:
            path = os.path.join(part.folder.path, part.shards(self.array)[shard])
            raise UnavailableError(f"{path} cannot be read: {error}") from error
        for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            stored = data[offset - begin : offset - begin + length]
            body = stored[:-CHECKSUM]
            if len(stored) != length or crc32c(body) != int.from_bytes(stored[-CHECKSUM:], "little"):
                raise self._damage(part, shard, first + number, "its checksum does not match")
            try:
                blosc.decompress(body, out[number])
            except (RuntimeError, ValueError) as error:
                raise self._damage(part, shard, first + number, f"it cannot be decompressed ({error})") from error

    def _file(self, part: Part, shard: int) -> _ShardFile:
        key = (part.name, shard)
        found = self._files.get(key)
        if found is None:
            found = _ShardFile(os.path.join(part.folder.path, part.shards(self.array)[shard]))
            with self._lock:
                if len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
                self._files[key] = found
        return found

    def _damage(self, part: Part, shard: int, page: int, what: str) -> CorruptionError:
        path = os.path.join(part.folder.path, part.shards(self.array)[shard])
        user = self._index.user_of_page(page)
        return CorruptionError(
            f"part {part.name}, page {page - part.page_base} of {self.array}, user {user!r}: {what} ({path})"
        )
