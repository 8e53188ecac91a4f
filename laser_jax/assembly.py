"""From columns of events, candidates and contexts to numbered table rows: the same for training and for serving."""

import numpy as np

from laser_jax.batch import Lines, Numbered, distinct, number
from laser_jax.features import NO_VALUE, FeatureConfig, FieldConfig, rows_of, source_of, table_of

Columns = dict[str, np.ndarray]


class Assembly:
    """What is looked up where.

    Attributes:
      tables: name -> (rows, width). table_of: field -> (table, its rows), for fields whose indices point into a table.
      lined: source -> field, for fields whose indices point into what is made of several rows, or given.
    """

    def __init__(self, features: FeatureConfig, vocabularies: dict[str, np.ndarray]):
        """`vocabularies`: field -> sorted int64 ids, for fields with ids="vocab".

        Raises:
          ValueError: a vocabulary is larger than its table, two of one table differ, or `features` makes no sense.
        """
        self.features = features
        self.vocabularies = vocabularies
        self.tables = features.tables()
        fields = (*features.item, *features.event, *features.context)
        of_tables: dict[str, FieldConfig] = {}
        for field in fields:
            known = vocabularies.get(field.name)
            if known is not None:
                other = of_tables.setdefault(table_of(field), field)
                if not np.array_equal(vocabularies[other.name], known):
                    raise ValueError(
                        f"fields {other.name!r} and {field.name!r} share table {table_of(field)!r}, but their "
                        "vocabularies differ: write one of all their ids under both names, or give them a table each"
                    )
            if known is not None and len(known) >= field.rows:
                raise ValueError(
                    f"the vocabulary of {field.name!r} has {len(known)} ids, its table {field.rows} rows: give it at "
                    f"least {len(known) + 1}"
                )
        self.table_of = {
            field.name: (table_of(field), field.rows) for field in fields if source_of(field) == table_of(field)
        }
        self.lined = {source_of(field): field for field in fields if source_of(field) != table_of(field)}

    def look_up(self, history: Columns, candidates: Columns, context: Columns) -> dict[str, Columns]:
        """Side -> field -> embedding rows of its column (see features.rows_of), NO_VALUE where there is no value."""
        features = self.features
        return {
            "history": self.rows((*features.item, *features.event), history),
            "candidates": self.rows(features.item, candidates),
            "context": self.rows(features.context, context),
        }

    def number(self, columns: dict[tuple[str, str], np.ndarray]) -> tuple[dict[str, Numbered], dict[str, Lines]]:
        """Distinct rows by table and distinct lines by source.

        Args:
          columns: (side, field) -> looked up column, of the requests that are scored on one device.
        """
        lines = {
            source: distinct(field, {key: part for key, part in columns.items() if key[1] == field.name})
            for source, field in self.lined.items()
        }
        numbered = {}
        for table in self.tables:
            mine = {key: part for key, part in columns.items() if self.table_of.get(key[1], ("",))[0] == table}
            bags = {s: lines[s] for s, field in self.lined.items() if field.bagged and table_of(field) == table}
            numbered[table] = number(mine, bags)
        return numbered, lines

    def rows(self, fields: tuple[FieldConfig, ...], columns: Columns) -> Columns:
        """Field -> embedding rows of its column, see look_up."""
        found = {}
        for field in fields:
            rows = rows_of(field, columns[field.name], self.vocabularies.get(field.name))
            found[field.name] = np.where(columns[field.name] == NO_VALUE, NO_VALUE, rows) if field.pool else rows
        return found


def comparable(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Candidates' values as they are compared with events': -1, which no event has, where they are not known.

    All that training never met shares row 0, and is not alike for that.
    """
    return np.where(known, values, np.int32(-1))


def pad_events(values: np.ndarray, offsets: np.ndarray, rows: int, length: int, dtype=np.int32) -> np.ndarray:
    """Flat values of events, request after request -> [rows, length], the newest event of each at length - 1.

    Args:
      offsets: int64 [B + 1], where each request's events begin; B <= rows.
    """
    out = np.zeros((rows, length), dtype)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    out[owner, np.arange(len(owner)) + (length - offsets[1:])[owner]] = values
    return out


def ages(request_times: np.ndarray, event_times: np.ndarray, offsets: np.ndarray, units_per_second: int) -> np.ndarray:
    """Seconds between each event and its request, int64 [N], at most what fits int32."""
    age = (np.repeat(request_times, np.diff(offsets)) - event_times) // units_per_second
    return np.minimum(age, np.iinfo(np.int32).max)
