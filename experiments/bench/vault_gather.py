"""Batches of users with a bound on time each: the vault's gather against RocksDB read by as many threads."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.bench import vault_codecs as codecs
from experiments.bench.vault_build import VAULT_TWO, tell
from experiments.bench.vault_data import LATEST, RAW, Columns, Events
from experiments.bench.vault_peers import RocksDBStore, key_of
from laser_jax import vault as seqvault


class RocksDBGather:
    """Two values a user, the vault's decode, MultiGet; the batch's columns are filled by all threads.

    The older value is read only for users whose newer one holds too little.
    """

    def __init__(self, path: str, threads: int):
        self._store = RocksDBStore(path, codecs.decode_planes)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self.close = self._store.close

    def gather(self, users: np.ndarray, before: np.ndarray) -> tuple[Columns, np.ndarray]:
        """Columns of all users, one after the other, and offsets int64 [B + 1]."""
        shares = np.array_split(np.arange(len(users)), self._threads)
        listed, bounds = users.tolist(), before.tolist()
        read = self._pool.map(
            lambda share: self._runs(listed[share[0] : share[-1] + 1], bounds[share[0] : share[-1] + 1]), shares
        )
        runs = [run for share in read for run in share]
        offsets = np.zeros(len(users) + 1, np.int64)
        np.cumsum([sum(stop - start for _, start, stop in run) for run in runs], out=offsets[1:])
        columns = codecs.empty_columns(int(offsets[-1]))
        list(self._pool.map(lambda share: _fill(columns, runs, offsets, share.tolist()), shares))
        return columns, offsets

    def _runs(self, users: list[int], before: list[int]) -> list[list[tuple[np.ndarray, int, int]]]:
        """Byte planes of values and which of their events to take, oldest first, for each user."""
        runs, short = [], []
        for row, value in enumerate(self._store.read([key_of(user, 1) for user in users])):
            planes = codecs.planes_of(value)
            stop = codecs.count_before(planes, before[row])
            runs.append([(planes, max(0, stop - LATEST), stop)])
            if stop < LATEST:
                short.append(row)
        for row, value in zip(short, self._store.read([key_of(users[row]) for row in short]), strict=True):
            planes = codecs.planes_of(value)
            held = runs[row][0][2]
            stop = planes.shape[1] if held else codecs.count_before(planes, before[row])
            runs[row].insert(0, (planes, max(0, stop + held - LATEST), stop))
        return runs


def _fill(columns: Columns, runs: list[Any], offsets: np.ndarray, share: list[int]) -> None:
    arrays = tuple(columns.values())
    rows = offsets.tolist()
    for position in share:
        row = rows[position]
        for planes, start, stop in runs[position]:
            codecs.unpack(planes, start, stop, row, *arrays)
            row += stop - start


def batches(events: Events, size: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Users of each batch, distinct and drawn alike, with a time in the later half of their events: [size] both."""
    rng = np.random.default_rng([events.seed, 4])
    times = _late_times(events, rng)
    chosen = [rng.choice(len(events.users), min(size, len(events.users)), replace=False) for _ in range(count)]
    return [(events.users[rows], times[rows]) for rows in chosen]


def _late_times(events: Events, rng: np.random.Generator) -> np.ndarray:
    """For each user one past the time of a random event of the later half, int64 [U]."""
    found = []
    for _, start, columns in events.blocks():
        lengths = np.diff(start)
        row = start[:-1] + (lengths * rng.uniform(0.5, 1.0, len(lengths))).astype(np.int64)
        found.append(columns["time"][row].astype(np.int64) + 1)
    return np.concatenate(found)


def measure(root: str, events: Events, rounds: int, size: int = 1024) -> dict[str, Any]:
    """Checks that both give the same and times them in turn; see experiments.bench.vault for the keys."""
    vault = seqvault.open(os.path.join(root, VAULT_TWO), cache_bytes=0)
    threads = os.cpu_count() or 1
    peer = RocksDBGather(os.path.join(root, "rocksdb_two"), threads)
    contenders = {
        "vault": lambda users, before: vault.gather(users, before=before, n=LATEST),
        "rocksdb_packed": peer.gather,
    }
    made = batches(events, size, rounds + 1)
    _check(contenders, *made[0])
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for number, (users, before) in enumerate(made[1:]):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            result = contenders[name](users, before)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            count = result.num_events if name == "vault" else int(result[1][-1])
            taken[name].append(seconds / count)
            cpu[name].append(cpu_seconds / count)
            del result
    peer.close()
    per_s = {name: 1 / float(np.median(values)) for name, values in taken.items()}
    tell(f"gather: {', '.join(f'{name} {rate:,.0f} events/s' for name, rate in per_s.items())}")
    return {
        f"gather{size}_vs_rocksdb_packed": round(per_s["vault"] / per_s["rocksdb_packed"], 4),
        "gather_events_per_s": {name: round(rate) for name, rate in per_s.items()},
        "gather_cpu_ns_per_event": {name: round(1e9 * float(np.median(values)), 1) for name, values in cpu.items()},
        "gather_threads": threads,
    }


def _check(contenders: dict[str, Any], users: np.ndarray, before: np.ndarray) -> None:
    found = contenders["vault"](users, before)
    columns, offsets = contenders["rocksdb_packed"](users, before)
    np.testing.assert_array_equal(found.offsets, offsets)
    for name in RAW:
        np.testing.assert_array_equal(found.columns[name], columns[name], err_msg=name)
