"""What a run says of itself: progress lines, TensorBoard files, and metrics.jsonl for the report."""

import contextlib
import json
import logging
import math
import os
import time
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from laser_jax.batch import Batch
from laser_jax.metrics import defined, histogram_auc
from laser_jax.whole_files import replacing

logger = logging.getLogger(__name__)

DEAD_GATES = 0.02  # spread of loudness over a user's segments, relative to its mean, below which gates ignore content


class RunLog:
    """Sums up steps into a line every `log_every`; on resume, drops what was logged after the restored step.

    Args:
      writes: whether it says and writes anything; of several processes one does.

    Attributes:
      history: every line of metrics.jsonl, oldest first.
    """

    def __init__(self, workdir: str, start: int, total: int, log_every: int, writes: bool = True):
        self._writes = writes
        self._path = os.path.join(workdir, "metrics.jsonl")
        self.history: list[dict[str, Any]] = []
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as file:
                # A killed run may leave a torn last line.
                lines = [line for line in file if line.endswith("\n")]
            self.history = [entry for entry in map(json.loads, lines) if entry["step"] <= start]
        if writes:
            with replacing(self._path) as file:
                file.writelines(f"{json.dumps(entry)}\n".encode() for entry in self.history)
            self._board = SummaryWriter(os.path.join(workdir, "tensorboard"), purge_step=start + 1)
        self._total, self._log_every = total, log_every
        self._pending: list[Any] = []
        self._waited = 0.0
        self._since = time.monotonic()
        self._told_alike = False
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()

    @property
    def contrast(self) -> float | None:
        """Spread of segment loudness over its mean, in the newest line; None where there are no segments to compare."""
        lines = [entry for entry in self.history if "loss" in entry]
        return lines[-1].get("gate_contrast") if lines else None

    @property
    def samples_per_second(self) -> float | None:
        """Median over all lines: the few that hold a compilation do not count."""
        rates = [entry["samples_per_second"] for entry in self.history if "loss" in entry]
        return float(np.median(rates)) if rates else None

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as waiting for input."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def stepped(self, step: int, counts: Any, batch: Batch, saving: bool) -> None:
        """Takes in one step's Counts; fetches and tells them when a line is due.

        Args:
          saving: the state after this step is saved. A line ends there, so that a continued run logs what one never
            stopped would, and a state past a broken loss is never saved.

        Raises:
          FloatingPointError: the loss of the line is not finite.
        """
        self._pending.append(counts)
        shape = tuple(unique.shape for unique in batch.step["unique"].values())
        if shape not in self._shapes:
            self._shapes.add(shape)
            self._tell(
                "step %d: shape %d to compile; real: %.0f %% of history, %.0f %% of candidate slots, %s unique rows",
                step, len(self._shapes), 100 * batch.num_events / batch.step["age"].size,
                100 * batch.step["mask"].mean(), batch.unique_fill(),
            )  # fmt: skip
        if not step % self._log_every or saving:
            self.flush(step)

    def flush(self, step: int) -> None:
        """A line of the steps since the last one, up to `step`; nothing if there are none."""
        if not self._pending:
            return
        fetched = jax.device_get(self._pending)
        seconds = time.monotonic() - self._since
        samples = float(sum(c.samples for c in fetched))
        loss = float(sum(c.loss for c in fetched)) / samples
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss} between step {step - len(fetched)} and step {step}")
        compared = float(sum(c.compared for c in fetched))
        contrast = float(sum(c.contrast for c in fetched)) / compared if compared else math.nan
        entry = {
            "step": step,
            "loss": loss,
            "auc": histogram_auc(np.sum([c.histogram for c in fetched], axis=0, dtype=np.int64)),
            "samples_per_second": samples / seconds,
            "events_per_second": float(sum(c.events for c in fetched)) / seconds,
            "input_wait": self._waited / seconds,
        }
        if math.isnan(entry["auc"]) and not self._told_alike:
            self._told_alike = True
            self._tell("the labels of steps %d to %d are all alike: no AUC", step - len(fetched) + 1, step)
        if not math.isnan(contrast):
            entry["gate_contrast"] = contrast
        eta = (self._total - step) * seconds / len(fetched)
        self._tell(
            "step %d/%d  loss %.4f  auc %.4f  %.0f samples/s  %.0f events/s  input wait %.0f %%  ETA %.0f s",
            step, self._total, loss, entry["auc"], entry["samples_per_second"], entry["events_per_second"],
            100 * entry["input_wait"], eta,
        )  # fmt: skip
        self._write(entry, "train")
        self._pending, self._waited, self._since = [], 0.0, time.monotonic()

    def evaluated(self, step: int, figures: dict[str, float]) -> None:
        """Takes in the figures of a validation, and warns of gates that are dead; its time counts for no line."""
        self._write({"step": step} | {f"valid_{name}": value for name, value in figures.items()}, "valid")
        self._tell("step %d/%d  valid AUC %.4f  logloss %.4f", step, self._total, figures["auc"], figures["logloss"])
        if self._writes and self.contrast is not None and self.contrast < DEAD_GATES:
            logger.warning(
                "dead gates at step %d: loudness varies by only %.4f of its mean over a user's segments, so they "
                "ignore what is in them (see 'When a model does not learn' in the README)",
                step, self.contrast,
            )  # fmt: skip
        if not self._pending:
            self._since = time.monotonic()

    def _tell(self, text: str, *values: Any) -> None:
        if self._writes:
            logger.info(text, *values)

    def _write(self, entry: dict[str, Any], group: str) -> None:
        self.history.append(entry)
        if not self._writes:
            return
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: defined(value) for name, value in entry.items()}) + "\n")
        for name, value in entry.items():
            if name != "step":
                self._board.add_scalar(f"{group}/{name.removeprefix('valid_')}", value, entry["step"])
        self._board.flush()
