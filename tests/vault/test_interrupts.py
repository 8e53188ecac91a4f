"""A writer that is interrupted anywhere, as by Ctrl-C or Jupyter's stop button, loses nothing and makes nothing up."""

import os

import pytest

from laser_jax import vault as seqvault
from laser_jax.vault import WriterOptions, maintenance, worker
from laser_jax.vault.appender import Appender
from laser_jax.vault.log_writer import LogWriter
from laser_jax.vault.tail import Tail
from tests.vault.test_append import BRANDS, ITEMS, KEYED, QUIET, events, items, make, reopened  # noqa: F401


class Once:
    """Does what `call` does, and then raises an error, the first time; after that only what `call` does."""

    def __init__(self, call, error=KeyboardInterrupt, before: bool = False):
        self._call, self._error, self._before, self.raised = call, error, before, False

    def __call__(self, *arguments):
        raises, self.raised = not self.raised, True
        if raises and self._before:
            raise self._error
        result = self._call(*arguments)
        if raises:
            raise self._error
        return result

    def __get__(self, instance, owner):
        return lambda *arguments: self(instance, *arguments)


def keyed(user: int, keys, brand: str) -> dict:
    count = len(keys)
    return {"user": [user] * count, "time": list(keys), "key": list(keys), "brand": [brand] * count}


def test_the_answer_to_a_task_that_was_interrupted_is_not_taken_for_the_next_ones(make, monkeypatch):  # noqa: F811
    vault = make(ITEMS, WriterOptions())
    vault.append(events([1] * 5))
    with monkeypatch.context() as patched:
        patched.setattr(worker, "_receive", Once(worker._receive, before=True))
        with pytest.raises(KeyboardInterrupt):
            vault.flush()
    vault.append(events([2] * 3, 10))
    vault.flush()
    for handle in (vault, reopened(vault)):
        assert items(handle, 1) == list(range(5)) and items(handle, 2) == [10, 11, 12]
        assert handle.verify() == []


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    "owner, name",
    [(os, "pwrite"), (os, "fdatasync"), (LogWriter, "_acknowledge"), (Tail, "append")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_append_that_is_interrupted_is_there_as_a_whole_or_not_at_all(
    make,  # noqa: F811
    monkeypatch,
    owner,
    name,
    written,
):
    """Wherever it was, memory and log may not agree any more: that handle writes nothing else."""
    vault = make(KEYED)
    first, many, last = keyed(1, [0], "a"), keyed(1, range(10, 60), "b"), keyed(2, [90], "c")
    vault.append(first)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, Once(getattr(owner, name), before=not written))
        with pytest.raises(KeyboardInterrupt):
            vault.append(many)
    for call in (
        vault.flush,
        vault.merge,
        vault.snapshot,
        lambda: vault.append(last),
    ):
        with pytest.raises(seqvault.UnavailableError, match="broken off.*close it and open it again"):
            call()
    assert seqvault.verify(vault.path) == []
    again = reopened(vault)
    again.append(last)
    assert again.get(2)["brand"].tolist() == ["c"]
    count = len(again.get(1))
    assert count in (1, 51)
    again.append(many)
    assert again.get(1)["key"].tolist() == [0, *range(10, 60)], "repeated ones are known"
    again.flush()
    assert again.get(1)["brand"].tolist() == ["a"] + ["b"] * 50 and again.verify() == []
    again.close()


def test_others_are_told_that_the_thread_which_wrote_for_them_was_interrupted(make, monkeypatch):  # noqa: F811
    vault = make(ITEMS)
    vault.append(events([2]))
    waiting = vault._appender._enqueue(events([2], 5), None).future  # as append_async does, for whoever comes next
    with monkeypatch.context() as patched:
        patched.setattr(Appender, "_write", Once(Appender._write, before=True))
        with pytest.raises(KeyboardInterrupt):
            vault.append(events([1]))
    with pytest.raises(seqvault.UnavailableError, match="may be written or not"):
        waiting.result(10)


@pytest.mark.parametrize("error", [KeyboardInterrupt, seqvault.UnavailableError("too many open files")], ids=str)
def test_a_manifest_that_was_replaced_is_never_taken_back(make, monkeypatch, error):  # noqa: F811
    """Disk and memory are at different manifests: what memory would write next has no place for the newest part."""
    vault = make(ITEMS)
    vault.append(events([1]))
    vault.flush()
    vault.snapshot("old")
    vault.append(events([1] * 5, 20))
    with monkeypatch.context() as patched:
        patched.setattr(maintenance, "HeldManifest", Once(maintenance.HeldManifest, error, before=True))
        with pytest.raises(error if isinstance(error, type) else type(error)):
            vault.flush()
    for call in (vault.flush, lambda: vault.drop_snapshot("old"), lambda: vault.retain(events=100)):
        with pytest.raises(seqvault.UnavailableError, match="manifest was replaced"):
            call()
    assert items(vault, 1) == [0, *range(20, 25)]
    again = reopened(vault)
    again.drop_snapshot("old")
    again.append(events([1], 30))
    again.flush()
    assert items(again, 1) == [0, *range(20, 25), 30] and again.verify() == []
    again.close()


def test_nobody_sees_a_string_before_it_is_durable(make, monkeypatch):  # noqa: F811
    """A code that a crash or a full disk takes back is given to another string: whoever kept it would read that."""
    vault, seen = make(BRANDS), []
    vault.append(events([1], brand=["a"]))

    def refuse(*_):
        seen.append(vault.dictionary("brand").tolist())
        seen.append(vault.encode("brand", ["a", "b"]).tolist())
        raise OSError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(LogWriter, "write", refuse)
        with pytest.raises(seqvault.UnavailableError, match="no room"):
            vault.append(events([2], 5, brand=["b"]))
    assert seen == [["a"], [0, -1]]
    vault.append(events([2], 5, brand=["c"]))
    assert vault.dictionary("brand").tolist() == ["a", "c"]
