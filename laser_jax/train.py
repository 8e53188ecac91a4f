"""Training: the pure step, and the run around it."""

import dataclasses
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from laser_jax import report
from laser_jax.checkpoint import Checkpoints
from laser_jax.config import Config, check_sizes, remember
from laser_jax.evaluate import Predictions, make_eval_step, predict, table
from laser_jax.gate_figures import gate_figures
from laser_jax.layers.embedding import adagrad_rows, gather_rows
from laser_jax.losses import bce_sum
from laser_jax.metrics import logit_histogram
from laser_jax.optim import TABLE_EPS, OptimConfig
from laser_jax.pipeline import BatchSource, fingerprint, prepare
from laser_jax.runlog import RunLog
from laser_jax.sharding import make_mesh, place_batch
from laser_jax.state import StateFactory, TrainState, num_parameters

logger = logging.getLogger(__name__)

COST_CANDIDATES = (1, 10, 100)  # candidates a request at which results.json gives multiply-accumulates
DEAD_GATES = 0.02  # spread of loudness over a user's segments, relative to its mean, below which gates ignore content


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What a step tells: sums that add up over steps and hosts, never ratios.

    Attributes:
      loss, samples: summed loss and the candidates it is over. histogram: int32 [2, bins].
      contrast: summed spread of segment loudness (std / mean over segments), NaN for encoders without segments.
    """

    loss: jax.Array
    samples: jax.Array
    histogram: jax.Array
    contrast: jax.Array


def make_train_step(factory: StateFactory, optim: OptimConfig) -> Callable:
    """(state, batch) -> (state, Counts): pure, compiled once a shape, the state donated."""

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Counts]:
        rows = {name: gather_rows(state.tables[name], unique) for name, unique in batch["unique"].items()}

        def loss_fn(params, rows):
            logits, out = factory.model(params)(rows, batch)
            total, samples = bce_sum(logits, batch["label"], batch["mask"])
            loss = total / jnp.maximum(samples, 1) + sum(out.aux_losses.values(), jnp.zeros(()))
            return loss, (total, samples, logits, out.diag)

        gradients, (total, samples, logits, diag) = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(state.params, rows)
        updates, opt_state = factory.optimizer.update(gradients[0], state.opt_state, state.params)
        tables = {
            name: adagrad_rows(
                state.tables[name],
                unique,
                gradients[1][name] * samples,  # of the summed loss
                optim.table_learning_rate,
                TABLE_EPS,
            )
            for name, unique in batch["unique"].items()
        }
        state = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, tables)
        counts = Counts(
            loss=total,
            samples=samples,
            histogram=logit_histogram(logits, batch["label"], batch["mask"]),
            contrast=_contrast(diag.get("loudness"), batch["mask"]),
        )
        return state, counts

    return jax.jit(train_step, donate_argnums=0)


def _contrast(loudness: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Summed over real candidates: std / mean of loudness [B, C, S] over the segments that hold events."""
    if loudness is None:
        return jnp.full((), jnp.nan)
    loudness = jax.lax.stop_gradient(loudness)
    alive = loudness > 0
    n = jnp.maximum(alive.sum(axis=-1), 1)
    mean = loudness.sum(axis=-1) / n
    variance = jnp.where(alive, (loudness - mean[..., None]) ** 2, 0.0).sum(axis=-1) / n
    return jnp.sum(jnp.where(mask, jnp.sqrt(variance) / jnp.maximum(mean, 1e-20), 0.0))


def run(config: Config, workdir: str) -> Predictions:
    """Trains, or goes on training, evaluates on test and writes the report; returns the test predictions.

    The same command after a crash goes on from the newest checkpoint; on the same kind of device the result is
    bit-identical to that of a run never interrupted.
    """
    workdir = os.path.abspath(workdir)
    check_sizes(config)
    prepare(config.data)
    mesh = make_mesh(config.mesh, config.data.batch_size, config.data.eval_batch_size)
    train, valid, test = (BatchSource(config.data, config.features, split) for split in ("train", "valid", "test"))
    factory = StateFactory(config.build_model, config.features.tables(), config.optim, mesh)
    # Only now: a start that failed above must not occupy the workdir.
    remember(config, workdir, fingerprint(config.data))
    checkpoints = Checkpoints(workdir)
    start = checkpoints.newest()
    if start is None:
        start, state = 0, factory.create(config.train.seed)
    else:
        state = checkpoints.restore(start, factory.abstract())
        logger.info("going on from step %d of %s", start, checkpoints.path)
    logger.info("parameters %s; train %s", num_parameters(state), train.describe())
    log = RunLog(workdir, start, train.num_batches, config.train.log_every)
    eval_step = make_eval_step(factory)

    def validate(state: TrainState, step: int) -> dict[str, float]:
        figures = dataclasses.asdict(predict(eval_step, state, valid, mesh, f"validation at step {step}").figures())
        log.evaluated(step, figures)
        return figures

    with jax.set_mesh(mesh):
        _loop(config, state, start, train, make_train_step(factory, config.optim), validate, checkpoints, log, mesh)
        best = checkpoints.best()
        state = checkpoints.restore(best, factory.abstract())
        predictions = predict(eval_step, state, test, mesh, "test")
        maps = report.gate_maps(eval_step, state, test, mesh, config.train.gate_maps)
        gates = gate_figures(eval_step, state, test, mesh, config.encoder)
    checkpoints.close()
    costs = {
        "parameters": num_parameters(state),
        "macs": {count: factory.abstract_model.macs(count) for count in COST_CANDIDATES},
    }
    _write_results(config, workdir, predictions, best, costs, log, maps, gates)
    return predictions


def _loop(config, state, start, train, train_step, validate, checkpoints, log, mesh) -> None:
    """Steps start .. end. Mind the order: evaluate, save, next batch, step, log.

    The stream moves only after a save, so what is saved is exactly where the run stands.
    """
    total, settings = train.num_batches, config.train

    def evaluates(step: int) -> bool:
        return step == total or (step > 0 and step % settings.eval_every == 0)

    def saves(step: int) -> bool:
        return evaluates(step) or (step > 0 and step % settings.save_every == 0)

    stream = train.stream(start, total)
    pending = None
    for step in range(start, total + 1):
        if step > start and saves(step):
            checkpoints.save(state, step, validate(state, step) if evaluates(step) else None)
        if step == total:
            return
        with log.waiting():
            batch = next(stream)
            placed = place_batch(batch.step, mesh)
        if pending is not None:
            jax.block_until_ready(pending)  # one step in flight: the host must not run ahead without bound
        state, pending = train_step(state, placed)
        log.stepped(step + 1, pending, batch, saving=saves(step + 1))


def _write_results(config, workdir, predictions, best, costs, log, maps, gates) -> None:
    """predictions.npz, results.json, the report, and the closing table."""
    predictions.save(os.path.join(workdir, "predictions.npz"))
    rows = {config.name or type(config.encoder).__name__: predictions.figures(), **predictions.reference_figures()}
    lengths = predictions.figures_by_length(config.train.length_edges)
    evaluated = next(entry for entry in reversed(log.history) if entry["step"] == best and "valid_auc" in entry)
    results = {
        "test": {name: scores.to_json() for name, scores in rows.items()},
        "valid_auc": evaluated["valid_auc"],
        "test_by_length": {name: scores.to_json() for name, scores in lengths.items()},
        "step": best,
        **costs,
        "gate_contrast": log.contrast,
        "gates": None if gates is None else dataclasses.asdict(gates),
        "samples_per_second": log.samples_per_second,
    }
    page = report.write(workdir, config, predictions, lengths, log.history, maps, gates)
    path = os.path.join(workdir, "results.json")
    with open(f"{path}.{os.getpid()}", "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1)
    os.replace(f"{path}.{os.getpid()}", path)  # last and at once: it says that the run is finished
    if log.contrast is not None and log.contrast < DEAD_GATES:
        logger.warning(
            "dead gates: loudness varies by only %.4f of its mean over a user's segments, so they ignore what is in "
            "them (see 'When a model does not learn' in the README)",
            log.contrast,
        )
    print(f"\ntest, parameters of step {best}:\n{table(rows)}\n\nby history length:\n{table(lengths)}")
    scores = next(iter(rows.values()))
    print(f"\n{next(iter(rows))}: test AUC {scores.auc:.4f} on {scores.samples} candidates; report: {page}")
