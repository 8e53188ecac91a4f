"""Tables of outcomes as markdown and CSV, and their pictures."""

import collections
import csv
import itertools
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.paper.intervals import aucs_of, over_seeds, paired
from experiments.paper.study import Outcome

HEAD = ["model", "seeds", "AUC", "sd", "GAUC", "logloss", "ECE"]
INTERVALS = ["over users", "over users and seeds"]  # 95 % each
NO_DIFFERENCE = ["", "", ""]  # the cells of a difference and INTERVALS
RATES = "Samples/s are of training, on a machine that may have been busy; see experiments.bench.models."
COSTS = ["MACs C=1", "MACs/cand. C=100", "with head C=1", "with head C=100", "parameters", "samples/s"]


def millions(value: float) -> str:
    return f"{value / 1e6:.2f} M"


def encoder_macs(outcome: Outcome, candidates: int) -> float | None:
    """Encoder multiply-accumulates a candidate, when a request has so many; None for the outsider."""
    macs = outcome.results.get("macs")
    if macs is None:
        return None
    macs = macs[str(candidates)]
    return macs["encoder_request"] / candidates + macs["encoder_candidate"]


def model_macs(outcome: Outcome, candidates: int) -> float:
    """The same of encoder and head, matches among it."""
    macs = outcome.results["macs"][str(candidates)]
    return encoder_macs(outcome, candidates) + macs["head_request"] / candidates + macs["head_candidate"]


def spread(values: Sequence[float]) -> str:
    return f"{np.std(values, ddof=1):.4f}" if len(values) > 1 else ""


def figures(label: str, outcomes: list[Outcome]) -> list[str]:
    """The cells of HEAD: means over seeds."""
    tests = [outcome.test for outcome in outcomes]
    means = [f"{np.mean([test[name] for test in tests]):.4f}" for name in ("gauc", "logloss", "ece")]
    aucs = [test["auc"] for test in tests]
    return [label, str(len(tests)), f"{np.mean(aucs):.4f}", spread(aucs), *means]


def costs(outcomes: list[Outcome]) -> list[str]:
    """The cells of COSTS. Samples a second are those of training, a figure for each kind of device it was done on."""
    first, rates = outcomes[0], {}
    for outcome in outcomes:  # the oldest runs that are kept do not say it: they were on CPU
        rates.setdefault(outcome.results.get("device", "cpu"), []).append(outcome.results["samples_per_second"])
    rate = ", ".join(f"{np.median(found):.0f} {device}" for device, found in sorted(rates.items()))
    if "macs" not in first.results:
        return [*[""] * (len(COSTS) - 1), rate]
    return [
        millions(encoder_macs(first, 1)),
        millions(encoder_macs(first, 100)),
        millions(model_macs(first, 1)),
        millions(model_macs(first, 100)),
        f"{first.results['parameters']['dense'] / 1e3:.0f} k",
        rate,
    ]


def difference(outcomes: list[Outcome], reference: list[Outcome]) -> list[str]:
    """Difference of AUC to the reference, and INTERVALS; over the seeds that both have."""
    if not outcomes or not reference or outcomes[0].model == reference[0].model:
        return NO_DIFFERENCE
    ours, theirs = shared_aucs(outcomes, reference)
    if not len(ours):
        return NO_DIFFERENCE
    value, low, high = paired(ours, theirs)
    wider = over_seeds(ours, theirs)
    shown = "" if wider is None else f"[{wider[0]:+.4f}, {wider[1]:+.4f}]"
    return [f"{value:+.4f}", f"[{low:+.4f}, {high:+.4f}]", shown]


def shared_aucs(*models: list[Outcome]) -> list[np.ndarray]:
    """Of each model, [seeds, 1 + resamples], the AUCs of the seeds that all of them have."""
    seeds = set.intersection(*({outcome.seed for outcome in outcomes} for outcomes in models))
    return [np.array([aucs_of(o.predictions) for o in outcomes if o.seed in seeds]) for outcomes in models]


def revisions(found: Iterable[list[Outcome]]) -> str:
    """A note: by which code the runs were made, the most frequent first."""
    counted: collections.Counter[str] = collections.Counter()
    for outcome in itertools.chain.from_iterable(found):
        with open(os.path.join(outcome.folder, "run.json"), encoding="utf-8") as file:
            counted[json.load(file)["revision"] or "unknown"] += 1
    return f"Runs by git revision: {', '.join(f'{name} ({count})' for name, count in counted.most_common())}."


def write(folder: str, name: str, head: list[str], rows: list[list[str]], notes: Sequence[str] = ()) -> str:
    """Writes FOLDER/NAME.md and .csv; returns the markdown."""
    os.makedirs(folder, exist_ok=True)
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    text = "\n".join([*lines, *(f"\n{note}" for note in notes)])
    with open(os.path.join(folder, f"{name}.md"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    with open(os.path.join(folder, f"{name}.csv"), "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return text


def save(figure: Figure, folder: str, name: str) -> str:
    """Writes FOLDER/NAME.png; returns its path."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.png")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return path


def bars(values: dict[str, list[float]], label: str, title: str, references: dict[str, float]) -> Figure:
    """One bar a model, the best on top, with a dot a seed; references as vertical lines."""
    figure = Figure(figsize=(7.5, 1.2 + 0.32 * len(values)))
    axes = figure.subplots()
    order = sorted(values, key=lambda name: np.mean(values[name]))
    axes.barh(range(len(order)), [np.mean(values[name]) for name in order], color="tab:blue", alpha=0.55)
    for place, name in enumerate(order):
        axes.plot(values[name], [place] * len(values[name]), "k.", markersize=4)
    for name, value in references.items():
        axes.axvline(value, color="tab:red", linewidth=1)
        axes.text(value, len(order) - 0.4, name, color="tab:red", ha="center", fontsize=8)
    every = [v for seeds in values.values() for v in seeds]
    margin = 0.05 * (max(every) - min(every)) + 1e-3
    axes.set_xlim(min(every) - margin, max([*every, *references.values()]) + margin)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel=label, title=title)
    axes.grid(axis="x", alpha=0.3)
    return figure
