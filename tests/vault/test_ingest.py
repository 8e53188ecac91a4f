"""The command line: raw logs in, a vault out, every wrong input a clear error."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.__main__ import main
from laser_jax.vault.ingest import ingest
from tests.vault.conftest import Model, assert_same

SCHEMA = Schema(
    fields=(
        Field("item", "int64"),
        Field("dwell", "uint16"),
        Field("clicked", "bool"),
        Field("score", "float32"),
        Field("brand", "string"),
    )
)
MEMORY = 256 << 20


def raw_log(rows: int = 3000, seed: int = 0) -> dict:
    """A log in no order, with ties of time and users in every file."""
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, 40, rows) * 10**12,
        "time": rng.integers(0, 300, rows),
        "item": rng.integers(0, 2**40, rows),
        "dwell": rng.integers(0, 60000, rows).astype(np.uint16),
        "clicked": rng.random(rows) < 0.5,
        "score": rng.random(rows).astype(np.float32),
        "brand": np.array(["", "ü", 'with "quotes", commas', "b"], object)[rng.integers(0, 4, rows)],
    }


def write_files(folder, log: dict, kind: str, files: int = 3) -> str:
    """Writes a log as files; returns the pattern that finds them."""
    folder.mkdir()
    rows = len(log["time"])
    for number in range(files):
        part = slice(rows * number // files, rows * (number + 1) // files)
        table = pa.table({name: column[part] for name, column in reversed(log.items())})
        table = table.append_column("unused", pa.array(np.zeros(len(table))))
        path = str(folder / f"log{number}.{kind}")
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=100)
        elif kind.endswith("zst"):
            with pa.output_stream(path, compression="zstd") as out:
                pa_csv.write_csv(table, out)
        elif kind.endswith("gz"):
            with gzip.open(path, "wb") as out:
                pa_csv.write_csv(table, out)
        else:
            pa_csv.write_csv(table, path)
    return str(folder / "log*")


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "csv.zst"])
def test_ingested_logs_read_as_they_were(tmp_path, kind):
    log = raw_log()
    pattern = write_files(tmp_path / "logs", log, kind)
    report = ingest(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY)
    assert (report.events, report.users, report.duplicates_dropped) == (3000, 40, 0)
    vault, model = seqvault.open(tmp_path / "vault"), Model(log)
    assert vault.verify() == []
    users = vault.users()
    histories = vault.gather(users, 200, 100)
    for position, user in enumerate(users.tolist()):
        assert_same(vault, histories[position], model.read(user, 100, 200), SCHEMA.names)
    assert sorted(os.listdir(tmp_path)) == ["logs", "vault"], "the spill directory is gone"


def test_wide_types(tmp_path):
    schema = Schema(
        user="string",
        time_unit="ms",
        fields=(Field("embedding", "float16", size=3), Field("big", "uint64"), Field("price", "float64")),
    )
    moments = np.array(["2024-01-05T10:00:00.123", "2023-12-31T23:59:59.999"], "datetime64[us]")
    table = pa.table(
        {
            "user": ["ann", "ann"],
            "time": moments,
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 3),
            "big": pa.array([2**64 - 1, 0], pa.uint64()),
            "price": [1.5, None],
        }
    )
    pq.write_table(table, tmp_path / "log.parquet")
    ingest(schema, str(tmp_path / "log.parquet"), str(tmp_path / "vault"), MEMORY)
    history = seqvault.open(tmp_path / "vault").get("ann", fields=schema.names)
    assert history["time"].tolist() == moments[::-1].astype("datetime64[ms]").astype(int).tolist()
    assert history["embedding"].tolist() == [[3, 4, 5], [0, 1, 2]]
    assert history["big"].tolist() == [0, 2**64 - 1]
    assert np.isnan(history["price"][0]) and history["price"][1] == 1.5


def test_ties_go_by_event_key_then_file_then_row(tmp_path):
    log = {
        "user": np.ones(6, np.int64),
        "time": np.full(6, 5),
        "key": np.array([7, 3, 9, 3, 1, 7]),
        "row": np.arange(6),
    }
    pattern = write_files(tmp_path / "logs", log, "parquet", files=2)
    for key, duplicates, expected in (
        (None, "keep", [0, 1, 2, 3, 4, 5]),
        ("key", "keep", [4, 1, 3, 0, 5, 2]),
        ("key", "drop", [4, 1, 0, 2]),
    ):
        schema = Schema(fields=(Field("key", "int32"), Field("row", "int32")), event_key=key, duplicates=duplicates)
        out = tmp_path / f"{key}{duplicates}"
        report = ingest(schema, pattern, str(out), MEMORY)
        assert seqvault.open(out).get(1)["row"].tolist() == expected
        assert report.duplicates_dropped == 6 - len(expected)


def test_late_rows_and_exact_duplicates(tmp_path):
    """A file of late events that repeats some of an earlier one."""
    first = raw_log(500)
    late = {name: np.concatenate([column[100:150], column[:50]]) for name, column in raw_log(500, seed=1).items()}
    both = {name: np.concatenate([first[name], late[name], first[name][:200]]) for name in first}
    pattern = write_files(tmp_path / "logs", both, "parquet", files=4)
    schema = Schema(fields=SCHEMA.fields, duplicates="drop")
    report = ingest(schema, pattern, str(tmp_path / "vault"), MEMORY)
    assert (report.events, report.duplicates_dropped) == (600, 200)
    once = Model({name: column[:600] for name, column in both.items()})
    vault = seqvault.open(tmp_path / "vault")
    for user in vault.users().tolist():
        assert_same(vault, vault.get(user), once.read(user, 1000, None), SCHEMA.names)


def write_schema(path, schema=SCHEMA) -> str:
    path.write_text(json.dumps(schema.to_json()))
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"item": None}, "column 'item' is missing; its columns: "),
        ({"user": [2, None, 2]}, r"log0.*, row 1: null user \(in 1 row\)"),
        ({"time": [5, -7, 6]}, "log0.*, row 1: negative time, such as -7"),
        ({"time": [5, 9000000000000, -6]}, "log0.*, row 1: impossible time, such as 9000000000000;"),
        ({"time": [5, 4102444800, 6]}, "row 1: absurd time, such as 4102444800; need 0 <= time.*is the unit right"),
        ({"time": [5, 1700000000000, 6]}, 'absurd time.*are these milliseconds.*time_unit "ms"'),
        ({"dwell": [1, 2, 65536]}, "log0.*, row 2: column 'dwell': '65536' is not of type uint16"),
        (
            {"item": [1.5, 2.5, 3.5]},
            "column 'item' has type DOUBLE, the schema says int64|row 0: column 'item': '1.5' is not of type int64",
        ),
        (
            {"item": ["a", "b", "c"]},
            "column 'item' has type VARCHAR, the schema says int64|row 0: column 'item': 'a' is not of type int64",
        ),
        ({"clicked": [None, True, True]}, "row 0: null clicked"),
    ],
)
def test_bad_logs_are_refused_and_nothing_stays(tmp_path, capsys, kind, change, text):
    log = {name: column[:3] for name, column in raw_log().items()} | change
    log = {name: column for name, column in log.items() if column is not None}
    pattern = write_files(tmp_path / "logs", log, kind, files=1)
    schema = write_schema(tmp_path / "schema.json")
    arguments = [f"--schema={schema}", f"--input={pattern}", f"--out={tmp_path / 'vault'}", "--memory=256MB"]
    assert main(["ingest", *arguments]) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ")
    assert re.search(text, err), err
    assert sorted(os.listdir(tmp_path)) == ["logs", "schema.json"]


def test_empty_log_and_no_files(tmp_path):
    empty = {name: column[:0] for name, column in raw_log().items()}
    empty["brand"] = pa.array([], pa.string())
    pattern = write_files(tmp_path / "logs", empty, "parquet", files=2)
    with pytest.raises(seqvault.SchemaError, match="^2 files, .*log0.parquet the first: the log holds no event"):
        ingest(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY)
    with pytest.raises(seqvault.SchemaError, match="^/[^ ]*log1.parquet: the log holds no event"):
        ingest(SCHEMA, pattern.replace("log*", "log1*"), str(tmp_path / "vault"), MEMORY)
    with pytest.raises(seqvault.VaultError, match="matches no file"):
        ingest(SCHEMA, str(tmp_path / "nothing*"), str(tmp_path / "vault"), MEMORY)
    (tmp_path / "log.txt").touch()
    with pytest.raises(seqvault.VaultError, match="all parquet"):
        ingest(SCHEMA, str(tmp_path / "log.txt"), str(tmp_path / "vault"), MEMORY)
    with pytest.raises(seqvault.VaultError, match="memory of 10 MB is too little"):
        ingest(SCHEMA, pattern, str(tmp_path / "vault"), 10 << 20)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(seqvault.VaultError, match="broken.parquet"):
        ingest(SCHEMA, str(tmp_path / "broken.parquet"), str(tmp_path / "vault"), MEMORY)
    for threads in (-1, 0):
        with pytest.raises(seqvault.VaultError, match=f"threads must be at least 1, got {threads}"):
            ingest(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY, threads=threads)
    assert not (tmp_path / "vault").exists()


def test_refuses_a_vault_that_is_there(tmp_path):
    pattern = write_files(tmp_path / "logs", raw_log(100), "parquet")
    ingest(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY)
    with pytest.raises(seqvault.VaultExistsError, match="already holds a vault"):
        ingest(SCHEMA, pattern, str(tmp_path / "vault"), MEMORY)
    assert seqvault.open(tmp_path / "vault").num_events == 100


def test_seconds_in_a_schema_of_milliseconds(tmp_path):
    schema = Schema(time_unit="ms")
    now, out = 1_700_000_000, str(tmp_path / "vault")
    for name, times in (
        ("seconds", pa.array([now, now + 5])),
        ("ms", pa.array([now * 1000, 5])),
        # A moment has a unit of its own.
        ("moments", pa.array([5, 6], pa.timestamp("s"))),
    ):
        pq.write_table(pa.table({"user": [1, 1], "time": times}), tmp_path / f"{name}.parquet")
    with pytest.raises(seqvault.SchemaError, match='row 1: the newest time.*1700000005.*set time_unit "s"'):
        ingest(schema, str(tmp_path / "seconds.parquet"), out, MEMORY)
    assert not (tmp_path / "vault").exists()
    assert ingest(schema, str(tmp_path / "ms.parquet"), out, MEMORY).events == 2
    ingest(schema, str(tmp_path / "moments.parquet"), out + "2", MEMORY)
    assert seqvault.open(out + "2").get(1)["time"].tolist() == [5000, 6000]


def test_killed_ingestion_leaves_nothing_to_the_next_one(tmp_path):
    pattern, out = write_files(tmp_path / "logs", raw_log(100), "parquet"), tmp_path / "vault"
    script = """
        import sys, time
        from laser_jax.vault.ingest import ingest
        from tests.vault.test_ingest import MEMORY, SCHEMA
        def stop(line):
            print(line, flush=True)
            time.sleep(60)
        ingest(SCHEMA, *sys.argv[1:], MEMORY, 1, stop)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), pattern, out], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"100 events in 3 files: sorting\n"
        (spill,) = (out / "parts").iterdir()
        (spill / "block").write_bytes(b"what DuckDB spilled")
        with pytest.raises(seqvault.LockedError):
            ingest(SCHEMA, pattern, str(out), MEMORY)
        assert (spill / "block").exists(), "a second ingestion leaves the spill of a living one alone"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert sorted(os.listdir(tmp_path)) == ["logs", "vault"] and spill.exists()
    with pytest.raises(seqvault.NotAVaultError):
        seqvault.open(out)
    ingest(SCHEMA, pattern, str(out), MEMORY)
    assert sorted(os.listdir(tmp_path)) == ["logs", "vault"]
    assert len(os.listdir(out / "parts")) == 1
    assert seqvault.open(out).verify() == [] and seqvault.open(out).num_events == 100


def test_places_and_schemas_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    pattern, schema = write_files(tmp_path / "logs", raw_log(100), "parquet"), write_schema(tmp_path / "schema.json")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "vault"
    with pytest.raises(seqvault.UnavailableError, match="file/vault cannot be created"):
        ingest(SCHEMA, pattern, str(out), MEMORY)
    assert main(["ingest", f"--schema={schema}", f"--input={pattern}", f"--out={out}"]) == 1
    assert "file/vault cannot be created" in capsys.readouterr().err

    # Directories that may not be written: as root, none is.
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    for function, place in (("makedirs", "vault"), ("mkdir", "vault"), ("listdir", "locked")):
        (tmp_path / "locked").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            with pytest.raises(seqvault.UnavailableError, match=f"{place} cannot be.*Permission denied"):
                ingest(SCHEMA, pattern, str(tmp_path / place), MEMORY)

    (tmp_path / "latin.json").write_bytes('{"user": "größe"}'.encode("latin-1"))
    assert main(["ingest", f"--schema={tmp_path / 'latin.json'}", f"--input={pattern}", f"--out={out}"]) == 1
    assert "latin.json is not UTF-8" in capsys.readouterr().err
    assert main(["ingest", f"--schema={schema}", f"--input={pattern}", f"--out={out}", "--threads=-1"]) == 1
    assert "threads must be at least 1, got -1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ingest", f"--schema={schema}", f"--input={pattern}", f"--out={out}", "--engine=hadoop"])
    assert "invalid choice: 'hadoop'" in capsys.readouterr().err


def test_the_whole_command_line(tmp_path, capsys):
    pattern = write_files(tmp_path / "logs", raw_log(), "parquet")
    schema = write_schema(tmp_path / "schema.json")
    out = str(tmp_path / "vault")
    command = [sys.executable, "-W", "error", "-m", "laser_jax.vault", "ingest", "--json"]
    arguments = [f"--schema={schema}", f"--input={pattern}", f"--out={out}", "--threads=1"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["events"] == 3000
    assert "3,000 events in 3 files: sorting" in done.stderr

    assert main(["stats", out]) == 0
    assert "users            40" in capsys.readouterr().out
    assert main(["stats", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 40
    assert main(["get", out, str(10**12), "--n", "3", "--fields", "item,brand"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["time", "item", "brand"] and len(table) == 5 and "1970-01-01" in table[1]
    assert main(["get", out, str(10**12), "--n=2", "--before=100", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["time"] == seqvault.open(out).get(10**12, 2, 100)["time"].tolist()
    assert main(["verify", out]) == 0
    assert capsys.readouterr().out.startswith("whole: ")

    assert main(["get", out, "ann"]) == 1
    assert "users are int64" in capsys.readouterr().err
    assert main(["stats", str(tmp_path)]) == 1
    assert "is not a vault" in capsys.readouterr().err
    part = os.path.join(out, "parts", os.listdir(os.path.join(out, "parts"))[0])
    os.truncate(os.path.join(part, "pages/c/0/0/0"), 100)
    assert main(["verify", out]) == 1
    assert "1 damages" in capsys.readouterr().out
    shutil.rmtree(part)
    assert main(["verify", out, "--json"]) == 1
    assert any("missing" in damage for damage in json.loads(capsys.readouterr().out))
