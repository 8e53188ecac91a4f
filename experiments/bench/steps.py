"""All of a step: what training, and scoring, of every model of the study take for a batch that is there.

  pip install '.[data]'
  python -m experiments.bench.steps --data=completejourney
  python -m experiments.bench.steps --data=xhs_synthetic --models=laser_plus,ta,transformer --rounds=20

Where experiments.bench.models times encoders alone, with histories that are full, this times what a run does: rows of
tables, encoder, head, loss, gradients, Adam, Adagrad on the rows met (`train`), and logits of candidates (`score`), on
real batches with histories as long as they are. Models, sizes and settings are those of the study's table 2, with what
its search found as far as its results are at hand. Making batches is not timed: experiments.bench.pipeline does.

Every model takes `--batches` batches after the other, then the next one does, round after round in one interleaved run;
medians of rounds. Compiling, seconds a model, is done before. The data set is built on first use. The last line is one
JSON object: `train` and `score` over laser_plus (or the first model), and milliseconds of a batch.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from experiments.bench.timing import interleave, use_huge_pages
from experiments.paper import models
from experiments.paper.search import choose
from experiments.paper.study import GBDT, KEPT, STANDARD, Study
from laser_jax.config import Config
from laser_jax.pipeline import BatchSource, prepare
from laser_jax.sharding import make_mesh, place_batch
from laser_jax.state import StateFactory, TrainState
from laser_jax.step import make_eval_step, make_train_step

REFERENCE = "laser_plus"


def training(factory: StateFactory, batches: list[dict]) -> Callable[[], TrainState]:
    """What takes a training step on each batch, from a state of its own on, and waits for it."""
    step, state = make_train_step(factory), [factory.create(0)]

    def run() -> TrainState:
        for batch in batches:
            state[0], counts = step(state[0], batch)
        return jax.block_until_ready((state[0], counts))[0]

    return run


def scoring(factory: StateFactory, batches: list[dict]) -> Callable[[], list]:
    """What scores the candidates of each batch, and waits for it; see step.make_eval_step."""
    step, state = make_eval_step(factory), factory.create(0)
    return lambda: jax.block_until_ready([step(state, batch) for batch in batches])


def real_batches(config: Config, mesh: Mesh, number: int) -> dict[str, list[dict]]:
    """What -> the first batches of the split it is of, on the mesh; fewer where the split has no more."""
    sources = {"train": BatchSource(config.data, config.features, "train")}
    sources["score"] = BatchSource(config.data, config.features, "test")
    return {
        what: [place_batch(source.batch(k).step, mesh) for k in range(min(number, source.num_batches))]
        for what, source in sources.items()
    }


def contenders(
    configs: dict[str, Config], mesh: Mesh, batches: dict[str, list[dict]]
) -> dict[tuple[str, str], Callable[[], object]]:
    """(model, what) -> what takes all batches, compiled."""
    runs = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        # No run is as long: a learning rate that falls costs the same at any height.
        factory = StateFactory(config.build_model, config.features, config.optim, mesh, steps=1_000_000)
        for what, prepared in (("train", training), ("score", scoring)):
            start = time.monotonic()
            runs[name, what] = prepared(factory, batches[what])
            runs[name, what]()
            told = f"[model {number} of {len(configs)}] {name}: {what} compiled in {time.monotonic() - start:.0f} s"
            print(told, file=sys.stderr, flush=True)
    return runs


def study_configs(data: str, names: list[str]) -> dict[str, Config]:
    """Model -> the config of table 2's `tricks`."""
    experiment, settings = STANDARD[data]
    study = Study(experiment, settings, os.path.join("runs/paper", data), kept=os.path.join(KEPT, data))
    trials = max(len(models.trials(name)) for name in names)
    found = choose(study, "tricks", names, trials, run=False)
    return {name: study.config(model, 0) for name, model in found.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="completejourney", choices=sorted(STANDARD))
    encoders = [name for name in models.ORDER if name != GBDT]
    parser.add_argument("--models", default="all", help=f"of {', '.join(encoders)}; or all of them")
    parser.add_argument("--batches", type=int, default=5, help="real batches, the same for every model")
    parser.add_argument("--rounds", type=int, default=6, help="in which every model takes all of them")
    args = parser.parse_args(argv)
    names = encoders if args.models == "all" else list(dict.fromkeys(args.models.split(",")))
    if unknown := [name for name in names if name not in encoders]:
        parser.error(f"--models: there is no {', '.join(unknown)}; choose of {', '.join(encoders)}, or all")
    if args.batches < 1 or args.rounds < 1:
        parser.error(f"--batches={args.batches} --rounds={args.rounds}: give at least 1 of each")
    configs = study_configs(args.data, names)
    config = next(iter(configs.values()))
    data = config.data
    prepare(data)
    mesh = make_mesh(config.mesh, data.batch_size, data.eval_batch_size)
    batches = real_batches(config, mesh, args.batches)
    with jax.set_mesh(mesh):
        seconds = interleave(contenders(configs, mesh, batches), args.rounds)
    reference = REFERENCE if REFERENCE in names else names[0]
    candidates = {
        what: sum(int(batch["mask"].sum()) for batch in found) / len(found) for what, found in batches.items()
    }
    ms = {what: {name: 1e3 * seconds[name, what] / len(batches[what]) for name in names} for what in batches}
    over = {what: {name: found[name] / found[reference] for name in names} for what, found in ms.items()}
    print(f"| | train ms | over {reference} | samples/s | score ms | over {reference} | us a candidate |")
    print("|---|---|---|---|---|---|---|")
    for name in sorted(names, key=ms["train"].get):
        train, score = (ms[what][name] for what in ("train", "score"))
        cells = [f"{train:.1f}", f"{over['train'][name]:.2f}", f"{1e3 * candidates['train'] / train:,.0f}"]
        cells += [f"{score:.1f}", f"{over['score'][name]:.2f}", f"{1e3 * score / candidates['score']:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        f"\n{args.data}, d={config.width}, L={data.history_length}: {data.batch_size} requests with "
        f"{candidates['train']:.0f} candidates in all to train on, {data.eval_batch_size} rows with "
        f"{candidates['score']:.0f} to score; {args.rounds} rounds of {len(batches['train'])} and "
        f"{len(batches['score'])} batches"
    )
    told: dict = {"data": args.data}
    for what in batches:
        told[f"{what}_over_{reference}"] = {name: round(value, 3) for name, value in over[what].items()}
        told[f"{what}_ms"] = {name: round(value, 2) for name, value in ms[what].items()}
    told |= {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count()}
    print(json.dumps(told | {"glibc_tunables": os.environ.get("GLIBC_TUNABLES", "")}))


if __name__ == "__main__":
    use_huge_pages("experiments.bench.steps")
    main()
