"""Figure 3: more GSTA layers (M = 1..4, of laser), and longer histories.

  python -m experiments.paper.figure3 --data=completejourney --seeds=3
  python -m experiments.paper.figure3 --data=xhs_long --seeds=3 --lengths=1000,4000,10000

Models are those of table 2. Every length is trained and served at that length; steps between lengths are paired over
users. Writes ROOT/DATA/figure3-{layers,lengths}.{md,csv,png}.
"""

import argparse
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from experiments.paper import models, tables, variants
from experiments.paper.search import chosen, chosen_rates
from experiments.paper.study import Model, Outcome, Study, parse

LAYERS = (1, 2, 3, 4)
STANDARD_LENGTH = 1000


def at_length(study: Study, name: str, length: int, run: bool) -> Model:
    """The model of table 2, at another length; `run`: see search.chosen."""
    model = chosen(study, name, run)
    return model if length == STANDARD_LENGTH else model.but(f"{name} L={length}", data__history_length=length)


def tabulate_lengths(study: Study, found: dict[str, dict[int, list[Outcome]]]) -> str:
    """A row a model and length, with the gain over the next shorter one; and the picture."""
    rows, figure = [], Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, by_length in found.items():
        known = [length for length, outcomes in sorted(by_length.items()) if outcomes]
        gaps = {b: tables.difference(by_length[b], by_length[a]) for a, b in pairwise(known)}
        for length in known:
            outcomes = by_length[length]
            cells = tables.figures(name, outcomes)
            rows.append(
                [*cells[:1], str(length), *cells[1:], *gaps.get(length, tables.NO_DIFFERENCE), *tables.costs(outcomes)]
            )
        means = [np.mean([o.test["auc"] for o in by_length[length]]) for length in known]
        axes.plot(known, means, "o-", label=name)
    axes.set(xscale="log", xlabel="L, events of history", ylabel="test AUC", title="Growth with length")
    lengths = sorted({length for by_length in found.values() for length in by_length})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    tables.save(figure, study.folder, "figure3-lengths")
    head = ["model", "L", *tables.HEAD[1:], "AUC - next shorter", *tables.INTERVALS, *tables.COSTS]
    every = [outcomes for by_length in found.values() for outcomes in by_length.values()]
    return tables.write(study.folder, "figure3-lengths", head, rows, [tables.RATES, tables.revisions(every)])


def main() -> None:
    def add(parser):
        parser.add_argument("--lengths", default="50,200,1000")
        parser.add_argument("--models", default="laser_plus,ta,mean", help="whose growth with length is drawn")
        parser.add_argument(
            "--layers", action=argparse.BooleanOptionalAction, default=True, help="also M = 1..4 of laser"
        )

    args, study = parse(__doc__, add)
    lengths = [int(length) for length in args.lengths.split(",")]
    names, run = models.names(args.models), not args.only_report
    wanted = {name: {length: at_length(study, name, length, run) for length in lengths} for name in names}
    base = chosen_rates(study, "laser", run) if args.layers else None
    if run:
        study.run([(wanted[name][n], seed) for seed in range(args.seeds) for name in names for n in lengths])
    found = {name: {n: study.finished(wanted[name][n], args.seeds) for n in lengths} for name in names}
    texts = [tabulate_lengths(study, found)]
    if base is not None:
        rows = [base, *(base.but(f"M={m}", encoder__layers=m) for m in LAYERS if m != 2)]
        texts.append(variants.tabulate(study, "figure3-layers", rows, args.seeds, run, "laser"))
    print("\n\n".join(texts))
    print(f"\n{args.data}: {len(names)} models at L = {args.lengths}, {args.seeds} seeds; pictures in {study.folder}")


if __name__ == "__main__":
    main()
