"""What writing costs: durable appends, replay, background merges and the reads beside them, write amplification.

  python -m experiments.bench.vault_write

- appends in batches of 1024, each durable when it returns, in turn with RocksDB's WriteBatch of as many records, synced
- appends of one event, in turn with a bare write and fdatasync of as many bytes
- replay: opening a vault whose log holds all of its events
- a day: many users write a few events each in the order of time, a few write many; bytes written to the disk over bytes
  appended, and how many parts users live in at its end
- reads with nothing else going on, and while users are merged in the background at the default rate

Ingestion is measured by experiments.bench.vault_ingest. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import time
from typing import Any

import numpy as np

from experiments.bench.vault_build import tell
from experiments.bench.vault_data import RAW, RAW_BYTES, SCHEMA, Columns, Events
from laser_jax import vault as seqvault

BATCH = 1024
#: Bytes of an event and its user, as columns.
EVENT_BYTES = RAW_BYTES + 8
SECONDS_A_DAY = 86_400
_VALUES = {
    "item": 2**40,
    "category": 500,
    "author": 300_000,
    "content_code": 2**20,
    "dwell": 3000,
    "action": 8,
    "scene": 3,
}


def day(num_events: int, num_users: int, seed: int) -> Columns:
    """A day's events of many users in the order of time; most users have a few, some have many."""
    rng = np.random.default_rng([seed, 7])
    weight = rng.lognormal(0.0, 1.2, num_users)
    user = np.sort(rng.choice(num_users, num_events, p=weight / weight.sum()))
    # A user's events of a day come in two or three sittings.
    sitting = rng.random((num_users, 3)) * (SECONDS_A_DAY - 3600)
    begin = sitting[user, rng.integers(0, 3, num_events)]
    moment = (begin + rng.exponential(600, num_events)).astype(np.int64)
    order = np.argsort(moment, kind="stable")
    found: dict[str, Any] = {"user": user[order].astype(np.int64), "time": 1_700_000_000 + moment[order]}
    for name, dtype in RAW.items():
        if name != "time":
            found[name] = rng.integers(0, _VALUES[name], num_events).astype(dtype)
    return found


def batches(events: Columns, size: int = BATCH) -> list[Columns]:
    """The same events in batches."""
    total = len(events["time"])
    return [{name: column[a : a + size] for name, column in events.items()} for a in range(0, total, size)]


def measure_appends(root: str, events: Columns, rounds: int) -> dict[str, Any]:
    """Durable batches against RocksDB's, and single events against fdatasync."""
    from rocksdict import Options, Rdict, WriteBatch, WriteOptions

    made = batches(events)
    path = _fresh(root, "append")
    with seqvault.create(path, SCHEMA):
        pass
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    database = Rdict(_fresh(root, "rocksdb"), options)
    synced = WriteOptions()
    synced.sync = True
    record = np.dtype([(name, dtype) for name, dtype in RAW.items()])
    sequence = 0

    def append_rocksdb(batch: Columns) -> None:
        nonlocal sequence
        rows = np.empty(len(batch["time"]), record)
        for name in RAW:
            rows[name] = batch[name]
        keys = np.empty(len(rows), [("user", ">u8"), ("time", ">u8"), ("sequence", ">u8")])
        keys["user"], keys["time"] = batch["user"], batch["time"]
        keys["sequence"] = np.arange(sequence, sequence + len(rows))
        sequence += len(rows)
        data, names = rows.tobytes(), keys.tobytes()
        batch_of_writes = WriteBatch(raw_mode=True)
        for row in range(len(rows)):
            batch_of_writes.put(
                names[row * 24 : row * 24 + 24], data[row * record.itemsize : (row + 1) * record.itemsize]
            )
        database.write(batch_of_writes, synced)

    with seqvault.open(path, writing=seqvault.WriterOptions(tail_bytes=1 << 30)) as vault:
        rates: dict[str, list[float]] = {"vault": [], "rocksdb": []}
        share = max(1, min(len(made) // (rounds + 1), 40))
        for turn in range(rounds + 1):
            chosen = made[turn * share : (turn + 1) * share]
            for name, append in (("vault", vault.append), ("rocksdb", append_rocksdb)):
                start = time.perf_counter()
                for batch in chosen:
                    append(batch)
                if turn:
                    rates[name].append(sum(len(batch["time"]) for batch in chosen) / (time.perf_counter() - start))
        single = {name: column[:1] for name, column in events.items()}
        size = _log_size(path)
        vault.append(single)
        size = _log_size(path) - size
        one, bare = _single_appends(vault, single, os.path.join(root, "bare"), size)
    database.close()
    per_s = {name: float(np.median(values)) for name, values in rates.items()}
    tell(f"append: vault {per_s['vault']:,.0f} events/s, rocksdb {per_s['rocksdb']:,.0f} events/s")
    return {
        "append_events_per_s": round(per_s["vault"]),
        "append_vs_rocksdb": round(per_s["vault"] / per_s["rocksdb"], 3),
        "append_one_us": round(1e6 * one, 1),
        "fdatasync_us": round(1e6 * bare, 1),
        "append_one_over_fdatasync": round(one / bare, 3),
    }


def _single_appends(vault: Any, single: Columns, bare_path: str, size: int, count: int = 1000) -> tuple[float, float]:
    """Median seconds of an append of one event, and of a bare write and fdatasync of as many bytes, in turn."""
    taken: dict[str, list[float]] = {"vault": [], "bare": []}
    descriptor = os.open(bare_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    data = os.urandom(size)
    for turn in range(count):
        start = time.perf_counter()
        vault.append(single)
        middle = time.perf_counter()
        os.pwrite(descriptor, data, turn * size)
        os.fdatasync(descriptor)
        taken["vault"].append(middle - start)
        taken["bare"].append(time.perf_counter() - middle)
    os.close(descriptor)
    return float(np.median(taken["vault"])), float(np.median(taken["bare"]))


def measure_replay(root: str, events: Columns) -> dict[str, Any]:
    """Opening a vault whose events are all in the log, as after a crash."""
    path = _fresh(root, "replay")
    with seqvault.create(path, SCHEMA):
        pass
    total = len(events["time"])
    writing = seqvault.WriterOptions(tail_bytes=8 << 30, background=False)
    with seqvault.open(path, writing=writing) as vault:
        futures = [vault.append_async(batch) for batch in batches(events)]
        for future in futures:
            future.result()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        opened = seqvault.open(path)
        seconds.append(time.perf_counter() - start)
        assert opened.num_events == total
    return {"replay_events_per_s": round(total / float(np.median(seconds)))}


def measure_day(root: str, events: Columns, base: Events, tail_bytes: int) -> dict[str, Any]:
    """A day on top of older histories, with everything that goes on in the background."""
    path = _fresh(root, "day")
    _base(path, base)
    total = len(events["time"])
    writing = seqvault.WriterOptions(tail_bytes=tail_bytes)
    with seqvault.open(path, writing=writing) as vault:
        before = vault.num_events
        start = time.perf_counter()
        for number, batch in enumerate(batches(events)):
            vault.append(batch)
            if number % 500 == 0:
                tell(f"day: {number * BATCH:,} of {total:,} events, {len(vault.state.parts)} parts")
        seconds = time.perf_counter() - start
        vault.flush()
        _wait_for_merges(vault)
        stats = vault.stats()
        writer = stats["writer"]
        written = writer["part_bytes_written"] + writer["log_bytes_written"]
        assert vault.gather(vault.users()[:100], n=10).num_events > 0 and vault.num_events >= before + total
        found = {
            "day_events": total,
            "day_users": len(np.unique(events["user"])),
            "day_tail_bytes": tail_bytes,
            "day_events_per_s": round(total / seconds),
            "write_amplification": round(written / (total * EVENT_BYTES), 3),
            "log_bytes_over_raw": round(writer["log_bytes_written"] / (total * EVENT_BYTES), 3),
            "events_merged_over_appended": round(writer["events_merged"] / total, 3),
            "parts": stats["parts"],
            "parts_per_user_mean": round(stats["parts_per_user"][0], 3),
            "parts_per_user_p99": stats["parts_per_user"][1],
            "parts_per_user_max": stats["parts_per_user"][2],
        }
    return found


def measure_reads(root: str, base: Events, lookups: int, rounds: int) -> dict[str, Any]:
    """Latency of lookups, idle and while users are merged in the background."""
    path = _fresh(root, "reads")
    _base(path, base)
    trace = base.users[base.trace(lookups)].tolist()
    writing = seqvault.WriterOptions(tail_bytes=1 << 30)
    rng = np.random.default_rng(3)
    with seqvault.open(path, cache_bytes=0, writing=writing) as vault:
        idle, busy, merging_s = [], [], 0.0
        for turn in range(rounds + 1):
            for _ in range(writing.merge_parts + 1):
                # A few more events of every user in one more part.
                rows = day(4 * len(base.users), len(base.users), int(rng.integers(2**31)))
                vault.append(rows | {"user": base.users[rows["user"]]})
                vault.flush()
            quiet = _latencies(vault, trace, lambda: True)
            vault.merge_in_background()
            started = time.perf_counter()
            beside = _latencies(vault, trace, lambda: vault.stats()["writer"]["merging"])
            if turn:
                idle.append(np.percentile(quiet, [50, 99]))
                busy.append(np.percentile(beside, [50, 99]))
            tell(f"reads: {len(beside)} lookups beside a merge")
            _wait_for_merges(vault)
            merging_s += time.perf_counter() - started
    p50, p99 = (np.median(np.array(busy), axis=0) / np.median(np.array(idle), axis=0)).tolist()
    return {
        "read_idle_p50_us": round(float(np.median(np.array(idle)[:, 0])), 1),
        "read_p50_during_merge_over_idle": round(p50, 3),
        "read_p99_during_merge_over_idle": round(p99, 3),
        "merge_rate_mb_per_s": writing.merge_bytes_per_s >> 20,
    }


def _latencies(vault: Any, trace: list[int], going_on: Any) -> np.ndarray:
    """Microseconds of each lookup, as long as something goes on."""
    taken = []
    for number, user in enumerate(trace):
        if number % 200 == 0 and number and not going_on():
            break
        start = time.perf_counter()
        vault.get(user)
        taken.append(time.perf_counter() - start)
    return 1e6 * np.array(taken)


def _wait_for_merges(vault: Any) -> None:
    while vault.stats()["writer"]["merging"]:
        time.sleep(0.05)


def _base(path: str, events: Events) -> None:
    """A vault of older histories."""
    with seqvault.create(path, SCHEMA) as writer:
        for users, start, columns in events.blocks():
            user = np.repeat(users, np.diff(start))
            writer.write({"user": user, **columns, "time": columns["time"].astype(np.int64)})


def _fresh(root: str, name: str) -> str:
    path = os.path.join(root, name)
    shutil.rmtree(path, ignore_errors=True)
    return path


def _log_size(path: str) -> int:
    folder = os.path.join(path, "log")
    return sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="datasets/bench_vault_write", help="where the stores are built; emptied")
    parser.add_argument("--events", type=int, default=4_000_000, help="events of the day")
    parser.add_argument("--active", type=int, default=400_000, help="users of the day")
    parser.add_argument("--users", type=int, default=10_000, help="users with older histories")
    parser.add_argument("--tail", type=int, default=64, help="MB of memory for events that are in no part")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.makedirs(args.path, exist_ok=True)
    events, base = day(args.events, args.active, 0), Events.of(args.users)
    found = measure_appends(args.path, events, args.rounds)
    found |= measure_replay(args.path, {name: column[:1_000_000] for name, column in events.items()})
    found |= measure_reads(args.path, base, 6000, args.rounds)
    found |= measure_day(args.path, events, base, args.tail << 20)
    print("| | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,} |")
    print(json.dumps(found | {"cpus": os.cpu_count()}))


if __name__ == "__main__":
    main()
