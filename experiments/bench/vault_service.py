"""The vault over the network: two partitions, each behind its service, against the same lookups at home and Redis.

  python -m experiments.bench.vault_service --users=20000

Real processes on this machine: two services, one Redis, one client, which all share its cores. Users with at least 1000
events are looked up by a Zipf(.9) trace, 1000 events each, all eight columns. What takes turns:

  remote   seqvault.open("grpc://...,grpc://...").get
  local    the same vault opened as a directory, no cache but the kernel's
  redis    the newest 1000 events of each user packed (columns, times as differences, blosc) into one value, decoded by
           the client as remote's are; it can answer nothing but "the newest 1000"; apt install redis-server

Wire bytes are those of the Arrow stream of an answer; raw bytes are 28 an event. The last line is one JSON object.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from experiments.bench import vault_codecs as codecs
from experiments.bench.vault_build import tell
from experiments.bench.vault_data import LATEST, RAW, RAW_BYTES, SCHEMA, Events
from experiments.bench.vault_measure import Timing, time_lookups
from laser_jax import vault as seqvault
from laser_jax.vault import wire
from laser_jax.vault.partitioning import partition_paths

PARTITIONS = 2
THREADS = (1, 2, 4, 8)
GATHERED = 256


def build(path: str, events: Events) -> None:
    """Writes the vault, once."""
    if os.path.exists(os.path.join(path, "partitions.json")):
        return
    shutil.rmtree(path, ignore_errors=True)
    with seqvault.create(path, SCHEMA, partitions=PARTITIONS) as writer:
        done = 0
        for users, start, columns in events.blocks():
            writer.write({"user": np.repeat(users, np.diff(start)), **columns})
            done += len(users)
            tell(f"{done:,} of {len(events.users):,} users written")


@contextlib.contextmanager
def services(path: str) -> Iterator[tuple[str, list[int]]]:
    """Starts a service for each partition; gives their URLs and process numbers."""
    processes, urls = [], []
    try:
        for partition in partition_paths(path):
            command = [sys.executable, "-m", "laser_jax.vault", "serve", partition, "--port=0", "--cache=1B"]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            urls.append(processes[-1].stdout.readline().split(" at ")[1].strip())
        yield ",".join(urls), [process.pid for process in processes]
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.communicate()


@contextlib.contextmanager
def redis_server() -> Iterator[tuple[Any, int] | None]:
    """Starts Redis, in memory only; gives a client and the process number, or None if Redis is not installed."""
    program = shutil.which("redis-server")
    if program is None or importlib.util.find_spec("redis") is None:
        tell("no Redis to compare with: apt install redis-server, pip install -e '.[bench]'")
        yield None
        return
    import redis

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [program, f"--port {port}", "--save", "", "--appendonly no", "--bind 127.0.0.1"]
    process = subprocess.Popen([part for word in command for part in word.split(" ")], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port)
        for _ in range(200):
            with contextlib.suppress(redis.exceptions.ConnectionError):
                client.ping()
                break
            time.sleep(0.05)
        yield client, process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_seconds(pids: list[int]) -> float:
    """Of some processes, all threads."""
    ticks = 0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def loopback_bytes() -> int:
    """Sent over the loopback device so far, everything of TCP and below included."""
    with open("/proc/net/dev", encoding="ascii") as file:
        line = next(line for line in file if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def by_threads(get: Callable[[int], Any], users: list[int]) -> dict[int, float]:
    """Lookups a second with so many threads of one client."""
    found = {}
    for threads in THREADS:
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(get, users[: 20 * threads]))
            start = time.perf_counter()
            list(pool.map(get, users))
            found[threads] = len(users) / (time.perf_counter() - start)
    return found


def check_equal(gets: dict[str, Callable[[int], Any]], users: list[int]) -> None:
    """All must give the same."""
    for user in users:
        wanted = gets["local"](user)
        for name, get in gets.items():
            found = get(user)
            for column in RAW:
                if not np.array_equal(found[column], wanted[column]):
                    raise AssertionError(f"{name}, user {user}: other {column}")


def measure(path: str, events: Events, rounds: int, lookups: int) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Timings by name, and the other figures."""
    long = np.flatnonzero(events.lengths >= LATEST)
    users = events.users[events.trace((rounds + 1) * lookups, long)]
    local = seqvault.open(path, cache_bytes=0)
    with services(path) as (url, pids), redis_server() as server, seqvault.open(url, timeout_s=60) as remote:
        gets: dict[str, Callable[[int], Any]] = {
            "remote": lambda user: remote.get(user, LATEST),
            "local": lambda user: local.get(user, LATEST),
        }
        owners = {"remote": pids}
        if server is not None:
            store, pid = server
            tell(f"filling Redis with {len(long):,} users")
            for user in events.users[long].tolist():
                history = local.get(user, LATEST)
                packed = {name: history[name].astype(dtype) for name, dtype in RAW.items()}
                store.set(str(user), codecs.encode_packed(packed))
            gets["redis"] = lambda user: codecs.decode_packed(store.get(str(user)))
            owners["redis"] = [pid]
        trace = [part.tolist() for part in np.array_split(users[: rounds * lookups], rounds)]
        check_equal(gets, users[-50:].tolist())
        for get in gets.values():
            for user in users[rounds * lookups :].tolist()[:500]:
                get(user)
        timings = time_lookups(gets, trace, block=100)
        figures: dict[str, Any] = {}
        few = trace[0][:1000]
        for name, processes in owners.items():
            before, sent = cpu_seconds(processes), loopback_bytes()
            for user in few:
                gets[name](user)
            figures[f"{name}_server_cpu_ms_per_1000"] = 1e6 * (cpu_seconds(processes) - before) / len(few)
            figures[f"{name}_loopback_bytes"] = (loopback_bytes() - sent) / len(few)
        figures["lookups_per_s"] = by_threads(gets["remote"], few)
        if "redis" in gets:
            figures["redis_lookups_per_s"] = by_threads(gets["redis"], few)
        batch = np.array(few[:GATHERED])
        for name, vault in (("remote", remote), ("local", local)):
            seconds = []
            for _ in range(10):
                start = time.perf_counter()
                vault.gather(batch, n=LATEST)
                seconds.append(time.perf_counter() - start)
            figures[f"{name}_gather_users_per_s"] = GATHERED / float(np.median(seconds))
        sizes = [wire_bytes(local.get(user, LATEST)) for user in few[:200]]
        figures["wire_bytes_per_lookup"] = float(np.mean(sizes))
    return timings, figures


def wire_bytes(history: Any) -> int:
    """Of the Arrow stream that answers a lookup."""
    sink = pa.BufferOutputStream()
    table = wire.history_table(history, SCHEMA, False, {})
    with pa.ipc.new_stream(sink, table.schema, options=wire.ZSTD) as stream:
        stream.write_table(table)
    return sink.getvalue().size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", default="datasets/bench_vault_service", help="the vault, built on first use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lookups", type=int, default=1000, help="of each in a round")
    args = parser.parse_args()
    events = Events.of(args.users, args.seed)
    path = os.path.join(args.path, f"{args.users}-{args.seed}")
    build(path, events)
    timings, figures = measure(path, events, args.rounds, args.lookups)

    print(f"\n{events.num_events:,} events, {PARTITIONS} services, {LATEST} events a lookup, {os.cpu_count()} cores\n")
    print("| | p50 us | p99 us | client's CPU ms per 1000 | server's | loopback bytes |\n|---|---|---|---|---|---|")
    for name, timing in timings.items():
        server = [figures.get(f"{name}_{what}", float("nan")) for what in ("server_cpu_ms_per_1000", "loopback_bytes")]
        cells = [timing.median("p50"), timing.median("p99"), timing.median("cpu"), *server]
        print(f"| {name} | {' | '.join(f'{cell:,.0f}' for cell in cells)} |".replace("nan", "-"))
    print(f"\nlookups a second by threads of one client: {rounded(figures['lookups_per_s'])}", end="")
    print(f"; Redis {rounded(figures['redis_lookups_per_s'])}" if "redis" in timings else "")
    print(
        f"gather of {GATHERED} users, users a second: remote {figures['remote_gather_users_per_s']:,.0f}, "
        f"local {figures['local_gather_users_per_s']:,.0f}"
    )
    remote = timings["remote"]
    result = {
        "remote_p50_ms": round(remote.median("p50") / 1e3, 4),
        "remote_p99_ms": round(remote.median("p99") / 1e3, 4),
        "remote_over_local_p50": round(remote.median("p50") / timings["local"].median("p50"), 3),
        "wire_bytes_over_raw": round(figures["wire_bytes_per_lookup"] / (LATEST * RAW_BYTES), 4),
        "lookups_per_s": round(max(figures["lookups_per_s"].values())),
        "redis_p99_over_ours": None,
        "redis_p50_over_ours": None,
        "redis_lookups_per_s": None,
        "server_cpu_ms_per_1000": round(figures["remote_server_cpu_ms_per_1000"], 1),
        "gather_users_per_s": round(figures["remote_gather_users_per_s"]),
    }
    if "redis" in timings:
        result["redis_p99_over_ours"] = round(timings["redis"].median("p99") / remote.median("p99"), 3)
        result["redis_p50_over_ours"] = round(timings["redis"].median("p50") / remote.median("p50"), 3)
        result["redis_lookups_per_s"] = round(max(figures["redis_lookups_per_s"].values()))
    print(json.dumps(result))


def rounded(figures: dict[int, float]) -> dict[int, int]:
    """Without places behind the point."""
    return {key: round(value) for key, value in figures.items()}


if __name__ == "__main__":
    main()
