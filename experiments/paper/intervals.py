"""Paired intervals, from stored (user, logit, label): over users, by bootstrap, and over users and seeds.

Over users alone says how far the trained models at hand differ on other users. Trained again, with other seeds, they
would be other models: two seeds of one model often differ by more than such an interval is wide. What is claimed of a
model and not of its runs needs the other interval.
"""

import os

import numpy as np
from scipy.stats import t as student_t

from laser_jax.whole_files import replacing

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


def aucs_of(predictions: str) -> np.ndarray:
    """`resampled_aucs` of a predictions.npz; kept beside it, since every table asks again."""
    stored = f"{predictions.removesuffix('.npz')}.aucs.npy"
    alone = not os.path.exists(predictions)  # of a run that was kept, the predictions were not
    if os.path.exists(stored) and (alone or os.path.getmtime(stored) >= os.path.getmtime(predictions)):
        found = np.load(stored)
        if alone or len(found) == 1 + RESAMPLES:
            return found
    with np.load(predictions) as file:
        users, labels, logits = (file[name] for name in ("users", "labels", "logits"))
    found = resampled_aucs(users, labels, logits)
    with replacing(stored) as file:
        np.save(file, found)
    return found


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Difference of the means over seeds, and its 95 % interval over users.

    Args:
      ours, theirs: [seeds, 1 + resamples], as of `aucs_of`.
    """
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    return float(difference[0]), *_interval(difference[1:])


def over_seeds(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float] | None:
    """The 95 % interval over users and seeds, arguments as for `paired`; None where one of them has a single seed.

    Welch's (1947): the variance over users, of the mean of the seeds at hand, and that of each model's seeds add up. By
    Student's t, since of three seeds nobody knows the variance well; users are many.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    difference = ours.mean(axis=0) - theirs.mean(axis=0)
    of_seeds = [np.var(aucs[:, 0], ddof=1) / len(aucs) for aucs in (ours, theirs)]
    variance = np.var(difference[1:], ddof=1) + sum(of_seeds)
    uncertain = sum(part**2 / (len(aucs) - 1) for part, aucs in zip(of_seeds, (ours, theirs), strict=True))
    freedom = variance**2 / uncertain if uncertain else np.inf
    half = float(student_t.ppf(0.975, freedom) * np.sqrt(variance))
    return float(difference[0]) - half, float(difference[0]) + half


def _interval(differences: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)
