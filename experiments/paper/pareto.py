"""Quality against cost: test AUC over encoder multiply-accumulates, at one and at a hundred candidates a request.

  python -m experiments.paper.pareto --data=completejourney --seeds=3

Reads what table2 has finished and adds the cheaper and dearer forms of laser_plus. The scoring time that
experiments.bench.models measured is drawn as well, of models of its own width and settings, which need not be those of
the AUC: by a table that comes with the code (two CPU cores), or your own, --times=runs/bench_models/models.csv. A
model is on the front unless a cheaper one has a higher AUC and the interval of the difference, over users and seeds,
excludes zero; with a single seed that is not known, which a question mark says. Writes ROOT/DATA/pareto.{md,csv,png}.
"""

import csv
import itertools
import os

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter
from matplotlib.transforms import Bbox

from experiments.paper import models, tables
from experiments.paper.intervals import over_seeds
from experiments.paper.search import choose, unfinished
from experiments.paper.study import GBDT, KEPT, Model, Outcome, parse

COUNTS = (1, 100)  # candidates a request


def forms(base: Model) -> list[Model]:
    """laser_plus, cheaper and dearer."""
    heads = 4 if base.settings.get("encoder.heads") == 2 else 2  # the other number of those that are searched
    gsta = dict(encoder__segment=10, encoder__recency="age", encoder__pool=True, encoder__layers=2)
    return [
        base.but("laser_plus, whole history only", encoder__horizons=(1000,)),
        base.but("laser_plus without the mean", head__mean=False),
        base.but(f"laser_plus, {heads} heads", encoder__heads=heads),
        base.but("laser_plus with GSTA", **gsta),
        base.but("laser_plus with GSTA, FFN 1x, recent", **gsta, encoder__segment_ffn=1, encoder__recent=1),
    ]


def read_times(path: str) -> dict[tuple[str, int], float]:
    """(model, candidates) -> microseconds to score a sample at L=1000, of a models.csv."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["length"] == "1000" and row["forward_us_a_sample"]]
    return {(row["model"], int(row["candidates"])): float(row["forward_us_a_sample"]) for row in rows}


def dominated_by(label: str, found: dict[str, list[Outcome]], cost: dict[str, float]) -> list[str]:
    """Cheaper models whose AUC is higher beyond the interval over users and seeds; "?" after one of a single seed."""
    better = []
    for other, outcomes in found.items():
        if other == label or other not in cost or cost[other] >= cost[label]:
            continue
        ours, theirs = tables.shared_aucs(found[label], outcomes)
        interval = over_seeds(theirs, ours)
        if interval is None and len(ours) and theirs[:, 0].mean() > ours[:, 0].mean():
            better.append(f"{other}?")
        if interval is not None and interval[0] > 0:
            better.append(other)
    return better


def picture(
    panels: dict[str, dict[str, float]], auc: dict[str, float], dominated: dict[str, dict[str, list[str]]]
) -> Figure:
    """A panel a cost: AUC over it, ours in red; hollow what is dominated.

    Args:
      panels: title -> label -> cost. dominated: title -> label -> by whom.
    """
    figure = Figure(figsize=(15, 6 * (len(panels) // len(COUNTS))))
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels) // len(COUNTS), len(COUNTS), squeeze=False)
    for axes, (title, cost) in zip(grid.flat, panels.items(), strict=True):
        axes.set(xscale="log", xlabel=title, ylabel="test AUC")
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.margins(x=0.25, y=0.08)
        axes.grid(alpha=0.3)
        for label, value in cost.items():
            color = "tab:red" if label.startswith("laser_plus") else "tab:blue"
            hollow = any(not other.endswith("?") for other in dominated[title][label])
            axes.plot([value], [auc[label]], "o", color=color, markerfacecolor="white" if hollow else color)
    figure.suptitle("hollow: a model of less cost is better, beyond the interval over users and seeds")
    figure.tight_layout()
    for axes, cost in zip(grid.flat, panels.values(), strict=True):
        _label(axes, cost, auc)
    return figure


def _label(axes: Axes, cost: dict[str, float], auc: dict[str, float]) -> None:
    """Names of points, each at the nearest place where it covers neither another name nor a point."""
    renderer = axes.figure.canvas.get_renderer()
    points = {label: axes.transData.transform((cost[label], auc[label])) for label in cost}
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points.values()]
    for label in sorted(cost, key=lambda label: -auc[label]):
        name = label.replace(", ", ",\n")
        places = sorted(itertools.product((6, -6), range(-48, 49, 8)), key=lambda place: (abs(place[1]), -place[0]))
        for dx, dy in places:
            text = axes.annotate(
                name,
                (cost[label], auc[label]),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=8,
                va="center",
                ha="left" if dx > 0 else "right",
                arrowprops=dict(arrowstyle="-", color="gray", linewidth=0.5) if abs(dy) > 8 else None,
            )
            text.update_positions(renderer)
            # Of the text alone: that of an annotation has its line in it, which ends at the point.
            box, inside = Text.get_window_extent(text, renderer), axes.get_window_extent(renderer)
            if inside.x0 < box.x0 and box.x1 < inside.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
        else:
            axes.annotate(name, (cost[label], auc[label]), xytext=(6, 0), textcoords="offset points", fontsize=8)


def main() -> None:
    def add(parser):
        parser.add_argument("--trials", type=int, default=4, help="as given to table2")
        times = os.path.join(KEPT, "models.csv")
        parser.add_argument("--times", default=times, help="a models.csv of experiments.bench.models; empty for none")

    args, study = parse(__doc__, add)
    compared = choose(study, "tricks", list(models.ORDER), args.trials, run=False)
    others = forms(compared["laser_plus"])
    if not args.only_report:
        study.run([(form, seed) for seed in range(args.seeds) for form in others])
    rows = [*compared.values(), *others]
    found = {model.label: study.finished(model, args.seeds) for model in rows}
    found = {label: outcomes for label, outcomes in found.items() if outcomes}
    auc = {label: float(np.mean([o.test["auc"] for o in outcomes])) for label, outcomes in found.items()}
    with_cost = [label for label in found if label != GBDT]
    panels = {
        f"encoder MACs a candidate, C={count}": {
            label: tables.encoder_macs(found[label][0], count) for label in with_cost
        }
        for count in COUNTS
    }
    if args.times:
        times = read_times(args.times)
        for count in COUNTS:
            measured = {label: times[label, count] for label in with_cost if (label, count) in times}
            panels[f"microseconds to score a sample, C={count} (experiments.bench.models)"] = measured
    dominated = {title: {label: dominated_by(label, found, cost) for label in cost} for title, cost in panels.items()}
    head = ["model", "seeds", "AUC", "AUC - laser_plus", *tables.INTERVALS, *panels]
    head, cells = [*head, *(f"dominated at C={count} by" for count in COUNTS)], []
    for label in sorted(with_cost, key=lambda label: -auc[label]):
        values = [f"{cost[label]:.4g}" if label in cost else "" for cost in panels.values()]
        beaten = [", ".join(dominated[title][label]) for title in list(panels)[: len(COUNTS)]]
        gap = tables.difference(found[label], found.get("laser_plus", []))
        cells.append([label, str(len(found[label])), f"{auc[label]:.4f}", *gap, *values, *beaten])
    missing = {name: unfinished(study, name, args.trials) for name in compared if name in found}
    notes = [f"{name} is not fully searched: {what}." for name, what in missing.items() if what]
    notes.append(tables.revisions(found.values()))
    print(tables.write(study.folder, "pareto", head, cells, notes))
    path = tables.save(picture(panels, auc, dominated), study.folder, "pareto")
    print(f"\n{args.data}: {len(cells)} models; picture {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
