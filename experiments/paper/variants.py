"""Tables of one model and what becomes of it when one thing is changed."""

import numpy as np

from experiments.paper import tables
from experiments.paper.study import Model, Study


def tabulate(study: Study, name: str, rows: list[Model], seeds: int, run: bool) -> str:
    """Runs the models, of which the first is the base, and writes table NAME: differences are to the base.

    Args:
      rows: unlike each other; those that are not finished are left out where `run` is False.
    """
    if run:
        study.run([(model, seed) for seed in range(seeds) for model in rows])
    found = [(model, study.finished(model, seeds)) for model in rows]
    base = found[0][1]
    head = [*tables.HEAD, f"AUC - {rows[0].label}", "95 % interval", *tables.COSTS, "gate contrast"]
    cells = []
    for model, outcomes in found:
        if not outcomes:
            continue
        gap = tables.difference(outcomes, base) if base else ["", ""]
        contrasts = [o.results["gate_contrast"] for o in outcomes if o.results["gate_contrast"] is not None]
        shown = f"{np.mean(contrasts):.3f}" if contrasts else ""
        cells.append([*tables.figures(model.label, outcomes), *gap, *tables.costs(outcomes), shown])
    text = tables.write(study.folder, name, head, cells)
    values = {model.label: [o.test["auc"] for o in outcomes] for model, outcomes in found if outcomes}
    if values:
        tables.save(tables.bars(values, "test AUC", f"{name}, a dot a seed", {}), study.folder, name)
    return text
