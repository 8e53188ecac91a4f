"""Metrics of rankings: mergeable counts while training, exact figures in tables.

Exact functions work on numpy arrays of stored (user, logit, label) and know no device.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

HISTOGRAM_BINS = 8192
HISTOGRAM_RANGE = 12.0  # bins are uniform in logits over [-12, 12]: within 1e-4 of the exact AUC


def logit_histogram(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
    """Counts [2, bins] of negatives and positives by logit, int32: they add up over steps and hosts."""
    place = (logits + HISTOGRAM_RANGE) * (HISTOGRAM_BINS / (2 * HISTOGRAM_RANGE))
    place = jnp.clip(place, 0, HISTOGRAM_BINS - 1).astype(jnp.int32)
    row = (labels > 0.5).astype(jnp.int32)
    counts = jnp.zeros((2, HISTOGRAM_BINS), jnp.int32)
    return counts.at[row, place].add(mask.astype(jnp.int32))


def histogram_auc(counts: np.ndarray) -> float:
    """AUC of [2, bins] counts; two in one bin count as a tie. NaN unless both classes are there."""
    negative, positive = np.asarray(counts, np.float64)
    below = np.cumsum(negative) - negative
    pairs = negative.sum() * positive.sum()
    return float(np.sum(positive * (below + negative / 2)) / pairs) if pairs else float("nan")


def _ranks(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """1-based ranks of the scores inside each group (groups are 0 .. G-1), ties sharing their mean rank."""
    order = np.lexsort((scores, groups))
    g, s = groups[order], scores[order]
    new_group = np.r_[True, g[1:] != g[:-1]]
    new_value = new_group | np.r_[True, s[1:] != s[:-1]]
    starts = np.flatnonzero(new_value)
    ends = np.r_[starts[1:], len(s)]
    group_start = np.maximum.accumulate(np.where(new_group, np.arange(len(s)), 0))
    mean_rank = (starts + ends + 1) / 2 - group_start[starts]
    ranks = np.empty(len(s))
    ranks[order] = np.repeat(mean_rank, ends - starts)
    return ranks


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Exact area under the ROC curve, ties counted half. NaN unless both classes are there."""
    positive = np.asarray(labels) > 0.5
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if not n0 or not n1:
        return float("nan")
    ranks = _ranks(np.asarray(scores, np.float64), np.zeros(len(positive), np.int64))
    return float((ranks[positive].sum() - n1 * (n1 + 1) / 2) / (n0 * n1))


def gauc(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> float:
    """sum_u n_u AUC_u / sum_u n_u over users with both classes. NaN if there is none."""
    _, groups = np.unique(users, return_inverse=True)
    positive = np.asarray(labels) > 0.5
    size = groups.max() + 1 if len(groups) else 0
    n1 = np.bincount(groups, positive, minlength=size)
    n = np.bincount(groups, minlength=size)
    pairs = n1 * (n - n1)
    both = pairs > 0
    if not both.any():
        return float("nan")
    ranks = _ranks(np.asarray(scores, np.float64), groups)
    total = np.bincount(groups, ranks * positive, minlength=size)
    per_user = (total[both] - n1[both] * (n1[both] + 1) / 2) / pairs[both]
    return float(np.sum(n[both] * per_user) / n[both].sum())


def logloss(labels: np.ndarray, logits: np.ndarray) -> float:
    """Mean binary cross-entropy of logits, in nats."""
    logits = np.asarray(logits, np.float64)
    return float(np.mean(np.logaddexp(0.0, logits) - np.asarray(labels) * logits))


def normalized_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """Logloss over the entropy of the base rate: below 1 is better than always predicting the mean."""
    p = float(np.mean(labels))
    if p in (0.0, 1.0):
        return float("nan")
    return logloss(labels, logits) / -(p * np.log(p) + (1 - p) * np.log(1 - p))


def calibration_bins(
    labels: np.ndarray, logits: np.ndarray, bins: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, mean label and share of samples in bins of equal mass, lowest predictions first.

    Where a bin ends within equal predictions their labels are shared out evenly: the order of storage says nothing.
    """
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    pieces = [piece for piece in np.array_split(np.argsort(p, kind="stable"), bins) if len(piece)]
    _, tied = np.unique(p, return_inverse=True)
    labels = (np.bincount(tied, np.asarray(labels, np.float64)) / np.bincount(tied))[tied] if len(p) else p
    return (
        np.array([p[i].mean() for i in pieces]),
        np.array([labels[i].mean() for i in pieces]),
        np.array([len(i) / len(p) for i in pieces]),
    )


def defined(value: float | int | None) -> float | int | None:
    """None for nan, which JSON does not have."""
    return None if value is None or value != value else value


@dataclasses.dataclass(frozen=True)
class Scores:
    """The figures of one table row.

    Attributes:
      auc, gauc: of any scores. logloss, ne, calibration (mean prediction / mean label) and ece (20 bins of equal mass):
        of logits; None for scores that only rank.
    """

    auc: float
    gauc: float
    logloss: float | None
    ne: float | None
    calibration: float | None
    ece: float | None
    samples: int

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values; what is undefined (an AUC of one class) is None."""
        return {name: defined(value) for name, value in dataclasses.asdict(self).items()}


def score_table_row(users: np.ndarray, labels: np.ndarray, logits: np.ndarray) -> Scores:
    """All figures of one set of predictions."""
    predicted, observed, share = calibration_bins(labels, logits)
    mean_label = float(np.mean(labels)) if len(labels) else float("nan")
    return Scores(
        auc=auc(labels, logits),
        gauc=gauc(users, labels, logits),
        logloss=logloss(labels, logits),
        ne=normalized_entropy(labels, logits),
        calibration=float(np.sum(predicted * share)) / mean_label if mean_label else float("nan"),
        ece=float(np.sum(np.abs(predicted - observed) * share)),
        samples=len(labels),
    )


def score_ranking(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> Scores:
    """The figures of scores that are no logits, like a popularity."""
    return Scores(auc(labels, scores), gauc(users, labels, scores), None, None, None, None, len(labels))


def by_length(
    lengths: np.ndarray, users: np.ndarray, labels: np.ndarray, logits: np.ndarray, edges: tuple[int, ...]
) -> dict[str, Scores]:
    """The same figures apart by history length.

    Args:
      edges: lower bounds of the buckets, ascending from 0; those beyond the longest history make no bucket.
    """
    if edges[:1] != (0,) or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges={edges}: give ascending lower bounds that begin with 0")
    edges = tuple(edge for edge in edges if edge == 0 or edge <= lengths.max(initial=0))
    rows = {}
    for low, high in zip(edges, (*edges[1:], None), strict=True):
        inside = (lengths >= low) & (lengths < high if high is not None else True)
        if inside.any():
            name = f"{low}+" if high is None else f"{low}-{high - 1}"
            rows[name] = score_table_row(users[inside], labels[inside], logits[inside])
    return rows
