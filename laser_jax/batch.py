"""A batch on the host: columns of indices, and the rows of tables that they point to, laid out for the devices."""

import dataclasses
from typing import Any

import numpy as np

from laser_jax.features import NO_VALUE, FieldConfig, line_source
from laser_jax.id_dictionary import Assigned, IdDictionary
from laser_jax.row_placement import (
    Wanted,
    bucket_size,
    distinct_lines,
    rows_at,
    rows_per_device,
    unique_keys,
)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the host: the requests of this process's devices.

    Attributes:
      step: what the model's step takes: `unique` (table -> int32 [devices, N, size], rows that each of this process's
        devices wants of each of the N devices, see row_placement), `history` (field -> int32 [B, L], positions among
        what its device wants), `candidates` ([B, C]), `context` ([B]), `length` [B], `age` [B, L], `label` and `mask`
        [B, C]; `side` (field -> int32 [B, C], the candidates' positions as they are compared with the history's, see
        assembly.comparable); `bags` (source -> int32 [devices, G, m], positions among what the device wants, -1 for
        none) and `vectors` (source -> float32 [devices, G, width]) for fields whose indices point into those, see
        features.source_of; for tables with a dictionary `fresh` (table -> bool, like unique): rows that another id had
        before.
      users: the user of each real row. references: name -> float32 [B, C] scores stored beside the labels.
      lengths: events before the request, of each real row, at most L.
      num_unique: table -> distinct rows, summed over this process's devices.
      tables: field -> (table, its rows), for fields whose indices point into a table.
    """

    step: dict[str, Any]
    users: np.ndarray
    lengths: np.ndarray
    references: dict[str, np.ndarray]
    num_unique: dict[str, int]
    tables: dict[str, tuple[str, int]]

    @property
    def num_events(self) -> int:
        return int(self.lengths.sum())

    def unique_fill(self) -> str:
        """Real over padded unique rows, by table."""
        sizes = {table: unique.size for table, unique in self.step["unique"].items()}
        return " ".join(f"{table} {self.num_unique[table]}/{size}" for table, size in sizes.items())

    def known(self, side: str, field: str) -> np.ndarray:
        """Whether a field's values are known ones, so that equal indices mean equal values; shaped like the indices."""
        if field in self.tables:
            return self.rows(side, field) != 0
        index = self.step[side][field]
        bags = self.step["bags"].get(line_source(field))
        if bags is None:  # a vector
            return np.ones(index.shape, bool)
        device = np.arange(len(index)) // (len(index) // len(bags))
        return (bags >= 0).any(axis=2)[device.reshape(-1, *[1] * (index.ndim - 1)), index]

    def rows(self, side: str, field: str) -> np.ndarray:
        """Embedding rows behind the indices of a field, for what is compared on the host; shaped like the indices.

        Args:
          side: "history", "candidates" or "context".
        """
        table, num_rows = self.tables[field]
        wanted, index = self.step["unique"][table], self.step[side][field]
        devices, owners, _ = wanted.shape
        first = rows_per_device(num_rows, owners) * np.arange(owners)[:, None]
        flat = (wanted + first).reshape(devices, -1)
        device = np.arange(len(index)) // (len(index) // devices)
        return rows_at(flat[device.reshape(-1, *[1] * (index.ndim - 1)), index], num_rows)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Distinct rows (or ids, where there is a dictionary) of one device in one table, and each column as positions.

    Attributes:
      keys: [U]. positions: (side, field) -> positions of a column. bags: source -> positions [G, m] of its lines, -1
        for no value.
    """

    keys: np.ndarray
    positions: dict[tuple[str, str], np.ndarray]
    bags: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Lines:
    """Distinct lines of one device in a field of several values, and each column as positions among them.

    Attributes:
      values: [G, m], rows, ids or numbers. missing: bool [G, m]. positions: (side, field) -> positions of a column.
    """

    values: np.ndarray
    missing: np.ndarray
    positions: dict[tuple[str, str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Laid:
    """Buckets of one table, those of this process's devices.

    Attributes:
      unique, fresh: [devices, N, size]. slots: of each device's keys, in its buckets laid end to end.
    """

    unique: np.ndarray
    fresh: np.ndarray
    slots: list[np.ndarray]
    num_unique: int


def distinct(field: FieldConfig, columns: dict[tuple[str, str], np.ndarray]) -> Lines:
    """Distinct lines of the columns of one field, by side."""
    values, positions = distinct_lines(list(columns.values()))
    missing = values == NO_VALUE if field.pool else np.zeros(values.shape, bool)
    return Lines(values, missing, dict(zip(columns, positions, strict=True)))


def number(columns: dict[tuple[str, str], np.ndarray], lines: dict[str, Lines]) -> Numbered:
    """The distinct keys of one device in one table.

    Args:
      columns: (side, field) -> keys. lines: source -> distinct lines of a field whose values are keys of the table.
    """
    parts = [*columns.values(), *(line.values[~line.missing] for line in lines.values())]
    keys, positions = unique_keys(parts)
    bags = {source: np.full(line.missing.shape, -1, np.int32) for source, line in lines.items()}
    for bag, line, position in zip(bags.values(), lines.values(), positions[len(columns) :], strict=True):
        bag[~line.missing] = position
    return Numbered(keys, dict(zip(columns, positions, strict=False)), bags)


def lay_out(
    parts: list[Numbered],
    num_rows: int,
    num_devices: int,
    least: int,
    size: int | None = None,
    dictionary: IdDictionary | None = None,
    assigned: Assigned | None = None,
) -> Laid:
    """What devices want of a table, in buckets by owner.

    Args:
      parts: an entry a device; their keys are rows, or ids where there is a dictionary.
      num_devices: N, of all processes.
      least: smallest size of a bucket. size: of the buckets, by default what they need.
      assigned: what all ids of the step, ascending, were given; by default the rows that they have.
    """
    share = rows_per_device(num_rows, num_devices)
    found = []
    for part in parts:
        keys, fresh, same = part.keys, None, None
        if dictionary is not None:
            if assigned is None:
                keys = dictionary.rows(keys)
            else:
                at = np.searchsorted(assigned.ids, keys)
                keys, fresh = assigned.rows[at], assigned.fresh[at]
            # Several ids may read row 0.
            distinct, (same,) = unique_keys([keys])
            if fresh is not None:
                fresh_rows = np.zeros(len(distinct), bool)
                fresh_rows[same] = fresh
                fresh = fresh_rows
            keys = distinct
        wanted, rank = Wanted.of(keys, num_rows, num_devices)
        found.append((wanted, rank, same, fresh))
    if size is None:
        fullest = max(int(wanted.counts.max()) for wanted, *_ in found)
        size = bucket_size(fullest, min(share, num_rows), least)
    blocks, flags, slots = [], [], []
    for wanted, rank, same, fresh in found:
        local, slot = wanted.buckets(size, share)
        flag = np.zeros(local.shape, bool)
        if fresh is not None:
            flag.reshape(-1)[slot[rank]] = fresh
        blocks.append(local)
        flags.append(flag)
        slots.append(slot[rank] if same is None else slot[rank][same])
    num_unique = sum(len(wanted.places) for wanted, *_ in found)
    return Laid(np.stack(blocks), np.stack(flags), slots, num_unique)
