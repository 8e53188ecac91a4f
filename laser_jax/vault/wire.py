"""Events as Arrow columns and back, and errors as text: what a service and its clients say to each other.

A string field travels as strings, or as the codes of the service's dictionary for clients that follow it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import flight

from laser_jax.schema import Field, Schema, SchemaError
from laser_jax.vault import errors
from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.history import Histories, History

#: Level 1: half the time of higher ones, within 3 % of their size. Answers are too small for threads to pay.
ZSTD = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", 1), use_threads=False)
PLAIN_READ = pa.ipc.IpcReadOptions(use_threads=False)
_NAMED = re.compile(r"\b([A-Z][A-Za-z]*Error): (.*)", re.DOTALL)
#: Characters of an error that are sent: gRPC has room for 8 KB in all.
_TEXT = 500
#: What gRPC adds behind a message.
_CONTEXT = re.compile(r"(\. Detail: \w+)?\.? gRPC client debug context: .*|\. Detail: \w+$", re.DOTALL)


def history_table(history: History, schema: Schema, coded: bool, metadata: Mapping[bytes, bytes]) -> pa.Table:
    """A history as a table: `time` and the fields that were read, one row an event.

    Args:
      history: that was read.
      schema: of the vault.
      coded: whether strings stay codes.
      metadata: of the table's schema.
    """
    columns = {}
    for name, values in history.columns.items():
        strings = None if coded else _strings_of(history, schema, name)
        columns[name] = _array(values) if strings is None else _dictionary(values, strings)
    return pa.table(columns).replace_schema_metadata(dict(metadata))


def histories_batch(histories: Histories, schema: Schema, coded: bool) -> pa.RecordBatch:
    """A batch of histories as lists: one row a user, in each column the list of its events' values."""
    offsets = pa.array(histories.offsets.astype(np.int32))
    columns = {}
    for name, values in histories.columns.items():
        strings = None if coded else _strings_of(histories, schema, name)
        flat = _array(values) if strings is None else pa.array(strings[values].tolist(), pa.string())
        columns[name] = pa.ListArray.from_arrays(offsets, flat)
    return pa.record_batch(columns)


def history_type(schema: Schema, fields: tuple[str, ...] | None, coded: bool) -> pa.Schema:
    """The Arrow schema of `histories_batch`."""
    names = [field.name for field in schema.scalars] if fields is None else list(dict.fromkeys(fields))
    found = [pa.field("time", pa.list_(pa.int64()))]
    for name in names:
        if name != "time":
            found.append(pa.field(name, pa.list_(_type(schema.field(name), coded))))
    return pa.schema(found)


def events_batch(schema: Schema, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Columns as `append` takes them, checked before, as a record batch."""
    arrays = {}
    for name in ("user", "time", *schema.names):
        column = columns[name]
        arrays[name] = _dictionary(column.codes, column.values) if isinstance(column, Coded) else _array(column)
    return pa.record_batch(arrays)


def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch that came over the wire, if it is what it says: nothing in it points beyond its own bytes.

    Raises:
      SchemaError: a column is damaged, or there twice.
    """
    try:
        names = batch.schema.names
    except UnicodeDecodeError as error:
        raise SchemaError(f"the name of a column is not UTF-8: {error}") from error
    for name in names:
        if names.count(name) > 1:
            raise SchemaError(f"column {name!r} is there {names.count(name)} times")
    for name, array in zip(names, batch.columns, strict=True):
        try:
            array.validate(full=True)
        except pa.ArrowException as error:
            raise SchemaError(f"column {name!r} is damaged: {error}") from error
        if len(array) != batch.num_rows:
            raise SchemaError(f"column {name!r} has {len(array)} rows, the batch {batch.num_rows}")
    return batch


def columns_of(batch: pa.RecordBatch) -> dict[str, Any]:
    """The columns of a record batch as numpy arrays, strings as Coded.

    Raises:
      SchemaError: a column holds nulls, or is of a type that no field has.
    """
    columns: dict[str, Any] = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
            raise SchemaError(f"column {name!r}, row {row}: null {name}; drop the event or fill it")
        columns[name] = _values(name, array)
    return columns


def split_lists(batch: pa.RecordBatch) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The inverse of `histories_batch` for coded strings: columns of all users, and offsets int64 [B + 1]."""
    offsets = np.zeros(1, np.int64)
    columns = {}
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        offsets = array.offsets.to_numpy().astype(np.int64)
        columns[name] = _values(name, array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        offsets = offsets - offsets[0]
    return columns, offsets


def error_to_send(error: VaultError) -> Exception:
    """What Flight sends of an error: UNAVAILABLE, INTERNAL for damage, UNKNOWN for what callers do wrong.

    INVALID_ARGUMENT would be the word for the last, but pyarrow sends that with a stack trace of the service.
    """
    text = f"{type(error).__name__}: {error}"
    if len(text) > _TEXT:
        text = f"{text[:_TEXT]} ... ({len(text)} characters)"
    if isinstance(error, UnavailableError):
        return flight.FlightUnavailableError(text)
    if isinstance(error, errors.CorruptionError):
        return flight.FlightInternalError(text)
    return flight.FlightServerError(text)


def error_received(error: Exception, where: str) -> Exception:
    """The vault's error that a service sent, or an UnavailableError that says why it did not answer."""
    if isinstance(error, VaultError):
        return error
    text = _CONTEXT.sub("", str(error))
    named = _NAMED.search(text)
    kind = getattr(errors, named[1], None) if named and named[1] in errors.__all__ else None
    if kind is not None:
        return kind(f"{where}: {named[2]}")
    if isinstance(error, flight.FlightTimedOutError):
        return UnavailableError(f"{where} did not answer in time")
    if isinstance(error, (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)):
        return UnavailableError(f"{where} refuses: {text}; set SEQVAULT_TOKEN to the service's token")
    if isinstance(error, (flight.FlightError, pa.ArrowException, OSError)):
        return UnavailableError(f"{where} does not answer: {text}")
    return error


def _strings_of(found: History | Histories, schema: Schema, name: str) -> np.ndarray | None:
    return found.dictionary(name) if name != "time" and schema.field(name).type == "string" else None


def _type(field: Field, coded: bool) -> pa.DataType:
    if field.type == "string":
        return pa.int32() if coded else pa.string()
    one = pa.from_numpy_dtype(field.dtype)
    return one if field.size is None else pa.list_(one, field.size)


def _array(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _dictionary(codes: np.ndarray, strings: Any) -> pa.Array:
    """Strings, of which only those that occur travel."""
    used, places = np.unique(codes, return_inverse=True)
    listed = [strings[code] for code in used.tolist()]
    return pa.DictionaryArray.from_arrays(pa.array(places.astype(np.int32)), pa.array(listed, pa.string()))


def _values(name: str, array: pa.Array) -> Any:
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        array = array.dictionary_encode()
        kind = array.type
    if pa.types.is_dictionary(kind):
        if array.dictionary.null_count:
            raise SchemaError(f"column {name!r}: its dictionary holds a null; drop these events or fill them")
        if not pa.types.is_integer(kind.value_type):
            codes = array.indices.to_numpy(zero_copy_only=False).astype(np.int64)
            return Coded(codes, array.dictionary.to_pylist())
        return array.dictionary_decode().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(kind):
        flat = array.flatten()
        if flat.null_count:
            raise SchemaError(f"column {name!r} holds a vector with a null; drop the event or fill it")
        return flat.to_numpy(zero_copy_only=False).reshape(len(array), kind.list_size)
    if pa.types.is_timestamp(kind):
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_primitive(kind):
        return array.to_numpy(zero_copy_only=False)
    raise SchemaError(f"column {name!r} has Arrow type {kind}; need numbers, booleans, strings or fixed-size lists")
