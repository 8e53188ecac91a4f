"""Command line of a vault: python -m laser_jax.vault ingest | append | get | serve | stats | merge | verify | ..."""

import argparse
import datetime
import json
import re
import sys
import time
from typing import Any

import numpy as np

from laser_jax import vault as seqvault
from laser_jax.schema import Schema
from laser_jax.vault.client import is_service
from laser_jax.vault.errors import SchemaError, VaultError
from laser_jax.vault.history import History
from laser_jax.vault.storage import is_url

_UNITS = {"": 1, "B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 well, 1 damage or an error, 2 a wrong command."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (VaultError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m laser_jax.vault", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str, path: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        if path:
            added.add_argument("path", help="directory of the vault, or grpc://host:port; to read, also another URL")
        if name != "serve":
            added.add_argument("--json", action="store_true", help="print the result as JSON")
        added.set_defaults(run=run)
        return added

    ingest = command("ingest", _ingest, "build a vault from parquet or CSV logs", path=False)
    ingest.add_argument("--schema", required=True, help="JSON file of the schema")
    ingest.add_argument("--input", required=True, action="append", help="glob of log files; may be repeated")
    ingest.add_argument("--out", required=True, help="directory of the new vault, or a URL such as s3://bucket/name")
    ingest.add_argument("--engine", choices=("duckdb", "spark"), default="duckdb", help="what sorts the log")
    ingest.add_argument("--memory", default="2GB", type=_bytes, help="memory to use, such as 500MB or 2GB")
    ingest.add_argument("--threads", type=int, help="threads that sort; all cores if left out")

    append = command(
        "append", _append, "append events: JSON lines with user, time and every field, from standard input"
    )
    append.add_argument("--batch", type=int, default=1024, help="events that are made durable together")

    get = command("get", _get, "print the newest events of a user")
    get.add_argument("user", help="the user's id")
    get.add_argument("--n", type=int, default=20, help="events at most")
    get.add_argument("--before", type=int, help="only events before this time, in the schema's unit")
    get.add_argument("--as-of", type=int, help="only events with a smaller sequence number")
    get.add_argument("--fields", type=lambda text: text.split(","), help="comma-separated fields; all if left out")
    get.add_argument("--where", type=_condition, action="append", metavar="FIELD=VALUE,...", help="only such events")
    get.add_argument("--max-scan", type=int, help="with --where: events to look back at, at most")
    get.add_argument("--at", help="read from this snapshot")

    stats = command("stats", _stats, "print sizes and lengths")
    stats.add_argument("--at", help="of this snapshot")

    merge = command("merge", _merge, "merge every user's events into one part, and free space")
    merge.add_argument("--keep-events", type=int, help="from now on keep a user's newest so many events")
    merge.add_argument(
        "--keep-age", type=int, help="from now on keep events that are so much younger than the newest one"
    )

    command("verify", _verify, "read everything and name every damage")
    repair = command(
        "repair", _repair, "make damaged files anew, set aside what cannot be, and keep the rest", path=False
    )
    repair.add_argument("path", help="directory of the vault, on the machine where it lies; nobody may be writing it")

    snapshot = command("snapshot", _snapshot, "pin what is there now; list or drop what was pinned")
    snapshot.add_argument("--name", help="of the new snapshot; its sequence number if left out")
    snapshot.add_argument("--replace", action="store_true", help="move the snapshot of that name, if there is one")
    snapshot.add_argument("--list", action="store_true", help="only list")
    snapshot.add_argument("--drop", metavar="NAME", help="unpin that one")

    forget = command("forget", _forget, "remove users from all files: parts, log and snapshots")
    forget.add_argument("user", nargs="+", help="ids")

    publish = command("publish", _publish, "upload the vault, or a snapshot of it, to a key-value store")
    publish.add_argument("url", help="such as s3://bucket/name")
    publish.add_argument("--at", help="this snapshot")

    serve = command("serve", _serve, "serve the vault, or a partition of one, to other machines by Arrow Flight")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on")
    serve.add_argument("--port", type=int, default=8815, help="port; 0 for a free one")
    serve.add_argument("--metrics-port", type=int, help="port of Prometheus metrics over HTTP; 0 for a free one")
    serve.add_argument("--cache", default="256MB", type=_bytes, help="memory for decoded histories of hot users")
    serve.add_argument("--read-only", action="store_true", help="follow the writer, and do not become it")
    serve.add_argument("--tls-certificate", help="PEM file; with --tls-key")
    serve.add_argument("--tls-key", help="PEM file")
    serve.add_argument("--max-events", type=int, default=100_000, help="events of one user that are read at most")
    serve.add_argument("--max-users", type=int, default=4096, help="users that are read at once, at most")
    serve.add_argument("--max-put", default="64MB", type=_bytes, help="events that are taken at once, at most")
    serve.add_argument("--max-calls", type=int, default=128, help="calls under way at once")
    return parser


def _ingest(options: argparse.Namespace) -> int:
    from laser_jax.vault.ingest import print_progress
    from laser_jax.vault.remote import ingest_anywhere

    try:
        schema = Schema.load(options.schema)
    except UnicodeDecodeError as error:
        raise SchemaError(f"{options.schema} is not UTF-8: {error}; save it as UTF-8") from error
    report = ingest_anywhere(
        schema, options.input, options.out, options.engine, options.memory, options.threads, print_progress
    )
    print(json.dumps(vars(report)) if options.json else report)
    return 0


def _append(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise VaultError(f"--batch={options.batch}: need an integer >= 1")
    with seqvault.open(options.path) as vault:
        wanted = ("user", "time", *vault.schema.names)
        events, started, spoken, rows = 0, time.monotonic(), time.monotonic(), []
        begin = 1  # the line of the first row

        def write() -> None:
            nonlocal events, rows
            try:
                vault.append({name: [row[name] for row in rows] for name in wanted})
            except VaultError as error:
                raise type(error)(f"{error} (row 0 is line {begin})") from error
            events += len(rows)
            rows = []

        try:
            for number, line in enumerate(sys.stdin, 1):
                if not line.strip():
                    continue
                begin = begin if rows else number
                rows.append(_event(line, number, wanted))
                if len(rows) == options.batch:
                    write()
                    if time.monotonic() - spoken >= 1:
                        spoken = time.monotonic()
                        rate = events / (spoken - started)
                        print(f"{events:,} events appended, {rate:,.0f}/s", file=sys.stderr, flush=True)
            if rows:
                write()
        except VaultError as error:
            if not events:
                raise
            # Who corrects the line and gives all of them again would write these twice.
            raise type(error)(f"{error}; {events:,} events are written: go on with line {begin}") from error
        result = {"events": events, "seconds": time.monotonic() - started, "next_sequence": vault.next_sequence}
    print(json.dumps(result) if options.json else f"{events:,} events in {result['seconds']:.1f} s: {options.path}")
    return 0


def _event(line: str, number: int, wanted: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SchemaError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict) or sorted(row) != sorted(wanted):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise SchemaError(f"line {number} has {found}; need an object with {', '.join(wanted)}")
    return row


def _get(options: argparse.Namespace) -> int:
    vault = seqvault.open(options.path, at=options.at)
    conditions = None
    if options.where:
        conditions = {}
        for name, texts in options.where:
            conditions[name] = [_value(vault.schema, name, text) for text in texts]
    history = vault.get(
        _user(vault.schema, options.user),
        options.n,
        options.before,
        options.as_of,
        fields=options.fields,
        where=conditions,
        max_scan=options.max_scan,
    )
    if options.json:
        print(json.dumps({name: history[name].tolist() for name in history.columns}))
        return 0
    print(_table(history, vault.schema))
    if conditions:
        more = "the whole history" if history.exhausted else "older ones were not looked at"
        print(f"of {history.scanned} events ({more})")
    return 0


def _stats(options: argparse.Namespace) -> int:
    stats = seqvault.open(options.path, at=options.at).stats()
    if options.json:
        print(json.dumps(stats))
        return 0
    for one in stats.pop("partitions", []):
        _print_stats(one)
        print()
    _print_stats(stats)
    return 0


def _print_stats(stats: dict[str, Any]) -> None:
    lengths = stats.pop("lengths", [])
    for name, value in stats.items():
        if name in ("first_time", "last_time") and value is not None:
            value = f"{value} ({_readable(value, stats['time_unit'])})"
        print(f"{name:16} {value:,.3f}" if isinstance(value, float) else f"{name:16} {value}")
    most = max((count for _, _, count in lengths), default=1)
    if lengths:
        print("events a user    users")
    for low, high, count in lengths:
        print(f"{low:>7}..{high - 1:<7} {count:>9}  {'#' * -(-count * 40 // most)}")


def _merge(options: argparse.Namespace) -> int:
    started = time.monotonic()
    with seqvault.open(options.path) as vault:
        before = vault.stats()
        if options.keep_events is not None or options.keep_age is not None:
            vault.retain(options.keep_events, options.keep_age)
        vault.merge(progress=lambda line: print(line, file=sys.stderr, flush=True))
        after = vault.stats()
    names = ("events", "parts", "bytes")
    result = {name: [before[name], after[name]] for name in names} | {"seconds": time.monotonic() - started}
    if options.json:
        print(json.dumps(result))
    else:
        changes = ", ".join(f"{before[name]:,} -> {after[name]:,} {name}" for name in names)
        print(f"{changes} in {result['seconds']:.1f} s: {options.path}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if is_service(options.path):
        with seqvault.open(options.path) as vault:
            damages = vault.verify()
    else:
        damages = seqvault.verify(options.path, progress=lambda line: print(line, file=sys.stderr, flush=True))
    if options.json:
        print(json.dumps(damages))
    elif damages:
        print("\n".join(damages))
        print(f"{len(damages)} damages: {options.path}")
    else:
        print(f"whole: {options.path}")
    return 1 if damages else 0


def _repair(options: argparse.Namespace) -> int:
    if is_service(options.path) or is_url(options.path):
        raise VaultError(f"{options.path}: repair needs the directory of the vault, where no service writes it")
    report = seqvault.repair(options.path)
    print(json.dumps(vars(report)) if options.json else report)
    return 1 if report.loss else 0


def _snapshot(options: argparse.Namespace) -> int:
    with seqvault.open(options.path) as vault:
        if options.drop is not None:
            vault.drop_snapshot(options.drop)
        elif not options.list:
            name = vault.snapshot(options.name, options.replace)
            print(json.dumps(name) if options.json else f"snapshot {name}: open it with at={name!r}")
            return 0
        names = vault.snapshots()
    print(json.dumps(names) if options.json else "\n".join(names) or "no snapshots")
    return 0


def _forget(options: argparse.Namespace) -> int:
    with seqvault.open(options.path) as vault:
        removed = vault.forget([_user(vault.schema, user) for user in options.user])
    users = f"{len(options.user)} user{'s' * (len(options.user) > 1)}"
    print(json.dumps({"events": removed}) if options.json else f"{removed:,} events of {users} removed: {options.path}")
    return 0


def _publish(options: argparse.Namespace) -> int:
    size = seqvault.publish(options.path, options.url, options.at)
    print(json.dumps({"bytes": size}) if options.json else f"{size:,} bytes uploaded: {options.url}")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from laser_jax.vault.serve import serve
    from laser_jax.vault.service import Limits

    serve(
        options.path,
        options.host,
        options.port,
        options.metrics_port,
        options.cache,
        options.read_only,
        options.tls_certificate,
        options.tls_key,
        Limits(options.max_events, options.max_users, options.max_put, options.max_calls),
    )
    return 0


def _user(schema: Schema, text: str) -> int | str:
    if schema.user == "string":
        return text
    if not re.fullmatch(r"[+-]?\d+", text):
        raise VaultError(f"user {text!r}: this vault's users are int64")
    return int(text)


def _condition(text: str) -> tuple[str, list[str]]:
    name, sign, values = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form FIELD=VALUE,...")
    return name, values.split(",")


def _value(schema: Schema, name: str, text: str) -> Any:
    """A value of a field from the command line."""
    if name not in schema.names or schema.field(name).type == "string":
        return text
    kind = schema.field(name).dtype.kind
    try:
        return {"b": lambda value: {"true": True, "false": False}[value.lower()], "f": float}.get(kind, int)(text)
    except (ValueError, KeyError) as error:
        raise SchemaError(f"where {name}={text}: this field holds {schema.field(name).type}") from error


def _table(history: History, schema: Schema) -> str:
    """Events as lines of a table, oldest first."""
    columns = {"time": [_readable(time, schema.time_unit) for time in history["time"].tolist()]}
    for name in history.columns:
        if name != "time":
            columns[name] = [_short(value) for value in history[name]]
    lines = []
    for name, cells in columns.items():
        width = max(len(cell) for cell in [name, *cells])
        lines.append([cell.rjust(width) for cell in [name, *cells]])
    rows = ["  ".join(row) for row in zip(*lines, strict=True)]
    return "\n".join([*rows, f"{len(history)} events"])


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        shown = " ".join(f"{number:.3g}" for number in value[:4].tolist())
        return f"[{shown}{' ...' if len(value) > 4 else ''}]"
    return f"{value:.6g}" if isinstance(value, np.floating) else str(value)


def _readable(time: int, unit: str) -> str:
    seconds, rest = divmod(time, {"s": 1, "ms": 1000}[unit])
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return moment if unit == "s" else f"{moment}.{rest:03}"


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GB")
    unit = match[2].upper()
    return int(float(match[1]) * _UNITS[unit if unit in _UNITS else unit + "B"])


if __name__ == "__main__":
    sys.exit(main())
