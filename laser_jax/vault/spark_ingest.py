"""Raw logs -> vault, on Spark: executors read logs, sort and write whole parts; the driver commits one manifest."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from laser_jax.schema import Schema
from laser_jax.vault import errors, log_files, spark_tasks
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.ingest import MIN_MEMORY, Report, buffer_events, spill_place
from laser_jax.vault.log_check import Survey, check
from laser_jax.vault.reader import Vault
from laser_jax.vault.spark_tasks import Plan
from laser_jax.vault.writer import VaultWriter

#: Fewer events are not worth a partition of their own.
_LEAST_EVENTS = 1 << 18
#: How long tasks of a job that failed may take to end.
_CANCEL_SECONDS = 30.0
#: Java's log, off from its start. Without an appender Spark would put its own settings in place of these.
_QUIET = "rootLogger.level = off\nappender.none.type = Null\nappender.none.name = none\n"
_QUIET += "rootLogger.appenderRef.none.ref = none\n"


def ingest_spark(
    schema: Schema,
    inputs: str | list[str],
    out: str,
    memory: int = 2 << 30,
    master: str | None = None,
    partitions: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Builds a vault from log files, as `laser_jax.vault.ingest.ingest` does: every user has the same history.

    Same files, checks, errors, order and duplicates; nothing is left if anything fails. The log files and the vault
    must be on a file system that all executors see under the same names. A log file is read by one task, so a log
    should have at least as many files as there are cores; distinct values of string fields must fit into the driver.

    It runs in the Spark session that is active, and else starts one of its own for this call, under `master`.

    Args:
      schema: of the events; also how CSV columns are read.
      inputs: glob pattern or patterns of parquet or CSV files (.csv, .tsv, also .gz and .zst).
      out: directory of the new vault.
      memory: bytes. A local session of its own has half of it as Java's heap and shares a quarter among the buffers of
        its tasks; Python and Java take some 300 MB more for each core. On a cluster a quarter is one task's buffer,
        and the session says the rest.
      master: of the session that is started: Spark's URL, or local[2]; the environment's SPARK_MASTER if left out,
        and all cores of this machine without it.
      partitions: tasks that sort and write; by default as many as cores, and more if the log is long.
      progress: called with a line now and then.

    Raises:
      SchemaError, VaultError, UnavailableError: as the other engine does; also if Spark cannot be started or fails.
    """
    import duckdb

    if memory < MIN_MEMORY:
        raise VaultError(f"memory of {memory >> 20} MB is too little to sort in: give {MIN_MEMORY >> 20} MB or more")
    if partitions is not None and partitions < 1:
        raise VaultError(f"partitions must be at least 1, got {partitions}; leave it out to have one a core")
    started = time.monotonic()
    say = progress or (lambda line: None)
    out = os.path.abspath(out)
    try:
        writer = VaultWriter(out, schema)
        files = log_files.find_files(inputs)
        with writer, spill_place(out) as spill:
            with log_files.connect(spill, MIN_MEMORY, threads=1) as connection:
                # Names and types of columns: the driver finds what is wrong with them before Spark starts.
                plain_times = log_files.create_view(connection, schema, files)
            with _session(master, memory, spill) as (spark, shared):
                folder = os.path.dirname(spill)
                # A quarter for parts. DuckDB needs little to read one file at a time.
                size = buffer_events(schema, memory // 4 // shared)
                plan = Plan(schema, files, folder, spill, size, MIN_MEMORY)
                job = _Job(spark, say)
                survey, strings = _survey(job, plan)
                check(schema, survey, files, plain_times)
                say(f"{survey.events:,} events in {len(files)} file{'s' * (len(files) > 1)}: sorting")
                plan = dataclasses.replace(plan, dictionaries=_write_dictionaries(spill, strings))
                parts, dropped = _write(job, plan, partitions or _partitions(job, plan, survey.events))
            written = sum(entry["events"] for entry in parts) + dropped
            if written != survey.events:
                raise UnavailableError(
                    f"the log changed while it was read: {survey.events:,} events were checked, {written:,} sorted"
                )
            writer.adopt(parts, strings, dropped)
    except duckdb.Error as error:
        raise log_files.explained(error, duckdb) from error
    except OSError as error:
        raise UnavailableError(f"vault {out} cannot be written: {error}") from error
    opened = Vault(out)
    seconds = time.monotonic() - started
    return Report(out, opened.num_events, len(opened), len(opened.state.parts), writer.duplicates_dropped, seconds)


class _Job:
    """Runs steps on Spark, with lines of progress; nothing runs on when a step fails or is interrupted."""

    def __init__(self, spark: Any, say: Callable[[str], None]):
        self.spark = spark
        self.context = spark.sparkContext
        self._say = say

    def files(self, step: Callable[..., Any], plan: Plan, columns: str) -> Any:
        """A data frame: a step that takes numbers of files, each file a task of its own."""
        count = len(plan.files)
        return self.step(self.spark.range(0, count, 1, count), functools.partial(step, plan), columns)

    def step(self, frame: Any, step: Callable[..., Any], columns: str) -> Any:
        """A data frame: another one's record batches through a step."""
        with _no_warnings():
            return frame.mapInArrow(step, columns)

    def collect(self, frame: Any, label: str) -> pa.Table:
        """The rows of a data frame."""
        group, done = f"laser_jax {uuid.uuid4()}", threading.Event()
        ticker = threading.Thread(target=self._tick, args=(group, label, done), daemon=True)
        self.context.setJobGroup(group, f"laser_jax ingestion: {label}", interruptOnCancel=True)
        ticker.start()
        try:
            with _no_warnings(), _explained():
                return frame.toArrow()
        except BaseException:
            self._cancel(group)
            raise
        finally:
            done.set()
            ticker.join()

    def _cancel(self, group: str) -> None:
        """Returns when no task writes any more: the caller is about to remove what there is."""
        self.context.cancelJobGroup(group)
        deadline, waited = time.monotonic() + _CANCEL_SECONDS, False
        while any(stage.numActiveTasks for stage in self._stages(group)) and time.monotonic() < deadline:
            waited = True
            time.sleep(0.1)
        if waited:
            # Spark gives a Python process two seconds to end by itself.
            time.sleep(3)

    def _stages(self, group: str) -> list[Any]:
        tracker = self.context.statusTracker()
        jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
        stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
        return [stage for stage in stages if stage]

    def _tick(self, group: str, label: str, done: threading.Event) -> None:
        spoken = ""
        while not done.wait(1.0):
            active = [stage for stage in self._stages(group) if stage.numActiveTasks]
            if active:
                line = f"{label}: {active[-1].numCompletedTasks} of {active[-1].numTasks} tasks"
                if line != spoken:
                    self._say(line)
                spoken = line


def _survey(job: _Job, plan: Plan) -> tuple[Survey, dict[str, list[str]]]:
    """What is in all files, and the values of each string field, in an order that depends on nothing else."""
    found = job.collect(job.files(spark_tasks.survey, plan, spark_tasks.SURVEY_COLUMNS).distinct(), "checking")
    kinds, values = found["kind"].combine_chunks(), found["value"].combine_chunks()

    def of(kind: int) -> list[str]:
        return values.filter(pa.compute.equal(kinds, kind)).to_pylist()

    failed = sorted(map(json.loads, of(spark_tasks.ERROR)), key=lambda error: error["file"])
    if failed:
        raise getattr(errors, failed[0]["type"])(failed[0]["text"])
    surveys = sorted(map(json.loads, of(spark_tasks.SURVEY)), key=lambda survey: survey["file"])
    strings = {field.name: sorted(of(i)) for i, field in enumerate(plan.schema.fields) if field.type == "string"}
    return Survey.merged([Survey.from_json(survey["survey"]) for survey in surveys]), strings


def _write_dictionaries(folder: str, strings: dict[str, list[str]]) -> dict[str, str]:
    """Files of values and codes, for the tasks."""
    paths = {}
    for name, values in strings.items():
        paths[name] = os.path.join(folder, f"{name}.parquet")
        table = {"value": pa.array(values, pa.string()), "code": pa.array(range(len(values)), pa.int32())}
        pq.write_table(pa.table(table), paths[name])
    return paths


def _partitions(job: _Job, plan: Plan, events: int) -> int:
    """At least one a core; so many that most of them, unequal as they are, make one part."""
    full = 4 * events // (3 * plan.buffer_events) + 1
    return max(1, min(max(job.context.defaultParallelism, full), events // _LEAST_EVENTS))


def _write(job: _Job, plan: Plan, partitions: int) -> tuple[list[dict[str, Any]], int]:
    """Entries of the parts, those of one partition one after the other, and the number of repeated events."""
    read = job.files(spark_tasks.read, plan, spark_tasks.read_columns(plan.schema))
    rows = read.repartition(partitions, "user").sortWithinPartitions("user", "time", "key", "place")
    written = job.step(rows, functools.partial(_write_partition, plan), spark_tasks.WRITE_COLUMNS)
    parts, dropped = [], 0
    for row in sorted(job.collect(written, "sorting").to_pylist(), key=lambda row: row["partition"]):
        result = json.loads(row["parts"])
        parts += result["parts"]
        dropped += result["duplicates_dropped"]
    return parts, dropped


def _write_partition(plan: Plan, batches: Any) -> Any:
    from pyspark import TaskContext

    return spark_tasks.write(plan, batches, TaskContext.get().partitionId())


@contextlib.contextmanager
def _session(master: str | None, memory: int, spill: str) -> Iterator[tuple[Any, int]]:
    """A Spark session, and how many tasks share this machine's memory: 1 on a cluster."""
    try:
        with _no_warnings():
            from pyspark import SparkContext
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
    except ImportError as error:
        raise VaultError(f"--engine=spark needs pyspark: pip install 'laser_jax[spark]' ({error})") from error
    running = SparkContext._active_spark_context is not None
    new_java = SparkContext._gateway is None
    builder = SparkSession.builder
    if not running:
        master = master or os.environ.get("SPARK_MASTER")
        if master is None and "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit says it itself
            master = "local[*]"
        for key, value in _settings(master, memory, spill).items():
            builder = builder.config(key, value)
    with contextlib.ExitStack() as stack:
        if new_java:
            stack.callback(_end_java, SparkContext)
        if not running and threading.current_thread() is threading.main_thread():
            # A session has Ctrl-C go through itself, even once it is stopped.
            stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        stack.enter_context(_same_python(local=(master or "").startswith("local")))
        try:
            with _no_warnings():
                spark = SparkSession.getActiveSession() or builder.getOrCreate()
                context = spark.sparkContext
        except (PySparkException, RuntimeError, OSError) as error:
            text = str(error).split("\n")[0]
            needs = "it needs Java 17 or newer, and a session that is not of Spark Connect"
            raise UnavailableError(f"Spark cannot be started: {text}; {needs}") from error
        if not running:
            stack.callback(spark.stop)
        yield spark, context.defaultParallelism if context.master.startswith("local") else 1


def _end_java(context: Any) -> None:
    """Ends Java, which pyspark keeps for the next session: it remembers the memory and the directory of the first."""
    gateway, context._gateway, context._jvm = context._gateway, None, None
    if gateway is not None:
        gateway.shutdown()
        # It waits for its end.
        gateway.proc.stdin.close()
        gateway.proc.wait()


def _settings(master: str | None, memory: int, spill: str) -> dict[str, str]:
    """Of a session of our own."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    settings = {
        "spark.app.name": "laser_jax ingestion",
        "spark.ui.showConsoleProgress": "false",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(1 << 15),
        # Where laser_jax is not installed: the same source tree, on the shared file system.
        "spark.executorEnv.PYTHONPATH": package,
    }
    if master is not None:
        settings["spark.master"] = master
    if master is None or not master.startswith("local"):
        return settings
    settings |= {
        "spark.ui.enabled": "false",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.driver.memory": f"{max(memory // 2, 512 << 20) >> 20}m",
        "spark.driver.maxResultSize": "0",
        # Every error reaches the caller as an exception.
        "spark.log.level": "OFF",
    }
    if re.fullmatch(r"[\w/.-]+", spill):  # these settings are lists of words
        quiet = os.path.join(spill, "log4j2.properties")
        with open(quiet, "w", encoding="utf-8") as file:
            file.write(_QUIET)
        settings["spark.driver.extraJavaOptions"] = f"-Dlog4j2.configurationFile=file:{quiet}"
        # With what the next writer removes if this process is killed.
        settings["spark.local.dir"] = spill
    return settings


@contextlib.contextmanager
def _same_python(local: bool) -> Iterator[None]:
    """Workers run this interpreter; on a cluster, where it may lie elsewhere, the environment may name another."""
    before = os.environ.get("PYSPARK_PYTHON")
    if local or before is None:
        os.environ["PYSPARK_PYTHON"] = sys.executable
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYSPARK_PYTHON", None)
        else:
            os.environ["PYSPARK_PYTHON"] = before


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """pyspark says on every call that it is not sure of pandas 3, which an ingestion does not use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Spark's failures as errors of a vault; those of a vault that happened in a task as what they were."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        text = str(error)
        own = re.search(r"^laser_jax\.\S+\.(\w+Error): (.*)$", text, re.MULTILINE)
        kind = getattr(errors, own[1], None) if own else None
        if kind is not None:
            raise kind(own[2]) from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise UnavailableError(f"Spark failed: {' '.join(lines[:1] + lines[-1:])[:500]}") from error
