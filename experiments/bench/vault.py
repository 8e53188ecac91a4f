"""The vault against RocksDB, LMDB and a memory map: lookups of a user's latest 1000 events, and batches.

  python -m experiments.bench.vault --users=40000

About 20 M seeded events (vault_data.py), every store filled with the same (vault_build.py, once, into --path), answers
checked equal, users looked up by a Zipf(.9) trace. What is compared:

  rocksdb_json      a JSON array of records a user, zstd blocks; only the newest records are parsed
  rocksdb_packed    columns with times as differences, one blosc buffer a user, decoded by numcodecs and numpy
  ..._same_decode   byte planes and zstd, decoded as the vault does: one reused context and a compiled loop
  rocksdb_raw       28-byte records, a value a user, zstd blocks
  lmdb              the packed values of rocksdb_packed
  memmap            uncompressed columns: the physical limit

Block (i): no cache but the kernel's, which holds all files (RocksDB needs a block cache: 8 MiB). Block (ii): 128 MiB
each, as decoded histories, and for rocksdb_packed as block cache too: the better counts. Cold: files evicted before
every few lookups, of distinct users. Each figure is the median of rounds whose blocks of lookups take turns. The last
line is one JSON object; a key `p99_vs_x` is the vault's p99 over x's, `cpu_` of all threads of the process.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench import vault_gather
from experiments.bench.vault_build import CONTENDERS, FOLDERS, VAULT, build, open_store, tell
from experiments.bench.vault_data import LATEST, RAW, Events
from experiments.bench.vault_measure import (
    Timing,
    count_reads,
    disk_bytes,
    evict,
    pre_read,
    time_lookups,
)
from experiments.bench.vault_peers import SMALL_CACHE, Cached

STORES = (VAULT, "memmap", *CONTENDERS)
CACHE = 128 << 20
THREADS = (1, 2, 4, 8)


def check_equal(stores: dict[str, Any], users: list[int]) -> None:
    """All stores must give the memory map's answers, with the schema's types."""
    for user in users:
        wanted = stores["memmap"].get(user)
        for name, store in stores.items():
            found = store.get(user)
            if set(found) != set(RAW):
                raise AssertionError(f"{name}, user {user}: columns {sorted(found)}")
            for column, values in wanted.items():
                same = found[column].dtype == values.dtype and np.array_equal(found[column], values)
                if not same or not found[column].flags.c_contiguous:
                    raise AssertionError(f"{name}, user {user}: other {column}")


def warm_files(root: str) -> None:
    """Brings all files into the page cache; before every warm block, for kernels let go of what nobody asked for."""
    tell("reading all files")
    for name in FOLDERS:
        pre_read(os.path.join(root, name))


def cut(users: np.ndarray, rounds: int) -> list[list[int]]:
    """A trace cut into rounds."""
    return [part.tolist() for part in np.array_split(users, rounds)]


def warm_block(stores: dict[str, Any], events: Events, rounds: int, lookups: int) -> tuple[dict, dict]:
    """Block (i) by the trace, and the same among users with at least LATEST events."""
    gets = {name: store.get for name, store in stores.items()}
    trace = events.users[events.trace((rounds + 1) * lookups)]
    for get in gets.values():
        for user in trace[-min(lookups, 500) :].tolist():
            get(user)
    everyone = time_lookups(gets, cut(trace[: rounds * lookups], rounds))
    long = np.flatnonzero(events.lengths >= LATEST)
    if not len(long):
        return everyone, {}
    return everyone, time_lookups(gets, cut(events.users[events.trace(rounds * lookups // 4, long)], rounds))


def cached_block(root: str, stores: dict[str, Any], events: Events, rounds: int, lookups: int) -> dict[str, Timing]:
    """Block (ii): every store with CACHE bytes, spent as it likes, filled before the first round."""
    gets = {name: Cached(stores[name], CACHE - SMALL_CACHE * name.startswith("rocksdb")).get for name in CONTENDERS}
    opened = {
        VAULT: open_store(root, VAULT, CACHE),
        "rocksdb_packed_block_cache": open_store(root, "rocksdb_packed", CACHE),
    }
    gets |= {name: store.get for name, store in opened.items()}
    trace = events.users[events.trace((rounds + 5) * lookups)]
    tell("filling the caches")
    for get in gets.values():
        for user in trace[rounds * lookups :].tolist():
            get(user)
    found = time_lookups(gets, cut(trace[: rounds * lookups], rounds))
    for store in opened.values():
        store.close()
    return found


def cold_block(stores: dict[str, Any], events: Events, rounds: int, lookups: int) -> dict[str, Timing]:
    """Distinct users, every store's files evicted before each 25 lookups."""
    rng = np.random.default_rng([events.seed, 5])
    count = min(rounds * lookups, len(events.users))
    users = events.users[rng.choice(len(events.users), count, replace=False)]
    gets = {name: store.get for name, store in stores.items()}
    return time_lookups(gets, cut(users, rounds), block=25, before_block=lambda name: evict(stores[name]))


def by_threads(get: Callable[[int], Any], users: list[int]) -> dict[str, int]:
    """Lookups a second with several threads sharing one handle; the median of three runs."""

    def look_up(part: list[int]) -> None:
        for user in part:
            get(user)

    found = {}
    for threads in THREADS:
        parts = [users[number::threads] for number in range(threads)]
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(look_up, [part[:50] for part in parts]))  # starts the threads
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                list(pool.map(look_up, parts))
                seconds.append(time.perf_counter() - start)
        found[str(threads)] = round(len(users) / float(np.median(seconds)))
    return found


def table(title: str, timings: dict[str, Timing], extra: dict[str, dict[str, float]] | None = None) -> str:
    """Markdown: a store a row; `extra` is column -> store -> value."""
    extra = extra or {}
    lines = [f"\n{title}\n", f"| store | p50 us | p99 us | CPU ms per 1000 |{''.join(f' {name} |' for name in extra)}"]
    lines.append("|---" * (4 + len(extra)) + "|")
    for name, timing in timings.items():
        cells = [f"{timing.median('p50'):.1f}", f"{timing.median('p99'):.1f}", f"{timing.median('cpu'):.1f}"]
        cells += [f"{column.get(name, float('nan')):.4g}" for column in extra.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("nan", "-")


def ratio(timings: dict[str, Timing], what: str, peer: str) -> float:
    """The vault's median over a peer's."""
    return round(timings[VAULT].median(what) / timings[peer].median(what), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=40_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", default="datasets/bench_vault", help="stores, built on first use")
    parser.add_argument("--rebuild", default="", help="stores to write anew, such as vault,vault_two")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lookups", type=int, default=4000, help="of a store in a round")
    parser.add_argument("--cold_lookups", type=int, default=1000, help="of a store in a cold round")
    parser.add_argument("--gather_rounds", type=int, default=40)
    args = parser.parse_args()
    events = Events.of(args.users, args.seed)
    root = os.path.join(args.path, f"{args.users}-{args.seed}")
    for name in filter(None, args.rebuild.split(",")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(root, name + ".json"))
    build(root, events)

    stores = {name: open_store(root, name) for name in STORES}
    some = events.trace(200).tolist() + np.argsort(events.lengths)[[0, -1, -2, -3]].tolist()
    check_equal(stores, events.users[some].tolist())
    tell("answers are equal")
    warm_files(root)
    warm, long = warm_block(stores, events, args.rounds, args.lookups)
    sample = events.users[events.trace(args.lookups)].tolist()
    reads = {name: count_reads(store.get, sample) for name, store in stores.items()}
    threads = {name: by_threads(stores[name].get, sample) for name in (VAULT, "rocksdb_packed_same_decode")}
    warm_files(root)
    cached = cached_block(root, stores, events, args.rounds, args.lookups)
    warm_files(root)
    gathered = vault_gather.measure(root, events, args.gather_rounds)
    cold = cold_block(stores, events, args.rounds, args.cold_lookups)
    for store in stores.values():
        store.close()

    per_event = {name: disk_bytes(os.path.join(root, name)) / events.num_events for name in FOLDERS}
    folder = {VAULT: VAULT, "memmap": "memmap"} | {name: place for name, (place, _) in CONTENDERS.items()}
    columns = {
        "bytes/event": {name: per_event[folder[name]] for name in STORES},
        "reads": {name: calls for name, (calls, _) in reads.items()},
        "kB read": {name: size / 1e3 for name, (_, size) in reads.items()},
    }
    print(
        f"{args.users:,} users, {events.num_events:,} events; JSON by LZ4: {per_event['rocksdb_json_lz4']:.2f} B/event"
    )
    print(table("Warm, no application cache (i); reads by the kernel's count, maps not seen", warm, columns))
    if long:
        print(table(f"As (i), users with at least {LATEST} events", long))
    print(table(f"{CACHE >> 20} MiB each (ii)", cached))
    print(table("Cold", cold, {"disk kB": {name: timing.median("disk_kb") for name, timing in cold.items()}}))
    result = {
        "p99_vs_rocksdb_json": ratio(warm, "p99", "rocksdb_json"),
        "cpu_vs_rocksdb_json": ratio(warm, "cpu", "rocksdb_json"),
        "disk_vs_rocksdb_json_zstd": round(per_event[VAULT] / per_event["rocksdb_json_zstd"], 4),
        "disk_vs_rocksdb_json_lz4": round(per_event[VAULT] / per_event["rocksdb_json_lz4"], 4),
        "p99_vs_rocksdb_packed": ratio(warm, "p99", "rocksdb_packed"),
        "cpu_vs_rocksdb_packed": ratio(warm, "cpu", "rocksdb_packed"),
        "p99_vs_rocksdb_packed_same_decode": ratio(warm, "p99", "rocksdb_packed_same_decode"),
        "cpu_vs_rocksdb_packed_same_decode": ratio(warm, "cpu", "rocksdb_packed_same_decode"),
        "p99_vs_lmdb": ratio(warm, "p99", "lmdb"),
        "p99_vs_lmdb_same_decode": ratio(warm, "p99", "lmdb_same_decode"),
        "p99_vs_rocksdb_raw": ratio(warm, "p99", "rocksdb_raw"),
        "cpu_vs_rocksdb_raw": ratio(warm, "cpu", "rocksdb_raw"),
        "p99_over_memmap": ratio(warm, "p99", "memmap"),
        "cold_p99_vs_rocksdb_packed": ratio(cold, "p99", "rocksdb_packed"),
        "cold_p99_vs_rocksdb_packed_same_decode": ratio(cold, "p99", "rocksdb_packed_same_decode"),
        "preads_per_lookup": round(reads[VAULT][0], 4),
        "bytes_per_lookup": round(reads[VAULT][1]),
        "cpu_cached_vs_rocksdb_packed": max(
            ratio(cached, "cpu", name) for name in ("rocksdb_packed", "rocksdb_packed_block_cache")
        ),
        "cpu_cached_vs_rocksdb_packed_same_decode": ratio(cached, "cpu", "rocksdb_packed_same_decode"),
        **gathered,
        "lookups_per_s": threads[VAULT],
        "lookups_per_s_rocksdb_packed_same_decode": threads["rocksdb_packed_same_decode"],
        "users": args.users,
        "events": events.num_events,
        "rounds": args.rounds,
        "lookups": args.lookups,
        "cpus": os.cpu_count(),
    }
    if long:
        result["p99_vs_rocksdb_packed_long"] = ratio(long, "p99", "rocksdb_packed")
        result["p99_vs_rocksdb_packed_same_decode_long"] = ratio(long, "p99", "rocksdb_packed_same_decode")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
