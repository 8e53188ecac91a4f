"""python -m laser_jax.main --config=experiments/xhs.py --workdir=DIR

Kept short on purpose: everything else can be imported and tested. The same command again goes on from the newest
checkpoint in the workdir.
"""

import logging
import sys

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from laser_jax import train
from laser_jax.config import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment file, e.g. experiments/xhs.py:laser_plus.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and the report go.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax tells much
    # Saving between two evaluations is meant.
    absl.logging.get_absl_logger().addFilter(lambda record: "did not provide metrics" not in record.getMessage())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("laser_jax")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False  # the libraries' own chatter stays at warnings
    if not isinstance(_CONFIG.value, Config):
        raise app.UsageError("--config names no experiment file whose get_config() returns a laser_jax.config.Config")
    train.run(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
