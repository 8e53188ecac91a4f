"""A writer that is killed, or meets a full disk, leaves a whole vault or none."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import files, manifest, worker
from laser_jax.vault.format import VERSION
from laser_jax.vault.storage import LocalStorage

ROWS, PARTS = 3000, 4
WRITER = """
    import resource, signal, sys
    import numpy as np
    from laser_jax import vault as seqvault
    from laser_jax.schema import Field, Schema
    path, limit = sys.argv[1], int(sys.argv[2])
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    print("ready", flush=True)
    rows = np.arange(3000)
    noise = np.random.default_rng(0).integers(0, 2**62, 3000)
    with seqvault.create(path, Schema(fields=[Field("x", "int64")]), buffer_events=750) as writer:
        writer.write({"user": rows % 7, "time": rows, "x": noise})
    print("done", flush=True)
"""


def start(path, limit: int = 0) -> subprocess.Popen:
    """A process that says "ready", writes a vault and says "done"."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(path), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_whole(path) -> None:
    """The vault holds all that the writer writes."""
    vault = seqvault.open(path)
    assert vault.verify() == []
    assert vault.num_events == ROWS
    assert vault.gather(np.arange(7), n=ROWS).num_events == ROWS


def test_killed_writer_leaves_no_vault_or_a_whole_one(tmp_path):
    outcomes = set()
    for attempt in range(8):
        path = tmp_path / f"vault{attempt}"
        process = start(path)
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.012 * attempt)
            process.send_signal(signal.SIGKILL)
        finally:
            process.communicate(timeout=60)
        if (path / "manifest.json").exists():
            assert_whole(path)
            outcomes.add("whole")
        else:
            with pytest.raises(seqvault.NotAVaultError):
                seqvault.open(path)
            outcomes.add("none")
            # The next writer is not held up by the dead one's lock or leftovers.
            with seqvault.create(path, Schema()) as writer:
                writer.write({"user": [1], "time": [1]})
            assert seqvault.open(path).verify() == []
            assert len(os.listdir(path / "parts")) == 1
    assert "none" in outcomes


def test_killed_at_every_step_of_the_commit(tmp_path, monkeypatch):
    """Whichever rename or flush is the last one that happens, a reader sees all or nothing."""

    class Killed(BaseException):
        """Stands for SIGKILL: nothing after it runs."""

    # Without the tidying of a writer that is still alive.
    monkeypatch.setattr("laser_jax.vault.writer.VaultWriter._abandon", lambda self: None)
    original = {name: getattr(os, name) for name in ("fsync", "replace")}
    for last in range(200):
        calls = [0]

        def counted(name, calls=calls, last=last):
            def call(*arguments):
                calls[0] += 1
                if calls[0] > last:
                    raise Killed
                return original[name](*arguments)

            return call

        for name in original:
            monkeypatch.setattr(files.os, name, counted(name))
        path = tmp_path / f"vault{last}"
        try:
            with seqvault.create(path, Schema(fields=[Field("x", "int64")])) as writer:
                writer.write({"user": [1, 2], "time": [1, 2], "x": [3, 4]})
            finished = True
        except Killed:
            finished = False
        for name, function in original.items():
            monkeypatch.setattr(files.os, name, function)
        if (path / "manifest.json").exists():
            assert seqvault.open(path).verify() == [] and len(seqvault.open(path)) == 2
        else:
            with pytest.raises(seqvault.NotAVaultError):
                seqvault.open(path)
        if finished:
            break
    assert finished and last > 20


@pytest.mark.parametrize("limit", [100, 2000, 5000])
def test_full_disk(tmp_path, limit):
    """Files cannot grow beyond a limit, as on a full disk: a clear error, and nothing is left."""
    process = start(tmp_path / "vault", limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "done" not in out
    assert "UnavailableError" in err and str(tmp_path / "vault") in err
    assert not (tmp_path / "vault").exists()


def test_parent_that_cannot_hold_a_vault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(seqvault.UnavailableError, match="cannot be created"):
        with seqvault.create(tmp_path / "file" / "vault", Schema()):
            pass


def write_manifest(path, **changes) -> None:
    """Rewrites a vault's manifest with changes and a checksum that fits."""
    content = manifest.read_manifest(LocalStorage(str(path)))
    manifest.commit_manifest(str(path), content | changes)


def test_not_a_vault(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"name": "my web app"}))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "manifest.json").write_text("[]")
    for name in ("empty", "file", "other", "list", "missing"):
        with pytest.raises(seqvault.NotAVaultError, match=f"{name} is not a vault"):
            seqvault.open(tmp_path / name)
    (tmp_path / "other" / "manifest.json").write_text("{")
    with pytest.raises(seqvault.CorruptionError, match="manifest.json is damaged"):
        seqvault.open(tmp_path / "other")


def test_newer_version(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1], "time": [1]})
    write_manifest(tmp_path / "vault", version=VERSION + 1)
    with pytest.raises(
        seqvault.VersionError, match=f"version {VERSION + 1}.*up to {VERSION}: install a newer laser_jax"
    ):
        seqvault.open(tmp_path / "vault")


def test_a_worker_whose_writer_died_ends_without_a_word():
    """Its answer may be under way at that moment, before it sees that its input has ended."""
    command = [sys.executable, "-c", "from laser_jax.vault.worker import main; main()"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        worker._send(process.stdin, types.SimpleNamespace(run=os.getpid))
        assert process.wait(60) == 0
        assert process.stderr.read() == b""
