"""A vault several times larger than the memory it is allowed, and the index of very many users.

  python -m experiments.bench.vault_scale

Every store has a process of its own in a control group (v2 or v1) whose memory limit, page cache included, is a quarter
of the vault's size; opening the store is within it. Two blocks: `cold`, distinct users with the store's files evicted
before every few lookups, and `limited`, a Zipf(.9) trace with what page cache the limit leaves. Where control groups
cannot be written, it says so and only `cold` is measured. The peers decode as the vault does. `--big` adds an index of
100 M users, given the memory. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.bench.vault_build import CONTENDERS, VAULT, build, open_store, tell
from experiments.bench.vault_data import Events
from experiments.bench.vault_measure import count_reads, disk_bytes, evict, time_lookups

STORES = (VAULT, "rocksdb_packed_same_decode", "lmdb_same_decode")
#: Data over memory; below some MEGABYTES, Python and its libraries alone hardly fit.
OVERSIZE, MEGABYTES = 4, 200
_CGROUP = "/sys/fs/cgroup"
#: Bytes a user while a simulated index is being made.
_INDEX_PEAK = 190


class MemoryLimit:
    """A control group with a memory limit, removed on exit; OSError where there cannot be one."""

    def __init__(self, name: str, limit: int):
        root = _CGROUP
        if os.path.exists(f"{root}/cgroup.controllers"):
            if "memory" not in _read(f"{root}/cgroup.subtree_control").split():
                _write(f"{root}/cgroup.subtree_control", "+memory")
            files = {"memory.max": limit, "memory.swap.max": 0}
        else:
            root = f"{_CGROUP}/memory"
            files = {"memory.limit_in_bytes": limit}
        self.path = f"{root}/{name}"
        os.mkdir(self.path)
        try:
            for file, value in files.items():
                if file != "memory.swap.max" or os.path.exists(f"{self.path}/{file}"):
                    _write(f"{self.path}/{file}", str(value))
        except OSError:
            os.rmdir(self.path)
            raise

    def command(self, command: list[str]) -> list[str]:
        """The same command, inside."""
        enter = f"echo $$ > {shlex.quote(self.path)}/cgroup.procs && exec {shlex.join(command)}"
        return ["/bin/sh", "-c", enter]

    def remove(self) -> None:
        """Once the processes have ended."""
        for _ in range(50):
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
                return
            time.sleep(0.1)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


class Worker:
    """A process that looks users up in one store."""

    def __init__(self, root: str, name: str, limit: MemoryLimit | None):
        self.name = name
        command = [sys.executable, "-m", "experiments.bench.vault_scale", f"--worker={name}", f"--path={root}"]
        self._process = subprocess.Popen(
            limit.command(command) if limit else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.opened = self._answer()

    def ask(self, block: str, users: list[int]) -> dict[str, float]:
        """Has some users looked up; see `work`."""
        self._process.stdin.write(json.dumps({"block": block, "users": users}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}: -9 means that it needs more memory")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def work(root: str, name: str) -> None:
    """The worker: an order a line in, figures a line out, until the input ends."""
    store = open_store(root, name)
    opened = {"index_bytes": store.vault.stats()["index_bytes"]} if name == VAULT else {}
    print(json.dumps(opened), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order["block"] == "preads":
            evict(store)
            calls, size = count_reads(store.get, order["users"])
            print(json.dumps({"calls": calls, "bytes": size}), flush=True)
            continue
        before = (lambda _: evict(store)) if order["block"] == "cold" else None
        timing = time_lookups({name: store.get}, [order["users"]], 25, before, quiet=True)[name]
        print(json.dumps({what: timing.median(what) for what in ("p50", "p99", "cpu", "disk_kb")}), flush=True)
    store.close()


@contextlib.contextmanager
def workers(root: str, limit_bytes: int) -> Iterator[tuple[dict[str, Worker], bool]]:
    """A worker for each store, and whether their memory is limited."""
    with contextlib.ExitStack() as stack:
        limits: dict[str, MemoryLimit | None] = dict.fromkeys(STORES)
        try:
            for name in STORES:
                limits[name] = MemoryLimit(f"laser_bench_{os.getpid()}_{name}", limit_bytes)
                stack.callback(limits[name].remove)
        except OSError as error:
            limits = dict.fromkeys(STORES)
            tell(f"no memory limit ({error}): run as root with writable control groups; files are only evicted")
        started = {}
        for name in STORES:
            started[name] = Worker(root, name, limits[name])
            stack.callback(started[name].close)
        yield started, all(limits.values())


def measure(root: str, events: Events, limit_bytes: int, rounds: int, lookups: int) -> dict[str, Any]:
    """Both blocks; the keys are those of the JSON line."""
    rng = np.random.default_rng([events.seed, 6])
    distinct = events.users[rng.permutation(len(events.users))[: rounds * lookups]]
    orders = {"cold": np.array_split(distinct, rounds)}
    found: dict[str, Any] = {}
    with workers(root, limit_bytes) as (started, limited):
        found["memory_limited"] = limited
        if limited:
            # The first two rounds of the trace fill what page cache there is.
            orders["limited"] = np.array_split(events.users[events.trace((rounds + 2) * lookups)], rounds + 2)
        for block, parts in orders.items():
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in STORES}
            for number, part in enumerate(parts):
                for name, worker in started.items():
                    answer = worker.ask(block, part.tolist())
                    if block == "cold" or number >= 2:
                        rows[name].append(answer)
                tell(f"{block}, round {number + 1} of {len(parts)}")
            medians = {name: {k: float(np.median([a[k] for a in rows[name]])) for k in rows[name][0]} for name in rows}
            print(
                f"\n{block}\n\n| store | p50 us | p99 us | CPU ms per 1000 | disk kB a lookup |\n|---|---|---|---|---|"
            )
            for name, row in medians.items():
                print(f"| {name} | {row['p50']:.0f} | {row['p99']:.0f} | {row['cpu']:.0f} | {row['disk_kb']:.1f} |")
            for what in ("p50", "p99"):
                found[f"{block}_{what}_us"] = {name: round(row[what], 1) for name, row in medians.items()}
                for peer in STORES[1:]:
                    short = peer.partition("_")[0]
                    found[f"{block}_{what}_vs_{short}"] = round(medians[VAULT][what] / medians[peer][what], 4)
            found[f"{block}_disk_kb_per_lookup"] = {name: round(row["disk_kb"], 2) for name, row in medians.items()}
        counted = started[VAULT].ask("preads", distinct[:lookups].tolist())
        found["preads_per_cold_lookup"] = round(counted["calls"], 4)
        found["bytes_per_cold_lookup"] = round(counted["bytes"])
        found["index_bytes_per_user"] = round(started[VAULT].opened["index_bytes"] / len(events.users), 1)
    return found


class _SimulatedPart:
    """One part of many users in one shard a few thousand pages, as laser_jax.vault.index wants to see it."""

    def __init__(self, num_users: int, rng: np.random.Generator):
        self.name, self.number, self.num_users, self.texts = "part-000000-00000000", 0, num_users, None
        lengths = np.clip(rng.lognormal(np.log(239), 1.2, num_users), 10, 10_000).astype(np.int64)
        self.keys = rng.permutation(num_users) * np.int64(2_654_435_761)  # distinct
        self.first_page = np.concatenate(([0], np.cumsum(-(-lengths // 256))))
        self.covers = np.broadcast_to(np.int32(0), num_users)
        self.num_pages = pages = int(self.first_page[-1])
        self.page_count = np.full(pages, 256, np.uint16)
        self.first_time = self.last_time = self.last_sequence = np.arange(pages)
        self.length = np.full(pages, 3900, np.uint32)
        self.offset = (np.arange(pages) % 4096 * 3900).astype(np.uint32)

    @property
    def users(self) -> "_SimulatedPart":
        """Who has pages here."""
        return self

    def release_users(self) -> None:
        """The index has them."""


def simulate_index(num_users: int) -> dict[str, float]:
    """The vault's own index, of invented users.

    Returns:
      bytes_per_user: of user and page tables; user_table_bytes_per_user of the former alone.
      ns_per_lookup: from key to position, in batches; ns_per_single_lookup: one at a time, from Python.
    """
    from laser_jax.vault.index import PageTable, UserIndex

    rng = np.random.default_rng(7)
    part = _SimulatedPart(num_users, rng)
    keys = part.keys[rng.integers(0, num_users, 1_000_000)]
    table = PageTable([part])
    index = UserIndex([part], table)
    del part
    index.find(keys[:1000], keys[:1000])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        found = index.find(keys, keys)
        seconds.append((time.perf_counter() - start) / len(keys))
    if (index.keys[found] != keys).any():
        raise AssertionError("the simulated index finds other users")
    single = keys[:100_000].tolist()
    start = time.perf_counter()
    for key in single:
        index.find_one(key, key)
    one = (time.perf_counter() - start) / len(single)
    return {
        "users": num_users,
        "pages": table.size,
        "bytes_per_user": round((index.num_bytes + table.num_bytes) / num_users, 1),
        "user_table_bytes_per_user": round(index.num_bytes / num_users, 1),
        "ns_per_lookup": round(1e9 * float(np.median(seconds)), 1),
        "ns_per_single_lookup": round(1e9 * one, 1),
    }


def _available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        values = dict(line.split(":") for line in file)
    return int(values["MemAvailable"].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", default="datasets/bench_vault", help="stores, built on first use")
    parser.add_argument("--memory_mb", type=int, help="allowed to each store; by default a quarter of the vault")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lookups", type=int, default=2000, help="of a store in a round")
    parser.add_argument("--index_users", type=int, default=10_000_000, help="users of the simulated index; 0 for none")
    parser.add_argument("--big", action="store_true", help="an index of 100 M users too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.path, args.worker)
        return
    events = Events.of(args.users, args.seed)
    root = os.path.join(args.path, f"{args.users}-{args.seed}")
    build(root, events, [VAULT, *(CONTENDERS[name][0] for name in STORES[1:])])
    size = disk_bytes(os.path.join(root, VAULT))
    limit = (args.memory_mb << 20) if args.memory_mb else size // OVERSIZE
    if not args.memory_mb and limit < MEGABYTES << 20:
        limit = MEGABYTES << 20
        tell(f"{args.users} users make a vault of {size >> 20} MB: allowing {MEGABYTES} MB, which Python alone needs")
    result = {"users": args.users, "events": events.num_events, "vault_bytes": size, "memory_bytes": limit}
    result["vault_over_memory"] = round(size / limit, 2)
    result |= measure(root, events, limit, args.rounds, args.lookups)
    for num_users in filter(None, (args.index_users, 100_000_000 if args.big else 0)):
        needed, free = num_users * _INDEX_PEAK, _available_memory()
        if needed > free:
            tell(
                f"no index of {num_users:,} users: building it takes {needed >> 30} GB of memory, {free >> 30} are free"
            )
            continue
        tell(f"an index of {num_users:,} users")
        simulated = simulate_index(num_users)
        print(f"\nindex of {num_users:,} users: {simulated}")
        result[f"index_{num_users // 1_000_000}m"] = simulated
    print(json.dumps(result))


if __name__ == "__main__":
    main()
