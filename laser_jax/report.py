"""workdir/report/: one page with pictures, for those who would rather look than read."""

import dataclasses
import html
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, StrMethodFormatter

from laser_jax import hosts, metrics
from laser_jax.evaluate import Predictions, table
from laser_jax.gate_figures import AGE_NAMES, SILENT, GateFigures
from laser_jax.pipeline import BatchSource, Peers
from laser_jax.sharding import place_batch
from laser_jax.state import TrainState


@dataclasses.dataclass(frozen=True)
class GateMap:
    """How loud each segment of one user is for each candidate.

    Attributes:
      loudness: [C, S], segments oldest to newest. labels, logits: [C]. events: the user's events before the request.
    """

    user: Any
    loudness: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    events: int


def gate_maps(
    eval_step: Callable,
    state: TrainState,
    source: BatchSource,
    mesh: Mesh,
    users: int,
    peers: Peers | None = None,
) -> list[GateMap]:
    """Gate maps of the users with the longest histories in the first batch; empty for encoders without segments.

    With several processes, of the users that this one has; `peers`: see BatchSource.stream.
    """
    batch = next(source.stream(0, 1, peers))
    logits, diag = eval_step(state, place_batch(batch.step, mesh))
    if "loudness" not in diag:
        return []
    loudness, logits = hosts.local(diag["loudness"]), hosts.local(logits)
    maps = []
    for row in np.argsort(-batch.lengths, kind="stable")[:users]:
        real = batch.step["mask"][row]
        maps.append(
            GateMap(
                user=batch.users[row],
                loudness=loudness[row][real],
                labels=batch.step["label"][row][real],
                logits=logits[row][real],
                events=int(batch.lengths[row]),
            )
        )
    return maps


def _save(figure: Figure, folder: str, name: str) -> str:
    figure.tight_layout()
    figure.savefig(os.path.join(folder, name), dpi=110)
    return name


def _legend(axes: Axes, **settings: Any) -> None:
    for text in axes.legend(**settings).get_texts():
        text.set_parse_math(False)  # a name that somebody chose may hold dollar signs


def _known(entries: list[dict[str, Any]], name: str) -> np.ndarray:
    """A figure of every entry, nan where it is undefined."""
    return np.array([entry[name] for entry in entries], np.float64)


def _loss_curve(history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3.4))
    left, right = figure.subplots(1, 2)
    train = [e for e in history if "loss" in e]
    valid = [e for e in history if "valid_auc" in e]
    left.plot([e["step"] for e in train], [e["loss"] for e in train], label="train")
    left.plot([e["step"] for e in valid], _known(valid, "valid_logloss"), "o-", label="valid")
    left.set(xlabel="step", ylabel="logloss", title="Loss")
    right.plot([e["step"] for e in train], _known(train, "auc"), label="train (histogram)")
    right.plot([e["step"] for e in valid], _known(valid, "valid_auc"), "o-", label="valid (exact)")
    right.set(xlabel="step", ylabel="AUC", title="AUC")
    for axes in (left, right):
        _legend(axes)
        axes.grid(alpha=0.3)
    return figure


def roc_points(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates from (0, 0) to (1, 1), a point for every distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    positive, ordered = labels[order] > 0.5, scores[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    true_rate = np.cumsum(positive)[ends] / max(positive.sum(), 1)
    false_rate = np.cumsum(~positive)[ends] / max((~positive).sum(), 1)
    return np.r_[0.0, false_rate], np.r_[0.0, true_rate]


def _roc(name: str, predictions: Predictions) -> Figure:
    figure = Figure(figsize=(4.4, 4.2))
    axes = figure.subplots()
    for label, scores in {name: predictions.logits, **predictions.references}.items():
        false_rate, true_rate = roc_points(predictions.labels, scores)
        keep = np.linspace(0, len(true_rate) - 1, min(len(true_rate), 2000)).astype(int)
        area = metrics.auc(predictions.labels, scores)
        axes.plot(false_rate[keep], true_rate[keep], label=f"{label} ({area:.4f})")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC, test")
    _legend(axes, loc="lower right")
    return figure


def _calibration(predictions: Predictions) -> Figure:
    figure = Figure(figsize=(4.4, 4.2))
    axes = figure.subplots()
    predicted, observed, _ = metrics.calibration_bins(predictions.labels, predictions.logits)
    top = max(predicted.max(), observed.max()) * 1.05
    axes.plot([0, top], [0, top], color="grey", linewidth=0.8)
    axes.plot(predicted, observed, "o-")
    axes.set(xlabel="mean prediction", ylabel="share of clicks", title="Calibration, 20 bins of equal mass")
    return figure


def _auc_by_length(lengths: dict[str, metrics.Scores]) -> Figure:
    figure = Figure(figsize=(6, 3.4))
    axes = figure.subplots()
    names = list(lengths)
    axes.bar(names, [lengths[n].auc for n in names], color="tab:blue")
    for i, n in enumerate(names):
        axes.text(i, lengths[n].auc, f"n={lengths[n].samples}", ha="center", va="bottom", fontsize=8)
    low = min((lengths[n].auc for n in names if np.isfinite(lengths[n].auc)), default=0.5)
    axes.set(xlabel="events before the request", ylabel="AUC", title="AUC by history length")
    axes.set_ylim(bottom=max(0.0, min(0.5, low - 0.05)))
    return figure


def _gate_map(gate_map: GateMap) -> Figure:
    order = np.argsort(-gate_map.logits, kind="stable")
    figure = Figure(figsize=(9, 0.6 + 0.16 * len(order) + 1))
    axes = figure.subplots()
    picture = axes.imshow(gate_map.loudness[order], aspect="auto", cmap="magma", interpolation="nearest")
    axes.set_yticks(
        range(len(order)),
        [f"{'clicked  ' if gate_map.labels[i] > 0.5 else ''}{gate_map.logits[i]:+.2f}" for i in order],
        fontsize=6,
    )
    axes.set(xlabel="segment, oldest to newest", ylabel="candidate (logit)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"user {gate_map.user}, {gate_map.events} events", parse_math=False)  # an id may hold dollar signs
    figure.colorbar(picture, ax=axes, label="loudness")
    return figure


_LOUDNESS_TICKS = (0, 0.5, 1, 1.5, *(digit * 10**power for power in range(6) for digit in (2, 5, 10)))


def _gates_by_age(gates: GateFigures) -> Figure:
    figure = Figure(figsize=(7, 3.6))
    axes = figure.subplots()
    axes.set_yscale("symlog", linthresh=1, linscale=0.4)  # smooth at 1; silence, 0, is to be seen too
    places = np.arange(len(AGE_NAMES))
    for name, values in gates.by_age.items():
        known = [i for i, value in enumerate(values) if value is not None]
        axes.plot(places[known], [values[i] for i in known], "o-", label=f"{name} ({100 * gates.shares[name]:.1f} %)")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xticks(places, AGE_NAMES, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(FixedLocator(_LOUDNESS_TICKS))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel="age of the segment's newest event", ylabel="loudness / mean")
    axes.set_title("Gates by age and by what matches the candidate (share of segments)", fontsize=10)
    _legend(axes, fontsize=8)
    return figure


def _gate_text(gates: GateFigures) -> str:
    lines = [f"silent segments (below {SILENT:g} of their history's mean): {100 * gates.silent:.1f} %"]
    lines += ["", "closest match in the segment: loudness over the history's mean (share of segments)"]
    lines += [
        f"  {name:<16s} {value:8.3f}  ({100 * gates.shares[name]:.1f} %)" for name, value in gates.by_match.items()
    ]
    return "\n".join(lines)


def write(
    workdir: str,
    config: Any,
    predictions: Predictions,
    lengths: dict[str, metrics.Scores],
    history: list[dict[str, Any]],
    maps: list[GateMap],
    gates: GateFigures | None,
) -> str:
    """Writes workdir/report/index.html and its pictures; returns the page's path."""
    folder = os.path.join(workdir, "report")
    os.makedirs(folder, exist_ok=True)
    name = config.name or type(config.encoder).__name__
    rows = {name: predictions.figures(), **predictions.reference_figures()}
    pictures = [
        (_save(_loss_curve(history), folder, "loss.png"), "Loss and AUC while training"),
        (_save(_roc(name, predictions), folder, "roc.png"), "ROC on the test split"),
        (_save(_calibration(predictions), folder, "calibration.png"), "Calibration on the test split"),
        (_save(_auc_by_length(lengths), folder, "auc_by_length.png"), "AUC by history length"),
    ]
    spoken = ""
    if gates is not None:
        spoken = f"<h2>Gates</h2><pre>{html.escape(_gate_text(gates))}</pre>\n"
        pictures.append((_save(_gates_by_age(gates), folder, "gates_by_age.png"), "What the gates listen to"))
    for i, gate_map in enumerate(maps):
        caption = (
            "How loud each segment is for each candidate, best-scored candidate on top. Rows that differ show gates "
            "that look at content; equal rows show dead gates."
        )
        pictures.append((_save(_gate_map(gate_map), folder, f"gates_{i}.png"), caption))
    figures = "\n".join(
        f'<figure><img src="{file}" alt="{html.escape(text)}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for file, text in pictures
    )
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
        settings = json.dumps(json.load(file), indent=1)
    page = os.path.join(folder, "index.html")
    with open(page, "w", encoding="utf-8") as file:
        file.write(
            f"<!doctype html><meta charset='utf-8'><title>{html.escape(name)}</title>\n"
            "<style>body{font:15px sans-serif;max-width:1000px;margin:2em auto}figure{margin:1em 0}"
            "img{max-width:100%}pre{background:#f4f4f4;padding:1em;overflow:auto}</style>\n"
            f"<h1>{html.escape(name)}</h1>\n<h2>Test</h2><pre>{html.escape(table(rows))}</pre>\n"
            f"<h2>By history length</h2><pre>{html.escape(table(lengths))}</pre>\n{spoken}{figures}\n"
            f"<details><summary>Configuration</summary><pre>{html.escape(settings)}</pre></details>\n"
        )
    return page
