"""How fast, and in how much memory, logs larger than that memory become a vault: parquet in time order, by DuckDB.

    python -m experiments.bench.vault_ingest --events=100000000

The logs hold the events of vault_data, ordered by time over several files, as a collector writes them: no user's events
lie together. Each ingestion runs in a process of its own through the command line, sort, checks and flushing to the
disk included; its peak of resident memory is the kernel's count for that process.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.bench.vault_build import tell
from experiments.bench.vault_data import RAW, SCHEMA, Events

EVENTS_A_FILE = 5_000_000
#: Users that are looked at to cut time into files of about equal size.
_SAMPLE_BLOCKS = 3
_ROW_GROUP = 1 << 17
_VERSION = 1


def write_logs(folder: str, num_events: int, seed: int) -> int:
    """Writes parquet logs ordered by time, unless they are there; returns the number of events.

    Events are made user by user: they are first dealt out to unsorted files of a period each, then each of these is
    sorted. Only one file is in memory.
    """
    marker = os.path.join(folder, "whole.json")
    signature = {"version": _VERSION, "events": num_events, "seed": seed}
    if os.path.exists(marker):
        with open(marker, encoding="utf-8") as file:
            found = json.load(file)
        if found["signature"] == signature:
            return found["events"]
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    events = _events_of(num_events, seed)
    files = -(-events.num_events // EVENTS_A_FILE)
    bounds = _bounds(events, files)
    drafts = [os.path.join(folder, f"draft{number}.arrow") for number in range(files)]
    schema = pa.schema({"user": pa.int64()} | {name: pa.from_numpy_dtype(dtype) for name, dtype in RAW.items()})
    writers = [pa.ipc.new_file(draft, schema) for draft in drafts]
    tell(f"{events.num_events:,} events of {len(events.users):,} users: making {files} log files")
    for users, start, columns in events.blocks():
        columns = {"user": np.repeat(users, np.diff(start))} | columns
        period = np.searchsorted(bounds, columns["time"], side="right")
        order = np.argsort(period, kind="stable")
        cuts = np.searchsorted(period[order], np.arange(files + 1))
        for number, writer in enumerate(writers):
            rows = order[cuts[number] : cuts[number + 1]]
            if len(rows):
                writer.write_batch(pa.record_batch([pa.array(columns[name][rows]) for name in schema.names], schema))
    for number, (writer, draft) in enumerate(zip(writers, drafts, strict=True)):
        writer.close()
        with pa.OSFile(draft) as file:
            table = pa.ipc.open_file(file).read_all()
        rows = np.argsort(table["time"].to_numpy(), kind="stable")
        pq.write_table(table.take(pa.array(rows)), os.path.join(folder, f"log{number:04}.parquet"), _ROW_GROUP)
        os.remove(draft)
    with open(marker, "w", encoding="utf-8") as file:
        json.dump({"signature": signature, "events": events.num_events}, file)
    return events.num_events


def _events_of(num_events: int, seed: int) -> Events:
    """As many users as make at least `num_events` events."""
    num_users = max(num_events // 480, 1)
    while (events := Events.of(num_users, seed)).num_events < num_events:
        num_users += max((num_events - events.num_events) // 480, 1)
    return events


def _bounds(events: Events, files: int) -> np.ndarray:
    """Times at which a new file begins."""
    blocks = zip(range(_SAMPLE_BLOCKS), events.blocks(), strict=False)
    return np.quantile(np.concatenate([block[2]["time"] for _, block in blocks]), np.arange(1, files) / files)


def measure(logs: str, out: str, schema: str, memory: int) -> dict[str, float]:
    """Ingests once, into a vault that is removed again, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "laser_jax.vault", "ingest", f"--schema={schema}", f"--out={out}", "--json"]
    command += [f"--input={logs}/*.parquet", f"--memory={memory >> 20}MB"]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    report = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"ingestion failed: status {process.returncode}")
    events = json.loads(report)["events"]
    size = _size_of(out)
    shutil.rmtree(out)
    return {
        "ingest_events_per_s": events / seconds,
        "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "seconds": seconds,
        "vault_bytes": size,
    }


def _size_of(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory_mb", type=int, help="given to the ingestion; by default a quarter of the log")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--path", default="datasets/bench_ingest", help="logs, made on first use, and the vault")
    parser.add_argument("--drop_logs", action="store_true", help="remove the logs at the end")
    args = parser.parse_args()
    root = os.path.join(args.path, f"{args.events}-{args.seed}")
    logs, schema = os.path.join(root, "logs"), os.path.join(root, "schema.json")
    events = write_logs(logs, args.events, args.seed)
    with open(schema, "w", encoding="utf-8") as file:
        json.dump(SCHEMA.to_json(), file)
    log_bytes = _size_of(logs)
    memory = args.memory_mb << 20 if args.memory_mb else max(log_bytes // 4, 256 << 20)
    runs = [measure(logs, os.path.join(root, "vault"), schema, memory) for _ in range(args.rounds)]
    raw = events * (8 + sum(dtype.itemsize for dtype in RAW.values()))
    result = {"events": events, "log_bytes": log_bytes, "raw_bytes": raw, "memory_bytes": memory}
    result |= {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    result |= {"log_over_memory": round(log_bytes / memory, 2), "raw_over_memory": round(raw / memory, 2)}
    result |= {"load_1m": os.getloadavg()[0]}
    if args.drop_logs:
        shutil.rmtree(root)
    print("| | |\n|---|---|")
    for name, value in result.items():
        print(f"| {name} | {value:,} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
