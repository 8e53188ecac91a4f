"""What the executors of a Spark ingestion do: check log files, read them, write parts. Knows nothing of pyspark."""

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from laser_jax.schema import Schema
from laser_jax.vault import log_files
from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.ingest import column_of
from laser_jax.vault.log_check import Survey
from laser_jax.vault.part_buffer import PartBuffer

#: Kinds of the rows that `survey` gives, besides the numbers of string fields.
SURVEY, ERROR = -1, -2
#: Rows in a record batch of `read`, and bytes of their fields, at most.
_BATCH_ROWS, _BATCH_BYTES = 1 << 15, 1 << 26
_SIGN = np.uint64(1 << 63)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What every task has to know.

    Attributes:
      schema: of the events.
      files: of the log, in order.
      folder: where parts go.
      spill: directory for DuckDB.
      buffer_events: rows that become a part.
      memory: bytes for DuckDB.
      dictionaries: string field -> parquet file of `value` and `code`.
    """

    schema: Schema
    files: list[str]
    folder: str
    spill: str
    buffer_events: int
    memory: int
    dictionaries: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def record(self) -> np.dtype:
        """All fields of an event in one value."""
        shapes = [
            (field.name, field.dtype, () if field.size is None else (field.size,)) for field in self.schema.fields
        ]
        return np.dtype(shapes)


#: Columns of the rows of each step, in Spark's words. An event's fields go through Spark as one value, bit for bit:
#: Spark knows neither unsigned numbers nor half floats.
SURVEY_COLUMNS = "kind int, value string"
WRITE_COLUMNS = "partition int, parts string"


def read_columns(schema: Schema) -> str:
    """Columns of what `read` gives, keys of the order first."""
    return f"user {'string' if schema.user == 'string' else 'long'}, time long, key long, place long, fields binary"


def survey(plan: Plan, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """File numbers -> what is to be said of each file: its Survey or an error, and the distinct strings of fields."""
    for number in _numbers(batches):
        try:
            with _opened(plan, number) as connection:
                found = Survey.of(connection, plan.schema).to_json()
                yield _kinds([SURVEY], [json.dumps({"file": number, "survey": found})])
                for i, column in enumerate(log_files.columns_of(plan.schema)):
                    if column.field.type == "string" and column.name != "user":
                        values = connection.sql(f"SELECT DISTINCT c{i} FROM log WHERE c{i} IS NOT NULL")
                        for batch in values.to_arrow_reader(_BATCH_ROWS):
                            yield _kinds([i - 2] * len(batch), batch.column(0))
        except VaultError as error:
            value = {"file": number, "type": type(error).__name__, "text": str(error)}
            yield _kinds([ERROR], [json.dumps(value)])


def read(plan: Plan, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """File numbers -> their events, columns as in read_columns."""
    columns = log_files.columns_of(plan.schema)
    selected, joins = [], []
    for i, column in enumerate(columns):
        if column.name in plan.dictionaries:
            source = f"read_parquet({log_files.quoted(plan.dictionaries[column.name])})"
            joins.append(f"LEFT JOIN {source} d{i} ON c{i} = d{i}.value")
            selected.append(f"d{i}.code AS c{i}")
        else:
            selected.append(f"c{i}")
    size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(plan.record.itemsize, 1)))
    for number in _numbers(batches):
        place = f"place + {number << log_files.ROW_BITS}"
        with _opened(plan, number) as connection:
            query = connection.sql(f"SELECT {', '.join(selected)}, {place} AS place FROM log {' '.join(joins)}")
            for batch in query.to_arrow_reader(size):
                yield _packed(plan, batch)


def write(plan: Plan, batches: Iterable[pa.RecordBatch], partition: int) -> Iterator[pa.RecordBatch]:
    """Sorted events, as `read` gives them, into parts -> the parts' entries for the manifest."""
    _check_place(plan)
    buffer = PartBuffer(plan.folder, plan.schema, plan.buffer_events)
    try:
        with contextlib.closing(buffer):
            for batch in batches:
                if len(batch):
                    buffer.add(_unpacked(plan, batch))
            buffer.finish()
    except BaseException:
        for name in buffer.started:
            shutil.rmtree(os.path.join(plan.folder, name), ignore_errors=True)
        raise
    result = json.dumps({"parts": buffer.parts, "duplicates_dropped": buffer.duplicates_dropped})
    yield pa.record_batch({"partition": pa.array([partition], pa.int32()), "parts": pa.array([result])})


@contextlib.contextmanager
def _opened(plan: Plan, number: int) -> Iterator[Any]:
    """A connection to DuckDB whose view `log` is one file; its errors are those of a vault."""
    import duckdb

    _check_place(plan)
    try:
        with tempfile.TemporaryDirectory(dir=plan.spill) as spill:
            with log_files.connect(spill, plan.memory, threads=1) as connection:
                log_files.create_view(connection, plan.schema, [plan.files[number]])
                yield connection
    except duckdb.Error as error:
        raise log_files.explained(error, duckdb) from error
    except OSError as error:
        raise UnavailableError(f"{plan.files[number]} cannot be read: {error}") from error


def _check_place(plan: Plan) -> None:
    """The driver has made the directory before any task began."""
    if not os.path.isdir(plan.spill):
        raise UnavailableError(
            f"{plan.folder}, where the vault is built, is not on executor {socket.gethostname()}: --out must be a "
            "directory that all executors see under the same name; from there `publish` takes it to an object store"
        )


def _numbers(batches: Iterable[pa.RecordBatch]) -> Iterator[int]:
    for batch in batches:
        yield from batch.column(0).to_pylist()


def _kinds(kinds: list[int], values: Any) -> pa.RecordBatch:
    values = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    return pa.record_batch({"kind": pa.array(kinds, pa.int32()), "value": values})


def _packed(plan: Plan, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Columns as DuckDB gives them -> columns as in read_columns."""
    schema = plan.schema
    rows = np.empty(len(batch), plan.record)
    for i, field in enumerate(schema.fields):
        column = batch.column(i + 2)
        if field.type == "string" and column.null_count:
            raise UnavailableError(f"a value of {field.name!r} came while the log was read: it must not change")
        rows[field.name] = column.to_numpy() if field.type == "string" else column_of(field, column)
    key = np.zeros(len(batch), np.int64)
    if schema.event_key is not None:
        key = rows[schema.event_key]
        # As signed numbers, in the order of the unsigned ones.
        key = (key ^ _SIGN).view(np.int64) if key.dtype == np.uint64 else key.astype(np.int64)
    ends = np.arange(len(batch) + 1, dtype=np.int32) * plan.record.itemsize
    fields = pa.Array.from_buffers(pa.binary(), len(batch), [None, pa.py_buffer(ends), pa.py_buffer(rows.tobytes())])
    arrays = {"user": batch.column(0), "time": batch.column(1), "key": pa.array(key)}
    return pa.record_batch(arrays | {"place": batch.column(batch.num_columns - 1), "fields": fields})


def _unpacked(plan: Plan, batch: pa.RecordBatch) -> dict[str, Any]:
    """Columns as in read_columns -> columns as PartBuffer takes them, none of them a view of the batch."""
    user, time, fields = (batch.column(name) for name in ("user", "time", "fields"))
    if plan.schema.user == "string":
        coded = user.dictionary_encode()
        users: Any = Coded(coded.indices.to_numpy().astype(np.int64), coded.dictionary.to_pylist())
    else:
        users = user.to_numpy().copy()
    rows = {"user": users, "time": time.to_numpy().copy()}
    if plan.schema.fields:
        _, offsets, data = fields.buffers()
        width = np.int64 if pa.types.is_large_binary(fields.type) else np.int32
        start = int(np.frombuffer(offsets, width, 1, fields.offset * np.dtype(width).itemsize)[0])
        records = np.frombuffer(data, plan.record, len(batch), start)
        rows |= {name: np.ascontiguousarray(records[name]) for name in plan.schema.names}
    return rows
