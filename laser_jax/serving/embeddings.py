"""From columns of events, candidates and requests to their embeddings, read from tables on disk."""

import os
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from laser_jax.assembly import Assembly, Columns
from laser_jax.features import NO_VALUE, FieldConfig, table_of
from laser_jax.id_dictionary import IdDictionary


class Embeddings:
    """Looks up what an exported model knows of ids. Safe to share among threads."""

    def __init__(self, assembly: Assembly, tables: dict[str, "Table"], dictionaries: dict[str, IdDictionary]):
        """
        Args:
          assembly: of the features. tables: by name. dictionaries: of the tables that have one.
        """
        self._assembly, self._tables, self._dictionaries = assembly, tables, dictionaries

    def rows(self, fields: tuple[FieldConfig, ...], columns: Columns) -> Columns:
        """What `of` takes of some fields: rows of their tables.

        Args:
          columns: field -> values [N] (or [N, m]); strings as codes.

        Returns:
          Field -> rows [N]; [N, m] for a field of several, NO_VALUE where there are fewer; a vector itself, [N, width].
        """
        found = self._assembly.rows(fields, columns)
        for field in fields:
            dictionary = None if field.ids == "vector" else self._dictionaries.get(table_of(field))
            if dictionary is not None:
                ids = found[field.name]
                known = dictionary.rows(ids.reshape(-1)).reshape(ids.shape)
                found[field.name] = np.where(ids == NO_VALUE, NO_VALUE, known) if field.pool else known
        return found

    def of(self, fields: tuple[FieldConfig, ...], rows: Columns, count: int) -> Float[np.ndarray, "N f"]:
        """The embeddings of some fields side by side, float32.

        Args:
          rows: see `rows`. count: N.
        """
        out = np.empty((count, sum(field.width for field in fields)), np.float32)
        start = 0
        for field in fields:
            part, mine = out[:, start : start + field.width], rows[field.name]
            start += field.width
            if field.ids == "vector":
                part[:] = mine
                continue
            table = self._tables[table_of(field)]
            if not field.bagged:
                part[:] = table.take(mine)
                continue
            real = mine != NO_VALUE
            values = table.take(np.where(real, mine, 0).reshape(-1)).reshape(*mine.shape, field.width)
            part[:] = np.where(real[..., None], values, 0).sum(axis=1)
            if field.pool == "mean":
                part /= np.maximum(real.sum(axis=1), 1)[:, None]
        return out


class Table:
    """An embedding table on disk, mapped: rows are read as they are asked for."""

    def __init__(self, path: str, file: str, dtype: str, scale: str | None):
        """
        Args:
          path: of the model. file: of the rows [V, D]. dtype: what they are. scale: file of what a row is multiplied
            by, float32 [V], or None.
        """
        self._values = np.load(os.path.join(path, file), mmap_mode="r")
        if dtype == "bfloat16":
            self._values = self._values.view(ml_dtypes.bfloat16)
        self._scale: Any = None if scale is None else np.load(os.path.join(path, scale), mmap_mode="r")

    def take(self, rows: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N D"]:
        """Those rows, float32."""
        values = self._values[rows].astype(np.float32, copy=False)
        return values if self._scale is None else values * self._scale[rows][:, None]
