"""Several encoders, several seeds, one table.

  python -m experiments.compare --config=experiments/completejourney.py --workdir=runs/compare --seeds=3

Every run is a process of `python -m laser_jax.main`; finished ones are not run again, a killed one goes on. Differences
to `--against` are paired: the same users are resampled for both, and averaged over seeds. Further flags
(--config.head.products=True ...) are handed to every run: another protocol, so give it another workdir.
"""

import argparse

import numpy as np

from experiments.paper import tables
from experiments.paper.study import Model, Study
from laser_jax.models import ENCODERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--encoders", default="laser,laser_plus,ta,din,mean", help=f"of {', '.join(ENCODERS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--against", default="ta")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    args, flags = parser.parse_known_args()
    unknown = [flag for flag in flags if not flag.startswith("--config.")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    study = Study(args.config, {}, args.workdir, args.jobs, tuple(flags))
    models = {name: Model(name, name) for name in args.encoders.split(",")}
    study.run([(model, seed) for seed in range(args.seeds) for model in models.values()])
    found = {name: study.finished(model, args.seeds) for name, model in models.items()}
    head = [*tables.HEAD, f"AUC - {args.against}", *tables.INTERVALS, *tables.COSTS, "gate contrast"]
    rows = []
    for name in sorted(found, key=lambda name: -np.mean([o.test["auc"] for o in found[name]])):
        gap = tables.difference(found[name], found.get(args.against, []))
        contrast = found[name][0].results["gate_contrast"]
        shown = "" if contrast is None else f"{contrast:.3f}"
        rows.append([*tables.figures(name, found[name]), *gap, *tables.costs(found[name]), shown])
    print("\n" + tables.write(args.workdir, "table", head, rows))
    print(f"\n{len(models)} encoders, {args.seeds} seeds; also in {args.workdir}/table.md and table.csv")


if __name__ == "__main__":
    main()
