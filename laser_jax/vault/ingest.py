"""Raw logs -> vault, on DuckDB: parquet and CSV (also .gz, .zst), sorted out of core in bounded memory."""

import dataclasses
import glob
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from laser_jax.schema import Field, Schema, SchemaError
from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.writer import VaultWriter

_SQL_TYPES = {
    "bool": "BOOLEAN",
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint8": "UTINYINT",
    "uint16": "USMALLINT",
    "uint32": "UINTEGER",
    "uint64": "UBIGINT",
    "float16": "FLOAT",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
}
_INTEGERS = {sql for name, sql in _SQL_TYPES.items() if "int" in name} | {"HUGEINT", "UHUGEINT"}
_FLOATS = _INTEGERS | {"FLOAT", "DOUBLE"}
_CSV = re.compile(r"\.(csv|tsv)(\.gz|\.zst)?$")
_PARQUET = re.compile(r"\.(parquet|pq)$")
#: Rows of a record batch on their way from DuckDB to the writer.
_BATCH_ROWS = 1 << 17
#: DuckDB's readers and sort do not work in less.
MIN_MEMORY = 256 << 20


@dataclasses.dataclass(frozen=True)
class Report:
    """What an ingestion did."""

    path: str
    events: int
    users: int
    parts: int
    duplicates_dropped: int
    seconds: float

    def __str__(self) -> str:
        dropped = f", {self.duplicates_dropped:,} repeated ones dropped" if self.duplicates_dropped else ""
        rate = self.events / max(self.seconds, 1e-9)
        return (
            f"{self.events:,} events of {self.users:,} users{dropped} in {self.parts} parts, "
            f"{self.seconds:.1f} s ({rate:,.0f} events/s): {self.path}"
        )


def ingest(
    schema: Schema,
    inputs: str | list[str],
    out: str,
    memory: int = 2 << 30,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Builds a vault from log files, sorted by (user, time, event key if any, file, row in file).

    Files are ordered by name. Columns of the log are found by the names of the schema's; others are ignored.
    Repeated events are treated as the schema says. Nothing is left at `out` if anything fails.

    Args:
      schema: of the events; also how CSV columns are read.
      inputs: glob pattern or patterns of parquet or CSV files (.csv, .tsv, also .gz and .zst).
      out: directory of the new vault. What does not fit into memory is spilled beside it.
      memory: bytes to use for sorting and writing; the process itself takes some 250 MB more.
      threads: of DuckDB; None uses every core.
      progress: called with a line now and then.

    Raises:
      SchemaError: a column is missing or of the wrong type, a null, an impossible time, a log without events.
      VaultError: no such input, and what `laser_jax.vault.create` raises.
      UnavailableError: a file cannot be read or the disk is full.
    """
    import duckdb

    from laser_jax import vault

    if memory < MIN_MEMORY:
        raise VaultError(f"memory of {memory >> 20} MB is too little to sort in: give {MIN_MEMORY >> 20} MB or more")
    started = time.monotonic()
    say = progress or (lambda line: None)
    out = os.path.abspath(out)
    writer = vault.create(out, schema, buffer_events=_buffer_events(schema, memory))
    log = _Log(schema, _files(inputs))
    os.makedirs(os.path.dirname(out), exist_ok=True)
    spill = tempfile.mkdtemp(prefix=os.path.basename(out) + ".spill-", dir=os.path.dirname(out))
    try:
        connection = duckdb.connect(
            config={
                "temp_directory": spill,
                "memory_limit": f"{int(memory * 0.6) >> 20}MB",
                "threads": threads or os.cpu_count() or 1,
                "preserve_insertion_order": True,
            }
        )
        with connection:
            # DuckDB counts its progress only with the bar on; it need not draw it.
            connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
            log.open(connection)
            total = log.check(connection)
            say(f"{total:,} events in {len(log.files)} files: sorting")
            with writer, _Ticker(connection, say) as ticker:
                _stream(log, connection, writer, total, say, ticker)
    except duckdb.Error as error:
        raise _explained(error, duckdb) from error
    finally:
        shutil.rmtree(spill)
    opened = vault.open(out)
    return Report(
        out,
        opened.num_events,
        len(opened),
        len(opened.index.parts),
        writer.duplicates_dropped,
        time.monotonic() - started,
    )


class _Log:
    """The log files as one DuckDB view of the schema's columns."""

    def __init__(self, schema: Schema, files: list[str]):
        self.schema = schema
        self.files = files
        self.is_csv = all(_CSV.search(file) for file in files)
        if not self.is_csv and not all(_PARQUET.search(file) for file in files):
            odd = next(file for file in files if not _PARQUET.search(file))
            raise VaultError(
                f"{odd}: logs must be all parquet (.parquet, .pq) or all CSV (.csv, .tsv, also .gz or .zst)"
            )

    def open(self, connection: Any) -> None:
        """Creates the view `log` of the columns, their file and row, and checks the columns' types."""
        listed = "[" + ", ".join(_quote(file) for file in self.files) + "]"
        if self.is_csv:
            options = "header = true, nullstr = '', all_varchar = true, buffer_size = 8000000"
            source = f"read_csv({listed}, filename = '__file', {options})"
        else:
            source = f"read_parquet({listed}, filename = '__file', file_row_number = true)"
        found = {row[0]: row[1] for row in connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()}
        selected = []
        for name in ("user", "time", *self.schema.names):
            if name not in found:
                columns = [column for column in found if column not in ("__file", "file_row_number")]
                raise SchemaError(f"{self.files[0]}: column {name!r} is missing; its columns: {', '.join(columns)}")
            selected.append(f"{self._expression(name, found[name])} AS {_name(name)}")
        # Without a row number in the reader, rows are counted as they come: files in order, rows in order.
        row = "row_number() OVER ()" if self.is_csv else "file_row_number"
        columns = ", ".join(selected)
        connection.execute(f"CREATE VIEW log AS SELECT {columns}, __file, {row} AS __row FROM {source}")

    def _expression(self, name: str, found: str) -> str:
        """SQL that gives a column in the schema's type."""
        column = _name(name)
        if name == "time" and found.startswith(("TIMESTAMP", "DATE")):
            unit = 1000 if self.schema.time_unit == "s" else 1
            return f"(epoch_ms({column}::TIMESTAMP) // {unit})"
        field = Field("column", self.schema.user) if name == "user" else None
        if name not in ("user", "time"):
            field = self.schema.field(name)
        sql = "BIGINT" if field is None else _SQL_TYPES[field.type]
        wanted = sql if field is None or field.size is None else f"{sql}[{field.size}]"
        if self.is_csv:
            return self._parsed(name, column, wanted)
        element = found if field is None or field.size is None else re.sub(r"\[\d*\]$", "", found)
        if element == found and "[" in wanted:
            allowed: set[str] = set()
        elif sql in _INTEGERS:
            allowed = _INTEGERS
        elif sql in _FLOATS:
            allowed = _FLOATS
        else:
            allowed = {sql}
        if element not in allowed:
            raise SchemaError(
                f"{self.files[0]}: column {name!r} has type {found}, the schema says "
                f"{'an integer' if field is None else wanted}"
            )
        return f"CAST({column} AS {wanted})"

    def _parsed(self, name: str, column: str, wanted: str) -> str:
        """SQL that parses a CSV cell; an empty cell is the empty string or, in any other type, null."""
        if wanted == "VARCHAR":
            return column if name == "user" else f"coalesce({column}, '')"
        cast = f"CAST({column} AS {wanted})"
        if wanted not in _INTEGERS:
            return cast
        # DuckDB would round 1.5.
        message = f"{_quote(f'column {name!r}: ')} || {column} || ' is not an integer'"
        whole = f"{column} IS NULL OR regexp_full_match({column}, '\\s*[+-]?[0-9]+\\s*')"
        return f"CASE WHEN {whole} THEN {cast} ELSE CAST(error({message}) AS {wanted}) END"

    def check(self, connection: Any) -> int:
        """Number of events; SchemaError names file and row of a null or of an impossible time."""
        # A missing float is NaN; anything else that is missing has no value to stand for it.
        optional = {field.name for field in self.schema.scalars if field.dtype.kind == "f"}
        columns = ("user", "time", *self.schema.names)
        nulls = ", ".join(f"count(*) - count({_name(name)})" for name in columns)
        row = connection.execute(f'SELECT count(*), min("time"), max("time"), {nulls} FROM log').fetchall()[0]
        total, first, last, counts = row[0], row[1], row[2], row[3:]
        if total == 0:
            raise SchemaError(f"{self.files[0]} and {len(self.files) - 1} other files: the log holds no event")
        for name, count in zip(columns, counts, strict=True):
            if count and name not in optional:
                where = self._first(connection, f"{_name(name)} IS NULL")
                raise SchemaError(f"{where}: null {name} ({count:,} rows have none); drop these events or fill them")
        if self.schema.user == "string" and (where := self._first(connection, "\"user\" = ''")):
            raise SchemaError(f"{where}: null user (an empty string); drop the event")
        if first < 0 or last >= self.schema.time_limit:
            where = self._first(connection, f'"time" < 0 OR "time" >= {self.schema.time_limit}')
            bad, kind = (first, "negative") if first < 0 else (last, "absurd")
            raise SchemaError(
                f"{where}: {kind} time, such as {bad}; need 0 <= time < {self.schema.time_limit} in "
                f"{self.schema.time_unit} since 1970 (is the unit right?)"
            )
        return total

    def _first(self, connection: Any, condition: str) -> str:
        """File and row of the first event that fulfils a condition; empty if there is none."""
        query = f"SELECT __file, __row FROM log WHERE {condition} ORDER BY __file, __row LIMIT 1"
        for file, row in connection.execute(query).fetchall():
            return f"row {row} of all files" if self.is_csv else f"{file}, row {row}"
        return ""

    def sorted_query(self) -> str:
        """SQL of all events in the order of the vault."""
        columns = ", ".join(_name(name) for name in ("user", "time", *self.schema.names))
        key = f"{_name(self.schema.event_key)}, " if self.schema.event_key else ""
        return f'SELECT {columns} FROM log ORDER BY "user", "time", {key}__file, __row'


def _stream(
    log: _Log, connection: Any, writer: VaultWriter, total: int, say: Callable[[str], None], ticker: "_Ticker"
) -> None:
    """Sorted record batches into the writer; `ticker` falls silent when the first one is there."""
    reader = connection.sql(log.sorted_query()).to_arrow_reader(_BATCH_ROWS)
    done, started, spoken = 0, time.monotonic(), time.monotonic()
    for batch in reader:
        ticker.stop()
        columns = {"user": log.schema.user, "time": "int64"}
        values: dict[str, Any] = {
            name: _column(Field("column", kind), batch.column(name)) for name, kind in columns.items()
        }
        for field in log.schema.fields:
            values[field.name] = _column(field, batch.column(field.name))
        writer.write(values)
        done += len(batch)
        now = time.monotonic()
        if now - spoken >= 1:
            rate = done / (now - started)
            say(f"writing {done:,} of {total:,} events, {rate:,.0f}/s, {(total - done) / rate:.0f} s left")
            spoken = now


def _column(field: Field, array: Any) -> Any:
    """An Arrow column as the writer takes it."""
    if field.size is not None:
        return np.asarray(array.flatten()).reshape(-1, field.size)
    if field.type == "string":
        coded = array.dictionary_encode()
        return Coded(np.asarray(coded.indices).astype(np.int64), coded.dictionary.to_pylist())
    return array.to_numpy(zero_copy_only=False)


class _Ticker:
    """Says how far DuckDB is while it sorts, when it knows."""

    def __init__(self, connection: Any, say: Callable[[str], None]):
        self._connection = connection
        self._say = say
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        spoken = 0.0
        while not self._stop.wait(1.0):
            done = self._connection.query_progress()
            if done > spoken and done < 100:
                self._say(f"sorting: {done:.0f} %")
                spoken = done

    def __enter__(self) -> "_Ticker":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Says nothing more."""
        self._stop.set()

    def __exit__(self, *_: Any) -> None:
        self.stop()
        self._thread.join()


def _files(inputs: str | list[str]) -> list[str]:
    patterns = [inputs] if isinstance(inputs, str) else list(inputs)
    files: set[str] = set()
    for pattern in patterns:
        found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
        if not found:
            raise VaultError(f"input {pattern!r} matches no file")
        files.update(found)
    return sorted(files)


def _buffer_events(schema: Schema, memory: int) -> int:
    """Rows that the writer may buffer in a quarter of the memory: raw, sorted and paged copies of each."""
    row = 16 + sum(field.dtype.itemsize * (field.size or 1) for field in schema.fields)
    return max(1024, memory // 4 // (row * 4 + 64))


def _explained(error: Exception, duckdb: Any) -> VaultError:
    """DuckDB's error as one of a vault."""
    text = " ".join(str(error).split("\n\n")[0].split())
    if isinstance(error, (duckdb.ConversionException, duckdb.InvalidInputException)):
        return SchemaError(f"the log does not fit the schema: {text}")
    return UnavailableError(f"the log cannot be read or sorted: {text}")


def _name(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def print_progress(line: str) -> None:
    """A progress line on stderr."""
    print(line, file=sys.stderr, flush=True)
