"""Parts are written in a thread: what goes wrong there reaches whoever writes, and nothing goes on in secret."""

import os
import threading
import time

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import part_buffer

SCHEMA = Schema(fields=(Field("x", "int64"),))


def rows(first: int, count: int) -> dict:
    numbers = np.arange(first, first + count)
    return {"user": numbers // 7, "time": numbers, "x": numbers * 10**6}


def test_a_failed_part_is_never_forgotten(tmp_path, monkeypatch):
    """Even if the caller ignores what `write` raised, there is no vault without the lost rows."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise seqvault.UnavailableError("the disk is full")
        return original(*arguments)

    original = part_buffer.write_part
    monkeypatch.setattr(part_buffer, "write_part", fail)
    failures = 0
    with pytest.raises(seqvault.UnavailableError, match="disk is full"):
        with seqvault.create(tmp_path / "vault", SCHEMA, buffer_events=70) as writer:
            for first in range(0, 700, 70):
                try:
                    writer.write(rows(first, 70))
                except seqvault.UnavailableError:
                    failures += 1
    assert failures > 0 and len(calls) == 2, "nothing is written after the failure"
    assert not (tmp_path / "vault").exists()


def test_an_error_in_the_block_waits_for_the_thread(tmp_path, monkeypatch):
    begun = threading.Event()

    def slow(path, *arguments):
        begun.set()
        time.sleep(0.3)
        os.makedirs(path)
        raise seqvault.UnavailableError("not seen: the error of the block comes first")

    monkeypatch.setattr(part_buffer, "write_part", slow)
    with pytest.raises(ZeroDivisionError):
        with seqvault.create(tmp_path / "vault", SCHEMA, buffer_events=10) as writer:
            writer.write(rows(0, 15))
            assert begun.wait(10)
            raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_rows_come_in_while_a_part_is_written(tmp_path, monkeypatch):
    """The caller's arrays are its own again as soon as `write` returns."""
    release = threading.Event()

    def held(*arguments):
        assert release.wait(10)
        return original(*arguments)

    original = part_buffer.write_part
    monkeypatch.setattr(part_buffer, "write_part", held)
    with seqvault.create(tmp_path / "vault", SCHEMA, buffer_events=70) as writer:
        for first in (0, 70):
            columns = rows(first, 70 if first == 0 else 60)
            writer.write(columns)
            for column in columns.values():
                column[:] = -1
        assert writer.events == 0
        release.set()
    vault = seqvault.open(tmp_path / "vault")
    assert writer.events == vault.num_events == 130 and vault.verify() == []
    assert vault.get(9)["x"].tolist() == [number * 10**6 for number in range(63, 70)]
