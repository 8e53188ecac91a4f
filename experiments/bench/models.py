"""Every model of the zoo, timed: microseconds a sample, forward and training step, over history length and candidates.

  python -m experiments.bench.models
  python -m experiments.bench.models --models=laser_plus,ta,transformer --lengths=1000 --candidates=1 --rounds=15

A sample is one pair of request and candidate. At each length L and number of candidates C all models take turns in one
interleaved run, medians of rounds; all have the same width d and read the same random batch of B requests, B such that
B * L is `--events` (less where B * L * C would pass `--pairs`): the exponent of time a sample over L is then that of
the model and not of the batch. Histories are full unless `--histories=zipf`.

What is timed:
  forward  embedding rows gathered by the batch's indices inside (four fields, f=128) -> the encoder's tokens;
  train    value and gradient of a scalar of the tokens with respect to the encoder, w_in, the rows and the candidates'
           tokens q, then Adam on encoder and w_in.
What is not: the head and how q is made, the loss on labels, the tables' Adagrad on the rows met, making batches. They
cost the same for all models, but for the head's input, which is as wide as the encoder has tokens.

Settings are the zoo's defaults, except a Transformer with a 1x feed-forward (the cost that LASER's paper quotes) and
LONGER with groups of 8 events of width 32 each, whatever d is: by default they are as wide as d, at five times the
multiply-accumulates. All models take their requests in parts, as a training step does: on a CPU of about 4000 events
each, two requests at least, else all at once (`--parts`: so many). Those with attention between events hold it block by
block.

MACs are forward, what the encoder counts, without the gather; parameters those of the encoder; temporaries what the
compiler asks for one step, without inputs and results. A model whose step would take more than `--most_seconds` or
more than `--most_gb` of temporaries, or for which no time is left, is reported as skipped, with the reason; fewer
`--events` make room for it. Compiling counts as time, too.

The last line is one JSON object. A_over_B_train is the time of A over that of B at L=1000, C=1 (`at`), `_c100` the same
at C=100; length exponents are slopes of log(time a sample) over log(L) at C=1, 1 where cost is linear. What was not
measured is null, and `reasons` says why. models.csv and models.md go to `--out`. Runs with huge pages for large
allocations (GLIBC_TUNABLES; set it to nothing to see all without).
"""

import argparse
import csv
import json
import os
import sys
import time
from collections.abc import Iterable

import jax
import numpy as np

from experiments.bench.models_measure import KINDS, Limits, Row, Size, measure
from experiments.bench.timing import use_huge_pages
from laser_jax.models import ENCODERS
from laser_jax.optim import OptimConfig

#: Slow model over fast one, in the JSON object.
RATIOS = (
    ("transformer", "laser_plus"),
    ("hstu", "laser_plus"),
    ("transformer", "laser"),
    ("hstu", "laser"),
    ("laser_plus", "ta"),
    ("laser", "ta"),
)
REFERENCE_LENGTH, MANY_CANDIDATES = 1000, 100
HEAD = (
    "model",
    "us a sample, forward",
    "us a sample, train",
    "us a request, forward",
    "us a request, train",
    "MACs a request",
    "MACs a candidate",
    "parameters",
    "temporaries MB, forward",
    "temporaries MB, train",
    "rounds, forward / train",
)


def sizes(args: argparse.Namespace) -> list[Size]:
    """One for each length and number of candidates; what the JSON object needs comes first."""
    fewest, most, reference = min(args.candidates), max(args.candidates), reference_length(args.lengths)
    pairs = [(length, candidates) for candidates in args.candidates for length in args.lengths]
    pairs.sort(key=lambda pair: (pair[1] != fewest, pair[0] != reference, pair[1] != most))
    found = []
    for length, candidates in pairs:
        events = min(args.events, args.pairs // candidates)
        found.append(Size(max(events // length, 1), length, candidates, args.d))
    return found


def reference_length(lengths: Iterable[int]) -> int:
    """The length of the ratios: 1000, or the longest where that is not asked for."""
    return REFERENCE_LENGTH if REFERENCE_LENGTH in lengths else max(lengths)


class Progress:
    """Lines on stderr: what was done, how far the run is, how long it may still take."""

    def __init__(self, number: int, minutes: float):
        self.number, self.minutes, self.start, self.done = number, minutes, time.monotonic(), 0

    def of(self, size: Size):
        def tell(what: str, share: float) -> None:
            gone = (time.monotonic() - self.start) / 60
            done = (self.done + share) / self.number
            left = min(gone / done - gone, max(self.minutes - gone, 0.0))
            where = f"[size {self.done + 1} of {self.number}: L={size.length} C={size.candidates} B={size.requests}]"
            print(f"{where} {what}; {gone:.1f} min gone, about {left:.1f} left", file=sys.stderr, flush=True)

        return tell


def table(rows: list[Row], histories: str) -> str:
    """The rows of one size, as Markdown."""
    size = rows[0].size
    lines = [f"L={size.length}, C={size.candidates}, B={size.requests}, d={size.width}, {histories} histories", ""]
    lines += [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row in rows:
        times = [_time_cell(row, kind, per) for per in (1, size.candidates) for kind in KINDS]
        temporaries = [_size_cell(row.timings[kind].temporaries) for kind in KINDS]
        cells = [row.model, *times, *(f"{macs:.3g}" for macs in row.macs), str(row.parameters), *temporaries]
        cells.append(" / ".join(str(row.timings[kind].rounds) for kind in KINDS))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _time_cell(row: Row, kind: str, samples: int) -> str:
    microseconds = row.sample_us(kind)
    if microseconds is None:
        return f"skipped ({row.timings[kind].skipped})"
    return f"{samples * microseconds:.4g}"


def _size_cell(temporaries: int | None) -> str:
    return "" if temporaries is None else f"{temporaries / 1e6:.1f}"


def write(folder: str, rows: list[Row], histories: str) -> None:
    """models.csv, a line a model and size, and models.md, the tables, by candidates and length."""
    os.makedirs(folder, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row.size.candidates, row.size.length))
    with open(os.path.join(folder, "models.csv"), "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        of_kind = ("us_a_sample", "rounds", "temporaries_bytes", "skipped")
        head = ["candidates", "length", "requests", "d", "histories", "model", "macs_request", "macs_candidate"]
        writer.writerow([*head, "parameters", *(f"{kind}_{what}" for kind in KINDS for what in of_kind)])
        for row in rows:
            size, cells = row.size, []
            for kind in KINDS:
                timing = row.timings[kind]
                cells += [row.sample_us(kind), timing.rounds, timing.temporaries, timing.skipped]
            of_size = [size.candidates, size.length, size.requests, size.width, histories]
            writer.writerow([*of_size, row.model, *row.macs, row.parameters, *cells])
    groups: dict[Size, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.size, []).append(row)
    with open(os.path.join(folder, "models.md"), "w", encoding="utf-8") as file:
        file.write("\n\n".join(table(group, histories) for group in groups.values()) + "\n")


class Summary:
    """The JSON object: figures, or null with a reason."""

    def __init__(self, rows: list[Row], length: int):
        self.rows, self.length = {(row.model, row.size.length, row.size.candidates): row for row in rows}, length
        self.figures: dict[str, float | None] = {}
        self.reasons: dict[str, str] = {}

    def ratios(self) -> None:
        for suffix, candidates in (("", 1), (f"_c{MANY_CANDIDATES}", MANY_CANDIDATES)):
            for slow, fast in RATIOS:
                for kind in KINDS:
                    key = f"{slow}_over_{fast}_{kind}{suffix}"
                    values = [self._measured(name, candidates, kind, key) for name in (slow, fast)]
                    self.figures[key] = None if None in values else round(values[0] / values[1], 3)

    def _measured(self, model: str, candidates: int, kind: str, key: str) -> float | None:
        row = self.rows.get((model, self.length, candidates))
        value = None if row is None else row.sample_us(kind)
        if value is None:
            why = "not asked for" if row is None else f"skipped: {row.timings[kind].skipped}"
            self.reasons[key] = f"{model} at L={self.length} C={candidates} {why}"
        return value

    def exponents(self, model: str) -> dict[str, float | list[int] | None]:
        """Slopes of log(time a sample) over log(L) at C=1, and the lengths they were fitted over."""
        found: dict[str, float | list[int] | None] = {}
        for kind in KINDS:
            points = sorted(
                (length, row.sample_us(kind))
                for (name, length, candidates), row in self.rows.items()
                if name == model and candidates == 1 and row.sample_us(kind) is not None
            )
            found[f"{kind}_lengths"] = [length for length, _ in points]
            found[kind] = round(float(np.polyfit(*np.log(points).T, 1)[0]), 3) if len(points) > 1 else None
        return found

    def json(self) -> dict:
        self.ratios()
        for kind in KINDS:
            key = "laser_plus_length_exponent" + ("" if kind == "train" else f"_{kind}")
            self.figures[key] = self.exponents("laser_plus")[kind]
            if self.figures[key] is None:
                self.reasons[key] = "laser_plus has fewer than two lengths at C=1"
        names = dict.fromkeys(name for name, _, _ in self.rows)
        return {
            "at": {"length": self.length, "candidates": 1},
            **self.figures,
            "length_exponents": {name: self.exponents(name) for name in names},
            "reasons": self.reasons,
            "device": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
            "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        }


def arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        found = sorted({int(part) for part in text.split(",")})
        if found[0] < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers of at least 1")
        return found

    def names(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in found if name not in ENCODERS]:
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; choose of {', '.join(ENCODERS)}")
        return found

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names, default=list(ENCODERS), help="names of the zoo, comma-separated")
    parser.add_argument("--lengths", type=numbers, default=[200, 1000, 4000, 10_000], help="L, comma-separated")
    parser.add_argument("--candidates", type=numbers, default=[1, 10, 100], help="C of a request, comma-separated")
    parser.add_argument("--d", type=int, default=128, help="width of tokens")
    parser.add_argument("--histories", choices=("full", "zipf"), default="full", help="how long they are, up to L")
    parser.add_argument("--events", type=int, default=40_000, help="B * L; more on an accelerator")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="the most that B * L * C may be, if B > 1")
    parser.add_argument("--parts", type=int, default=0, help="in which requests come, a divisor of B; 0: see above")
    parser.add_argument("--rounds", type=int, default=15, help="at most; slow models get fewer")
    parser.add_argument("--minutes", type=float, default=25, help="to be spent on everything, about")
    parser.add_argument("--most_seconds", type=float, default=20, help="of a step; slower ones are skipped")
    parser.add_argument("--most_gb", type=float, default=10, help="of a step's temporaries; larger ones are skipped")
    parser.add_argument("--out", default="runs/bench_models", help="folder of models.csv and models.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    todo = sizes(args)
    optim = OptimConfig(microbatches=args.parts)
    progress = Progress(len(todo), args.minutes)
    deadline = time.monotonic() + 60 * args.minutes
    limits = Limits(args.most_seconds, 1e9 * args.most_gb, args.rounds, deadline)
    rows: list[Row] = []
    # The length of the ratios gets twice the time of the others.
    weights = [1 + (size.length == reference_length(args.lengths)) for size in todo]
    for number, size in enumerate(todo):
        seconds = max(limits.left, 0.0) * weights[number] / sum(weights[number:])
        found = measure(args.models, size, args.histories, optim, limits, seconds, progress.of(size))
        progress.done += 1
        rows += found
        write(args.out, rows, args.histories)
        print(table(found, args.histories), end="\n\n", flush=True)
    print(json.dumps(Summary(rows, reference_length(args.lengths)).json()))


if __name__ == "__main__":
    use_huge_pages("experiments.bench.models")
    main()
