"""Scoring a split: stored predictions first, figures from them after."""

import dataclasses
import logging
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from laser_jax import metrics
from laser_jax.layers.embedding import gather_rows
from laser_jax.pipeline import BatchSource
from laser_jax.sharding import place_batch
from laser_jax.state import StateFactory, TrainState

logger = logging.getLogger(__name__)

ORACLE = "oracle"  # the reference whose scores are the true logits


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One entry a candidate, in the order of the requests.

    Attributes:
      users, labels, logits, lengths (events before the request, at most L): [N].
      references: name -> [N], scores stored with the data (an oracle's, popularity).
    """

    users: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    lengths: np.ndarray
    references: dict[str, np.ndarray]

    def save(self, path: str) -> None:
        """Writes an .npz file."""
        columns = {f"reference_{name}": values for name, values in self.references.items()}
        users = self.users.astype(str) if self.users.dtype == object else self.users  # an .npz without pickles
        np.savez_compressed(path, users=users, labels=self.labels, logits=self.logits, lengths=self.lengths, **columns)

    def figures(self) -> metrics.Scores:
        return metrics.score_table_row(self.users, self.labels, self.logits)

    def figures_by_length(self, edges: tuple[int, ...]) -> dict[str, metrics.Scores]:
        return metrics.by_length(self.lengths, self.users, self.labels, self.logits, edges)

    def reference_figures(self) -> dict[str, metrics.Scores]:
        """An oracle's scores are logits; all others only rank."""
        return {
            name: figures(self.users, self.labels, scores)
            for name, scores in self.references.items()
            for figures in (metrics.score_table_row if name == ORACLE else metrics.score_ranking,)
        }


def make_eval_step(factory: StateFactory) -> Callable:
    """(state, batch) -> logits [B, C] and the encoder's diagnostics, compiled."""

    @jax.jit
    def eval_step(state: TrainState, batch: dict):
        rows = {name: gather_rows(state.tables[name], unique) for name, unique in batch["unique"].items()}
        logits, out = factory.model(state.params)(rows, batch)
        return logits, out.diag

    return eval_step


def predict(eval_step: Callable, state: TrainState, source: BatchSource, mesh: Mesh, what: str) -> Predictions:
    """Scores every candidate of a split."""
    columns: dict[str, list[np.ndarray]] = {"users": [], "labels": [], "logits": [], "lengths": []}
    references: dict[str, list[np.ndarray]] = {name: [] for name in source.requests.references}
    start = told = time.monotonic()
    for k, batch in enumerate(source.stream(0, source.num_batches)):
        logits, _ = eval_step(state, place_batch(batch.step, mesh))
        real = batch.step["mask"]
        per_row = real[: len(batch.users)].sum(axis=1)
        columns["users"].append(np.repeat(batch.users, per_row))
        columns["lengths"].append(np.repeat(batch.lengths, per_row))
        columns["labels"].append(batch.step["label"][real])
        columns["logits"].append(np.asarray(logits)[real])
        for name, values in references.items():
            values.append(batch.references[name][real])
        if time.monotonic() - told > 10:
            told = time.monotonic()
            eta = (told - start) / (k + 1) * (source.num_batches - k - 1)
            logger.info("%s: %d/%d batches, ETA %.0f s", what, k + 1, source.num_batches, eta)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not np.isfinite(joined["logits"]).all():
        bad = int(np.flatnonzero(~np.isfinite(joined["logits"]))[0])
        raise FloatingPointError(f"{what}: the score of candidate {bad} (user {joined['users'][bad]!r}) is not finite")
    return Predictions(**joined, references={name: np.concatenate(parts) for name, parts in references.items()})


def table(rows: dict[str, metrics.Scores]) -> str:
    """Figures as a markdown table."""
    names = [field.name for field in dataclasses.fields(metrics.Scores)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, scores in rows.items():
        cells = ["" if v is None else str(v) if isinstance(v, int) else f"{v:.4f}" for v in dataclasses.astuple(scores)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
