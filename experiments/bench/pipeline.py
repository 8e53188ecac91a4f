"""How fast batches are made, and how that compares with training on them.

  python -m experiments.bench.pipeline

B=128 requests, L=1000, on the generated multi-scene logs with long histories: gather from the vault, id -> row, unique
rows, padding. `input_over_step` is the time to make a batch over the time of a training step of experiments/xhs.py's
model on it (C=1), each timed alone. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os

import jax
import numpy as np

from data.xhs_synthetic import XhsSynthetic
from experiments import xhs
from experiments.bench.steps import training
from experiments.bench.timing import interleave
from laser_jax.pipeline import BatchSource, prepare
from laser_jax.sharding import make_mesh, place_batch
from laser_jax.state import StateFactory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="datasets/bench_pipeline", help="data set, built on first use")
    parser.add_argument("--encoders", default="laser_plus,laser,ta", help="models whose step is timed")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    base = xhs.get_config()
    recipe = XhsSynthetic(users=2_000, mean_length=3_000, train_requests=20_000)
    data = dataclasses.replace(
        base.data, path=args.path, recipe=recipe, batch_size=128, candidates=1, history_length=1000
    )
    prepare(data)
    source = BatchSource(data, base.features, "train")
    batches = iter(range(source.num_batches))
    made = []
    times = interleave({"input": lambda: made.append(source.batch(next(batches)))}, args.rounds)
    events = np.mean([batch.num_events for batch in made])
    unique = {name: int(np.mean([b.step["unique"][name].size for b in made])) for name in made[0].step["unique"]}

    rows = [("make a batch (one thread)", times["input"])]
    mesh = make_mesh(base.mesh, data.batch_size)
    steps = {}
    for name in args.encoders.split(","):
        config = dataclasses.replace(xhs.get_config(name), data=data)
        factory = StateFactory(config.build_model, config.features, config.optim, mesh, steps=source.num_batches)
        with jax.set_mesh(mesh):
            steps[name] = interleave({"step": training(factory, [place_batch(made[0].step, mesh)])}, 5)["step"]
        rows.append((f"training step, {name}", steps[name]))
    print("| | ms | events/s |\n|---|---|---|")
    for label, seconds in rows:
        print(f"| {label} | {1e3 * seconds:.1f} | {events / seconds:,.0f} |")
    print(f"\n{events:.0f} events a batch of {data.batch_size}; unique rows, padded: {unique}")
    first = args.encoders.split(",")[0]
    print(
        json.dumps(
            {
                "input_events_per_s": round(events / times["input"]),
                "input_over_step": round(times["input"] / steps[first], 4),
                "input_ms": round(1e3 * times["input"], 2),
                "step_ms": {name: round(1e3 * seconds, 1) for name, seconds in steps.items()},
                "cpus": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
