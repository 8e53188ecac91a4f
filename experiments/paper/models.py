"""The rows of the tables: every model of the zoo, plain and with all tricks, and what is searched for each."""

import dataclasses
from typing import Any

from experiments.paper.study import GBDT, Model
from laser_jax.models import ENCODERS, encoder_config

#: From the cheapest to the dearest, so that a table that is cut short still has most of its rows.
ORDER = (
    "laser_plus", "ta", GBDT, "mean", "twin_v2", "sim_hard", "sim_soft", "sdim", "eta", "twin", "laser", "mirrn", "din",
    "stca", "longer", "transformer", "hstu",
)  # fmt: skip

#: What all models are given alike. "plain": each model's own card, untied projections, neither products nor matches nor
#: the mean in the head. "tricks": all that is not tied to segments, Wk := Wq at init, product features with the
#: candidate, the mean of all events, and what the history holds of the candidate's own kind, by the fields that the
#: experiment says. Unit-RMS tokens and log-spaced ages are in both.
COLUMNS = ("plain", "tricks")

#: Tried for every model, one after the other on the best so far (see search.py); each model's own knob comes last.
TRIALS: tuple[dict[str, Any], ...] = ({}, {"optim.learning_rate": 1e-3}, {"optim.table_learning_rate": 0.2})
KNOBS: dict[str, dict[str, Any]] = {
    "laser_plus": {"encoder.heads": 2},
    "laser": {"encoder.norm": "pre"},
    "ta": {"encoder.mass": True},
    "mean": {"optim.learning_rate": 4e-3},
    "din": {"encoder.softmax": False},
    "sim_hard": {"encoder.top": 50},
    "sim_soft": {"encoder.top": 50},
    "eta": {"encoder.bits": 64},
    "sdim": {"encoder.bits": 3},
    "twin": {"encoder.top": 50},
    "twin_v2": {"encoder.segment": 5},
    "mirrn": {"encoder.top": 20},
    "transformer": {"encoder.ffn": 4},
    "hstu": {"encoder.layers": 1},
    "stca": {"encoder.layers": 1},
    "longer": {"encoder.group": 8, "encoder.heads": 8, "encoder.width_token": 32},
}


def model(name: str, column: str) -> Model:
    """The model called `name` in a column of the table.

    Args:
      column: one of COLUMNS.
    """
    if column not in COLUMNS:
        raise ValueError(f"column={column!r} is not one of {', '.join(COLUMNS)}")
    # Which the experiments have.
    without: dict[str, Any] = {"head.matches": (), "head.match_horizons": (), "head.mean": False}
    if name == GBDT:  # counts matches itself
        return Model(name, name, without)
    settings: dict[str, Any] = {"head.products": column != "plain"}
    if column == "plain":
        settings |= without
    if "tied" in {field.name for field in dataclasses.fields(encoder_config(name))}:
        settings["encoder.tied"] = column != "plain"
    if name == "transformer":
        settings["encoder.ffn"] = 1  # as in PAPER's comparison of costs
    return Model(name, name, settings)


def trials(name: str) -> list[dict[str, Any]]:
    """What is tried for a model: as many settings for one as for any other."""
    return [{}] if name == GBDT else [*TRIALS, KNOBS[name]]


def names(text: str) -> list[str]:
    """Comma-separated names, or "all"."""
    wanted = list(ORDER) if text == "all" else text.split(",")
    for name in wanted:
        if name not in ENCODERS and name != GBDT:
            raise ValueError(f"there is no model {name!r}; choose of {', '.join(ORDER)}, or all")
    return wanted
