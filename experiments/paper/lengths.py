"""Trained at one length, served at another; and who gains from long histories.

  python -m experiments.paper.lengths --data=completejourney --seeds=3 --model=laser_plus

Writes ROOT/DATA/lengths-MODEL.{md,csv}: test AUC of every training length (rows) at every serving length (columns);
empty where a model has parameters for no more places than it was trained at, or has not been served on all seeds. And
by_length-MODEL.{md,csv}: AUC by how many events a user has, of the model trained at the longest length.
"""

import copy
import dataclasses
import json
import os

import jax
import numpy as np
from flax import nnx

from experiments.paper import models, tables
from experiments.paper.figure3 import at_length
from experiments.paper.study import GBDT, Model, Outcome, Study, parse
from laser_jax import metrics
from laser_jax.checkpoint import Checkpoints
from laser_jax.evaluate import predict
from laser_jax.layers.segment_runs import newest_segments
from laser_jax.models.base import Ranker
from laser_jax.models.laser import LaserEncoder
from laser_jax.pipeline import BatchSource
from laser_jax.sharding import device_share, make_mesh
from laser_jax.state import StateFactory
from laser_jax.step import make_eval_step
from laser_jax.whole_files import replacing

#: See has_places.
WITH_PLACES = ("transformer", "hstu", "longer", "mirrn")


def has_places(study: Study, model: Model) -> bool:
    """Whether it has parameters for every place in a history, and none for places beyond those it was trained at."""
    recency = getattr(study.config(model, 0).encoder, "recency", "none")
    return model.encoder in WITH_PLACES or recency in ("position", "both")


def stretched(ranker: Ranker, trained: int, length: int) -> Ranker:
    """A ranker that was built for `trained` events, and where it reads the whole history, reads up to `length`.

    Shorter horizons stay what they are, and so does what masses and counts are divided by: a user who has no older
    events gets the same logits.
    """
    if length <= trained:
        return ranker
    encoder = ranker.encoder
    if isinstance(encoder, LaserEncoder) and encoder.horizons is not None:
        reaches = (*encoder.horizons.reaches[:-1], length)
        encoder.config = dataclasses.replace(encoder.config, horizons=reaches)
        encoder.horizons.newest = newest_segments(reaches, encoder.config.segment)
        encoder.history_length, encoder.num_segments = length, encoder.horizons.newest[-1]
    if ranker.matches is not None and ranker.matches.reaches:
        ranker.matches.reaches = (*ranker.matches.reaches[:-1], length)
    return ranker


def served(study: Study, model: Model, seed: int, length: int) -> float | None:
    """Test AUC of a run that was served with its users' newest `length` events; None if it has not been."""
    path = study.left(model, seed, f"served-at-{length}.json")
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)["auc"]


def serve(study: Study, outcome: Outcome, length: int) -> None:
    """Serves a finished run that has its checkpoints: predictions and AUC are left in its folder."""
    config = study.config(outcome.model, outcome.seed)
    mesh = make_mesh(config.mesh, config.data.batch_size, config.data.eval_batch_size)

    def build(rngs: nnx.Rngs) -> Ranker:
        return stretched(config.build_model(rngs), trained, length)

    trained = config.data.history_length
    factory = StateFactory(build, config.features, config.optim, mesh)
    checkpoints = Checkpoints(outcome.folder, read_only=True)
    state = checkpoints.restore(outcome.results["step"], factory.abstract())
    checkpoints.close()
    data = dataclasses.replace(config.data, history_length=length)
    source = BatchSource(data, config.features, "test", device_share(mesh))
    with jax.set_mesh(mesh):
        predictions = predict(make_eval_step(factory), state, source, mesh, f"{outcome.model.label} at {length}")
    path = os.path.join(outcome.folder, f"served-at-{length}")
    predictions.save(f"{path}.npz")
    with replacing(f"{path}.json") as file:
        file.write(json.dumps({"auc": metrics.auc(predictions.labels, predictions.logits)}).encode())


def by_length(outcomes: list[Outcome]) -> list[list[str]]:
    """Means over seeds, a row for each bucket of lengths."""
    rows = []
    for bucket in outcomes[0].results["test_by_length"]:
        scores = [o.results["test_by_length"][bucket] for o in outcomes]
        known = [s["auc"] for s in scores if s["auc"] is not None]
        rows.append([bucket, str(scores[0]["samples"]), f"{np.mean(known):.4f}" if known else "", tables.spread(known)])
    return rows


def main() -> None:
    def add(parser):
        choices = [name for name in models.ORDER if name != GBDT]
        parser.add_argument("--model", default="laser_plus", choices=choices)
        parser.add_argument("--lengths", default="50,200,1000")

    args, study = parse(__doc__, add)
    if study.flags:
        raise SystemExit(f"runs with further flags cannot be served here: leave out {' '.join(study.flags)}")
    lengths = [int(length) for length in args.lengths.split(",")]
    run = not args.only_report
    trained = {length: at_length(study, args.model, length, run) for length in lengths}
    most = {length: length if has_places(study, model) else max(lengths) for length, model in trained.items()}
    if run:
        missing = [
            (model, seed, n)
            for seed in range(args.seeds)
            for length, model in trained.items()
            for n in lengths
            if n <= most[length] and served(study, model, seed, n) is None
        ]
        whole = copy.copy(study)  # without those of which only results are kept: checkpoints are needed
        whole.kept = None
        whole.run([(model, seed) for model, seed, _ in missing])
        for model, seed, n in missing:
            serve(whole, whole.outcome(model, seed), n)
    rows = []
    for length, model in trained.items():
        found = [[served(study, model, seed, n) for seed in range(args.seeds) if n <= most[length]] for n in lengths]
        rows.append([str(length), *(f"{np.mean(aucs):.4f}" if aucs and None not in aucs else "" for aucs in found)])
    head = ["trained at L", *(f"served at {n}" for n in lengths)]
    texts = [tables.write(study.folder, f"lengths-{args.model}", head, rows)]
    outcomes = study.finished(trained[max(lengths)], args.seeds)
    if outcomes:
        head = ["events before the request", "candidates", "AUC", "sd"]
        texts.append(tables.write(study.folder, f"by_length-{args.model}", head, by_length(outcomes)))
    print("\n\n".join(texts))
    print(f"\n{args.data}: {args.model} trained and served at L = {args.lengths}; tables in {study.folder}")


if __name__ == "__main__":
    main()
