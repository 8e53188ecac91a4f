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

from laser_jax.schema import Field, Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault import log_files
from laser_jax.vault.columns import Coded
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.log_check import Survey, check
from laser_jax.vault.reader import Vault
from laser_jax.vault.writer import VaultWriter

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

    Files are ordered by name; each must have every column of the schema, found by its name, others are ignored. CSV
    files have a header, UTF-8, cells split at commas (tabs in .tsv) and quoted by double quotes or not at all; an
    empty cell is an empty string, a missing float (NaN), or an error; elements of vectors are finite. Repeated events
    are treated as the schema says, wherever in the log they are (only an event key that comes back at another time, in
    a history too long for the writer's buffer, a quarter of `memory`, stays). Nothing is left at `out` if anything
    fails; what a killed ingestion left there, the next one to the same place removes. Errors count rows from 0, without
    the header.

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

    if memory < MIN_MEMORY:
        raise VaultError(f"memory of {memory >> 20} MB is too little to sort in: give {MIN_MEMORY >> 20} MB or more")
    if threads is not None and threads < 1:
        raise VaultError(f"threads must be at least 1, got {threads}; leave it out to use every core")
    started = time.monotonic()
    say = progress or (lambda line: None)
    out = os.path.abspath(out)
    try:
        writer = VaultWriter(out, schema, buffer_events(schema, memory // 4))
        files = log_files.find_files(inputs)
        with writer, spill_place(out) as spill:
            with log_files.connect(spill, int(memory * 0.6), threads or os.cpu_count() or 1) as connection:
                # DuckDB counts its progress only with the bar on; it need not draw it.
                connection.execute("SET enable_progress_bar = true; SET enable_progress_bar_print = false")
                plain_times = log_files.create_view(connection, schema, files)
                survey = Survey.of(connection, schema)
                check(schema, survey, files, plain_times)
                say(f"{survey.events:,} events in {len(files)} file{'s' * (len(files) > 1)}: sorting")
                with _Ticker(connection, say) as ticker:
                    _stream(_sorted_batches(connection, schema), writer, survey.events, say, ticker)
    except duckdb.Error as error:
        raise log_files.explained(error, duckdb) from error
    except OSError as error:
        raise UnavailableError(f"vault {out} cannot be written: {error}") from error
    opened = Vault(out)
    return Report(
        out,
        opened.num_events,
        len(opened),
        len(opened.state.parts),
        writer.duplicates_dropped,
        time.monotonic() - started,
    )


@contextlib.contextmanager
def spill_place(out: str) -> Iterator[str]:
    """A directory for what does not fit into memory: the next writer clears it if this process is killed."""
    spill = os.path.join(out, vault_format.PARTS, "spill")
    os.makedirs(spill)
    yield spill
    # After an error the writer removes everything.
    shutil.rmtree(spill)


def _sorted_batches(connection: Any, schema: Schema) -> Any:
    """Record batches of all events of the view `log`, columns as in columns_of, in the order of the vault."""
    names = [column.name for column in log_files.columns_of(schema)]
    columns = [f"c{i}" for i in range(len(names))]
    if schema.time_limit <= 1 << 32:
        # Half the bytes: DuckDB's sort is the faster the shorter its keys are.
        columns[1] = "c1::UINTEGER AS c1"
    key = f"c{names.index(schema.event_key)}, " if schema.event_key else ""
    query = f"SELECT {', '.join(columns)} FROM log ORDER BY c0, c1, {key}place"
    return connection.sql(query).to_arrow_reader(_BATCH_ROWS)


def _stream(batches: Any, writer: VaultWriter, total: int, say: Callable[[str], None], ticker: "_Ticker") -> None:
    """Sorted record batches into the writer; `ticker` falls silent when the first one is there."""
    columns = log_files.columns_of(writer.schema)
    done, started, spoken = 0, time.monotonic(), time.monotonic()
    for batch in batches:
        ticker.stop()
        writer.write({column.name: column_of(column.field, batch.column(i)) for i, column in enumerate(columns)})
        done += len(batch)
        now = time.monotonic()
        if now - spoken >= 1:
            rate = done / (now - started)
            say(f"writing {done:,} of {total:,} events, {rate:,.0f}/s, {(total - done) / rate:.0f} s left")
            spoken = now


def column_of(field: Field, array: Any) -> Any:
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


def buffer_events(schema: Schema, memory: int) -> int:
    """Rows that a writer may buffer in so much memory: raw, sorted and paged copies of each."""
    row = 16 + sum(field.dtype.itemsize * (field.size or 1) for field in schema.fields)
    return max(1024, memory // (row * 4 + 64))


def print_progress(line: str) -> None:
    """A progress line on stderr."""
    print(line, file=sys.stderr, flush=True)
