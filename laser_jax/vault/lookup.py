"""Pages of parts: by pread from local files, by tensorstore from anywhere else."""

import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from laser_jax.schema import Field
from laser_jax.vault import format as vault_format
from laser_jax.vault import kernels
from laser_jax.vault.decode import DamagedPage, PageDecoder
from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.format import PAGE, SHARD_PAGES
from laser_jax.vault.part import Part
from laser_jax.vault.storage import shared_context

#: Shard files kept open at most; the rest are opened again when needed.
_OPEN_FILES = 256


class _ShardFile:
    """An open shard file; closes when the last reader lets it go."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class LocalPages:
    """Reads runs of pages, one pread for each shard they touch. Safe to share among threads."""

    def __init__(self, gone: Callable[[], bool]):
        """`gone` says whether the vault has moved on since it was opened, so that a missing file is no damage."""
        self._gone = gone
        self._files: dict[tuple[str, str, int], _ShardFile] = {}
        self._decoders: dict[tuple[int, int], PageDecoder] = {}
        self._locations: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def planes(self, part: Part, first: int, end: int) -> np.ndarray:
        """Pages first..end-1 of a part as byte planes, uint8 [end - first, bytes of a page].

        Raises:
          CorruptionError: names part, page and user.
          UnavailableError: a file cannot be read.
        """
        size = part.layout.page_bytes
        decode = self._decoder(size, 4).planes
        pages = self._decoded(part, "pages", first, end, part.offset, part.length, decode)
        joined = pages[0] if len(pages) == 1 else b"".join(pages)
        return np.frombuffer(joined, np.uint8).reshape(len(pages), size)

    def vectors(self, part: Part, field: Field, first: int, end: int) -> np.ndarray:
        """Pages first..end-1 of a vector field: [end - first, PAGE, size]; errors as for `planes`."""
        array = vault_format.vector_path(field.name)
        found = self._locations.get((part.name, array))
        if found is None:
            found = self._locations[part.name, array] = part.locations(array)
        decode = self._decoder(PAGE * field.size * field.dtype.itemsize, field.dtype.itemsize).values
        pages = self._decoded(part, array, first, end, *found, decode)
        return np.stack(pages).view(field.dtype).reshape(len(pages), PAGE, field.size)

    def forget(self, names: set[str]) -> None:
        """Lets go of everything but the parts of these names."""
        with self._lock:
            self._files = {key: file for key, file in self._files.items() if key[0] in names}
            self._locations = {key: found for key, found in self._locations.items() if key[0] in names}

    def _decoder(self, size: int, typesize: int) -> PageDecoder:
        found = self._decoders.get((size, typesize))
        if found is None:
            found = self._decoders[size, typesize] = PageDecoder(size, typesize)
        return found

    def _decoded(
        self,
        part: Part,
        array: str,
        first: int,
        end: int,
        offset: np.ndarray,
        length: np.ndarray,
        decode: Callable[[bytes], Any],
    ) -> list[Any]:
        pages: list[Any] = []
        while first < end:
            shard = first // SHARD_PAGES
            stop = min(end, (shard + 1) * SHARD_PAGES)
            offsets, lengths = offset[first:stop].tolist(), length[first:stop].tolist()
            begin = min(offsets)
            size = max(map(int.__add__, offsets, lengths)) - begin
            try:
                file = self._file(part, array, shard)  # held: another thread may push it out of the table meanwhile
                data = os.pread(file.descriptor, size, begin)
            except FileNotFoundError as error:
                if self._gone():
                    raise UnavailableError(
                        f"part {part.name} is gone since this handle was opened or refreshed: call refresh() and read "
                        "again"
                    ) from error
                raise damage(part, array, first, "its shard file is missing") from error
            except OSError as error:
                raise UnavailableError(f"{_shard_name(part, array, shard)} cannot be read: {error}") from error
            for at, size in zip(offsets, lengths, strict=True):
                at -= begin
                try:
                    pages.append(decode(data[at : at + size]))
                except DamagedPage as error:
                    raise damage(part, array, first, error) from error
                first += 1
        return pages

    def _file(self, part: Part, array: str, shard: int) -> _ShardFile:
        key = (part.name, array, shard)
        found = self._files.get(key)
        if found is None:
            found = _ShardFile(_shard_name(part, array, shard))
            with self._lock:
                if len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
                self._files[key] = found
        return found


class RemotePages:
    """Reads pages of parts in a key-value store, with a cache of decoded ones."""

    def __init__(self, cache_bytes: int):
        import tensorstore as ts

        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, shared_context())
        self._stores: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def planes(self, part: Part, first: int, end: int) -> np.ndarray:
        """As LocalPages.planes."""
        words = np.ascontiguousarray(self._read(part, "pages", first, end)).view(np.uint8).reshape(end - first, -1)
        planes = np.empty_like(words)
        for page in range(len(words)):
            kernels.shuffle(words[page], 4, planes[page])
        return planes

    def vectors(self, part: Part, field: Field, first: int, end: int) -> np.ndarray:
        """As LocalPages.vectors."""
        pages = self._read(part, vault_format.vector_path(field.name), first, end)
        blank = np.flatnonzero(~pages.any(axis=(1, 2)))
        if len(blank):
            # Zeros may be real, or stand for a shard that is lost.
            for shard in {(first + int(page)) // SHARD_PAGES for page in blank}:
                name = part.shards(vault_format.vector_path(field.name))[shard]
                if part.folder.storage.read(f"{part.folder.name}/{name}") is None:
                    raise damage(part, vault_format.vector_path(field.name), first, "its shard file is missing")
        return pages

    def forget(self, names: set[str]) -> None:
        """As LocalPages.forget."""
        with self._lock:
            self._stores = {key: store for key, store in self._stores.items() if key[0] in names}

    def _read(self, part: Part, array: str, first: int, end: int) -> np.ndarray:
        try:
            return self._store(part, array)[first:end].read().result()
        except (ValueError, NotImplementedError) as error:  # any failure of the store
            if "DATA_LOSS" not in str(error) and "checksum" not in str(error):
                raise UnavailableError(f"part {part.folder.path} cannot be read: {error}") from error
            for page in range(first, end if end - first > 1 else first):
                self._read(part, array, page, page + 1)
            raise damage(part, array, first, f"its bytes are damaged ({error})") from error

    def _store(self, part: Part, array: str) -> Any:
        import tensorstore as ts

        with self._lock:
            store = self._stores.get((part.name, array))
            if store is None:
                kvstore = part.folder.storage.kvstore(f"{part.folder.name}/{array}")
                opening = {"recheck_cached_data": False, "context": self._context}
                # Parts are never edited: looking again would cost a request for every page.
                spec = {"driver": "zarr3", "kvstore": kvstore}
                store = ts.open(spec, open=True, read=True, **opening).result()
                self._stores[part.name, array] = store
            return store


def damage(part: Part, array: str, page: int, what: Any) -> CorruptionError:
    """The error that names part, page and user."""
    path = _shard_name(part, array, page // SHARD_PAGES)
    return CorruptionError(
        f"part {part.name}, page {page} of {array}, user {part.user_of_page(page)!r}: {what} ({path})"
    )


def _shard_name(part: Part, array: str, shard: int) -> str:
    return f"{part.folder.path}/{part.shards(array)[shard]}"
