"""Logged requests become training data: python -m laser_jax.serving.replay --log=DIR --vault=DIR --model=DIR --out=DIR

What was asked is written as requests (user, time, sequence number, candidates, context), so that training and
evaluation see exactly the events that the server saw. A candidate's label is 1 if the user has an event with it after
the request (of its moment or later, and not seen by it), within --window; --where says which events count. Requests
whose window is not over at --until are left out, since their clicks may yet come. A string that the vault had not met
when it was asked about is written as an unknown one, whatever code it was given since: that code would tell that it was
clicked. The logged scores are kept as the reference `live`. A share of the requests is scored anew from the vault, and
the largest difference to what was answered live is told.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from laser_jax import vault as seqvault
from laser_jax.assembly import Columns
from laser_jax.column_files import RequestsError
from laser_jax.requests import RequestsWriter
from laser_jax.serving.exported import ExportedModel, Requests
from laser_jax.serving.files import ModelError
from laser_jax.serving.request_log import read_log
from laser_jax.vault.conditions import allowed_values

_BATCH = 256
#: Events after a request that are looked through for what became of its candidates.
_EVENTS = 10_000
LIVE = "live"


@dataclasses.dataclass
class Report:
    """What was replayed.

    Attributes:
      requests, candidates, positives: counts. unfinished: requests that were left out, their window being not over.
      unscored: left out, since a score was no finite number.
      compared: requests that were scored anew. difference: between a logit then and now, the largest; None if nothing
        was compared. others: requests of other models, not compared.
    """

    requests: int = 0
    candidates: int = 0
    positives: int = 0
    unfinished: int = 0
    unscored: int = 0
    compared: int = 0
    difference: float | None = None
    others: int = 0


@dataclasses.dataclass(frozen=True)
class _Column:
    """A column of some logged requests, one request after the other.

    Attributes:
      then: numbers as they are; of strings their codes in the vault, -1 where it had not met them when they were asked
        about. now: the same by what the vault has met since. given: what the model is given to score.
    """

    then: np.ndarray
    now: np.ndarray
    given: np.ndarray


def replay(
    log: str,
    vault: Any,
    model: ExportedModel,
    out: str,
    item: str,
    window: int,
    where: dict[str, Any] | None = None,
    compare: float = 0.1,
    until: int | None = None,
) -> Report:
    """Writes logged requests as a directory of requests.

    Args:
      log: directory of the server's request log.
      vault: that the server ranked from. model: that ranked.
      out: directory to make, such as DATA/requests/train.
      item: the field by which an event is one of a candidate.
      window: time after a request, in the vault's unit, in which an event counts for it.
      where: field -> the value, or the values, that an event must have to count.
      compare: share of the requests that are scored anew.
      until: time up to which all events have been written, in the vault's unit; now by default.

    Raises:
      ValueError, RequestsError, VaultError: what is wrong with the log, `out`, or the vault.
    """
    schema = vault.schema
    if not 0 < window <= schema.time_limit:
        raise ValueError(f"window={window}: need 1 to {schema.time_limit}, in {schema.time_unit}")
    if not 0 <= compare <= 1:
        raise ValueError(f"compare={compare}: need a share of the requests, 0 to 1")
    for name in where or {}:
        if name not in schema.names:
            raise ValueError(f"where {name!r}: events have the fields {', '.join(schema.names)}")
    fields = {field.name: field for field in model.features.item}
    if item not in fields:
        raise ValueError(f"item {item!r} is none of the candidates' fields {', '.join(fields)}")
    types = {
        side: {field.name: _type(model, field) for field in found}
        for side, found in (("candidates", model.features.item), ("context", model.features.context))
    }
    if until is None:
        until = int(time.time() * (1000 if schema.time_unit == "ms" else 1))
    report, every = Report(), max(round(1 / compare), 1) if compare > 0 else 0
    translations = model.translations(vault)
    with RequestsWriter(out, schema.user, references=(LIVE,), sequence=True, **types) as writer:
        for found in _batches(read_log(log)):
            entries = [entry for entry in found if entry["time"] + window <= until]
            report.unfinished += len(found) - len(entries)
            for entry in entries:
                _check(entry, types)
            over = len(entries)
            entries = [entry for entry in entries if np.isfinite(entry["logits"]).all()]
            report.unscored += over - len(entries)
            if not entries:
                continue
            users, times = [entry["user"] for entry in entries], np.array([entry["time"] for entry in entries])
            if schema.user == "int64":
                users = np.array(users, np.int64)
            sequence = np.array([entry["as_of"] for entry in entries], np.int64)
            sides = {
                side: {
                    name: _column(entries, side, name, kind, model, vault, name in translations)
                    for name, kind in kinds.items()
                }
                for side, kinds in types.items()
            }
            counts = np.array([len(entry["logits"]) for entry in entries])
            starts = np.cumsum(counts) - counts
            shown = np.split(sides["candidates"][item].now, starts[1:])
            label = _labels(shown, vault, users, times, sequence, item, window, where or {})
            live = np.concatenate([entry["logits"] for entry in entries]).astype(np.float32)
            writer.write(
                user=users,
                time=times,
                counts=counts,
                label=label,
                candidates={name: column.then for name, column in sides["candidates"].items()},
                context={name: column.then for name, column in sides["context"].items()},
                sequence=sequence,
                references={LIVE: live},
            )
            for place, entry in enumerate(entries):
                if every and (report.requests + place) % every == 0:
                    part = slice(starts[place], starts[place] + counts[place])
                    candidates = {name: column.given[part] for name, column in sides["candidates"].items()}
                    context = {name: column.given[place : place + 1] for name, column in sides["context"].items()}
                    _compare(report, entry, model, vault, translations, candidates, context)
            report.requests += len(entries)
            report.candidates += len(label)
            report.positives += int(label.sum())
    return report


def _check(entry: dict, types: dict[str, dict[str, str]]) -> None:
    """Raises ValueError if a logged request is not of a model with these fields."""
    where = _place(entry)
    for side, fields in types.items():
        if entry[side].keys() != fields.keys():
            given, wanted = (", ".join(found) or "none" for found in (entry[side], fields))
            raise ValueError(f"{where} has the {side} {given}; the model has {wanted}")
    for name, values in entry["candidates"].items():
        if not isinstance(values, list) or len(values) != len(entry["logits"]):
            raise ValueError(f"{where}: candidates {name!r} and logits are of unlike lengths")


def _place(entry: dict) -> str:
    return f"the request of user {entry['user']!r} at {entry['time']}"


def _column(
    entries: list[dict], side: str, name: str, kind: str, model: ExportedModel, vault: Any, translated: bool
) -> _Column:
    """Raises ValueError if it holds no strings where the vault does, or unknown ones that are not there."""
    lists = [entry[side][name] if side == "candidates" else [entry[side][name]] for entry in entries]
    flat = [value for values in lists for value in values]
    if name not in model.strings:
        numbers = np.array(flat, kind.partition("[")[0])
        return _Column(numbers, numbers, numbers)
    for entry, values in zip(entries, lists, strict=True):
        for value in values:
            if not isinstance(value, str):
                raise ValueError(f"{_place(entry)}: {side} {name!r} holds {value!r}; {vault.path} has strings there")
    now = vault.encode(name, flat).astype(np.int64)
    then, start = now.copy(), 0
    for entry, values in zip(entries, lists, strict=True):
        for place in entry.get("unknown", {}).get(f"{side}.{name}", ()):
            if place not in range(len(values)):
                raise ValueError(f"{_place(entry)}: {side} {name!r} has no place {place!r}, which it calls unknown")
            then[start + place] = -1
        start += len(values)
    return _Column(then, now, np.array(flat, object) if translated else then)


def _labels(
    shown: list[np.ndarray],
    vault: Any,
    users: Any,
    times: np.ndarray,
    sequence: np.ndarray,
    item: str,
    window: int,
    where: dict[str, Any],
) -> np.ndarray:
    """1 for candidates of which an event came within the window, else 0; float32 [N].

    Args:
      shown: values of `item`, an array a request, as events have them.
    """
    end = np.minimum(times + window, vault.schema.time_limit)
    found = vault.gather(users, end, _EVENTS, fields=list(dict.fromkeys([item, *where])))
    seen = vault.gather(users, times, _EVENTS, as_of=sequence, fields=[])
    labels = []
    allowed = {
        name: allowed_values(name, vault.schema.field(name), value, vault.encode) for name, value in where.items()
    }
    for place, (items, time_of_request) in enumerate(zip(shown, times.tolist(), strict=True)):
        events, moment = found[place].columns, time_of_request - 1
        counts = events["time"] > moment
        # Of the request's own moment, those that it saw come first: what came after them is an answer to it.
        at_once = np.flatnonzero(events["time"] == moment)
        counts[at_once[np.count_nonzero(seen[place].columns["time"] == moment) :]] = True
        for name, values in allowed.items():
            counts &= np.isin(events[name], values)
        labels.append(np.isin(items, events[item][counts]))
    return np.concatenate(labels).astype(np.float32)


def _compare(
    report: Report,
    entry: dict,
    model: ExportedModel,
    vault: Any,
    translations: dict[str, np.ndarray],
    candidates: Columns,
    context: Columns,
) -> None:
    """Scores a request again, from the events that were seen then."""
    if (entry["model"], entry["version"]) != (model.name, model.version):
        report.others += 1
        return
    count = len(entry["logits"])
    users = np.array([entry["user"]]) if vault.schema.user == "int64" else [entry["user"]]
    moment, seen = np.array([entry["time"]]), np.array([entry["as_of"]])
    histories = vault.gather(users, moment, model.history_length, as_of=seen, fields=model.event_fields)
    logits = model.score(histories, Requests(moment, np.array([0, count]), candidates, context), translations)
    # What is no number differs from all that was answered.
    farthest = float(np.nan_to_num(np.abs(logits - np.array(entry["logits"], np.float32)), nan=np.inf).max())
    report.compared += 1
    report.difference = farthest if report.difference is None else max(report.difference, farthest)


def _batches(entries: Iterator[dict]) -> Iterator[list[dict]]:
    waiting: list[dict] = []
    for entry in entries:
        waiting.append(entry)
        if len(waiting) == _BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _type(model: ExportedModel, field: Any) -> str:
    width = model.width_of(field)
    name = "float32" if field.ids in ("log", "vector") else "int64"
    return name if width is None else f"{name}[{width}]"


def main(arguments: list[str] | None = None) -> int:
    """Runs a replay; returns the exit status: 1 also where scores differ by more than 1e-4, or none was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--log", required=True, help="the server's --request-log")
    add("--vault", required=True, help="directory, or grpc://host:port of its service")
    add("--model", required=True, help="what export wrote")
    add("--out", required=True, help="directory to make, such as DATA/requests/train")
    add("--item", default="item", help="field by which an event is one of a candidate")
    add("--window", type=int, default=3600, help="time after a request in which an event counts, in the vault's unit")
    add("--where", action="append", default=[], metavar="FIELD=VALUE,...", help="only such events count")
    add("--compare", type=float, default=0.1, help="share of the requests that are scored anew")
    add("--until", type=int, help="time up to which all events have been written, in the vault's unit; now by default")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        where = {}
        for text in args.where:
            name, sign, values = text.partition("=")
            if not sign:
                raise ValueError(f"--where={text}: need FIELD=VALUE,...")
            where[name] = [int(value) if value.lstrip("-").isdigit() else value for value in values.split(",")]
        vault, model = seqvault.open(args.vault), ExportedModel(args.model)
        report = replay(args.log, vault, model, args.out, args.item, args.window, where, args.compare, args.until)
    except (ModelError, RequestsError, ValueError, seqvault.VaultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(report)))
    seconds = time.monotonic() - started
    print(
        f"{report.requests:,} requests with {report.candidates:,} candidates, {report.positives:,} positive; "
        f"{report.unfinished:,} left out, their window being not over, and {report.unscored:,} with scores that are no "
        f"numbers; {report.compared:,} scored anew, logits differ by {report.difference or 0:.1e} at most; "
        f"{seconds:.1f} s: {args.out}",
        file=sys.stderr,
    )
    if args.compare > 0 and not report.compared:
        others = (
            f"the {report.others:,} requests that were to be scored anew are of other versions than {model.name} "
            f"{model.version}"
        )
        reason = others if report.others else f"{args.log} has no request whose window is over"
        print(f"no score was compared: {reason}; --compare=0 if that is meant", file=sys.stderr)
        return 1
    return 1 if report.difference is not None and report.difference > 1e-4 else 0


if __name__ == "__main__":
    sys.exit(main())
