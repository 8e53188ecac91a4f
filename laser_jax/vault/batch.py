"""Pages of many users by tensorstore: the training path."""

import os
import threading
from typing import Any

import numpy as np
import tensorstore as ts

from laser_jax.vault.errors import CorruptionError, UnavailableError
from laser_jax.vault.index import VaultIndex
from laser_jax.vault.lookup import PageReader


class BatchReader:
    """Reads any pages of an array in one indexed read a part, on all cores, with a cache of decoded pages."""

    def __init__(self, index: VaultIndex, cache_bytes: int):
        self._index = index
        self._cache_bytes = cache_bytes
        self._context: Any = None
        self._stores: dict[tuple[int, str], Any] = {}
        self._lock = threading.Lock()

    def read(self, page: np.ndarray, single: PageReader) -> np.ndarray:
        """Pages by ascending number in the vault's page table: [P, *page_shape], contiguous.

        Args:
          page: int64 [P].
          single: reads single pages of the array; it says which page is damaged.

        Raises:
          CorruptionError: names part, page and user.
          UnavailableError: the storage refused.
        """
        edges = np.searchsorted(page, self._index.page_base).tolist()
        pending = []
        for number, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            if b > a:
                local = page[a:b] - self._index.parts[number].page_base
                pending.append((number, a, b, self._store(number, single.array)[local].read()))
        found = []
        for number, a, b, future in pending:
            try:
                found.append(future.result())
            except (ValueError, NotImplementedError) as error:  # any failure of tensorstore's storage
                for damaged in page[a:b].tolist():
                    single.read(damaged, damaged + 1)
                # Every page is whole: then it is the shard index, or the storage refused.
                kind = CorruptionError if "DATA_LOSS" in str(error) else UnavailableError
                raise kind(f"part {self._index.parts[number].name}: {error}") from error
        if not found:
            return np.zeros((0, *single.page_shape), single.dtype)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _store(self, number: int, array: str) -> Any:
        """The tensorstore handle of an array of a part."""
        with self._lock:
            store = self._stores.get((number, array))
            if store is None:
                if self._context is None:
                    self._context = ts.Context({"cache_pool": {"total_bytes_limit": self._cache_bytes}})
                path = os.path.join(self._index.parts[number].folder.path, array) + "/"
                spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
                # Parts are never edited: looking again would cost a stat for every page.
                opening = {"recheck_cached_data": False, "context": self._context}
                store = ts.open(spec, open=True, read=True, **opening).result()
                self._stores[number, array] = store
            return store


def restore_blank(pages: np.ndarray, page: np.ndarray, doubtful: np.ndarray, single: PageReader) -> None:
    """Reads pages again that may be blank: tensorstore gives zeros where a shard file has vanished.

    Args:
      pages: of BatchReader.read; changed in place.
      page: their numbers, int64 [P].
      doubtful: positions to read again.
      single: reads single pages of the array.
    """
    for position in doubtful.tolist():
        pages[position] = single.read(int(page[position]), int(page[position]) + 1)[0]
