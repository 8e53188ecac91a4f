"""Command line of a vault: python -m laser_jax.vault ingest | get | stats | verify."""

import argparse
import datetime
import json
import re
import sys
from typing import Any

import numpy as np

from laser_jax import vault as seqvault
from laser_jax.schema import Schema
from laser_jax.vault.errors import SchemaError, VaultError
from laser_jax.vault.history import History

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

    ingest = commands.add_parser("ingest", help="build a vault from parquet or CSV logs")
    ingest.add_argument("--schema", required=True, help="JSON file of the schema")
    ingest.add_argument("--input", required=True, action="append", help="glob of log files; may be repeated")
    ingest.add_argument("--out", required=True, help="directory of the new vault")
    ingest.add_argument("--memory", default="2GB", type=_bytes, help="memory to use, such as 500MB or 2GB")
    ingest.add_argument("--threads", type=int, help="threads that sort; all cores if left out")
    ingest.add_argument("--json", action="store_true", help="print the result as JSON")
    ingest.set_defaults(run=_ingest)

    get = commands.add_parser("get", help="print the newest events of a user")
    get.add_argument("path", help="directory of the vault")
    get.add_argument("user", help="the user's id")
    get.add_argument("--n", type=int, default=20, help="events at most")
    get.add_argument("--before", type=int, help="only events before this time, in the schema's unit")
    get.add_argument("--fields", type=lambda text: text.split(","), help="comma-separated fields; all if left out")
    get.add_argument("--json", action="store_true", help="print columns as JSON")
    get.set_defaults(run=_get)

    for name, run, text in (
        ("stats", _stats, "print sizes and lengths"),
        ("verify", _verify, "read everything and name every damage"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="directory of the vault")
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=run)
    return parser


def _ingest(options: argparse.Namespace) -> int:
    from laser_jax.vault.ingest import ingest, print_progress

    try:
        schema = Schema.load(options.schema)
    except UnicodeDecodeError as error:
        raise SchemaError(f"{options.schema} is not UTF-8: {error}; save it as UTF-8") from error
    report = ingest(schema, options.input, options.out, options.memory, options.threads, print_progress)
    print(json.dumps(vars(report)) if options.json else report)
    return 0


def _get(options: argparse.Namespace) -> int:
    vault = seqvault.open(options.path)
    user: int | str = options.user
    if vault.schema.user == "int64":
        if not re.fullmatch(r"[+-]?\d+", options.user):
            raise VaultError(f"user {options.user!r}: this vault's users are int64")
        user = int(options.user)
    history = vault.get(user, options.n, options.before, fields=options.fields)
    if options.json:
        print(json.dumps({name: history[name].tolist() for name in history.columns}))
    else:
        print(_table(history, vault.schema))
    return 0


def _stats(options: argparse.Namespace) -> int:
    stats = seqvault.open(options.path).stats()
    if options.json:
        print(json.dumps(stats))
        return 0
    lengths = stats.pop("lengths")
    for name, value in stats.items():
        if name in ("first_time", "last_time") and value is not None:
            value = f"{value} ({_readable(value, stats['time_unit'])})"
        print(f"{name:16} {value:,.3f}" if isinstance(value, float) else f"{name:16} {value}")
    most = max((count for _, _, count in lengths), default=1)
    print("events a user    users")
    for low, high, count in lengths:
        print(f"{low:>7}..{high - 1:<7} {count:>9}  {'#' * -(-count * 40 // most)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from laser_jax.vault.inspection import verify

    damages = verify(options.path)
    if options.json:
        print(json.dumps(damages))
    elif damages:
        print("\n".join(damages))
        print(f"{len(damages)} damages: {options.path}")
    else:
        print(f"whole: {options.path}")
    return 1 if damages else 0


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
