"""Pages of parts: by pread from local files, by tensorstore from anywhere else."""

import os
import threading
from typing import Any

import numpy as np

from laser_jax.schema import Field
from laser_jax.vault import format as vault_format
from laser_jax.vault import kernels
from laser_jax.vault.decode import DamagedPage, decode_pages, read_run, read_runs
from laser_jax.vault.errors import CorruptionError, MissingError, UnavailableError
from laser_jax.vault.format import PAGE
from laser_jax.vault.index import PageTable
from laser_jax.vault.part import Part
from laser_jax.vault.storage import shared_context

#: Shard files kept open at most; the rest are opened again when needed.
_OPEN_FILES = 256


class _ShardFile:
    """An open shard file; closes when the last reader lets it go."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close=os.close) -> None:
        # A default: the module's names may be gone when the interpreter ends.
        if hasattr(self, "descriptor"):
            close(self.descriptor)


class LocalPages:
    """Reads runs of pages, one pread for each shard they touch. Safe to share among threads."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str, int], _ShardFile] = {}
        self._locations: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()

    def words(self, parts: list[Part], first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Pages first..end-1 of R parts, all of one layout: uint32 [P, words, PAGE].

        Raises:
          CorruptionError: names part, page and user.
          UnavailableError: a file cannot be read.
        """
        layout = parts[0].layout
        found = self._decoded("pages", parts, first, end, layout.page_bytes)
        return found.view(np.uint32).reshape(-1, layout.num_words, PAGE)

    def unpack(
        self,
        part: Part,
        table: PageTable,
        low: int,
        high: int,
        before: int,
        n: int,
        plan: np.ndarray,
        out: np.ndarray,
        prefix: np.ndarray,
    ) -> tuple[int, int, int]:
        """Reads the pages of one run and unpacks its newest n events before a bound.

        Args:
          part: that the pages belong to.
          table: of pages; low, high: the run's first page in it, and one past the last.
          before, n, plan, out, prefix: as for kernels.unpack_run.

        Returns:
          What kernels.unpack_run returns.

        Raises:
          As for words.
        """
        layout, base = part.layout, table.base[part.name]
        shard_pages = part.shard_pages["pages"]
        shard = (low - base) // shard_pages
        if (high - 1 - base) // shard_pages == shard:
            file = self._opened(part, "pages", shard)  # held: another thread may push it out of the table meanwhile
            try:
                found = read_run(file.descriptor, table, low, high, layout, before, n, plan, out, prefix)
            except DamagedPage as error:
                raise damage(part, "pages", low - base + error.position, error) from error
            if found is not None:
                return found
        return _unpack_words(self, part, table, low, high, before, n, plan, out, prefix)

    def vectors(self, part: Part, field: Field, first: int, end: int) -> np.ndarray:
        """Pages first..end-1 of a vector field: [end - first, PAGE, size]; errors as for `words`."""
        array = vault_format.vector_path(field.name)
        size = PAGE * field.size * field.dtype.itemsize
        pages = self._decoded(array, [part], np.array([first]), np.array([end]), size)
        return pages.view(field.dtype).reshape(-1, PAGE, field.size)

    def forget(self, names: set[str]) -> None:
        """Lets go of everything but the parts of these names."""
        with self._lock:
            self._files = {key: file for key, file in self._files.items() if key[0] in names}
            self._locations = {key: found for key, found in self._locations.items() if key[0] in names}

    def _decoded(
        self, array: str, parts: list[Part], first: np.ndarray, end: np.ndarray, page_bytes: int
    ) -> np.ndarray:
        """Pages first..end-1 of R parts, uint8 [P, page_bytes]."""
        shard_pages = _shard_pages(parts, array)
        if (first // shard_pages != (end - 1) // shard_pages).any():
            parts, first, end = _within_shards(array, parts, first, end)
            shard_pages = _shard_pages(parts, array)
        counts = end - first
        before = np.cumsum(counts) - counts
        total = int(counts.sum())
        offset, length = np.empty(total, np.int64), np.empty(total, np.int64)
        pages = np.repeat(first - before, counts) + np.arange(total)
        numbers = {part: number for number, part in enumerate(dict.fromkeys(parts))}
        number = np.fromiter(map(numbers.__getitem__, parts), np.int64, len(parts)) if len(numbers) > 1 else None
        for part, own in numbers.items():
            mine: Any = slice(None) if number is None else np.repeat(number == own, counts)
            offsets, lengths = self._locations_of(part, array)
            offset[mine], length[mine] = offsets[pages[mine]], lengths[pages[mine]]
        last = before + counts - 1
        start = offset[before]
        size = offset[last] + length[last] - start
        target = np.cumsum(size) - size
        data = np.empty(int(size.sum()), np.uint8)
        self._read(array, parts, first // shard_pages, start, size, target, data)
        try:
            return decode_pages(data, offset + np.repeat(target - start, counts), length, page_bytes)
        except DamagedPage as error:
            run = int(np.searchsorted(before, error.position, side="right")) - 1
            raise damage(parts[run], array, int(pages[error.position]), error) from error

    def _locations_of(self, part: Part, array: str) -> tuple[np.ndarray, np.ndarray]:
        if array == "pages":
            return part.offset, part.length
        found = self._locations.get((part.name, array))
        if found is None:
            found = self._locations[part.name, array] = part.locations(array)
        return found

    def _read(
        self,
        array: str,
        parts: list[Part],
        shards: np.ndarray,
        start: np.ndarray,
        size: np.ndarray,
        target: np.ndarray,
        data: np.ndarray,
    ) -> None:
        """Fills `data` run by run; what lies beyond the end of a file stays as it is, and fails its checksum."""
        places = list(zip(parts, shards.tolist(), strict=True))
        # Held until the end: another thread may push them out of the table meanwhile.
        files = {place: self._opened(place[0], array, place[1]) for place in dict.fromkeys(places)}
        descriptor = np.fromiter((files[place].descriptor for place in places), np.int32, len(places))
        run = read_runs(descriptor, start, size, target, data, 0)
        while run < len(places):
            try:
                view = memoryview(data)[target[run] : target[run] + size[run]]
                os.preadv(files[places[run]].descriptor, (view,), int(start[run]))
            except OSError as error:
                part, shard = places[run]
                raise UnavailableError(f"{_shard_name(part, array, shard)} cannot be read: {error}") from error
            run = read_runs(descriptor, start, size, target, data, run + 1)

    def _opened(self, part: Part, array: str, shard: int) -> _ShardFile:
        key = (part.name, array, shard)
        found = self._files.get(key)
        if found is None:
            name = _shard_name(part, array, shard)
            try:
                found = _ShardFile(name)
            except FileNotFoundError as error:
                raise MissingError(f"{name} is missing") from error
            except OSError as error:
                raise UnavailableError(f"{name} cannot be read: {error}") from error
            with self._lock:
                if len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))
                self._files[key] = found
        return found


def _shard_pages(parts: list[Part], array: str) -> np.ndarray:
    """Pages in a shard file of R parts, int64 [R]."""
    found = {part: part.shard_pages[array] for part in set(parts)}
    return np.fromiter(map(found.__getitem__, parts), np.int64, len(parts))


def _within_shards(
    array: str, parts: list[Part], first: np.ndarray, end: np.ndarray
) -> tuple[list[Part], np.ndarray, np.ndarray]:
    """The same runs, cut where a shard ends."""
    rows = []
    for part, begin, stop in zip(parts, first.tolist(), end.tolist(), strict=True):
        shard_pages = part.shard_pages[array]
        while begin < stop:
            cut = min(stop, (begin // shard_pages + 1) * shard_pages)
            rows.append((part, begin, cut))
            begin = cut
    cut_parts, begins, ends = zip(*rows, strict=True)
    return list(cut_parts), np.array(begins), np.array(ends)


def _unpack_words(pages: Any, part: Part, table: PageTable, low: int, high: int, *run: Any) -> tuple[int, int, int]:
    """LocalPages.unpack in two steps."""
    base = table.base[part.name]
    return kernels.unpack_run(
        pages.words([part], np.array([low - base]), np.array([high - base])),
        part.layout.time_words == 2,
        table.count[low:high],
        table.first_time[low:high],
        table.last_time[low:high],
        *run,
    )


class RemotePages:
    """Reads pages of parts in a key-value store, with a cache of decoded ones."""

    def __init__(self, cache_bytes: int):
        import tensorstore as ts

        self._context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}}, shared_context())
        self._stores: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def words(self, parts: list[Part], first: np.ndarray, end: np.ndarray) -> np.ndarray:
        """As LocalPages.words."""
        runs = list(zip(parts, first.tolist(), end.tolist(), strict=True))
        futures = [self._store(part, "pages")[begin:stop].read() for part, begin, stop in runs]
        found = [self._result(*run, future) for run, future in zip(runs, futures, strict=True)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def unpack(self, part: Part, table: PageTable, low: int, high: int, *run: Any) -> tuple[int, int, int]:
        """As LocalPages.unpack."""
        return _unpack_words(self, part, table, low, high, *run)

    def vectors(self, part: Part, field: Field, first: int, end: int) -> np.ndarray:
        """As LocalPages.vectors."""
        array = vault_format.vector_path(field.name)
        pages = self._read(part, array, first, end)
        blank = np.flatnonzero(~pages.any(axis=(1, 2)))
        if len(blank):
            # Zeros may be real, or stand for a shard that is lost.
            for shard in {(first + int(page)) // part.shard_pages[array] for page in blank}:
                name = part.shards(array)[shard]
                if part.folder.storage.read(f"{part.folder.name}/{name}") is None:
                    raise MissingError(f"{part.folder.path}/{name} is missing")
        return pages

    def forget(self, names: set[str]) -> None:
        """As LocalPages.forget."""
        with self._lock:
            self._stores = {key: store for key, store in self._stores.items() if key[0] in names}

    def _read(self, part: Part, array: str, first: int, end: int) -> np.ndarray:
        return self._result(part, first, end, self._store(part, array)[first:end].read(), array)

    def _result(self, part: Part, first: int, end: int, future: Any, array: str = "pages") -> np.ndarray:
        try:
            return np.ascontiguousarray(future.result())
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
    path = _shard_name(part, array, page // part.shard_pages[array])
    return CorruptionError(
        f"part {part.name}, page {page} of {array}, user {part.user_of_page(page)!r}: {what} ({path})"
    )


def _shard_name(part: Part, array: str, shard: int) -> str:
    return f"{part.folder.path}/{part.shards(array)[shard]}"
