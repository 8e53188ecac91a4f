"""Training: the run around the pure step (step.py)."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from laser_jax import hosts, report
from laser_jax.checkpoint import Checkpoints
from laser_jax.columns import tell_cut_codes
from laser_jax.config import Config, check_sizes, remember
from laser_jax.evaluate import Predictions, predict, table
from laser_jax.fingerprint import fingerprint, strings
from laser_jax.gate_figures import gate_figures
from laser_jax.metrics import defined
from laser_jax.pipeline import BatchSource, prepare
from laser_jax.runlog import RunLog
from laser_jax.sharding import device_share, make_mesh, place_batch
from laser_jax.state import StateFactory, TrainState
from laser_jax.step import make_eval_step, make_train_step
from laser_jax.warm_start import check_parts, warm_start
from laser_jax.whole_files import replacing
from laser_jax.workdir_lock import WorkdirLock

logger = logging.getLogger(__name__)

COST_CANDIDATES = (1, 10, 100)  # candidates a request at which results.json gives multiply-accumulates


def run(config: Config, workdir: str) -> Predictions:
    """Trains, or goes on training, evaluates on test and writes the report; returns the test predictions.

    The same command after a crash goes on from the newest checkpoint; on the same kind and number of CPUs the result is
    bit-identical to that of a run never interrupted.

    Raises:
      hosts.Stopped: SIGTERM came; the state is saved.
    """
    with started(config, workdir) as run:
        return run.finish()


@contextlib.contextmanager
def started(config: Config, workdir: str) -> Iterator["Run"]:
    """A run that is set up: its config and data are checked, its state is there.

    Raises:
      ValueError, OSError, VaultError: what is wrong with config, data or workdir.
    """
    check_sizes(config)
    check_parts(config.train.warm_parts)
    prepare(config.data)
    with hosts.Peers() as peers, contextlib.ExitStack() as stack:
        watchdog = None
        if jax.process_count() > 1:
            stack.enter_context(hosts.LastWords())
            watchdog = stack.enter_context(hosts.Watchdog(config.train.patience_s))
        try:
            run = Run(config, os.path.abspath(workdir), peers, watchdog, stack)
            run.restore()
            yield run
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:
                hosts.lost_peer(error)
            raise


class Run:
    """One process's part in a run: everything from the config to the report."""

    def __init__(
        self,
        config: Config,
        workdir: str,
        peers: hosts.Peers,
        watchdog: hosts.Watchdog | None,
        stack: contextlib.ExitStack,
    ):
        """The workdir is this run's until `stack` ends."""
        self.config, self.workdir, self.peers, self.watchdog = config, workdir, peers, watchdog
        self.mesh = make_mesh(config.mesh, config.data.batch_size, config.data.eval_batch_size)
        share = device_share(self.mesh)
        # An error, if any, comes now.
        config.optim.parts(config.data.batch_size // self.mesh.size, config.data.history_length)
        self.sources = {
            split: BatchSource(config.data, config.features, split, share) for split in ("train", "valid", "test")
        }
        seen = self.sources["train"].seen
        for source in self.sources.values():
            source.seen = None if seen is None else hosts.of_first(seen)
            source.check_histories()
        if hosts.is_first():
            tell_cut_codes(self.sources["train"].vault, config.features)
            self.sources["train"].tell_unknown_codes()
        if jax.process_count() > 1:
            for source in self.sources.values():
                source.least = dict(zip(source.least, hosts.agree(list(source.least.values())), strict=True))
        self.factory = StateFactory(
            config.build_model,
            config.features,
            config.optim,
            self.mesh,
            config.mesh.split_from,
            self.sources["train"].num_batches,
        )
        known = strings(config.data, config.features) if hosts.is_first() else {}
        self._data = (fingerprint(config.data), known)
        remember(config, workdir, *self._data, write=False)
        ids = self.sources["train"].dictionaries
        for source in self.sources.values():
            source.dictionaries = ids
        stack.enter_context(WorkdirLock(workdir, peers))
        self.checkpoints = Checkpoints(workdir, ids, self.factory.largest_bytes)
        self.eval_step = make_eval_step(self.factory)
        self._alike: set[str] = set()  # splits of which it was told that all labels are alike

    @property
    def others(self) -> hosts.Peers | None:
        return self.peers if jax.process_count() > 1 else None

    def moved(self, what: str) -> None:
        if self.watchdog is not None:
            self.watchdog.moved(what)

    def finish(self) -> Predictions:
        """Trains to the end, or to SIGTERM, then tests."""
        (state, start), self._state = self._state, None
        train = self.sources["train"]
        if hosts.is_first():
            logger.info("parameters %s; train %s", self.factory.num_parameters(), train.describe())
            for setting in self.factory.abstract_model.encoder.unused(self.config.data.candidates):
                logger.warning("training: %s", setting)
            self._tell_ids()
        log = RunLog(self.workdir, start, train.num_batches, self.config.train.log_every, hosts.is_first())
        with jax.set_mesh(self.mesh):
            self._loop(state, start, log)
            del state  # the best one takes its place
            state, best = self.checkpoints.restore_best(self.factory.abstract())
            predictions = self.predict(state, "test", "test")
            self.moved("the report")
            test = self.sources["test"]
            maps = report.gate_maps(self.eval_step, state, test, self.mesh, self.config.train.gate_maps, self.others)
            gates = gate_figures(self.eval_step, state, test, self.mesh, self.config.encoder, self.others)
        self.checkpoints.close()
        costs = {
            "parameters": self.factory.num_parameters(),
            "macs": {count: self.factory.abstract_model.macs(count) for count in COST_CANDIDATES},
        }
        if hosts.is_first():
            _write_results(self.config, self.workdir, predictions, best, costs, log, maps, gates)
        hosts.agree([0])  # who leaves first would be taken for dead while the report is written
        return predictions

    def restore(self) -> None:
        """Finds the state that `finish` goes on from."""
        self._state = self._restored()
        # Only now: a start that failed before must not occupy the workdir.
        remember(self.config, self.workdir, *self._data, write=hosts.is_first())

    def _restored(self) -> tuple[TrainState, int]:
        """The newest state that can be read, or a fresh one; and its step."""
        self.moved("restoring")
        found = self.checkpoints.restore_newest(self.factory.abstract())
        if found is None:
            state, settings = self.factory.create(self.config.train.seed), self.config.train
            if settings.warm_start:
                ids, data, features = self.sources["train"].dictionaries, self.config.data, self.config.features
                state = warm_start(state, self.factory, features, ids, data, settings.warm_start, settings.warm_parts)
            return state, 0
        state, step = found
        if hosts.is_first():
            logger.info("going on from step %d of %s", step, self.checkpoints.path)
        return state, step

    def _tell_ids(self) -> None:
        for name, ids in self.sources["train"].dictionaries.items():
            logger.info(
                "dictionary of %r: %d ids have one of %d rows, %d wait, %d times there was no room",
                name, len(ids), ids.num_rows - 1, ids.waiting, ids.refused,
            )  # fmt: skip

    def predict(self, state: TrainState, split: str, what: str, save: Callable[[], None] = lambda: None) -> Predictions:
        """Scores a split, unless SIGTERM comes; `save` is called then, before the run stops."""

        def moved(what: str) -> None:
            self.moved(what)
            if self.peers.asked_to_stop:
                save()
                self._stop(f"SIGTERM during {what}")

        predictions = predict(self.eval_step, state, self.sources[split], self.mesh, what, self.others, moved)
        if hosts.is_first() and split not in self._alike and len(np.unique(predictions.labels > 0.5)) < 2:
            self._alike.add(split)
            logger.warning("the labels of %s are all alike: no AUC", split)
        return predictions

    def _stop(self, why: str) -> None:
        self.checkpoints.close()
        newest = self.checkpoints.newest()
        raise hosts.Stopped(
            f"{why}; the same command " + ("starts again" if newest is None else f"goes on from step {newest}")
        )

    def _loop(self, state: TrainState, start: int, log: RunLog) -> None:
        """Steps start .. end. Mind the order: evaluate, save, next batch, step, log.

        The stream moves only after a save, so what is saved is exactly where the run stands.
        """
        train, settings = self.sources["train"], self.config.train
        total, train_step = train.num_batches, make_train_step(self.factory)
        # On CPU a step that runs ahead of another process's may block its collectives for good.
        ahead = jax.process_count() == 1 or jax.default_backend() != "cpu"

        def evaluates(step: int) -> bool:
            return step == total or (step > 0 and step % settings.eval_every == 0)

        def saves(step: int) -> bool:
            return evaluates(step) or (step > 0 and step % settings.save_every == 0)

        stream = train.stream(start, total, self.others)
        pending = None
        for step in range(start, total + 1):
            if evaluates(step) and (step > start or not self.checkpoints.is_judged(step)):
                self._judge(state, step, log, saved=step == start)
            elif step > start and saves(step):
                self.checkpoints.save(state, step, None)
            if step == total:
                return
            if self.peers.asked_to_stop:
                log.flush(step)
                if step > start and not saves(step):
                    self.checkpoints.save(state, step, None)
                self._stop(f"SIGTERM at step {step}")
            with log.waiting():
                batch = next(stream)
                placed = place_batch(batch.step, self.mesh)
            if pending is not None:
                jax.block_until_ready(pending)  # one step in flight: the host must not run ahead without bound
            self.moved(f"step {step + 1}")
            state, pending = train_step(state, placed)
            if not ahead:
                jax.block_until_ready(pending)
            log.stepped(step + 1, pending, batch, saving=saves(step + 1))

    def _judge(self, state: TrainState, step: int, log: RunLog, saved: bool) -> None:
        """Validates a state and saves it with its figures; without them where SIGTERM comes first.

        Args:
          saved: whether it was saved without them.
        """

        def save() -> None:
            if not saved:
                self.checkpoints.save(state, step, None)

        predictions = self.predict(state, "valid", f"validation at step {step}", save)
        figures = dataclasses.asdict(predictions.figures())
        log.evaluated(step, figures)
        if saved:
            self.checkpoints.judge(step, figures)
        else:
            self.checkpoints.save(state, step, figures)
        if hosts.is_first():
            self._tell_ids()


def _write_results(config, workdir, predictions, best, costs, log, maps, gates) -> None:
    """predictions.npz, results.json, the report, and the closing table."""
    predictions.save(os.path.join(workdir, "predictions.npz"))
    rows = {config.name or type(config.encoder).__name__: predictions.figures(), **predictions.reference_figures()}
    lengths = predictions.figures_by_length(config.train.length_edges)
    evaluated = [entry["valid_auc"] for entry in log.history if entry["step"] == best and "valid_auc" in entry]
    results = {
        "test": {name: scores.to_json() for name, scores in rows.items()},
        "valid_auc": defined(evaluated[-1]) if evaluated else None,
        "test_by_length": {name: scores.to_json() for name, scores in lengths.items()},
        "step": best,
        **costs,
        "gate_contrast": log.contrast,
        "gates": None if gates is None else dataclasses.asdict(gates),
        "samples_per_second": log.samples_per_second,
        "device": jax.devices()[0].device_kind,
    }
    page = report.write(workdir, config, predictions, lengths, log.history, maps, gates)
    path = os.path.join(workdir, "results.json")
    with replacing(path) as file:  # last and at once: it says that the run is finished
        file.write(json.dumps(results, indent=1).encode())
    print(f"\ntest, parameters of step {best}:\n{table(rows)}\n\nby history length:\n{table(lengths)}")
    scores = next(iter(rows.values()))
    print(f"\n{next(iter(rows))}: test AUC {scores.auc:.4f} on {scores.samples} candidates; report: {page}")
