"""Whether what a model is given to score is what it reads: kinds and sizes, no values but those of offsets."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from laser_jax.assembly import Columns
from laser_jax.features import FieldConfig
from laser_jax.vault.history import Histories, History

#: Kinds of numpy types -> what they hold, in words.
_INTEGERS, _NUMBERS, _STRINGS = "iub", "iubf", "iubOU"
_IN_WORDS = {
    _INTEGERS: "integers, such as int64",
    _NUMBERS: "numbers",
    _STRINGS: "strings, or their codes as integers",
}
WidthOf = Callable[[FieldConfig], int | None]


def check_histories(histories: Any, fields: tuple[FieldConfig, ...], width_of: WidthOf) -> None:
    """Raises ValueError if these are no histories with columns for `fields` and `time`."""
    if not isinstance(histories, Histories):
        one = ", which is one user's" if isinstance(histories, History) else ""
        raise ValueError(f"histories is a {type(histories).__name__}{one}: give what vault.gather(users, ...) returns")
    columns, events = histories.columns, histories.num_events
    for name in ("time", *(field.name for field in fields)):
        if name not in columns:
            raise ValueError(
                f"histories have no column {name!r}, only {', '.join(columns)}: gather with fields=model.event_fields"
            )
    _check_column("histories' 'time'", columns["time"], (events,), "its offsets", _INTEGERS)
    for field in fields:
        _check_field("histories'", field, columns[field.name], events, "its offsets", width_of)


def check_moments(time: Any, offsets: Any, requests: int) -> int:
    """How many candidates `offsets` speak of; ValueError if these are no times and offsets of so many requests."""
    if not requests:
        raise ValueError("histories are of no user: give at least one request")
    _check_column("requests.time", time, (requests,), f"the histories of {requests} users", _INTEGERS)
    _check_column("requests.offsets", offsets, (requests + 1,), f"{requests} requests", _INTEGERS)
    if offsets[0] != 0 or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(
            f"requests.offsets are {offsets[:5].tolist()} ...: they begin with 0 and never fall; request i has the "
            "candidates offsets[i] to offsets[i+1]-1"
        )
    return int(offsets[-1])


def check_side(
    side: str,
    columns: Columns,
    fields: tuple[FieldConfig, ...],
    count: int,
    width_of: WidthOf,
    strings: Collection[str],
) -> None:
    """Raises ValueError if columns are not those of `fields`.

    Args:
      side: "candidates" or "context". count: values that each column must have.
      strings: names of the fields that hold strings.
    """
    names = [field.name for field in fields]
    for name in columns:
        if name not in names:
            raise ValueError(
                f"requests.{side} has {name!r}, which is none of the model's: {', '.join(names) or 'none'}"
            )
    for field in fields:
        if field.name not in columns:
            raise ValueError(f"requests.{side} has no {field.name!r}: the model needs {', '.join(names)}")
        _check_field(
            f"requests.{side}", field, columns[field.name], count, "requests.offsets", width_of, field.name in strings
        )


def _check_field(
    where: str, field: FieldConfig, values: Any, count: int, by: str, width_of: WidthOf, strings: bool = False
) -> None:
    width = width_of(field)
    kinds = _NUMBERS if field.ids in ("log", "vector") else _STRINGS if strings else _INTEGERS
    _check_column(f"{where} {field.name!r}", values, (count,) if width is None else (count, width), by, kinds)


def _check_column(what: str, values: Any, shape: tuple[int, ...], by: str, kinds: str) -> None:
    """Raises ValueError if this is no array of the shape that it has `by` something else, of one of `kinds`."""
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{what} is a {type(values).__name__}: give a numpy array of {_IN_WORDS[kinds]}")
    if values.shape != shape:
        raise ValueError(f"{what} has shape {values.shape}: by {by} it needs {shape}")
    if values.dtype.kind not in kinds:
        raise ValueError(f"{what} is of type {values.dtype}: give {_IN_WORDS[kinds]}")
