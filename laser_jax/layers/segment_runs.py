"""How a history is cut into segments, so that every horizon ends where a segment does.

From the newest event backwards, segments hold w events each; where a horizon would end inside one, that one is cut
short there and the next begins anew. Neighbours of one width make a run, which is computed as one array.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from laser_jax.layers.segment_sums import cut_segments


@dataclasses.dataclass(frozen=True)
class Run:
    """Segments of one width side by side; the oldest may hold less.

    Attributes:
      begin: how many events back its oldest one is: 20 are the newest twenty, or what of them it holds.
      end: how many events are newer than all of it. width: of a segment.
    """

    begin: int
    end: int
    width: int

    @property
    def num_segments(self) -> int:
        return -(-(self.begin - self.end) // self.width)


def check_horizons(name: str, horizons: Sequence[int]) -> None:
    """Raises ValueError, naming the field, unless they are numbers of events."""
    if any(not isinstance(events, int) or events < 1 for events in horizons):
        raise ValueError(f"{name}={tuple(horizons)}: give whole numbers of events, at least 1 each")


def reaches_of(horizons: Sequence[int], length: int) -> tuple[int, ...]:
    """Numbers of newest events that are read together: each horizon within the history, and all of it."""
    return (*sorted({events for events in horizons if events < length}), length)


def segment_runs(reaches: Sequence[int], width: int) -> tuple[Run, ...]:
    """The runs of a history, oldest first.

    Args:
      reaches: ascending, the last is the number of events. width: w.
    """
    runs: list[Run] = []
    end = 0
    for reach in reaches:
        if runs and (runs[-1].begin - runs[-1].end) % width == 0:  # the one before ends with a full segment
            end = runs.pop().end
        runs.append(Run(reach, end, min(width, reach - end)))
        end = reach
    return tuple(reversed(runs))


def num_segments(runs: Sequence[Run]) -> int:
    """S, of all runs."""
    return sum(run.num_segments for run in runs)


def newest_segments(reaches: Sequence[int], width: int) -> tuple[int, ...]:
    """How many segments hold the newest so many events, for each reach; arguments as for segment_runs."""
    return tuple(num_segments(segment_runs(reaches[: place + 1], width)) for place in range(len(reaches)))


def split(x: jax.Array, runs: Sequence[Run]) -> list[jax.Array]:
    """The events of each run: [B, L, ...] -> [B, n, ...]; an L beyond the oldest run's is not read.

    All at once: gradients of slices, one by one, would each fill and add an array of the history's size.
    """
    x = x[:, x.shape[1] - runs[0].begin :]
    return jnp.split(x, [runs[0].begin - run.end for run in runs[:-1]], axis=1)


def over_segments(x: jax.Array, runs: Sequence[Run], reduce) -> jax.Array:
    """A figure for every segment of all runs.

    Args:
      x: [B, L, ...]. reduce: [B, S, w, ...] -> [B, S, ...]; where a segment holds less, x is 0 (or False) there.
    """
    found = [reduce(cut_segments(part, run.width)) for part, run in zip(split(x, runs), runs, strict=True)]
    return jnp.concatenate(found, axis=1)
