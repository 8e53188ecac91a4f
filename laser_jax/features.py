"""From what the logs hold to embedding rows: which columns are used, and how an id becomes a row.

Knows no jax: the same functions run in the training pipeline and, later, in the ranking server.
"""

import dataclasses

import numpy as np

from laser_jax.id_dictionary import IdDictionary
from laser_jax.vault.hashing import splitmix64

ID_MAPS = ("code", "vocab", "hash", "log", "dictionary", "vector")
POOLS = ("sum", "mean")
MOST_ROWS = 2**31 - 2**20  # rows are int32
NO_VALUE = -1  # fills up a column of several values


@dataclasses.dataclass
class FieldConfig:
    """One column and its embedding.

    Attributes:
      name: the column in the vault and, for candidates and context, in the requests.
      width: of the embedding.
      rows: of the table. Row 0 stands for what is missing or was never seen.
      ids: how a value becomes a row:
        "code": small integers and dictionary codes, row = 1 + value; beyond the table: row 0;
        "vocab": ids known at ingestion (DIR/vocab/<name>), row = 1 + position; else row 0;
        "hash": any int64, row = 1 + hash mod (rows - 1);
        "log": a quantity >= 0 in half powers of two, clipped to the table;
        "dictionary": any int64; ids get rows as training meets them (id_dictionary), else row 0;
        "vector": `width` numbers that are used as they are, with no table; put them at the scale of optim.table_std.
      admit, keep: of a dictionary: steps in which an id must have been met before it gets a row, and steps without it
        after which its row may go to another (0: never).
      hashes: for ids="hash", hashes of an id whose rows are summed: ids that share one row seldom share two.
      pool: for a column of several integers an event, NO_VALUE where there are fewer: "sum" or "mean" of their rows.
      table: several fields may share one table; empty: a table of its own, called like the field.
    """

    name: str
    width: int
    rows: int = 0
    ids: str = "code"
    table: str = ""
    admit: int = 1
    keep: int = 0
    hashes: int = 1
    pool: str = ""

    @property
    def bagged(self) -> bool:
        """Whether several rows make one embedding."""
        return bool(self.pool) or self.hashes > 1


@dataclasses.dataclass(frozen=True)
class Bag:
    """Rows of `table`, several an embedding: their mean, or their sum."""

    table: str
    mean: bool


@dataclasses.dataclass
class FeatureConfig:
    """Fields by the side they describe.

    Attributes:
      item: fields of events and of candidates (item, category, ...).
      event: fields of events only (action, scene, ...).
      context: fields of the request.
      age_width, age_buckets: the log-spaced age embedding of every event.
    """

    item: tuple[FieldConfig, ...] = ()
    event: tuple[FieldConfig, ...] = ()
    context: tuple[FieldConfig, ...] = ()
    age_width: int = 8
    age_buckets: int = 32

    def tables(self) -> dict[str, tuple[int, int]]:
        """Table name -> (rows, width).

        Raises:
          ValueError: no item field, an unknown id map, a table too small, or fields that disagree about a table.
        """
        if not self.item:
            raise ValueError("features.item is empty: candidates need at least one field to be told apart")
        names = [field.name for field in (*self.item, *self.event)]
        if len(set(names)) != len(names):
            raise ValueError(f"features name a column twice, as item and event or within one: {names}")
        others = {field.name: field for field in (*self.item, *self.event)}
        for field in self.context:
            if others.get(field.name, field) != field:
                raise ValueError(
                    f"context field {field.name!r} has the name of another field: give both the same settings, or one "
                    "another name"
                )
        tables: dict[str, tuple[int, int]] = {}
        for field in (*self.item, *self.event, *self.context):
            if field.ids not in ID_MAPS:
                raise ValueError(f"field {field.name!r}: ids={field.ids!r} is not one of {ID_MAPS}")
            _check(field)
            if field.ids == "vector":
                continue
            size = (field.rows, field.width)
            if tables.setdefault(table_of(field), size) != size:
                raise ValueError(
                    f"field {field.name!r} wants table {table_of(field)!r} as {size}, another field as "
                    f"{tables[table_of(field)]}"
                )
        kinds: dict[str, tuple] = {}
        for field in (*self.item, *self.event, *self.context):
            if field.ids == "vector":
                continue
            kind = (field.ids, field.hashes, field.admit, field.keep)
            if kinds.setdefault(table_of(field), kind) != kind:
                raise ValueError(
                    f"fields of table {table_of(field)!r} disagree about where an id's row is (ids, hashes, admit, "
                    f"keep): {kinds[table_of(field)]} and, for {field.name!r}, {kind}; give one of them another table"
                )
        return tables

    def bags(self) -> dict[str, Bag]:
        """What is made of several rows each, by the source (source_of) under which it is found."""
        return {
            source_of(field): Bag(table_of(field), field.pool == "mean")
            for field in (*self.item, *self.event, *self.context)
            if field.bagged
        }

    def dictionaries(self) -> dict[str, IdDictionary]:
        """An empty dictionary for every table that has one."""
        return {
            table_of(field): IdDictionary(field.rows, field.admit, field.keep)
            for field in (*self.item, *self.event, *self.context)
            if field.ids == "dictionary"
        }


def _check(field: FieldConfig) -> None:
    """Raises ValueError for a field that makes no sense by itself."""
    vector = field.ids == "vector"
    if field.width < 1 or (field.rows != 0 if vector else not 2 <= field.rows <= MOST_ROWS):
        raise ValueError(
            f"field {field.name!r}: rows={field.rows} (2 to {MOST_ROWS}; none for ids='vector'), width={field.width}"
        )
    if field.ids != "dictionary" and (field.admit, field.keep) != (1, 0):
        raise ValueError(f"field {field.name!r}: admit and keep are for ids='dictionary', not {field.ids!r}")
    if vector and field.table:
        raise ValueError(f"field {field.name!r}: ids='vector' has no table, not {field.table!r}")
    if field.pool and (field.pool not in POOLS or field.ids in ("log", "vector")):
        raise ValueError(f"field {field.name!r}: pool={field.pool!r} is not one of {POOLS}, or not for {field.ids!r}")
    if field.hashes < 1 or (field.hashes > 1 and (field.ids != "hash" or field.pool)):
        raise ValueError(f"field {field.name!r}: hashes={field.hashes} needs ids='hash' and no pool")


def table_of(field: FieldConfig) -> str:
    """The table a field looks up."""
    return field.table or field.name


def source_of(field: FieldConfig) -> str:
    """What a field's indices point into: rows of its table, or what is made of several, or given, for it alone."""
    return line_source(field.name) if field.bagged or field.ids == "vector" else table_of(field)


def line_source(name: str) -> str:
    """The source of a field of several values."""
    return f"values of {name}"


def rows_of(field: FieldConfig, values: np.ndarray, vocabulary: np.ndarray | None) -> np.ndarray:
    """Embedding rows of a column's values.

    Args:
      values: [N], any integer type, bool, or float for ids="log"; [N, m] for several values.
      vocabulary: sorted int64 ids, for ids="vocab".

    Returns:
      int32, shaped like values, each in [0, field.rows); [N, hashes] for several hashes. For ids="dictionary" the ids
      themselves, int64: their rows change as it grows. For ids="vector" float32 [N, width].
    """
    if field.ids == "vector":
        return values.astype(np.float32)
    if field.ids == "dictionary":
        return values.astype(np.int64)
    if field.ids == "code":
        rows = values.astype(np.int64) + 1
        return np.where((rows < 1) | (rows >= field.rows), 0, rows).astype(np.int32)
    if field.ids == "vocab":
        if not len(vocabulary):
            return np.zeros(values.shape, np.int32)
        values = values.astype(np.int64)  # an unsigned column would be compared as floats
        rows = np.searchsorted(vocabulary, values)
        known = vocabulary[np.minimum(rows, len(vocabulary) - 1)] == values
        return np.where(known & (rows + 1 < field.rows), rows + 1, 0).astype(np.int32)
    if field.ids == "hash":
        hashed = splitmix64(values.astype(np.int64))
        if field.hashes > 1:  # the hash of (hash, number) is another hash
            hashed = splitmix64(hashed[:, None].view(np.int64) + np.arange(field.hashes))
        return (1 + hashed % np.uint64(field.rows - 1)).astype(np.int32)
    values = values.astype(np.float64)
    steps = np.minimum(1 + 2 * np.log2(1 + np.maximum(values, 0)), field.rows - 1)
    return np.where(np.isnan(values), 0, steps).astype(np.int32)
