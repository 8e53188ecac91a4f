"""Scoring a split: stored predictions first, figures from them after."""

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from laser_jax import hosts, metrics
from laser_jax.pipeline import BatchSource, Peers
from laser_jax.sharding import all_shares, place_batch
from laser_jax.state import TrainState
from laser_jax.whole_files import replacing

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
        """Writes an .npz file, whole or not at all."""
        columns = {f"reference_{name}": values for name, values in self.references.items()}
        users = self.users.astype(str) if self.users.dtype == object else self.users  # an .npz without pickles
        columns |= {"users": users, "labels": self.labels, "logits": self.logits, "lengths": self.lengths}
        with replacing(path) as file:
            np.savez_compressed(file, **columns)

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


def predict(
    eval_step: Callable,
    state: TrainState,
    source: BatchSource,
    mesh: Mesh,
    what: str,
    peers: Peers | None = None,
    moved: Callable[[str], None] = lambda what: None,
) -> Predictions:
    """Scores every candidate of a split; with several processes each scores its part, and all get all of it.

    Args:
      peers: see BatchSource.stream. moved: called with `what` and the number of every batch.

    Raises:
      FloatingPointError: a score is not finite.
    """
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in ("logits", "label", "mask", "length")}
    blocks |= {f"reference {name}": [] for name in source.requests.references}
    start = told = time.monotonic()
    for k, batch in enumerate(source.stream(0, source.num_batches, peers)):
        moved(f"{what}, batch {k}")
        logits, _ = eval_step(state, place_batch(batch.step, mesh))
        blocks["logits"].append(hosts.local(logits))
        for name in ("label", "mask", "length"):
            blocks[name].append(batch.step[name])
        for name, values in batch.references.items():
            blocks[f"reference {name}"].append(values)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            eta = (told - start) / (k + 1) * (source.num_batches - k - 1)
            logger.info("%s: %d/%d batches, ETA %.0f s", what, k + 1, source.num_batches, eta)
    rows = {name: _in_order(np.stack(parts), mesh) for name, parts in blocks.items()}
    real = rows.pop("mask")
    users = source.users()
    per_row = real[: len(users)].sum(axis=1)
    users = np.repeat(users, per_row)
    logits = rows.pop("logits")[real]
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits))[0])
        raise FloatingPointError(f"{what}: the score of candidate {bad} (user {users[bad]!r}) is not finite")
    return Predictions(
        users=users,
        labels=rows.pop("label")[real],
        logits=logits,
        lengths=np.repeat(rows.pop("length")[: len(per_row)], per_row),
        references={name.removeprefix("reference "): values[real] for name, values in rows.items()},
    )


def _in_order(blocks: np.ndarray, mesh: Mesh) -> np.ndarray:
    """[batches, rows of this process's devices, ...] -> [rows of the split, ...], of all processes."""
    batches, rows = blocks.shape[:2]
    shares = all_shares(mesh)
    gathered = hosts.gather(blocks)
    each = rows // len(shares[0])
    parts = gathered.reshape(len(shares), batches, len(shares[0]), each, *blocks.shape[2:])
    devices = sum(len(share) for share in shares)
    out = np.empty((batches, devices, each, *blocks.shape[2:]), blocks.dtype)
    for part, share in zip(parts, shares, strict=True):
        out[:, share] = part
    return out.reshape(batches * devices * each, *blocks.shape[2:])


def table(rows: dict[str, metrics.Scores]) -> str:
    """Figures as a markdown table."""
    names = [field.name for field in dataclasses.fields(metrics.Scores)]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for label, scores in rows.items():
        cells = ["" if v is None else str(v) if isinstance(v, int) else f"{v:.4f}" for v in dataclasses.astuple(scores)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
