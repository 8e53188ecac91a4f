"""What goes on behind a writer, and what may come in between: closing, refusals, appends that do not wait."""

import dataclasses
import errno
import os
import threading
import time

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.vault import WriterOptions
from laser_jax.vault.log_writer import LogWriter
from laser_jax.vault.tasks import LogTask, MergeTask
from laser_jax.vault.worker import Worker
from tests.vault.test_append import BRANDS, ITEMS, QUIET, events, items, make, reopened  # noqa: F401


class Gate:
    """Lets whoever comes to it wait: `reached` is set by the first one, `open` lets all pass."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *_):
        self.reached.set()
        assert self.open.wait(60)


def in_thread(call):
    """A thread that runs `call`, and the errors that it met."""
    met = []

    def run():
        try:
            call()
        except Exception as error:
            met.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, met


def before(gate, call):
    """`call`, once the gate has let it pass."""

    def waiting(*arguments):
        gate()
        return call(*arguments)

    return waiting


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("work", ["merge", "flush", "forget"])
def test_close_waits_for_what_another_thread_does(make, monkeypatch, work):  # noqa: F811
    """Else the next writer takes the new part for garbage, and what it writes is lost with the old manifest."""
    vault, gate = make(ITEMS), Gate()
    for start in range(3):
        vault.append(events([1, 2], 10 * start))
        vault.flush()
    vault.append(events([1], 50))
    for kind in (LogTask, MergeTask):
        monkeypatch.setattr(kind, "run", before(gate, kind.run))
    doing, met = in_thread({"merge": vault.merge, "flush": vault.flush, "forget": lambda: vault.forget([2])}[work])
    assert gate.reached.wait(60)
    closing, _ = in_thread(vault.close)
    closing.join(0.2)
    assert closing.is_alive()
    with pytest.raises(seqvault.LockedError), seqvault.open(vault.path, writing=QUIET) as second:
        second.begin_writing()
    gate.open.set()
    for thread in (doing, closing):
        thread.join(60)
        assert not thread.is_alive()
    # A merge may be given up, the other two are done.
    assert [str(error) for error in met] in ([], [f"{vault.path} was closed meanwhile: nothing of this merge counts"])
    assert bool(met) <= (work == "merge")
    with seqvault.open(vault.path, writing=QUIET) as second:
        second.append(events([1], 100))
        second.flush()
        assert items(second, 1) == [0, 10, 20, 50, 100]
        assert items(second, 2) == ([] if work == "forget" else [1, 11, 21])
    assert seqvault.verify(vault.path) == []


def test_a_merge_that_takes_hours_does_not_hold_up_who_closes(make):  # noqa: F811
    vault = make(ITEMS, WriterOptions(merge_bytes_per_s=1, merge_parts=1))
    for start in range(3):
        vault.append(events([1, 2], 10 * start))
        vault.flush()
    vault.merge_in_background()
    until(lambda: vault._appender.maintenance._merger._process is not None)
    again = reopened(vault)
    again.append(events([1], 100))
    assert items(again, 1) == [0, 10, 20, 100] and items(again, 2) == [1, 11, 21] and again.verify() == []
    again.close()


def test_a_merge_is_given_up_between_two_parts_too(make, monkeypatch):  # noqa: F811
    monkeypatch.setattr("laser_jax.vault.merge_plan.MERGE_EVENTS", 100)
    vault, gate, run = make(ITEMS, WriterOptions(merge_bytes_per_s=1, merge_parts=1)), Gate(), Worker.run
    users = list(range(80))
    for start in range(3):
        vault.append(events(users, 100 * start))
        vault.flush()

    def first_at_once(worker, task):
        if isinstance(task, MergeTask) and not gate.reached.is_set():
            gate()
            task = dataclasses.replace(task, bytes_per_s=0)
        return run(worker, task)

    monkeypatch.setattr(Worker, "run", first_at_once)
    vault.merge_in_background()
    assert gate.reached.wait(60)
    maintenance = vault._appender.maintenance
    closing, met = in_thread(vault.close)
    until(lambda: maintenance._closing)
    gate.open.set()
    closing.join(60)
    assert not closing.is_alive() and not met
    assert items(vault, 7) == [7, 107, 207] and vault.verify() == []


def test_a_handle_that_was_closed_changes_nothing_any_more(make):  # noqa: F811
    vault = make(ITEMS)
    vault.append(events([1]))
    appender = vault._appender
    vault.close()
    for call in (appender.maintenance.flush, lambda: appender.maintenance.merge(print), appender.maintenance.commit):
        with pytest.raises(seqvault.UnavailableError, match="was closed meanwhile"):
            call()


def test_the_code_of_a_refused_string_is_in_no_part(make, monkeypatch):  # noqa: F811
    """A tail becomes a part while an append is being refused: its string's code is given to the next one."""
    vault, gate = make(BRANDS), Gate()
    vault.append(events([1], brand=["first"]))
    vault._appender.seal()
    monkeypatch.setattr(LogTask, "run", before(gate, LogTask.run))
    flushing, met = in_thread(vault.flush)
    assert gate.reached.wait(60)

    def refuse(*_):
        gate.open.set()
        flushing.join(1)  # as far as it comes while this append is being written
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(LogWriter, "write", refuse)
        with pytest.raises(seqvault.UnavailableError, match="No space left"):
            vault.append(events([2], brand=["refused"]))
    flushing.join(60)
    assert not flushing.is_alive() and not met
    vault.append(events([3], brand=["wanted"]))
    for _ in range(2):
        assert seqvault.open(vault.path).get(3)["brand"].tolist() == ["wanted"]
        vault.flush()
    assert seqvault.verify(vault.path) == []


def test_appends_do_not_wait_for_a_background_merge(make, monkeypatch):  # noqa: F811
    """What becomes a part while users are merged is newer than what they become."""
    monkeypatch.setattr("laser_jax.vault.merge_plan.MERGE_EVENTS", 100)
    vault, gate = make(ITEMS, WriterOptions(tail_bytes=1 << 16, merge_parts=1)), Gate()
    users = list(range(40))
    for start in range(3):
        vault.append(events(users, 100 * start))
        vault.flush()
    run = Worker.run

    def watched(worker, task):
        if isinstance(task, MergeTask):
            gate()
        return run(worker, task)

    monkeypatch.setattr(Worker, "run", watched)
    vault.merge_in_background()
    assert gate.reached.wait(60)
    appending, met = in_thread(lambda: [vault.append(events(users, 1000 + 100 * number)) for number in range(60)])
    appending.join(60)
    assert not appending.is_alive() and not met and vault.stats()["parts"] > 3
    gate.open.set()
    until(lambda: not vault.stats()["writer"]["merging"])
    wanted = [100 * start + 7 for start in (0, 1, 2, *range(10, 70))]
    assert items(vault, 7) == wanted
    again = reopened(vault)
    assert items(again, 7) == wanted and again.verify() == []
    again.merge()
    assert items(again, 7) == wanted
    again.close()


def test_an_error_behind_the_writer_is_told_to_who_waits_and_does_not_last(make, monkeypatch):  # noqa: F811
    vault = make(ITEMS, WriterOptions(tail_bytes=1 << 16))
    vault.begin_writing()
    left = [MemoryError("no memory")]

    def once(task, run=vault._appender.maintenance.run_task):
        if left:
            raise left.pop()
        return run(task)

    monkeypatch.setattr(vault._appender.maintenance, "run_task", once)
    written, refused = 0, []
    for number in range(40):
        try:
            vault.append(events(np.arange(500).tolist(), 500 * number))
            written += 1
        except seqvault.UnavailableError as error:
            refused.append(str(error))
            time.sleep(0.1)
    assert not left and all("no memory" in text for text in refused)
    assert len(items(vault, 3)) == written
    until(lambda: vault.stats()["writer"]["flush_failure"] is None)


def test_who_is_forgotten_is_durable_before_it_is_said(make, monkeypatch):  # noqa: F811
    """A part's name reaches the disk before a manifest names it."""
    vault = make(ITEMS)
    vault.append(events([1, 2]))
    vault.flush()
    done = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        done.append(os.path.basename(target))
        replace(source, target)

    with monkeypatch.context() as noted:
        noted.setattr(os, "fsync", note_fsync)
        noted.setattr(os, "replace", note_replace)
        assert vault.forget([1]) == 1
    assert "parts" in done[: done.index("manifest.json")]
