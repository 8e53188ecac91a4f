"""A vault opened for reading: `get` for one user by pread, `gather` for a batch by tensorstore."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from laser_jax.schema import Field, Schema, SchemaError
from laser_jax.vault import format as vault_format
from laser_jax.vault.batch import BatchReader, restore_blank
from laser_jax.vault.errors import CorruptionError, UnknownFieldError
from laser_jax.vault.files import Folder, read_manifest
from laser_jax.vault.format import PAGE
from laser_jax.vault.history import Histories, History
from laser_jax.vault.index import VaultIndex, select_pages, spans
from laser_jax.vault.lookup import PageReader
from laser_jax.vault.pages import Unpacker, page_times, run_of

#: Memory for decoded pages that gather may keep.
CACHE_BYTES = 256 << 20


class Vault:
    """See laser_jax.vault.open.

    Attributes:
      path: absolute path of the vault.
      schema: of its events.
      num_events: events in all parts.
      next_sequence: sequence number that the next event written would get.
    """

    def __init__(self, path: str, cache_bytes: int = CACHE_BYTES):
        self.path = os.path.abspath(path)
        self.cache_bytes = cache_bytes
        self.manifest = read_manifest(self.path)
        self.schema = Schema.from_json(self.manifest["schema"])
        self.next_sequence: int = self.manifest["next_sequence"]
        self.num_events: int = sum(part["events"] for part in self.manifest["parts"])
        self.index = VaultIndex(self.path, self.manifest, self.schema)
        self._layout = self.index.layout
        self._values = {name: self._load_dictionary(name) for name in self.manifest["dictionaries"]}
        self._codes: dict[str, dict[str, int]] = {}
        self._readers: dict[str, PageReader] = {}
        self._batch = BatchReader(self.index, cache_bytes)

    def __reduce__(self):
        return Vault, (self.path, self.cache_bytes)

    def __len__(self) -> int:
        """Number of users."""
        return len(self.index.users)

    def __repr__(self) -> str:
        return f"Vault({self.path!r}, {len(self)} users, {self.num_events} events)"

    def users(self) -> np.ndarray:
        """All users in no particular order, int64 [U] or str objects [U]."""
        return self.index.users.values()

    def dictionary(self, field: str) -> np.ndarray:
        """Values of a string field, str objects; the position is the code."""
        if field not in self._values:
            known = ", ".join(self._values) or "none"
            raise UnknownFieldError(f"{self.path}: {field!r} is not a string field; string fields: {known}")
        return self._values[field]

    def encode(self, field: str, values: Sequence[str]) -> np.ndarray:
        """Codes of strings in a field's dictionary, int32 [N]; -1 for a value that is not in it."""
        if field not in self._codes:
            self._codes[field] = {value: code for code, value in enumerate(self.dictionary(field).tolist())}
        codes = self._codes[field]
        listed = values.tolist() if isinstance(values, np.ndarray) else values
        return np.fromiter((codes.get(value, -1) for value in listed), np.int32, len(listed))

    def get(
        self, user: int | str, n: int = 1000, before: int | None = None, fields: Sequence[str] | None = None
    ) -> History:
        """The newest n events of one user with time < before, oldest first.

        Args:
          user: an int64 or a string, as the schema says; an unknown user has an empty history.
          n: events at most.
          before: strict bound on event time in the schema's unit; None reads everything.
          fields: names of the fields to read; None reads all but the vectors. `time` always comes.

        Raises:
          UnknownFieldError, CorruptionError, UnavailableError.
        """
        asked = self._fields(fields)
        n = _count(n)
        slot = self.index.users.find_one(user)
        bound = None if before is None else int(_bounds(before, 1)[0])
        if slot < 0 or n == 0:
            return self._empty_history(asked)
        index = self.index
        entry, entry_end = index.entry_start[slot : slot + 2].tolist()
        if entry_end - entry > 1:
            bounds = None if bound is None else np.array([bound])
            _, firsts, ends = select_pages(index, np.array([slot]), bounds, n)
            return self._merged_history(asked, firsts, ends, bound, n)
        first, end = int(index.first_page[entry]), int(index.end_page[entry])
        sure = 0
        if bound is not None:
            end = first + int(np.searchsorted(index.first_time[first:end], bound))
            if end > first and index.last_time[end - 1] >= bound:
                sure = PAGE - 1  # a page that the bound cuts has one sure event
        if end == first:
            return self._empty_history(asked)
        first = max(first, end - -(-(n + sure) // PAGE))
        pages, time, start, stop = self._read_run(first, end, bound, n)
        columns = {"time": time.reshape(-1)[start:stop].copy()}
        for field in asked:
            if field.size is None:
                columns[field.name] = run_of(pages, self._layout.places[field.name], start, stop)
            else:
                vectors = self._reader(field).read(first, end).reshape(-1, field.size)
                columns[field.name] = vectors[start:stop]
        return History(columns, self._values.get)

    def gather(
        self,
        users: Any,
        before: Any = None,
        n: int = 1000,
        fields: Sequence[str] | None = None,
    ) -> Histories:
        """The newest n events with time < before of every user of a batch, in one read.

        Args:
          users: int64 [B] or B strings, repeats allowed; an unknown user has an empty history.
          before: strict bound on event time for all (a number) or each (int64 [B]) of them, or None.
          n: events of a user at most.
          fields: as for get.

        Raises:
          UnknownFieldError, CorruptionError, UnavailableError.
        """
        asked = self._fields(fields)
        n = _count(n)
        slots = self.index.users.find(users)
        bounds = None if before is None else _bounds(before, len(slots))
        if n == 0:
            slots = np.full(len(slots), -1, np.int64)
        request, first, end = select_pages(self.index, slots, bounds, max(n, 1))
        page = np.unique(spans(first, end - first))
        single = self._reader(None)
        pages = self._batch.read(page, single)
        restore_blank(pages, page, np.flatnonzero(self.index.last_time[page] == 0), single)
        time = page_times(self._layout, pages)
        self._check_times(page, time)
        time = time.reshape(-1)
        row, last_row = np.searchsorted(page, first), np.searchsorted(page, end - 1)
        # Slots of each run that lie before the bound; a page's unused slots lead it and hold time 0.
        stop = (last_row + 1) * PAGE
        if bounds is not None:
            cut = time.reshape(-1, PAGE)[last_row] < bounds[request][:, None]
            stop = last_row * PAGE + cut.sum(axis=1)
        start = np.maximum(stop - n, (row + 1) * PAGE - self.index.count[first])
        slot = spans(start, stop - start)
        lengths = np.zeros(len(slots), np.int64)
        np.add.at(lengths, request, stop - start)
        if len(np.unique(request)) != len(request):
            slot, lengths = _merge(slot, time, np.repeat(request, stop - start), lengths, n)
        columns = {"time": time.take(slot)}
        unpacker = Unpacker(pages, slot)
        for field in asked:
            if field.size is None:
                columns[field.name] = unpacker.take(self._layout.places[field.name])
            else:
                single = self._reader(field)
                vectors = self._batch.read(page, single)
                restore_blank(vectors, page, np.flatnonzero(~vectors.any(axis=(1, 2))), single)
                columns[field.name] = vectors.reshape(-1, field.size)[slot]
        return Histories(columns, np.concatenate(([0], np.cumsum(lengths))), self._values.get)

    def stats(self) -> dict[str, Any]:
        """Sizes and shape of the vault; see laser_jax.vault.inspection.stats."""
        from laser_jax.vault import inspection

        return inspection.stats(self)

    def verify(self) -> list[str]:
        """Reads everything and names every damage; empty if the vault is whole."""
        from laser_jax.vault import inspection

        return inspection.verify(self.path)

    def _fields(self, names: Sequence[str] | None) -> list[Field]:
        if names is None:
            return list(self.schema.scalars)
        if isinstance(names, str):
            raise UnknownFieldError(f"fields={names!r}: give a sequence of names")
        asked = []
        for name in names:
            if name == "time":
                continue
            if name not in self.schema.names:
                known = ", ".join(("time", *self.schema.names))
                raise UnknownFieldError(f"{self.path} has no field {name!r}; its fields: {known}")
            asked.append(self.schema.field(name))
        return asked

    def _load_dictionary(self, field: str) -> np.ndarray:
        values: list[str] = []
        for piece in self.manifest["dictionaries"][field]:
            path = os.path.join(self.path, vault_format.DICTIONARIES, piece["name"])
            folder = Folder(path, piece["files"])
            data = folder.array("bytes", np.uint8).tobytes()
            offsets = folder.array("offsets", np.int64, piece["values"] + 1).tolist()
            values.extend(data[a:b].decode() for a, b in zip(offsets[:-1], offsets[1:], strict=True))
        array = np.empty(len(values), object)
        array[:] = values
        array.flags.writeable = False
        return array

    def _empty_history(self, asked: list[Field]) -> History:
        columns = {"time": np.zeros(0, np.int64)}
        for field in asked:
            columns[field.name] = np.zeros((0,) if field.size is None else (0, field.size), field.dtype)
        return History(columns, self._values.get)

    def _read_run(self, first: int, end: int, bound: int | None, n: int) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Adjacent pages of a user, their times, and the slots of the newest n events before `bound`."""
        pages = self._reader(None).read(first, end)
        time = page_times(self._layout, pages)
        self._check_times(np.arange(first, end), time)
        stop = (end - first) * PAGE
        if bound is not None:
            # Unused slots lead the oldest page and hold time 0: all slots together are in order.
            stop -= PAGE - int(np.searchsorted(time[-1], bound))
        start = max(stop - n, PAGE - int(self.index.count[first]))
        return pages, time, start, stop

    def _merged_history(
        self, asked: list[Field], firsts: np.ndarray, ends: np.ndarray, bound: int | None, n: int
    ) -> History:
        """Merges one user's runs of pages from several parts."""
        runs = []
        for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
            runs.append((first, end, *self._read_run(first, end, bound, n)))
        if not runs:
            return self._empty_history(asked)
        time = np.concatenate([times.reshape(-1)[start:stop] for _, _, _, times, start, stop in runs])
        # Stable: of equal times the part that comes first in the manifest was written first.
        order = np.argsort(time, kind="stable")[-n:]
        columns = {"time": time[order]}
        for field in asked:
            if field.size is None:
                place = self._layout.places[field.name]
                values = [run_of(pages, place, start, stop) for _, _, pages, _, start, stop in runs]
            else:
                reader = self._reader(field)
                values = [reader.read(run[0], run[1]).reshape(-1, field.size)[run[4] : run[5]] for run in runs]
            columns[field.name] = np.concatenate(values)[order]
        return History(columns, self._values.get)

    def _reader(self, field: Field | None) -> PageReader:
        """The pread path to the pages, or to a vector field's array."""
        name = "pages" if field is None else vault_format.vector_path(field.name)
        reader = self._readers.get(name)
        if reader is None:
            shape = (self._layout.num_words, PAGE) if field is None else (PAGE, field.size)
            reader = PageReader(self.index, name, shape, np.dtype(np.uint32) if field is None else field.dtype)
            self._readers[name] = reader
        return reader

    def _check_times(self, page: np.ndarray, time: np.ndarray) -> None:
        """Decoded times must be those of the directory: finds a lost shard, which zarr reads as zeros."""
        index = self.index
        first = time[np.arange(len(page)), PAGE - index.count[page].astype(np.int64)]
        wrong = (first != index.first_time[page]) | (time[:, -1] != index.last_time[page])
        if wrong.any():
            bad = int(page[np.argmax(wrong)])
            part = index.part_of(bad)
            raise CorruptionError(
                f"part {part.name}, page {bad - part.page_base}, user {index.user_of_page(bad)!r}: "
                f"its times are not those of the directory ({part.folder.path}); is a shard file missing?"
            )


def _merge(
    slot: np.ndarray, time: np.ndarray, request: np.ndarray, lengths: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the runs of users who live in several parts, and keeps the newest n events of each.

    Args:
      slot: int64 [R], rows in order of request, part and time.
      time: of every slot.
      request: int64 [R], ascending.
      lengths: int64 [B], rows of each request.
      n: events of a request at most.

    Returns:
      slot and lengths of the result.
    """
    # Stable: of equal times the part that comes first in the manifest was written first.
    times = time[slot]
    times -= times.min()
    span = int(times.max()) + 1
    # One key, made of sorted runs, sorts ten times faster than two keys.
    if len(lengths) < 2**63 // span:
        order = np.argsort(request * span + times, kind="stable")
    else:
        order = np.lexsort((times, request))
    slot = slot[order]
    kept = np.minimum(lengths, n)
    return slot[spans(np.cumsum(lengths) - kept, kept)], kept


def _count(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 0:
        raise SchemaError(f"n={n!r}: need the number of events, an integer >= 0")
    return int(n)


def _bounds(before: Any, size: int) -> np.ndarray:
    array = np.asarray(before)
    if array.dtype.kind not in "iu" and array.size:
        raise SchemaError(f"before of type {array.dtype}: need integer times in the schema's unit")
    if array.ndim > 1 or (array.ndim == 1 and len(array) != size):
        raise SchemaError(f"before of shape {array.shape} for {size} users: need one time, or one for each")
    return np.broadcast_to(array.astype(np.int64), (size,))
