"""Checkpoints by orbax: the newest, to go on from, and the best on validation, to test with.

A checkpoint is the state and the dictionaries of ids, as of the same step. Beside the arrays lies a checksum of each,
which orbax does not keep: a flipped bit in an array reads back as wrong data.
"""

import contextlib
import logging
import os
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from laser_jax import hosts
from laser_jax.checksums import checksums
from laser_jax.id_dictionary import IdDictionary
from laser_jax.state import TrainState

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the array and the remedy."""


# What orbax and tensorstore raise for files that are damaged or missing.
_UNREADABLE = (ValueError, KeyError, AttributeError, TypeError, OSError)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns what orbax raises for damaged files into a CheckpointError that names `path`."""
    try:
        yield
    except Exception as error:
        # For an array that does not decode orbax raises a bare Exception.
        cause = error.__cause__ if type(error) is Exception else error
        if not isinstance(cause, _UNREADABLE):
            raise
        raise CheckpointError(f"{path} cannot be read: {str(cause)[:500]}") from error


Ids = dict[str, IdDictionary]
#: What orbax calls the figures of a checkpoint.
_METRICS = "metrics"
_CHUNKED = ocp.SaveArgs(chunk_byte_size=64 << 20)
#: Seconds that the files of a checkpoint take to be removed, at most.
_REMOVAL_S = 2.0


def _ids_state(ids: Ids) -> dict[str, dict[str, np.ndarray]]:
    return {table: dictionary.state() for table, dictionary in ids.items()}


def ids_checksums(ids: dict[str, dict[str, np.ndarray]]) -> dict[str, int]:
    """A checksum of every array of the dictionaries' states."""
    return {
        f"ids of {table}, {name}": zlib.crc32(np.ascontiguousarray(array))
        for table, arrays in ids.items()
        for name, array in arrays.items()
    }


class Checkpoints:
    """Saves and restores the states of one run; saving is asynchronous.

    The state's step is also the position in the data, so one item holds both.

    Large states stream: arrays are cut into chunks, of which a bounded number is in memory beside the state.

    Args:
      ids: table -> its dictionary; saved with every state, and what is restored is loaded into them.
      largest_bytes: of the largest array of a state, as far as it lies on this process's devices: what is in memory
        beside the state is a little more.
      read_only: nothing is saved, cleared up or set aside: the run may be training meanwhile.
    """

    def __init__(self, workdir: str, ids: Ids | None = None, largest_bytes: int = 0, read_only: bool = False):
        self._ids, self._read_only = ids or {}, read_only
        in_flight = 1 + -(-largest_bytes // 10**9)
        self.path = os.path.join(os.path.abspath(workdir), "checkpoints")
        # max_to_keep together with best_fn would delete the newest; two policies keep both.
        policy = AnyPreservationPolicy(
            [
                LatestN(2),  # one more, in case the newest is damaged
                BestN(get_metric_fn=lambda metrics: metrics["auc"], n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._state_handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=in_flight, restore_concurrent_gb=in_flight)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics["auc"],
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(
            self.path,
            options=options,
            item_handlers={
                "state": self._state_handler,
                "ids": ocp.StandardCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
            },
        )

    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation AUC; the newest where none was evaluated."""
        return self._manager.best_step() if self._manager.best_step() is not None else self.newest()

    def is_judged(self, step: int) -> bool:
        """Whether the checkpoint of `step` has figures of validation."""
        return bool(self._manager.metrics(step))

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None) -> None:
        """Starts saving; `metrics` must hold `auc` where the state was evaluated."""
        ids = _ids_state(self._ids)
        items = {
            "state": ocp.args.PyTreeSave(state, save_args=jax.tree.map(lambda _: _CHUNKED, state)),
            "checksums": ocp.args.JsonSave(checksums(state) | ids_checksums(ids)),
        }
        if ids:
            items["ids"] = ocp.args.StandardSave(ids)
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def judge(self, step: int, metrics: dict[str, float]) -> None:
        """Adds figures of validation, which hold `auc`, to a checkpoint that was saved before it could be judged."""
        if hosts.is_first():
            folder = pathlib.Path(self.path) / str(step)
            unfinished = folder / f".{_METRICS}"
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that died here
            unfinished.mkdir()
            ocp.JsonCheckpointHandler(filename=_METRICS).save(unfinished, args=ocp.args.JsonSave(metrics))
            unfinished.rename(folder / _METRICS)
        hosts.agree([0])  # nobody looks before it is done
        self._manager.reload()

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, placed as `abstract` says; the dictionaries become those of that step.

        Raises:
          CheckpointError: its files cannot be read, or an array is not what was saved.
        """
        failure, found = None, None
        try:
            with reading(f"{self.path}/{step}"):
                found = self._read(step, abstract)
        except CheckpointError as error:
            failure = error  # raised below, when the others know
        if hosts.agree([int(failure is not None)]) != [0]:
            raise failure or CheckpointError(f"{self.path}/{step} cannot be read by another process")
        state, ids, saved = found
        now = checksums(state) | ids_checksums(ids)
        wrong = sorted(name for name in now if now[name] != saved.get(name))
        if hosts.agree([len(wrong)]) != [0]:
            raise CheckpointError(
                f"{self.path}/{step} is damaged: {', '.join(wrong) or 'ids, on another process,'} is not what was saved"
            )
        for table, arrays in ids.items():
            self._ids[table].load(arrays)
        return state

    def _read(self, step: int, abstract: TrainState) -> tuple[TrainState, dict, dict[str, int]]:
        """State, dictionaries and checksums. By the handlers: the manager's restore waits for all processes at its end,
        for ever if one of them fails before."""
        folder = pathlib.Path(self.path) / str(step)
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=how)
        state = self._state_handler.restore(folder / "state", args=args)
        ids = {}
        if self._ids:
            args = ocp.args.StandardRestore(_ids_state(self._ids))
            ids = ocp.StandardCheckpointHandler().restore(folder / "ids", args=args)
        return state, ids, ocp.JsonCheckpointHandler().restore(folder / "checksums", args=ocp.args.JsonRestore())

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, int] | None:
        """The newest state that is whole, and its step; None if there is none.

        A damaged one is set aside (checkpoints-damaged/STEP), with a warning, once an older one was read.

        Raises:
          CheckpointError: all are damaged.
        """
        return self._first_whole(lambda steps: sorted(steps, reverse=True), abstract)

    def restore_best(self, abstract: TrainState) -> tuple[TrainState, int]:
        """The best whole state, and its step; where that is damaged the newest, with a warning.

        Raises:
          CheckpointError: all are damaged.
        """
        return self._first_whole(lambda steps: sorted(steps, key=lambda step: (step != self.best(), -step)), abstract)

    def _first_whole(
        self, order: Callable[[list[int]], list[int]], abstract: TrainState
    ) -> tuple[TrainState, int] | None:
        # A save that failed is no damage of what lies there already: its error comes from here.
        self._manager.wait_until_finished()
        damaged: list[tuple[int, CheckpointError]] = []
        waiting = order(self._manager.all_steps())
        while waiting:
            step = waiting.pop(0)
            try:
                state = self.restore(step, abstract)
            except CheckpointError as error:
                if self._read_only and self._went(step):
                    tried = [number for number, _ in damaged]
                    waiting = [number for number in order(self._manager.all_steps()) if number not in tried]
                    continue
                logger.warning("DAMAGED CHECKPOINT: %s. Trying an older one.", error)
                damaged.append((step, error))
                continue
            if not self._read_only:
                self._set_aside([number for number, _ in damaged])
            return state, step
        if damaged:
            raise CheckpointError(
                f"no checkpoint of {self.path} can be read (the newest: {damaged[0][1]}): give another --workdir"
            ) from damaged[0][1]
        return None

    def _went(self, step: int) -> bool:
        """Whether the run that trains takes this checkpoint away, as it does when it has newer ones."""
        path, until = os.path.join(self.path, str(step)), time.monotonic() + _REMOVAL_S
        while os.path.isdir(path) and time.monotonic() < until:
            time.sleep(0.1)
        self._manager.reload()
        return not os.path.isdir(path)

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        aside = f"{self.path}-damaged"
        if hosts.is_first():
            os.makedirs(aside, exist_ok=True)
            for step in steps:
                os.rename(os.path.join(self.path, str(step)), os.path.join(aside, f"{step}-{os.getpid()}"))
        hosts.agree([0])  # nobody looks before it is done
        self._manager.reload()
        logger.warning("set aside damaged checkpoints of steps %s in %s", steps, aside)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
