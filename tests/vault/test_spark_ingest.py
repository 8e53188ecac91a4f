"""Spark builds the same vault as DuckDB, from the same logs and with the same errors."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import ingest as duckdb_ingest
from tests.vault.conftest import FIELDS, random_log
from tests.vault.test_ingest import MEMORY, SCHEMA, raw_log, write_files

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("pyspark", reason="needs the extra `spark`")
from laser_jax.vault import spark_ingest  # noqa: E402

JAVA = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if "JAVA_HOME" in os.environ else "java"
pytestmark = pytest.mark.skipif(shutil.which(JAVA) is None, reason="Spark needs Java 17 or newer")


@pytest.fixture(scope="module")
def spark():
    """One session of the tests' own: starting one takes seconds."""
    from pyspark.sql import SparkSession

    settings = {
        "spark.master": "local[2]",
        "spark.ui.enabled": "false",
        "spark.log.level": "OFF",
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.executorEnv.PYTHONPATH": os.getcwd(),
        "spark.sql.execution.arrow.maxRecordsPerBatch": "500",
    }
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        session = SparkSession.builder.config(map=settings).getOrCreate()
        yield session
        session.stop()


def assert_equal(one, other) -> None:
    """Two vaults have the same users with the same histories."""
    assert sorted(one.users().tolist()) == sorted(other.users().tolist())
    assert one.num_events == other.num_events
    for user in one.users().tolist():
        first, second = (vault.get(user, 10**6, fields=vault.schema.names) for vault in (one, other))
        assert list(first.columns) == list(second.columns)
        for name in first.columns:
            if name != "time" and one.schema.field(name).type == "string":
                assert first[name].tolist() == second[name].tolist()
            else:
                assert first[name].dtype == second[name].dtype
                assert first[name].tobytes() == second[name].tobytes(), name


def as_table(log: dict) -> pa.Table:
    """Columns of numpy arrays, vectors included."""
    arrays = {}
    for name, column in log.items():
        values = pa.array(column.ravel() if column.dtype != object else column)
        arrays[name] = values if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(values, column.shape[1])
    return pa.table(arrays)


def all_types(tmp_path, user: str) -> tuple[Schema, str]:
    """Every type of field, ties of time, users of one sign and the other; the files have types of their own."""
    users = ["ann", "bö", "c" * 50, "d"] if user == "string" else [-(2**62), -1, 0, 2**63 - 1]
    schema = Schema(user=user, fields=FIELDS, time_unit="ms")
    users = np.array(users, object if user == "string" else np.int64)
    log = random_log(schema, users, 1500, seed=0, span=100) | {"time": np.arange(1500) % 100 + 10**12}
    log["price"][::7] = np.nan
    for number in range(3):
        table = as_table({name: column[number::3] for name, column in log.items()})
        if number == 1:
            moments = pa.array(table["time"].to_numpy(), pa.timestamp("ms"))
            table = table.set_column(1, "time", moments).append_column("more", moments)
        pq.write_table(table, tmp_path / f"log{number}.parquet", row_group_size=50)
    return schema, str(tmp_path / "log*")


def repeated(tmp_path, kind: str, key: str | None) -> tuple[Schema, str]:
    """Events that are there twice, in one file and in two, and keys above the largest signed number."""
    log = raw_log(1200)
    log["key"] = np.random.default_rng(1).integers(2**63 - 300, 2**63 + 300, 1200, np.uint64)
    log = {name: np.concatenate([column, column[300:900:2]]) for name, column in log.items()}
    pattern = write_files(tmp_path / "logs", log, kind, files=4)
    fields = (*SCHEMA.fields, Field("key", "uint64"))
    return Schema(fields=fields, event_key=key, duplicates="drop", user="int64"), pattern


def no_fields(tmp_path) -> tuple[Schema, str]:
    log = {"user": [3, 1, 3, 2], "time": [5, 5, 5, 4]}
    return Schema(), write_files(tmp_path / "logs", {name: np.array(log[name]) for name in log}, "parquet", files=2)


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (all_types, ("int64",)),
        (all_types, ("string",)),
        (repeated, ("parquet", None)),
        (repeated, ("csv.gz", "key")),
        (no_fields, ()),
    ],
)
def test_every_user_has_the_same_history(spark, tmp_path, monkeypatch, make, arguments):
    schema, pattern = make(tmp_path, *arguments)
    expected = duckdb_ingest.ingest(schema, pattern, str(tmp_path / "duckdb"), MEMORY)
    # Several partitions, and users longer than a part.
    monkeypatch.setattr(spark_ingest, "_LEAST_EVENTS", 100)
    monkeypatch.setattr(spark_ingest, "buffer_events", lambda schema, memory: 200)
    lines = []
    report = spark_ingest.ingest_spark(schema, pattern, str(tmp_path / "spark"), MEMORY, progress=lines.append)
    vault = seqvault.open(tmp_path / "spark")
    assert (report.events, report.users) == (expected.events, expected.users)
    assert report.duplicates_dropped == expected.duplicates_dropped
    assert lines[-1].endswith("sorting") or "sorting: " in lines[-1]
    assert vault.verify() == []
    assert_equal(seqvault.open(tmp_path / "duckdb"), vault)
    numbers = [int(name.split("-")[1]) for name in os.listdir(tmp_path / "spark" / "parts")]
    assert sorted(numbers) == list(range(report.parts)), "nothing else is left there"


BAD = {
    "missing column": ({"item": None}, {}),
    "two files do not fit": ({"dwell": [1, 2, 65536]}, {"dwell": [-1, -1, 3]}),
    "the second file does not fit": ({}, {"clicked": [True, None, False], "dwell": [1, -5, 2]}),
    "negative and absurd": ({"time": [1, 2, 4102444800]}, {"time": [-3, 5, 6]}),
    "milliseconds": ({}, {"time": [5, 6, 1700000000000]}),
    "a type": ({"item": ["a", "b", "c"]}, {}),
}


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_the_same_errors(spark, tmp_path, kind):
    for number, changes in enumerate(BAD.values()):
        folder = tmp_path / f"logs{number}"
        for file, change in enumerate(changes):
            log = {name: column[file * 3 : file * 3 + 3] for name, column in raw_log().items()} | change
            log = {name: column for name, column in log.items() if column is not None}
            folder.mkdir(exist_ok=True)
            write_files(folder / f"{file}", log, kind, files=1)
        assert_same_error(SCHEMA, str(folder / "*" / "log*"), tmp_path)


def test_the_same_errors_of_whole_logs(spark, tmp_path):
    (tmp_path / "ragged.csv").write_text("user,time\n1,2\n1,2,3\n")
    assert_same_error(Schema(), str(tmp_path / "ragged.csv"), tmp_path)
    for name, user, times in (
        ("a", [1, 1], [1_600_000_000, 1_700_000_005]),
        ("b", [2], [1_700_000_005]),
        ("c", [], []),
    ):
        table = {"user": pa.array(user, pa.int64()), "time": pa.array(times, pa.int64())}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    assert_same_error(Schema(time_unit="ms"), str(tmp_path / "*.parquet"), tmp_path)
    assert_same_error(Schema(), str(tmp_path / "c.parquet"), tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    assert_same_error(Schema(), str(tmp_path / "*.parquet"), tmp_path)
    assert_same_error(Schema(), str(tmp_path / "nothing*"), tmp_path)
    with pytest.raises(seqvault.VaultError, match="partitions must be at least 1"):
        spark_ingest.ingest_spark(Schema(), str(tmp_path / "a.parquet"), str(tmp_path / "vault"), partitions=0)


def assert_same_error(schema: Schema, pattern: str, tmp_path) -> None:
    found = []
    for ingest in (duckdb_ingest.ingest, spark_ingest.ingest_spark):
        with pytest.raises(seqvault.VaultError) as error:
            ingest(schema, pattern, str(tmp_path / "vault"), MEMORY)
        found.append((type(error.value), str(error.value)))
        assert not (tmp_path / "vault").exists()
    assert found[0] == found[1]


def test_a_log_that_changes_and_a_task_that_fails(spark, tmp_path):
    pattern = write_files(tmp_path / "logs", raw_log(300), "parquet")
    longer = write_files(tmp_path / "longer", raw_log(600), "parquet").replace("*", "1.parquet")

    def change(action):
        return lambda line: action() if line.endswith("files: sorting") else None

    for match, action in (
        ("log2.parquet", lambda: os.remove(tmp_path / "logs" / "log2.parquet")),
        ("the log changed while it was read: 2", lambda: shutil.copy(longer, tmp_path / "logs" / "log1.parquet")),
    ):
        with pytest.raises(seqvault.UnavailableError, match=match):
            spark_ingest.ingest_spark(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY, progress=change(action))
        assert not (tmp_path / "vault").exists()


def test_executors_that_do_not_see_where_the_vault_is_built(spark, tmp_path):
    """As on a cluster of machines that share no directory: the log is not blamed."""
    schema, pattern = no_fields(tmp_path)

    def hide(line):
        if line.endswith("files: sorting"):
            shutil.rmtree(tmp_path / "vault" / "parts" / "spill")

    with pytest.raises(seqvault.UnavailableError, match=f"{tmp_path}/vault/parts.* is not on executor .*`publish`"):
        spark_ingest.ingest_spark(schema, pattern, str(tmp_path / "vault"), MEMORY, progress=hide)
    assert not (tmp_path / "vault").exists()


SCRIPT = """
    import sys
    from laser_jax.vault.spark_ingest import ingest_spark
    from tests.vault.test_ingest import MEMORY, SCHEMA
    print(ingest_spark(SCHEMA, *sys.argv[1:], MEMORY))
"""


def test_sessions_of_its_own_and_what_a_killed_one_leaves(tmp_path):
    """With SPARK_MASTER; a killed ingestion leaves no vault, and nothing to the next one."""
    pattern, out = write_files(tmp_path / "logs", raw_log(300), "csv"), tmp_path / "vault"
    environment = os.environ | {"SPARK_MASTER": "local[2]"}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), pattern, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    try:
        while not list(out.glob("parts/spill/blockmgr-*")):  # of Spark, which spills there
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        with pytest.raises(seqvault.LockedError):
            duckdb_ingest.ingest(SCHEMA, pattern, str(out), MEMORY)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)  # Java, which has the pipe too, ends with it
    with pytest.raises(seqvault.NotAVaultError):
        seqvault.open(out)
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    assert "300 events of 40 users in 1 parts" in done.stdout, done.stderr
    assert "ERROR" not in done.stderr and " WARN " not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["logs", "vault"]
    assert len(os.listdir(out / "parts")) == 1 and seqvault.open(out).verify() == []
    duckdb_ingest.ingest(SCHEMA, pattern, str(tmp_path / "other"), MEMORY)
    assert_equal(seqvault.open(tmp_path / "other"), seqvault.open(out))
