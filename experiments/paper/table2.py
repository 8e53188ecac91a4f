"""Table 2: every model on one data set, the same embeddings, head, budget and search for all.

  python -m experiments.paper.table2 --data=completejourney --seeds=3
  python -m experiments.paper.table2 --data=xhs_synthetic --seeds=3 --models=laser_plus,ta,transformer

Settings are searched first (--trials of them a model, 1 for none), and what is found is tried on three seeds whatever
--seeds says (see search.py); then the seeds run.
Two columns: `tricks` gives every model what is not tied to segments, match readouts (layers/matches.py) too, and is
what the search is for; `plain` is each model's own card, with the same settings. Differences are paired over users.
Writes ROOT/DATA/table2-COLUMN.{md,csv,png}; the same command again goes on where it stopped.
"""

import numpy as np

from experiments.paper import models, tables
from experiments.paper.search import choose, unfinished
from experiments.paper.study import Model, Outcome, Study, parse


def tabulate(
    study: Study, column: str, chosen: dict[str, Model], seeds: int, against: str, missing: dict[str, str]
) -> str:
    """The table of what is finished.

    Args:
      missing: what is missing of each model's search.
    """
    found = {name: study.finished(model, seeds) for name, model in chosen.items()}
    found = {name: outcomes for name, outcomes in found.items() if outcomes}
    order = sorted(found, key=lambda name: -np.mean([o.test["auc"] for o in found[name]]))
    head = [*tables.HEAD, f"AUC - {against}", *tables.INTERVALS, *tables.COSTS, "settings"]
    rows = []
    for name in order:
        outcomes = found[name]
        gap = tables.difference(outcomes, found.get(against, []))
        fixed = models.model(name, column).settings
        searched = {k: v for k, v in chosen[name].settings.items() if fixed.get(k) != v}
        text = " ".join(f"{key.split('.', 1)[1]}={value}" for key, value in searched.items())
        text += f" (searched: {missing[name]})" if missing[name] else ""
        rows.append([*tables.figures(name, outcomes), *gap, *tables.costs(outcomes), text])
    references = reference_aucs(next(iter(found.values()))[0]) if found else {}
    notes = [f"{name}: AUC {value:.4f}." for name, value in references.items()]
    notes += [tables.RATES, tables.revisions(found.values())]
    text = tables.write(study.folder, f"table2-{column}", head, rows, notes)
    if found:
        values = {name: [o.test["auc"] for o in outcomes] for name, outcomes in found.items()}
        shown = {name: value for name, value in references.items() if name == "oracle"}
        tables.save(tables.bars(values, "test AUC", f"{column}, a dot a seed", shown), study.folder, f"table2-{column}")
    return text


def reference_aucs(outcome: Outcome) -> dict[str, float]:
    """AUCs of what was stored with the data."""
    return {name: scores["auc"] for name, scores in list(outcome.results["test"].items())[1:]}


def main() -> None:
    def add(parser):
        parser.add_argument("--models", default="all", help=f"of {', '.join(models.ORDER)}")
        parser.add_argument("--columns", default="tricks,plain", help="in what order they run")
        parser.add_argument("--trials", type=int, default=4, help="settings tried a model, 1 for none")
        parser.add_argument("--against", default="laser_plus")

    args, study = parse(__doc__, add)
    names = models.names(args.models)
    texts = []
    for column in args.columns.split(","):
        chosen = choose(study, column, names, args.trials, run=not args.only_report)
        missing = {name: unfinished(study, name, args.trials) for name in names}
        if not args.only_report:
            study.run([(model, seed) for seed in range(args.seeds) for model in chosen.values()])
        texts.append(f"{column}\n\n" + tabulate(study, column, chosen, args.seeds, args.against, missing))
    print("\n\n".join(texts))
    print(f"\n{args.data}: {len(names)} models, {args.seeds} seeds; tables and pictures in {study.folder}")


if __name__ == "__main__":
    main()
