"""What the gates of a segmented model listen to: how many segments stay silent, loudness by age and by match."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from laser_jax import hosts
from laser_jax.batch import Batch
from laser_jax.layers.segment_runs import Run, over_segments
from laser_jax.pipeline import BatchSource, Peers
from laser_jax.sharding import place_batch
from laser_jax.state import TrainState

SILENT = 0.1  # a segment quieter than this part of its history's mean says nothing
AGE_EDGES_S = (0, 3600, 86_400, 7 * 86_400, 30 * 86_400, 90 * 86_400, 365 * 86_400)
AGE_NAMES = ("< 1 h", "< 1 d", "< 1 w", "< 1 month", "< 3 months", "< 1 y", "older")
OTHER = "no match"
BATCHES = 8


@dataclasses.dataclass(frozen=True)
class GateFigures:
    """Loudness is relative to the mean over the segments of the same history: 1 says no more than any other.

    Attributes:
      silent: share of segments quieter than SILENT. by_match: closest match in the segment (first the fields of the
        item in their order, then "no match") -> mean loudness. shares: the same keys -> share of segments.
      by_age: the same keys -> mean loudness by the age of the segment's newest event, AGE_NAMES; None where there are
        no such segments.
      segments: how many (candidate, segment) pairs were looked at.
    """

    silent: float
    by_match: dict[str, float]
    shares: dict[str, float]
    by_age: dict[str, list[float | None]]
    segments: int


def segment_facts(batch: Batch, fields: list[str], runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is in each segment.

    Args:
      fields: of candidates and events, the one that says most first. runs: how the model cuts histories.

    Returns:
      match [B, C, S]: place in `fields` of the first field in which an event equals the candidate, len(fields) where
      none does; age [B, S]: of the newest event, seconds; alive [B, S].
    """
    step = batch.step
    length = step["age"].shape[1]
    mask = np.arange(length) >= length - step["length"][:, None]

    def any_of(real):
        return np.asarray(over_segments(real, runs, lambda events: events.any(axis=-1)))

    never = np.iinfo(np.int32).max
    left = np.where(mask, never - np.maximum(step["age"], 0), 0)
    age = never - np.asarray(over_segments(left, runs, lambda events: events.max(axis=-1)))
    alive = any_of(mask)
    match = np.full((*step["mask"].shape, alive.shape[1]), len(fields))
    for place in reversed(range(len(fields))):
        events = step["history"][fields[place]]
        candidates = step["side"][fields[place]]
        for c in range(candidates.shape[1]):
            equal = any_of((events == candidates[:, c, None]) & mask)
            match[:, c][equal] = place
    return match, age, alive


def gate_figures(
    eval_step: Callable,
    state: TrainState,
    source: BatchSource,
    mesh: Mesh,
    encoder: Any,
    peers: Peers | None = None,
) -> GateFigures | None:
    """Over the first batches of a split, this process's part of them; None for encoders without segments.

    Args:
      encoder: its config; `runs` says how it cuts a history. peers: see BatchSource.stream.
    """
    fields = [field.name for field in source.features.item]
    names = [*fields, OTHER]
    sums = np.zeros((len(names), len(AGE_NAMES)))
    counts = np.zeros_like(sums)
    silent = 0
    for batch in source.stream(0, min(BATCHES, source.num_batches), peers):
        _, diag = eval_step(state, place_batch(batch.step, mesh))
        if "loudness" not in diag:
            return None
        match, age, alive = segment_facts(batch, fields, encoder.runs(batch.step["age"].shape[1]))
        loudness = hosts.local(diag["loudness"]).astype(np.float64)
        seen = batch.step["mask"][:, :, None] & alive[:, None]
        mean = np.where(seen, loudness, 0).sum(axis=-1, keepdims=True) / np.maximum(seen.sum(axis=-1, keepdims=True), 1)
        relative = (loudness / np.maximum(mean, 1e-30))[seen]
        bucket = np.searchsorted(AGE_EDGES_S[1:], age, side="right")
        place = match[seen], np.broadcast_to(bucket[:, None], match.shape)[seen]
        np.add.at(sums, place, relative)
        np.add.at(counts, place, 1)
        silent += int((relative < SILENT).sum())
    total = counts.sum()
    if not total:
        return None
    of_match = counts.sum(axis=1)
    met = [i for i in range(len(names)) if of_match[i]]
    return GateFigures(
        silent=silent / total,
        by_match={names[i]: float(sums[i].sum() / of_match[i]) for i in met},
        shares={names[i]: float(of_match[i] / total) for i in met},
        by_age={names[i]: [float(s / n) if n else None for s, n in zip(sums[i], counts[i], strict=True)] for i in met},
        segments=int(total),
    )
