"""Tables of one model and what becomes of it when one thing is changed, all with the learning rates of table 2."""

from collections.abc import Callable

import numpy as np

from experiments.paper import models, tables
from experiments.paper.search import chosen_rates, unfinished
from experiments.paper.study import Model, Study, parse


def tabulate(study: Study, name: str, rows: list[Model], seeds: int, run: bool, base: str) -> str:
    """Runs the models, of which the first is the base, and writes table NAME: differences are to the base.

    Args:
      rows: unlike each other; those that are not finished are left out where `run` is False.
      base: the model of table 2 that they are forms of.
    """
    if run:
        study.run([(model, seed) for seed in range(seeds) for model in rows])
    found = [(model, study.finished(model, seeds)) for model in rows]
    compared = found[0][1]
    head = [*tables.HEAD, f"AUC - {rows[0].label}", *tables.INTERVALS, *tables.COSTS, "gate contrast"]
    cells = []
    for model, outcomes in found:
        if not outcomes:
            continue
        gap = tables.difference(outcomes, compared)
        contrasts = [o.results["gate_contrast"] for o in outcomes if o.results["gate_contrast"] is not None]
        shown = f"{np.mean(contrasts):.3f}" if contrasts else ""
        cells.append([*tables.figures(model.label, outcomes), *gap, *tables.costs(outcomes), shown])
    missing = unfinished(study, base, len(models.trials(base)))
    notes = [f"{base} is not fully searched: {missing}."] if missing else []
    notes += [tables.RATES, tables.revisions(outcomes for _, outcomes in found)]
    text = tables.write(study.folder, name, head, cells, notes)
    values = {model.label: [o.test["auc"] for o in outcomes] for model, outcomes in found if outcomes}
    if values:
        tables.save(tables.bars(values, "test AUC", f"{name}, a dot a seed", {}), study.folder, name)
    return text


def main(description: str, name: str, rows_of: Callable[[Model], list[Model]], base: str) -> None:
    """The command line of a table of variants.

    Args:
      name: of the table; its files are called NAME-BASE. rows_of: the base and its variants. base: the default one.
    """

    def add(parser):
        parser.add_argument("--base", default=base, choices=("laser_plus", "laser"))

    args, study = parse(description, add)
    run = not args.only_report
    rows = rows_of(chosen_rates(study, args.base, run))
    print(tabulate(study, f"{name}-{args.base}", rows, args.seeds, run, args.base))
    print(f"\n{args.data}: {len(rows)} forms of {args.base}, {args.seeds} seeds; table and picture in {study.folder}")
