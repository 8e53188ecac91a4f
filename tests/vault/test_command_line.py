"""The commands of python -m laser_jax.vault on a vault that lives: append, merge, snapshot, forget, repair, publish."""

import io
import json
import subprocess
import sys

import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.__main__ import main

SCHEMA = Schema(
    fields=[Field("item", "int64"), Field("scene", "string"), Field("price", "float32"), Field("v", "int8", 2)]
)


@pytest.fixture
def path(tmp_path) -> str:
    """An empty vault."""
    with seqvault.create(tmp_path / "vault", SCHEMA):
        pass
    return str(tmp_path / "vault")


def lines(count: int, first: int = 0) -> str:
    """Events as JSON lines; users 1 to 3 in turn."""
    rows = [
        {"user": i % 3 + 1, "time": 100 + i, "item": i, "scene": "abc"[i % 2], "price": i / 2, "v": [i % 5, 0]}
        for i in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(capsys, monkeypatch, *arguments: str, given: str = "") -> tuple[int, str, str]:
    """Exit status, output and errors of a command."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    status = main(list(arguments))
    found = capsys.readouterr()
    return status, found.out, found.err


def test_a_day_in_the_life(path, tmp_path, capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "append", path, "--batch=7", "--json", given=lines(30))
    assert status == 0 and json.loads(out)["events"] == 30 and json.loads(out)["next_sequence"] == 30
    status, out, _ = run(capsys, monkeypatch, "get", path, "2", "--n=3", "--fields=item,scene")
    assert status == 0 and out.splitlines()[-1] == "3 events" and out.splitlines()[-2].split()[-2:] == ["28", "a"]
    status, out, _ = run(capsys, monkeypatch, "get", path, "2", "--where=scene=b", "--where=item=1,13,28", "--n=9")
    assert "2 events\nof 10 events (the whole history)" in out
    status, out, _ = run(capsys, monkeypatch, "get", path, "2", "--as-of=10", "--json", "--before=105")
    assert json.loads(out)["item"] == [1, 4]
    assert run(capsys, monkeypatch, "snapshot", path, "--name=monday")[:2] == (
        0,
        "snapshot monday: open it with at='monday'\n",
    )
    run(capsys, monkeypatch, "append", path, given=lines(30, first=30))
    assert run(capsys, monkeypatch, "snapshot", path, "--name=monday")[0] == 1
    status, out, err = run(capsys, monkeypatch, "merge", path, "--keep-events=5", "--json")
    assert json.loads(out)["events"] == [60, 15] and "merged 3 of 3 users" in err
    status, out, _ = run(capsys, monkeypatch, "get", path, "1", "--at=monday", "--n=99", "--json")
    assert json.loads(out)["item"] == list(range(0, 30, 3))
    status, out, _ = run(capsys, monkeypatch, "stats", path, "--json")
    assert json.loads(out)["events"] == 15 and json.loads(out)["snapshots"] == ["monday"]
    assert "events a user    users" in run(capsys, monkeypatch, "stats", path)[1]
    url = "memory://command_line"
    assert "bytes uploaded" in run(capsys, monkeypatch, "publish", path, url, "--at=monday")[1]
    assert json.loads(run(capsys, monkeypatch, "stats", url, "--json")[1])["events"] == 30
    status, out, _ = run(capsys, monkeypatch, "forget", path, "1", "3")
    assert status == 0 and out.startswith("30 events of 2 users removed")
    assert run(capsys, monkeypatch, "snapshot", path, "--name=monday", "--replace")[0] == 0
    assert run(capsys, monkeypatch, "snapshot", path, "--list")[1] == "monday\n"
    assert run(capsys, monkeypatch, "snapshot", path, "--drop=monday", "--json")[1] == "[]\n"
    assert run(capsys, monkeypatch, "verify", path)[:2] == (0, f"whole: {path}\n")


def test_a_number_that_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    schema = Schema(fields=[Field("price", "float16"), Field("pair", "float16", 2), Field("hash", "uint64")])
    with seqvault.create(tmp_path / "vault", schema):
        pass

    def append(**values):
        rows = [{"user": 1, "time": 1, "price": 1.5, "pair": [1, 2], "hash": 1} | row for row in ({}, values)]
        given = "".join(json.dumps(row) + "\n" for row in rows)
        return run(capsys, monkeypatch, "append", str(tmp_path / "vault"), given=given)

    for wrong, number in (({"price": 70000.0}, "70000.0"), ({"pair": [0.5, -70000]}, "-70000.0")):
        status, _, err = append(**wrong)
        assert status == 1 and f"column '{next(iter(wrong))}', row 1: {number} does not fit float16" in err
    assert append(price=float("nan"), hash=2**63 + 5)[0] == 0
    assert seqvault.open(tmp_path / "vault").get(1)["hash"].tolist() == [1, 2**63 + 5]


def test_damage_is_named_and_repaired(path, capsys, monkeypatch):
    run(capsys, monkeypatch, "append", path, given=lines(30))
    with seqvault.open(path) as vault:
        vault.flush()
        part = next(iter(vault.state.parts.values()))
        shard = f"{part.folder.path}/pages/c/0/0/0"
        at = int(part.offset[1]) + 20
    with open(shard, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))
    status, out, _ = run(capsys, monkeypatch, "verify", path)
    assert status == 1 and "page 1 of pages, user 2: its checksum does not match" in out and "1 damages" in out
    status, out, _ = run(capsys, monkeypatch, "repair", path)
    assert status == 1 and "LOST" in out and out.endswith(f"repaired, 10 events lost: {path}\n")
    status, out, _ = run(capsys, monkeypatch, "repair", path)
    assert status == 0 and out.endswith(f"whole: {path}\n")
    vault = seqvault.open(path)
    assert [len(vault.get(user)) for user in (1, 2, 3)] == [10, 0, 10]


def test_append_says_where_to_go_on_after_a_line_that_is_wrong(path, capsys, monkeypatch):
    whole = lines(7).splitlines(keepends=True)
    for wrong, told in (
        ("[7]\n", "line 6 has list"),
        (whole[4].replace("104", "-4"), "(row 0 is line 6)"),
    ):
        given = "".join([*whole[:3], "\n", whole[3], wrong, *whole[5:]])  # the wrong one is line 6
        status, _, err = run(capsys, monkeypatch, "append", path, "--batch=2", given=given)
        assert status == 1 and told in err and err.endswith("; 4 events are written: go on with line 6\n")
        assert seqvault.open(path).num_events == 4
        rest = "".join(given.splitlines(keepends=True)[5:]).replace(wrong, whole[4])
        assert run(capsys, monkeypatch, "append", path, given=rest)[0] == 0
        assert sorted(seqvault.open(path).gather([1, 2, 3], n=99).columns["item"].tolist()) == list(range(7))
        with seqvault.open(path) as vault:
            vault.forget([1, 2, 3])


def test_stats_tell_the_times_of_what_is_in_the_log_too(path, capsys, monkeypatch):
    run(capsys, monkeypatch, "append", path, given=lines(5))
    with seqvault.open(path) as vault:
        vault.flush()
    run(capsys, monkeypatch, "append", path, given=lines(25, first=5))
    told = json.loads(run(capsys, monkeypatch, "stats", path, "--json")[1])
    assert (told["events"], told["first_time"], told["last_time"]) == (30, 100, 129)


@pytest.mark.parametrize(
    ("arguments", "given", "text"),
    [
        (["append"], "{}\n", "line 1 has ; need an object with user, time, item"),
        (["append"], "\n[1]\n", "line 2 has list"),
        (["append"], '{"user": 1\n', "line 1 is not JSON"),
        (["append"], lines(1).replace("100", "-5"), "negative time -5"),
        (["append"], lines(1).replace('"a"', "7"), "'scene', row 0: 7 is not a string"),
        (["append", "--batch=0"], "", "--batch=0"),
        (["get", "x"], "", "users are int64"),
        (["get", "1", "--where=item=x"], "", "where item=x: this field holds int64"),
        (["get", "1", "--where=itme=1"], "", "no field 'itme'"),
        (["get", "1", "--max-scan=5"], "", "max_scan goes with"),
        (["get", "1", "--at=tuesday"], "", "no snapshot 'tuesday'"),
        (["snapshot", "--name=a/b"], "", "need a name of letters"),
        (["snapshot", "--drop=nobody"], "", "no snapshot 'nobody'"),
        (["merge", "--keep-events=0"], "", "events=0"),
    ],
)
def test_what_is_wrong_is_said(path, capsys, monkeypatch, arguments, given, text):
    command, *rest = arguments
    status, out, err = run(capsys, monkeypatch, command, path, *rest, given=given)
    assert status == 1 and out == "" and text in err
    assert seqvault.open(path).num_events == 0


def test_as_a_process(path):
    command = [sys.executable, "-m", "laser_jax.vault"]
    done = subprocess.run([*command, "append", path], input=lines(5), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("5 events in") and done.stderr == ""
    done = subprocess.run([*command, "merge", path], capture_output=True, text=True, check=True)
    assert "0 -> 1 parts" in done.stdout
    done = subprocess.run([*command, "get", path, "1"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("2 events\n")
