"""The work behind the store's back: making parts from log files and from older parts. Files in, one new part out.

A task reads immutable files and writes one new part directory; it touches nothing that a reader may see. So it can
run in another process, and be killed at any moment.
"""

import dataclasses
import os
import time
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import kernels
from laser_jax.vault.format import LEAST_LEVEL, MOST_LEVEL, PAGE, PARTS
from laser_jax.vault.index import spans
from laser_jax.vault.log import FILE_HEADER, LogFile
from laser_jax.vault.lookup import LocalPages
from laser_jax.vault.part import Part
from laser_jax.vault.part_writer import write_part
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.unpacking import SEQUENCE, Unpacking

#: Pages decoded at once.
_BLOCK_PAGES = 1024


class Pace:
    """Sleeps so that work does not go faster than some bytes a second; 0 means as fast as it can."""

    def __init__(self, bytes_per_s: int):
        self._rate = bytes_per_s
        self._started = time.monotonic()
        self._done = 0

    def __call__(self, size: int) -> None:
        """Counts `size` bytes of work."""
        self._done += size
        if self._rate:
            ahead = self._done / self._rate - (time.monotonic() - self._started)
            if ahead > 0.001:
                time.sleep(ahead)


@dataclasses.dataclass(frozen=True)
class LogTask:
    """Log files -> a part.

    Attributes:
      root: of the vault. name: of the new part.
      files: (number, one past the last byte to read, or None for all of it).
      schema: of the files.
    """

    root: str
    name: str
    files: tuple[tuple[int, int | None], ...]
    schema: dict[str, Any]

    def run(self) -> dict[str, Any]:
        """Writes the part; returns its entry for the manifest, without name and schema."""
        schema = Schema.from_json(self.schema)
        users: list[Any] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *schema.names)}
        for number, end in self.files:
            with LogFile(self.root, number) as file:
                for batch, _ in file.batches(schema, FILE_HEADER, end):
                    users.extend(batch.users)
                    numbers = np.arange(batch.first_sequence, batch.first_sequence + len(batch))
                    columns[SEQUENCE].append(numbers)
                    for name, column in batch.columns.items():
                        columns[name].append(column)
        return write_rows(
            self.root, self.name, schema, users, {name: np.concatenate(found) for name, found in columns.items()}
        )


@dataclasses.dataclass(frozen=True)
class MergeTask:
    """Entries of users in some parts -> one part in which each of these users has one entry.

    Attributes:
      root: of the vault. name: of the new part.
      schemas: of the vault, the last one today's. fills: see Unpacking.
      parts: manifest entries of the parts to read.
      part, first, end: int64 [E], of each entry the position of its part, and its pages there.
      user: int64 [E], the user's position in `users`.
      users: keys of the U users.
      covers: int64 [U], see laser_jax.vault.format; None makes a part that stands for no other.
      keep_events: newest events of a user that are kept, 0 for all. keep_from: events before that time go.
      keep_one: whether a user's newest event stays even so.
      bytes_per_s: see Pace.
    """

    root: str
    name: str
    schemas: list[dict[str, Any]]
    fills: dict[str, int]
    parts: list[dict[str, Any]]
    part: np.ndarray
    first: np.ndarray
    end: np.ndarray
    user: np.ndarray
    users: list[Any]
    covers: np.ndarray | None
    keep_events: int = 0
    keep_from: int = 0
    keep_one: bool = True
    bytes_per_s: int = 0

    def run(self) -> dict[str, Any] | None:
        """Writes the part; returns its entry for the manifest without name and schema, None if nothing is left."""
        pace = Pace(self.bytes_per_s)
        schemas = [Schema.from_json(schema) for schema in self.schemas]
        schema = schemas[-1]
        storage = LocalStorage(self.root)
        pages = LocalPages()
        owner: list[np.ndarray] = []
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *schema.names)}
        for number, entry in enumerate(self.parts):
            mine = np.flatnonzero(self.part == number)
            mine = mine[np.argsort(self.first[mine], kind="stable")]
            part = Part(storage, entry, schemas)
            for block in _blocks(self.end[mine] - self.first[mine]):
                chosen = mine[block]
                rows, lengths = read_entries(part, pages, schema, self.fills, self.first[chosen], self.end[chosen])
                owner.append(np.repeat(self.user[chosen], lengths))
                for name, column in rows.items():
                    columns[name].append(column)
                pace(int((self.end[chosen] - self.first[chosen]).sum()) * part.layout.page_bytes)
        rows = {name: np.concatenate(found) for name, found in columns.items()}
        return self._write(schema, np.concatenate(owner), rows, pace)

    def _write(self, schema: Schema, user: np.ndarray, rows: dict[str, np.ndarray], pace: Pace) -> Any:
        order = np.lexsort((rows[SEQUENCE], rows["time"], user))
        user = user[order]
        if self.keep_events or self.keep_from:
            edges = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
            ends = np.append(edges[1:], len(user))
            newer = np.repeat(ends, ends - edges) - 1 - np.arange(len(user))
            kept = rows["time"][order] >= self.keep_from
            if self.keep_events:
                kept &= newer < self.keep_events
            if self.keep_one:
                kept |= newer == 0
            order, user = order[kept], user[kept]
        if not len(order):
            return None
        rows = {name: column[order] for name, column in rows.items()}
        starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
        present = user[starts]
        keys: Any = [self.users[position] for position in present.tolist()]
        if schema.user == "int64":
            keys = np.array(keys, np.int64)
        covers = None if self.covers is None else self.covers[present]
        return _write(self.root, self.name, schema, keys, np.append(starts, len(user)), rows, covers=covers, pace=pace)


def read_entries(
    part: Part, pages: Any, schema: Schema, fills: dict[str, int], first: np.ndarray, end: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All events of some runs of pages of a part.

    Args:
      part: to read. pages: that reads it.
      schema: in which values are returned. fills: see Unpacking.
      first, end: int64 [R], pages of each run, a user's whole entry.

    Returns:
      Columns: `time`, sequence numbers, every field; and the number of events of each run.
    """
    joined_first, joined_end = _adjacent(first, end)
    words = pages.words([part] * len(joined_first), joined_first, joined_end)
    count = end - first
    run_page = np.cumsum(count) - count
    start = PAGE - part.page_count[first].astype(np.int64)
    stop = count * PAGE
    lengths = stop - start
    row = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    scalars = list(schema.scalars)
    unpacking = Unpacking(part.layout, scalars, True, fills)
    buffer = unpacking.allocate(total)
    kernels.unpack_runs(
        words,
        part.layout.time_words == 2,
        run_page,
        start,
        stop,
        row,
        unpacking.plan,
        buffer,
        unpacking.prefix * total,
    )
    columns = unpacking.columns(buffer, total, total)
    slots = spans(run_page * PAGE + start, lengths)
    if part.layout.sequence_word < 0:
        page = np.repeat(first - run_page, count) + np.arange(len(words))
        columns[SEQUENCE] = part.last_sequence[page][slots // PAGE] - (PAGE - 1 - slots % PAGE)
    for field in schema.vectors:
        if field.name in part.schema.names:
            stored = part.schema.field(field.name)
            runs = zip(joined_first.tolist(), joined_end.tolist(), strict=True)
            values = np.concatenate([pages.vectors(part, stored, a, b) for a, b in runs])
            columns[field.name] = values.reshape(-1, field.size)[slots].astype(field.dtype, copy=False)
        else:
            fill = 0 if field.default is None else field.default
            columns[field.name] = np.full((total, field.size), fill, field.dtype)
    return columns, lengths


def write_rows(
    root: str,
    name: str,
    schema: Schema,
    users: list[Any],
    columns: dict[str, np.ndarray],
    covers: dict[Any, int] | None = None,
) -> dict[str, Any]:
    """Writes rows in any order as a part.

    Args:
      root: of the vault. name: of the part. schema: of the rows.
      users: keys of the N rows.
      columns: `time`, sequence numbers and every field.
      covers: of each user, see laser_jax.vault.format; without it the part stands for no other.
    """
    if schema.user == "int64":
        keys: Any
        keys, owner = np.unique(np.array(users, np.int64), return_inverse=True)
    else:
        numbers: dict[str, int] = {}
        owner = np.array([numbers.setdefault(user, len(numbers)) for user in users], np.int64)
        keys = list(numbers)
    order = np.lexsort((columns[SEQUENCE], columns["time"], owner))
    starts = np.searchsorted(owner[order], np.arange(len(keys) + 1))
    rows = {column: values[order] for column, values in columns.items()}
    covered = (
        None
        if covers is None
        else np.array([covers[key] for key in (keys if isinstance(keys, list) else keys.tolist())])
    )
    return _write(root, name, schema, keys, starts, rows, covered, level=LEAST_LEVEL)


def _write(
    root: str,
    name: str,
    schema: Schema,
    users: Any,
    starts: np.ndarray,
    rows: dict[str, np.ndarray],
    covers: np.ndarray | None = None,
    level: int = MOST_LEVEL,
    pace: Any = lambda size: None,
) -> dict[str, Any]:
    sequence = rows[SEQUENCE]
    fields = {field: rows[field] for field in schema.names}
    target = os.path.join(root, PARTS, name)
    entry = write_part(target, schema, users, starts, rows["time"], fields, sequence, covers, level, pace)
    return entry | {"first_sequence": int(sequence.min())}


def _blocks(pages: np.ndarray) -> list[slice]:
    """Cuts entries into runs of about _BLOCK_PAGES pages."""
    if not len(pages):
        return []
    ends = np.cumsum(pages)
    cuts = np.searchsorted(ends, np.arange(_BLOCK_PAGES, ends[-1] + _BLOCK_PAGES, _BLOCK_PAGES)) + 1
    edges = np.unique(np.clip(np.concatenate(([0], cuts, [len(pages)])), 0, len(pages))).tolist()
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _adjacent(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of pages, joined where one begins as the one before ends: fewer and larger reads."""
    gap = np.flatnonzero(first[1:] != end[:-1]) + 1
    return first[np.append(0, gap)], end[np.append(gap - 1, len(end) - 1)]
