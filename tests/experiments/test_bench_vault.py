"""The storage benchmark at a size that proves nothing but that it runs and that all stores give the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("rocksdict")
pytest.importorskip("lmdb")

from experiments.bench import vault as bench
from experiments.bench import vault_gather
from experiments.bench.vault_build import FOLDERS, build, open_store
from experiments.bench.vault_data import LATEST, RAW, SCHEMA, Events, zipf
from experiments.bench.vault_measure import count_reads, disk_bytes, evict, time_lookups
from experiments.bench.vault_peers import Cached


@pytest.fixture(scope="module")
def events() -> Events:
    return Events.of(50)


@pytest.fixture(scope="module")
def root(events, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("bench") / "stores")
    build(path, events)
    return path


@pytest.fixture(scope="module")
def stores(root):
    opened = {name: open_store(root, name) for name in bench.STORES}
    yield opened
    for store in opened.values():
        store.close()


def test_events_are_seeded_and_shaped(events):
    ((users, start, columns),) = events.blocks()
    again = next(iter(Events.of(50).blocks()))[2]
    assert set(columns) == set(RAW) == {"time", *SCHEMA.names}
    for name, dtype in RAW.items():
        assert columns[name].dtype == dtype and len(columns[name]) == events.num_events
        np.testing.assert_array_equal(columns[name], again[name])
    np.testing.assert_array_equal(np.diff(start), events.lengths)
    assert len(np.unique(users)) == 50 and events.lengths.min() >= 10 and events.lengths.max() <= 10_000
    for begin, end in zip(start[:-1], start[1:], strict=True):
        assert (np.diff(columns["time"][begin:end].astype(np.int64)) >= 0).all()


def test_zipf_falls_as_its_exponent_says():
    counts = np.bincount(zipf(np.random.default_rng(0), 0.9, 1000, 400_000), minlength=1000)
    assert len(counts) == 1000
    slope = np.polyfit(np.log(np.arange(10, 500)), np.log(counts[9:499]), 1)[0]
    assert slope == pytest.approx(-0.9, abs=0.05)


def test_all_stores_give_the_events_that_were_made(events, stores):
    users, start, columns = next(iter(events.blocks()))
    bench.check_equal(stores, users.tolist())
    for user, end, length in zip(users.tolist(), start[1:], events.lengths, strict=True):
        found = stores["memmap"].get(user)
        for name in RAW:
            np.testing.assert_array_equal(found[name], columns[name][end - min(length, LATEST) : end])


def test_check_sees_a_difference(events, stores):
    class Wrong:
        def get(self, user):
            found = dict(stores["memmap"].get(user))
            found["scene"] = found["scene"] + np.uint8(1)
            return found

    with pytest.raises(AssertionError, match="wrong, user .*: other scene"):
        bench.check_equal(dict(stores, wrong=Wrong()), events.users[:1].tolist())


def test_gather_gives_what_the_peer_gives(root, events):
    found = vault_gather.measure(root, events, rounds=2, size=32)  # it compares them
    assert found["gather32_vs_rocksdb_packed"] > 0
    assert set(found["gather_cpu_ns_per_event"]) == {"vault", "rocksdb_packed"}


def test_lookups_are_timed_and_counted(root, events, stores):
    gets = {name: store.get for name, store in stores.items()}
    users = events.users[events.trace(40)].tolist()
    found = time_lookups(gets, [users, users], block=10, before_block=lambda name: evict(stores[name]), quiet=True)
    for timing in found.values():
        assert len(timing.p50) == 2 and timing.median("p99") >= timing.median("p50") > 0
    calls, size = count_reads(stores["vault"].get, users)
    assert calls == pytest.approx(1, abs=0.1) and size > 0
    assert all(disk_bytes(f"{root}/{name}") > 0 for name in FOLDERS)


def test_stores_are_built_once(root, events):
    before = disk_bytes(root)
    build(root, events)
    assert disk_bytes(root) == before


def test_cached_keeps_to_its_budget(events, stores):
    cached = Cached(stores["memmap"], 100_000)
    for user in events.users.tolist():
        np.testing.assert_array_equal(cached.get(user)["item"], stores["memmap"].get(user)["item"])
    assert 0 <= cached._free < 100_000 and 0 < len(cached._held) < 50


def test_door_ends_in_a_line_of_json(tmp_path):
    command = [sys.executable, "-m", "experiments.bench.vault", "--users=50", f"--path={tmp_path}"]
    command += ["--rounds=2", "--lookups=40", "--cold_lookups=10", "--gather_rounds=2"]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    result = json.loads(done.stdout.splitlines()[-1])
    for key in ("p99_vs_rocksdb_json", "cpu_vs_rocksdb_packed", "preads_per_lookup", "gather1024_vs_rocksdb_packed"):
        assert result[key] > 0
