"""Columns as a caller gives them -> columns as the schema wants them, or a SchemaError that says why not."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from laser_jax.schema import Field, Schema, SchemaError


class Coded:
    """Strings given as codes into a list of values, so that equal ones are looked at once."""

    def __init__(self, codes: np.ndarray, values: list[str]):
        self.codes = codes
        self.values = values

    def __len__(self) -> int:
        return len(self.codes)


def check_columns(schema: Schema, columns: Mapping[str, Any]) -> dict[str, Any]:
    """All columns of one write, checked and converted.

    Returns:
      `time` int64 [N]; `user` int64 [N] or Coded; each field [N] or [N, size] of its dtype, strings as Coded.

    Raises:
      SchemaError: a column is missing, unknown, of the wrong type, length or range, or holds a null or a
        vector with a number that is not finite.
    """
    wanted = ("user", "time", *schema.names)
    for name in columns:
        if name not in wanted:
            raise SchemaError(f"column {name!r} is not in the schema; its columns: {', '.join(wanted)}")
    for name in wanted:
        if name not in columns:
            raise SchemaError(f"column {name!r} is missing; got: {', '.join(columns) or 'none'}")
    checked: dict[str, Any] = {}
    checked["user"] = _users(schema, columns["user"])
    checked["time"] = _times(schema, columns["time"])
    for field in schema.fields:
        checked[field.name] = _field(field, columns[field.name])
    for name, column in checked.items():
        if len(column) != len(checked["user"]):
            raise SchemaError(f"column {name!r} has {len(column)} rows, user has {len(checked['user'])}")
    return checked


def _users(schema: Schema, column: Any) -> Any:
    if schema.user == "string":
        users = _strings("user", column)
        empty = [code for code, value in enumerate(users.values) if not value]
        rows = np.flatnonzero(np.isin(users.codes, empty)) if empty else ()
        if len(rows):
            raise SchemaError(f"column 'user', row {rows[0]}: null user (an empty string); drop the event")
        return users
    array = _array("user", column, 1, np.dtype(np.int64))
    _integers("user", array, "int64")
    _range("user", array, np.iinfo(np.int64).min, np.iinfo(np.int64).max)
    return array.astype(np.int64)


def _times(schema: Schema, column: Any) -> np.ndarray:
    array = _array("time", column, 1, np.dtype(np.int64))
    if array.dtype.kind == "M":
        _no_null("time", np.isnat(array))
        array = array.astype(f"datetime64[{schema.time_unit}]").astype(np.int64)
    _integers("time", array, "an integer")
    bad = np.flatnonzero((array < 0) | (array >= schema.time_limit))
    if len(bad):
        kind = "negative" if array[bad[0]] < 0 else "absurd"
        raise SchemaError(
            f"column 'time', row {bad[0]}: {kind} time {array[bad[0]]}; need 0 <= time < {schema.time_limit} "
            f"in {schema.time_unit} since 1970 (is the unit right?)"
        )
    return array.astype(np.int64)


def _field(field: Field, column: Any) -> Any:
    if field.type == "string":
        return _strings(field.name, column)
    array = _array(field.name, column, 1 if field.size is None else 2, field.dtype)
    if field.size is not None and array.shape[1] != field.size:
        raise SchemaError(f"column {field.name!r} has vectors of {array.shape[1]} values, the schema says {field.size}")
    kind = field.dtype.kind
    if field.size is not None and array.dtype.kind == "f":
        # One such number spoils every sum that the vector is part of. A scalar that is NaN is a missing one.
        _refuse(field.name, array, ~_finite(array), "in a vector is no finite number; drop the event or fill it")
    if array.dtype == field.dtype:
        return array.copy()  # it may wait in a buffer while the caller fills theirs anew
    if kind == "b":
        if array.dtype.kind != "b":
            raise _wrong_type(field.name, array.dtype, "bool")
    elif kind in "iu":
        _integers(field.name, array, field.type)
        _range(field.name, array, np.iinfo(field.dtype).min, np.iinfo(field.dtype).max)
    else:
        if array.dtype.kind not in "iuf":
            raise _wrong_type(field.name, array.dtype, field.type)
        if array.dtype.itemsize > field.dtype.itemsize or array.dtype.kind != "f":
            limit = float(np.finfo(field.dtype).max)
            _refuse(
                field.name,
                array,
                ((array > limit) | (array < -limit)) & np.isfinite(array),
                f"does not fit {field.type}",
            )
    return array.astype(field.dtype)


def _finite(array: np.ndarray) -> np.ndarray:
    """Which numbers are finite."""
    if array.dtype == np.float16:
        # By the bits of the exponent: numpy converts each half float, which takes five times as long.
        return (array.view(np.uint16) & 0x7C00) != 0x7C00
    return np.isfinite(array)


def _array(name: str, column: Any, ndim: int, dtype: np.dtype) -> np.ndarray:
    if isinstance(column, Coded):
        raise SchemaError(f"column {name!r} holds strings; the schema says {dtype}")
    if isinstance(column, np.ma.MaskedArray):
        _no_null(name, np.ma.getmaskarray(column))
    array = np.asarray(column)
    if array.dtype == np.float64 and dtype == np.uint64 and isinstance(column, (list, tuple)):
        # Of small and large integers together numpy makes floats, which round.
        plain = np.asarray(column, object)
        if all(isinstance(one, (int, np.integer)) and 0 <= one < 2**64 for one in plain.ravel()):
            array = plain.astype(dtype)
    if array.dtype.kind == "O":
        _no_null(name, np.array([_is_null(value) for value in array.ravel()], bool))
        raise SchemaError(
            f"column {name!r} holds Python objects such as {array.ravel()[:1].tolist()}: give plain numbers"
        )
    if array.ndim != ndim:
        shape = "[rows]" if ndim == 1 else "[rows, size]"
        raise SchemaError(f"column {name!r} has shape {array.shape}, need {shape}")
    # An empty list has no type of its own.
    return array.astype(dtype) if array.size == 0 and array.dtype == np.float64 else array


def _strings(name: str, column: Any) -> Coded:
    if isinstance(column, Coded):
        return column
    if isinstance(column, np.ma.MaskedArray):
        _no_null(name, np.ma.getmaskarray(column))
    # As objects: numpy would turn the numbers of a mixed list into strings, and cut trailing zero bytes.
    array = np.asarray(column, object) if isinstance(column, (list, tuple)) else np.asarray(column)
    if array.ndim != 1:
        raise SchemaError(f"column {name!r} has shape {array.shape}, need [rows]")
    if array.dtype.kind not in "OUT" and len(array):
        raise _wrong_type(name, array.dtype, "string")
    found: dict[Any, int] = {}
    codes = np.fromiter((found.setdefault(value, len(found)) for value in array.tolist()), np.int64, len(array))
    for value, code in found.items():
        row = int(np.argmax(codes == code)) if not isinstance(value, str) else None
        if row is not None and _is_null(value):
            raise SchemaError(f"column {name!r}, row {row}: null {name}; drop the event or fill it")
        if row is not None:
            raise SchemaError(f"column {name!r}, row {row}: {value!r} is not a string")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise SchemaError(f"column {name!r}: {value!r} cannot be written as UTF-8: {error.reason}") from error
    return Coded(codes, list(found))


def _is_null(value: Any) -> bool:
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def _integers(name: str, array: np.ndarray, wanted: str) -> None:
    if array.dtype.kind == "f" and name in ("user", "time"):
        _no_null(name, np.isnan(array))
    if array.dtype.kind not in "iu":
        raise _wrong_type(name, array.dtype, wanted)


def _range(name: str, array: np.ndarray, low: int, high: int) -> None:
    info = np.iinfo(array.dtype)
    outside = np.zeros(array.shape, bool)
    if info.min < low:
        outside |= array < low
    if info.max > high:
        outside |= array > high
    _refuse(name, array, outside, f"is outside {low}..{high}")


def _refuse(name: str, array: np.ndarray, bad: np.ndarray, why: str) -> None:
    if bad.any():
        place = np.argwhere(bad)[0]
        raise SchemaError(f"column {name!r}, row {place[0]}: {array[tuple(place)]} {why}")


def _no_null(name: str, null: np.ndarray) -> None:
    if null.any():
        row = np.argwhere(null)[0][0]
        raise SchemaError(f"column {name!r}, row {row}: null {name}; drop the event or fill it")


def _wrong_type(name: str, got: np.dtype, wanted: str) -> SchemaError:
    return SchemaError(f"column {name!r} has type {got}, the schema says {wanted}")
