"""python -m laser_jax.main --config=experiments/xhs.py --workdir=DIR

Kept short on purpose: everything else can be imported and tested. The same command again goes on from the newest
checkpoint in the workdir. Several processes train together where a scheduler starts them (TPU pods, SLURM, Open MPI),
or with --coordinator=HOST:PORT --num_processes=N --process_id=I on each; workdir and data set are shared by all. What
is wrong with a command is said in one line, with exit status 2; what goes wrong in training, with a trace and 1.
"""

import contextlib
import logging

from absl import app, flags
from ml_collections import config_flags

from laser_jax import command_line, hosts, train
from laser_jax.progress import show_progress

logger = logging.getLogger("laser_jax")  # here __name__ is "__main__"

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. experiments/xhs.py:laser_plus.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the report go.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no scheduler tells it.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_HEARTBEAT = flags.DEFINE_integer("heartbeat_s", 30, "Seconds of silence after which a process is taken for dead.")


def main(argv: list[str]) -> None:
    show_progress()
    with contextlib.ExitStack() as stack:
        with command_line.refusals():
            hosts.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _HEARTBEAT.value)
            run = stack.enter_context(train.started(_CONFIG.value, _WORKDIR.value))
        try:
            run.finish()
        except hosts.Stopped as stopped:
            logger.info("stopped: %s", stopped)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=command_line.parse)
