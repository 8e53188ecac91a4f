"""Checks, before a run starts, that a data set holds the columns that its features name."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from laser_jax.features import FeatureConfig, FieldConfig, rows_of
from laser_jax.requests import Requests, split_type
from laser_jax.vault import UnknownFieldError

logger = logging.getLogger(__name__)

MOST_UNKNOWN = 0.5  # share of values that may read row 0 of their table without a word


def check_columns(vault: Any, requests: Requests, features: FeatureConfig) -> None:
    """Whether vault and requests hold what the features name.

    Raises:
      UnknownFieldError: the vault has no such field. ValueError: the requests have no such column, or a column is of
        another type or size.
    """
    known = {field.name: field for field in vault.schema.fields}
    for field in (*features.item, *features.event):
        if field.name not in known:
            raise UnknownFieldError(
                f"{vault.path}: features name the event field {field.name!r}; the vault has {', '.join(known)}"
            )
        _check_type(vault.path, field, known[field.name].type, known[field.name].size)
    if vault.schema.user != requests.user_type:
        raise ValueError(
            f"{requests.path} has {requests.user_type} users, {vault.path} has "
            f"{vault.schema.user}: write requests with the vault's user type"
        )
    for fields, columns, what in (
        (features.item, requests.columns, "candidate"),
        (features.context, requests.context_columns, "context"),
    ):
        for field in fields:
            if field.name not in columns:
                raise ValueError(
                    f"{requests.path}: features name the {what} column {field.name!r}; there is "
                    f"{', '.join(columns) or 'none'}"
                )
            dtype, size = split_type(columns[field.name])
            _check_type(requests.path, field, dtype, size)
            if what == "candidate" and size != known[field.name].size:
                raise ValueError(
                    f"{requests.path}: candidate column {field.name!r} holds {size or 1} values, the vault's "
                    f"field {known[field.name].size or 1}: write requests with as many"
                )


def tell_cut_codes(vault: Any, features: FeatureConfig) -> None:
    """Warns of tables that have too few rows for the strings that the vault knows."""
    strings = {field.name for field in vault.schema.fields if field.type == "string"}
    for field in (*features.item, *features.event):
        if field.ids == "code" and field.name in strings:
            known = len(vault.dictionary(field.name))
            if known >= field.rows:
                logger.warning(
                    "%s knows %d values of %r, its table has %d rows: %d values share row 0 with what is unknown. Give "
                    "it rows=%d or more",
                    vault.path, known, field.name, field.rows, known - field.rows + 1, known + 1,
                )  # fmt: skip


def tell_unknown_codes(vault: Any, what: str, fields: Sequence[FieldConfig], columns: Mapping[str, np.ndarray]) -> None:
    """Warns of fields with ids="code" most of whose numbers have no row of their own.

    Not of strings, see `tell_cut_codes`; nor of several values, since what fills up is unknown on purpose.

    Args:
      what: the columns are of, for the message. columns: field -> some values of it.
    """
    strings = {field.name for field in vault.schema.fields if field.type == "string"}
    for field in fields:
        if field.ids != "code" or field.pool or field.name in strings:
            continue
        values = columns[field.name]
        unknown = rows_of(field, values, None) == 0
        if values.size and unknown.mean() > MOST_UNKNOWN:
            logger.warning(
                "%d %% of the %s have a %r, such as %d, that shares row 0 with all that is unknown: ids='code' has "
                "rows for 0 to %d. Give it more rows, or ids='vocab', 'hash' or 'dictionary'",
                100 * unknown.mean(), what, field.name, values[unknown][0], field.rows - 2,
            )  # fmt: skip


def _check_type(path: str, field: FieldConfig, dtype: str, size: int | None) -> None:
    """Raises ValueError if a column of this type, of `size` values each, cannot be what its field says."""
    several = bool(field.pool) or field.ids == "vector"
    if (size is not None) != several or (field.ids == "vector" and size != field.width):
        raise ValueError(
            f"{path}: field {field.name!r} holds {size or 1} values each, which ids={field.ids!r}, "
            f"pool={field.pool!r}, width={field.width} do not fit: pool integers, use ids='vector' for numbers"
        )
    if dtype.startswith("float") and field.ids not in ("log", "vector"):
        raise ValueError(
            f"{path}: field {field.name!r} is {dtype}, which ids={field.ids!r} would cut to whole numbers: use "
            "ids='log'"
        )
