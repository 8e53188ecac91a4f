"""The newest events that meet conditions: looks back step by step, no further than it must."""

from collections.abc import Callable
from typing import Any

import numpy as np

from laser_jax.schema import Field, SchemaError
from laser_jax.vault.errors import UnknownFieldError
from laser_jax.vault.format import PAGE

Rows = dict[str, np.ndarray]


def newest_that_meet(
    read: Callable[[int], Rows | None], conditions: Rows, n: int, limit: int
) -> tuple[Rows | None, int, bool]:
    """The newest n events that meet all conditions.

    Args:
      read: gives the newest so many events; None if there are none.
      conditions: field -> the values that it may have.
      n: events at most.
      limit: events to look at, at most.

    Returns:
      Rows or None, how many events were looked at, and whether nothing older is left.
    """
    scan = max(2 * n, PAGE)
    while True:
        scan = min(scan, limit)
        # One more than may be looked at, to know whether there is one.
        rows = read(scan + 1)
        if rows is None:
            return None, 0, True
        exhausted = len(rows["time"]) <= scan
        rows = {name: column[len(column) - min(scan, len(column)) :] for name, column in rows.items()}
        size = len(rows["time"])
        kept = np.ones(size, bool)
        for name, allowed in conditions.items():
            kept &= np.isin(rows[name], allowed)
        found = np.flatnonzero(kept)
        if len(found) >= n or exhausted or scan == limit:
            break
        scan *= 4
    found = found[len(found) - min(n, len(found)) :]
    if len(found) == n and n and found[0] > 0:
        # It need not have looked further back than that.
        size, exhausted = size - int(found[0]), False
    return {name: column[found] for name, column in rows.items()}, size, exhausted


def allowed_values(name: str, field: Field | None, value: Any, encode: Callable[[str, list[str]], Any]) -> np.ndarray:
    """The values of a field that a condition lets through; codes of a string field, by `encode`.

    Raises:
      UnknownFieldError: not a scalar field (`field` is None for time).
      SchemaError: a value is not of the field's type.
    """
    if field is None or field.size is not None:
        raise UnknownFieldError(f"where={name!r}: conditions are on scalar fields, before bounds time")
    listed = list(value) if isinstance(value, (list, tuple, set, frozenset, np.ndarray)) else [value]
    if field.type == "string":
        if not all(isinstance(one, str) for one in listed):
            raise SchemaError(f"where={name!r}: {value!r}: this field holds strings")
        return encode(name, listed)
    kinds = {"b": (bool, np.bool_), "f": (int, float, np.integer, np.floating)}
    kind = kinds.get(field.dtype.kind, (int, np.integer))
    for one in listed:
        if not isinstance(one, kind) or (isinstance(one, bool) and field.dtype.kind != "b"):
            raise SchemaError(f"where={name!r}: {one!r}: this field holds {field.type}")
    if field.dtype.kind in "iu":
        # What does not fit is in no event; a common type of all, as numpy finds it, could be a float, which rounds.
        limits = np.iinfo(field.dtype)
        return np.array([int(one) for one in listed if limits.min <= one <= limits.max], field.dtype)
    with np.errstate(over="ignore"):
        found = np.array(listed).astype(field.dtype)
    if field.dtype.kind == "f":
        # What is too large for the type is in no event either.
        found = found[np.isfinite(found) | ~np.isfinite(np.array(listed, np.float64))]
    return found
