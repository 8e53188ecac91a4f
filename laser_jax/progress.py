"""What a run says while it goes on, shown: on a terminal, or below a cell of a notebook."""

import logging
import sys
from typing import TextIO

import absl.logging

#: What orbax warns of but is meant: saving between two evaluations, and reading one part of a checkpoint.
_MEANT = ("did not provide metrics", "Metadata file does not exist")


def show_progress(stream: TextIO | None = None) -> None:
    """Shows every line that laser_jax says, with the time; of the libraries' own, warnings alone.

    Args:
      stream: where to, stderr if None. Called again it replaces the one before.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)  # orbax tells much
    absl.logging.get_absl_logger().addFilter(_is_news)
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("laser_jax")
    logger.setLevel(logging.INFO)
    logger.handlers = [handler]
    logger.propagate = False  # the root's handler, if there is one, would show it a second time


def _is_news(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _MEANT)
