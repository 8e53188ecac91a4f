"""Repair gives up what is damaged and keeps everything else."""

import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.log import log_numbers, log_path
from tests.faults.test_bit_flips import flip
from tests.vault.conftest import FIELDS, random_log, take

USERS = np.array(["ann", "bob", "cem"], object)
SCHEMA = Schema(user="string", fields=FIELDS)


@pytest.fixture
def lived(tmp_path):
    """(path, log): 900 events in a merged part, 300 in a delta part, 300 in the log; a snapshot of the first 900."""
    log = random_log(SCHEMA, USERS, 1500, 0)
    path = tmp_path / "vault"
    with seqvault.create(path, SCHEMA) as writer:
        writer.write(take(log, slice(0, 500)))
    with seqvault.open(path, writing=seqvault.WriterOptions(background=False)) as vault:
        vault.append(take(log, slice(500, 900)))
        vault.merge()
        vault.snapshot("first")
        vault.append(take(log, slice(900, 1200)))
        vault.flush()
        for row in range(1200, 1500, 50):
            vault.append(take(log, slice(row, row + 50)))
    return str(path), log


def events_of(vault) -> dict:
    """user -> {(time, item)} of all that is there."""
    return {
        user: set(zip(*(vault.get(user, 9999)[name].tolist() for name in ("time", "item")), strict=True))
        for user in USERS
    }


def test_a_whole_vault_is_left_alone(lived):
    path, log = lived
    before = changed_at(path)
    report = seqvault.repair(path)
    assert report.actions == [] and report.events_lost == 0 and str(report) == f"whole: {path}"
    assert changed_at(path) == before


def changed_at(path) -> dict:
    """When each file of a vault was changed, but for the lock."""
    names = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    return {name: os.path.getmtime(name) for name in names if not name.endswith("writer.lock")}


def test_everything_damaged_at_once(lived):
    path, log = lived
    whole = events_of(seqvault.open(path))
    assert sum(map(len, whole.values())) == 1500
    vault = seqvault.open(path)
    merged, delta = vault.state.parts.values()
    flip(os.path.join(merged.folder.path, "pages/c/0/0/0"), int(merged.offset[1]) + 30, 2)
    flip(os.path.join(delta.folder.path, "user_bytes/c/0"), 1, 1)
    brand = vault.manifest["dictionaries"]["brand"][0]["name"]
    flip(os.path.join(path, "dictionaries", brand, "bytes/c/0"), 0, 0)
    number = max(name for name in os.listdir(os.path.join(path, "log")) if name.endswith(".log"))
    size = os.path.getsize(os.path.join(path, "log", number))
    flip(os.path.join(path, "log", number), size // 2, 3)
    damages = seqvault.verify(path)
    assert len(damages) >= 4
    report = seqvault.repair(path)
    assert seqvault.verify(path) == []
    left = events_of(seqvault.open(path))
    lost = sum(len(whole[user] - left[user]) for user in USERS)
    assert all(left[user] <= whole[user] for user in USERS), "nothing is there that was not written"
    # One page of the merged part, the delta part, one record of the log.
    assert report.events_lost == lost and 300 + 50 < lost <= 300 + 50 + 256
    assert "<lost 0>" in seqvault.open(path).dictionary("brand").tolist()
    assert len(events_of(seqvault.open(path, at="first"))["ann"]) > 0
    with seqvault.open(path) as vault:
        vault.append(take(log, slice(0, 10)))
        assert sum(map(len, events_of(vault).values())) <= 1500 - lost + 10
        vault.merge()
        assert vault.verify() == []


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_the_manifest_comes_back_from_its_copy(lived, damage):
    path, _ = lived
    whole = events_of(seqvault.open(path))
    name = os.path.join(path, "manifest.json")
    if damage == "flip":
        # Its other name in manifests/ is the same file.
        flip(name, 50, 1)
    else:
        os.remove(name)
    with pytest.raises((seqvault.CorruptionError, seqvault.NotAVaultError)):
        seqvault.open(path)
    assert "restored from manifest.copy.json" in str(seqvault.repair(path))
    assert events_of(seqvault.open(path)) == whole and seqvault.verify(path) == []


def test_a_log_that_was_cut_where_it_was_acknowledged(lived):
    path, _ = lived
    number = max(name for name in os.listdir(os.path.join(path, "log")) if name.endswith(".log"))
    target = os.path.join(path, "log", number)
    os.truncate(target, os.path.getsize(target) - 10)
    with pytest.raises(seqvault.CorruptionError, match="acknowledged"):
        seqvault.open(path)
    report = seqvault.repair(path)
    assert "250 events of its whole records are kept" in str(report)
    assert seqvault.open(path).num_events == 1450 and seqvault.verify(path) == []


QUIET = seqvault.WriterOptions(background=False)
BRANDS = Schema(fields=(Field("brand", "string"),))


def vault_at(path, schema):
    with seqvault.create(path, schema):
        pass
    return seqvault.open(path, writing=QUIET)


def test_a_log_of_which_no_file_is_left_is_not_whole(tmp_path):
    with vault_at(tmp_path / "vault", BRANDS) as vault:
        vault.append({"user": [1], "time": [1], "brand": ["a"]})
        vault.flush()
        vault.append({"user": [1], "time": [2], "brand": ["b"]})
    os.remove(log_path(vault.path, log_numbers(vault.path)[-1]))
    with pytest.raises(seqvault.CorruptionError, match="missing"):
        seqvault.open(vault.path)
    report = seqvault.repair(vault.path)
    assert report.events_lost == 1 and "1 are lost" in str(report) and report.loss
    with seqvault.open(vault.path, writing=QUIET) as vault:
        assert vault.next_sequence == 2
        vault.append({"user": [1], "time": [3], "brand": ["c"]})
        assert seqvault.open(vault.path).get(1)["brand"].tolist() == ["a", "c"]
    assert seqvault.verify(vault.path) == [] and seqvault.repair(vault.path).actions == []


def test_a_damaged_log_that_is_kept_for_repeated_events_bars_nobody(tmp_path):
    schema = Schema(fields=(Field("key", "int64"),), event_key="key", duplicates="drop")
    with vault_at(tmp_path / "vault", schema) as vault:
        for start in (0, 10):
            vault.append({"user": [1] * 10, "time": [1] * 10, "key": list(range(start, start + 10))})
            vault.flush()
    damaged = log_path(vault.path, log_numbers(vault.path)[0])
    flip(damaged, os.path.getsize(damaged) - 4, 0)
    assert damaged in str(seqvault.verify(vault.path))
    with seqvault.open(vault.path, writing=QUIET) as vault, pytest.raises(seqvault.CorruptionError):
        vault.begin_writing()
    report = seqvault.repair(vault.path)
    assert "not known which repeat them" in str(report) and not report.loss and report.events_lost == 0
    assert seqvault.verify(vault.path) == []
    with seqvault.open(vault.path, writing=QUIET) as vault:
        vault.append({"user": [1] * 2, "time": [1] * 2, "key": [3, 13]})
        assert sorted(vault.get(1)["key"].tolist()) == sorted([*range(20), 3])  # 13 is in the log that is whole


def test_repair_keeps_who_sent_what(tmp_path):
    with vault_at(tmp_path / "vault", BRANDS) as vault:
        for number in range(4):
            vault.append({"user": [1], "time": [number], "brand": [f"b{number}"]}, origin=("client", number))
        vault.append({"user": [2], "time": [9], "brand": ["z"]}, origin=("other", 7))
    log = log_path(vault.path, log_numbers(vault.path)[-1])
    flip(log, os.path.getsize(log) - 4, 0)
    assert seqvault.repair(vault.path).events_lost == 1
    with seqvault.open(vault.path, writing=QUIET) as vault:
        for number in range(5):
            vault.append({"user": [1], "time": [number], "brand": [f"b{number}"]}, origin=("client", number))
        vault.append({"user": [2], "time": [9], "brand": ["z"]}, origin=("other", 7))  # was lost, and is not there
        assert vault.get(1)["brand"].tolist() == [f"b{number}" for number in range(5)]
        assert vault.get(2)["brand"].tolist() == ["z"]


def test_a_log_whose_strings_a_part_brought_before_is_whole(tmp_path):
    """As when events come in while a tail becomes a part."""
    with vault_at(tmp_path / "vault", BRANDS) as vault:
        vault.append({"user": [1], "time": [1], "brand": ["a"]})
        vault._appender.seal()
        run = vault._appender.maintenance.run_task

        def busy(task):
            vault.append({"user": [1], "time": [2], "brand": ["b"]}, origin=("client", 2))
            return run(task)

        vault._appender.maintenance.run_task = busy
        vault._appender.maintenance._flush(list(vault._appender.pieces))
    assert seqvault.verify(vault.path) == []
    before = changed_at(vault.path)
    assert str(seqvault.repair(vault.path)) == f"whole: {vault.path}" and changed_at(vault.path) == before


def test_repair_of_nothing_and_of_a_vault_in_use(lived, tmp_path):
    path, log = lived
    with pytest.raises(seqvault.NotAVaultError):
        seqvault.repair(tmp_path / "none")
    with seqvault.open(path) as vault:
        vault.append(take(log, slice(0, 1)))
        with pytest.raises(seqvault.LockedError):
            seqvault.repair(path)
    shutil.rmtree(path)
