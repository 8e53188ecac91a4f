"""Checkpoints by orbax: the newest, to go on from, and the best on validation, to test with."""

import os

import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from laser_jax.state import TrainState


class Checkpoints:
    """Saves and restores the states of one run; saving is asynchronous.

    The state's step is also the position in the data, so one item holds both.
    """

    def __init__(self, workdir: str):
        self.path = os.path.join(os.path.abspath(workdir), "checkpoints")
        # max_to_keep together with best_fn would delete the newest; two policies keep both.
        policy = AnyPreservationPolicy(
            [
                LatestN(1),
                BestN(get_metric_fn=lambda metrics: metrics["auc"], n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            best_fn=lambda metrics: metrics["auc"],
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation AUC; the newest where none was evaluated."""
        return self._manager.best_step() if self._manager.best_step() is not None else self.newest()

    def save(self, state: TrainState, step: int, metrics: dict[str, float] | None) -> None:
        """Starts saving; `metrics` must hold `auc` where the state was evaluated."""
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), metrics=metrics)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state saved at `step`, placed as `abstract` says."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args).state

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()
