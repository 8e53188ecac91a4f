"""Paired bootstrap intervals over users, from stored (user, logit, label)."""

import os

import numpy as np

RESAMPLES = 500


def weighted_auc(order: np.ndarray, tie_ends: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float:
    """AUC where sample i counts weight[i] times; `order` sorts the scores, `tie_ends` are the ends of equal runs."""
    w, y = weight[order], positive[order]
    negative, gained = np.cumsum(w * ~y), np.cumsum(w * y)
    negative, gained = np.r_[0, negative[tie_ends]], np.r_[0, gained[tie_ends]]
    return float(np.sum(np.diff(gained) * (negative[1:] + negative[:-1]) / 2) / (negative[-1] * gained[-1]))


def resampled_aucs(users: np.ndarray, labels: np.ndarray, logits: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray:
    """AUCs under resamples of users, the same ones for all predictions of the same users.

    Args:
      users, labels, logits: [N], an entry a candidate.

    Returns:
      [1 + resamples]: the plain AUC first.
    """
    positive = labels > 0.5
    order = np.argsort(logits, kind="stable")
    ordered = logits[order]
    tie_ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    _, group = np.unique(users, return_inverse=True)
    rng = np.random.default_rng(0)
    num_users = group.max() + 1
    values = [weighted_auc(order, tie_ends, positive, np.ones(len(group)))]
    for _ in range(resamples):
        times = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
        values.append(weighted_auc(order, tie_ends, positive, times[group].astype(float)))
    return np.array(values)


def aucs_of(predictions: str, within: tuple[int, int] | None = None) -> np.ndarray:
    """`resampled_aucs` of a predictions.npz; kept beside it, since every table asks again.

    Args:
      within: only candidates whose history has so many events, [low, high).
    """
    suffix = "" if within is None else f"-{within[0]}-{within[1]}"
    stored = f"{predictions.removesuffix('.npz')}.aucs{suffix}.npy"
    alone = not os.path.exists(predictions)  # of a run that was kept, the predictions were not
    if os.path.exists(stored) and (alone or os.path.getmtime(stored) >= os.path.getmtime(predictions)):
        found = np.load(stored)
        if alone or len(found) == 1 + RESAMPLES:
            return found
    with np.load(predictions) as file:
        users, labels, logits, lengths = (file[name] for name in ("users", "labels", "logits", "lengths"))
    if within is not None:
        inside = (lengths >= within[0]) & (lengths < within[1])
        users, labels, logits = users[inside], labels[inside], logits[inside]
    found = resampled_aucs(users, labels, logits)
    np.save(stored, found)
    return found


def mean_aucs(predictions: list[str], within: tuple[int, int] | None = None) -> np.ndarray:
    """AUCs averaged over seeds, resample by resample: [1 + resamples]."""
    return np.mean([aucs_of(path, within) for path in predictions], axis=0)


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Difference of two `mean_aucs` and its 95 % interval over users."""
    difference = ours - theirs
    low, high = np.percentile(difference[1:], [2.5, 97.5])
    return float(difference[0]), float(low), float(high)
