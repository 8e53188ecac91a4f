"""Raw logs -> vault, on DuckDB: parquet and CSV (also .gz, .zst), sorted out of core in bounded memory."""

import contextlib
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from laser_jax.schema import TIME_LIMIT, Field, Schema, SchemaError
from laser_jax.vault import format as vault_format
from laser_jax.vault import log_files
from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.writer import VaultWriter

#: Rows of a record batch on their way from DuckDB to the writer.
_BATCH_ROWS = 1 << 17
#: DuckDB's readers and sort do not work in less.
MIN_MEMORY = 256 << 20
#: Times in milliseconds below it are of before March 1973: nobody logged then, these are seconds.
_FIRST_MS = 10**11


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

    Files are ordered by name; each must have every column of the schema, found by its name, others are ignored. CSV
    files have a header, UTF-8, cells split at commas (tabs in .tsv) and quoted by double quotes or not at all; an
    empty cell is an empty string, a missing float, or an error. Repeated events are treated as the schema says,
    wherever in the log they are (only an event key that comes back at another time, in a history too long for the
    writer's buffer, a quarter of `memory`, stays). Nothing is left at `out` if anything fails; what a killed ingestion
    left there, the next one to the same place removes. Errors count rows from 0, without the header.

    Args:
      schema: of the events; also how CSV columns are read.
      inputs: glob pattern or patterns of parquet or CSV files (.csv, .tsv, also .gz and .zst).
      out: directory of the new vault. What does not fit into memory is spilled there until the vault is whole.
      memory: bytes to use for sorting and writing; the process itself takes some 250 MB more.
      threads: of DuckDB, at least 1; None uses every core.
      progress: called with a line now and then.

    Raises:
      SchemaError: a column is missing or of the wrong type, a null, a value that does not fit its type, an impossible
        time, a CSV row that is none, a log without events.
      VaultError: no such input, and what `laser_jax.vault.create` raises.
      UnavailableError: a file cannot be read or written, or the disk is full.
    """
    import duckdb

    from laser_jax import vault

    if memory < MIN_MEMORY:
        raise VaultError(f"memory of {memory >> 20} MB is too little to sort in: give {MIN_MEMORY >> 20} MB or more")
    if threads is not None and threads < 1:
        raise VaultError(f"threads must be at least 1, got {threads}; leave it out to use every core")
    started = time.monotonic()
    say = progress or (lambda line: None)
    out = os.path.abspath(out)
    try:
        writer = vault.create(out, schema, buffer_events=_buffer_events(schema, memory))
        files = log_files.find_files(inputs)
        with writer, _spill_place(out) as spill:
            config = {
                "temp_directory": spill,
                "memory_limit": f"{int(memory * 0.6) >> 20}MB",
                "threads": threads or os.cpu_count() or 1,
                "preserve_insertion_order": True,
            }
            with duckdb.connect(config=config) as connection:
                # DuckDB counts its progress only with the bar on; it need not draw it.
                connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
                # Times with a zone must not depend on the machine's.
                connection.execute("SET TimeZone = 'UTC'")
                log = _Log(connection, schema, files)
                total = log.check()
                say(f"{total:,} events in {len(files)} file{'s' * (len(files) > 1)}: sorting")
                with _Ticker(connection, say) as ticker:
                    _stream(log, writer, total, say, ticker)
    except duckdb.Error as error:
        raise log_files.explained(error, duckdb) from error
    except OSError as error:
        raise UnavailableError(f"vault {out} cannot be written: {error}") from error
    opened = vault.open(out)
    return Report(
        out,
        opened.num_events,
        len(opened),
        len(opened.state.parts),
        writer.duplicates_dropped,
        time.monotonic() - started,
    )


@contextlib.contextmanager
def _spill_place(out: str) -> Iterator[str]:
    """A directory for DuckDB, under the writer's lock and among what the next writer clears if this one is killed."""
    spill = os.path.join(out, vault_format.PARTS, "spill")
    os.makedirs(spill)
    yield spill
    # After an error the writer removes everything.
    shutil.rmtree(spill)


class _Log:
    """The log files as DuckDB's view `log` (see log_files.create_view)."""

    def __init__(self, connection: Any, schema: Schema, files: list[str]):
        self.schema = schema
        self._connection = connection
        self._files = files
        self._columns = log_files.columns_of(schema)
        self._plain_times = log_files.create_view(connection, schema, files)

    def check(self) -> int:
        """Number of events; SchemaError names file, row and column of a value that no event may have."""
        counted = ["count(*)", "min(c1)", "max(c1)"]
        for i in range(len(self._columns)):
            counted += [f"count(*) FILTER (m{i})", f"count(*) FILTER (c{i} IS NULL AND NOT m{i})"]
        row = self._connection.execute(f"SELECT {', '.join(counted)} FROM log").fetchall()[0]
        total, first, last = row[:3]
        if total == 0:
            where = self._files[0] if len(self._files) == 1 else f"{len(self._files)} files, {self._files[0]} the first"
            raise SchemaError(f"{where}: the log holds no event")
        for i, (column, missing, bad) in enumerate(zip(self._columns, row[3::2], row[4::2], strict=True)):
            name = column.name
            if bad:
                where, value = self._first(f"c{i} IS NULL AND NOT m{i}", i)
                raise SchemaError(
                    f"{where}: column {name!r}: {value!r} is not of type {column.type} (in {_rows(bad)}); correct the "
                    "log, or change the schema"
                )
            # A missing float is NaN; anything else that is missing has no value to stand for it.
            if missing and (column.field.size is not None or column.field.dtype.kind != "f"):
                where, value = self._first(f"m{i}", i)
                shown = "null" if value is None else "empty"
                raise SchemaError(f"{where}: {shown} {name} (in {_rows(missing)}); drop these events or fill them")
        self._check_times(first, last)
        return total

    def _check_times(self, first: int, last: int) -> None:
        unit, limit = self.schema.time_unit, self.schema.time_limit
        if first < 0 or last >= limit:
            where, _ = self._first(f"c1 < 0 OR c1 >= {limit}", 1)
            bad, kind = (first, "negative") if first < 0 else (last, "absurd")
            hint = "is the unit right?"
            if self._plain_times and first >= 0 and unit == "s" and _FIRST_MS <= last < TIME_LIMIT["ms"]:
                hint = 'are these milliseconds? then set time_unit "ms" in the schema'
            raise SchemaError(
                f"{where}: {kind} time, such as {bad}; need 0 <= time < {limit} in {unit} since 1970 ({hint})"
            )
        if self._plain_times and unit == "ms" and last < _FIRST_MS:
            where, _ = self._first(f"c1 = {last}", 1)
            raise SchemaError(
                f"{where}: the newest time of the log is {last}: in milliseconds that is before March 1973, so these "
                'must be seconds; set time_unit "s" in the schema, or multiply the times by 1000'
            )

    def _first(self, condition: str, column: int) -> tuple[str, str | None]:
        """File and row of the first event that fulfils a condition, and what the log has in a column there."""
        query = f"SELECT file, row, s{column} FROM log WHERE {condition} ORDER BY file, row LIMIT 1"
        file, row, value = self._connection.execute(query).fetchall()[0]
        if log_files.is_csv(file):
            # Counted through all files.
            row -= self._connection.execute("SELECT min(row) FROM log WHERE file = ?", [file]).fetchall()[0][0]
        return f"{file}, row {row}", value if value is None or len(value) <= 100 else value[:100] + " ..."

    def sorted_batches(self) -> Any:
        """Record batches of all events, columns as in columns_of, in the order of the vault."""
        columns = ", ".join(f"c{i}" for i in range(len(self._columns)))
        names = [column.name for column in self._columns]
        key = f"c{names.index(self.schema.event_key)}, " if self.schema.event_key else ""
        query = f"SELECT {columns} FROM log ORDER BY c0, c1, {key}file, row"
        return self._connection.sql(query).to_arrow_reader(_BATCH_ROWS)


def _stream(log: _Log, writer: VaultWriter, total: int, say: Callable[[str], None], ticker: "_Ticker") -> None:
    """Sorted record batches into the writer; `ticker` falls silent when the first one is there."""
    columns = log_files.columns_of(log.schema)
    done, started, spoken = 0, time.monotonic(), time.monotonic()
    for batch in log.sorted_batches():
        ticker.stop()
        writer.write({column.name: _column(column.field, batch.column(i)) for i, column in enumerate(columns)})
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


def _buffer_events(schema: Schema, memory: int) -> int:
    """Rows that the writer may buffer in a quarter of the memory: raw, sorted and paged copies of each."""
    row = 16 + sum(field.dtype.itemsize * (field.size or 1) for field in schema.fields)
    return max(1024, memory // 4 // (row * 4 + 64))


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"


def print_progress(line: str) -> None:
    """A progress line on stderr."""
    print(line, file=sys.stderr, flush=True)
