"""Figures against brute force and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax import metrics, report

# Few values, so that ties are common.
samples = st.tuples(st.integers(0, 4), st.booleans(), st.sampled_from([-3.0, -0.5, 0.0, 0.5, 7.25]))
predictions = st.lists(samples, max_size=40)


def pairs_auc(labels, scores):
    """Share of (positive, negative) pairs in the right order, ties half."""
    won = [(p > n) + (p == n) / 2 for p in scores[labels] for n in scores[~labels]]
    return sum(won) / len(won) if won else math.nan


def columns(rows):
    by_column = zip(*rows, strict=True) if rows else ([], [], [])
    return (np.array(column, dtype) for column, dtype in zip(by_column, (int, bool, float), strict=True))


@settings(max_examples=200, deadline=None)
@given(predictions)
def test_auc_and_gauc_count_pairs(rows):
    users, labels, scores = columns(rows)
    np.testing.assert_allclose(metrics.auc(labels, scores), pairs_auc(labels, scores), rtol=1e-12)
    per_user = [(np.sum(users == u), pairs_auc(labels[users == u], scores[users == u])) for u in set(users.tolist())]
    counted = [(n, value) for n, value in per_user if not math.isnan(value)]
    want = sum(n * v for n, v in counted) / sum(n for n, _ in counted) if counted else math.nan
    np.testing.assert_allclose(metrics.gauc(users, labels, scores), want, rtol=1e-12)


def test_gauc_takes_string_users():
    users = np.array(["a", "b", "a", "b", "c"], object)
    assert metrics.gauc(users, np.array([1, 0, 0, 1, 1]), np.array([2.0, 5.0, 1.0, 3.0, 0.0])) == 0.5


@pytest.mark.parametrize(("loc", "scale"), [(0, 1), (-2, 3), (4, 0.3)])
def test_histogram_auc_is_within_1e_4_and_adds_up(loc, scale):
    rng = np.random.default_rng(0)
    labels = rng.random(40_000) < 0.2
    logits = (loc + scale * rng.normal(size=40_000) + labels * scale).astype(np.float32)
    mask = rng.random(40_000) < 0.9
    counts = sum(
        np.asarray(metrics.logit_histogram(*(a[half] for a in (logits, labels.astype(np.float32), mask))))
        for half in (slice(0, 15_000), slice(15_000, None))
    )
    assert counts.dtype == np.int32 and counts.sum(1).tolist() == [(mask & ~labels).sum(), (mask & labels).sum()]
    assert abs(metrics.histogram_auc(counts) - metrics.auc(labels[mask], logits[mask])) < 1e-4


def test_histogram_auc_counts_what_is_beyond_its_range():
    logits, labels = np.array([-900.0, 900.0, 12.0, -12.0], np.float32), np.array([0, 1, 1, 0], np.float32)
    assert metrics.histogram_auc(metrics.logit_histogram(logits, labels, np.ones(4, bool))) == 1
    assert math.isnan(metrics.histogram_auc(metrics.logit_histogram(logits, labels * 0, np.ones(4, bool))))


def test_small_cases_by_hand():
    labels, logits = np.array([1.0, 0.0, 0.0, 0.0]), np.log(np.array([3.0, 1.0, 1 / 3, 1 / 4]))  # p: .75 .5 .25 .2
    loss = -(math.log(0.75) + math.log(0.5) + math.log(0.75) + math.log(0.8)) / 4
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    scores = metrics.score_table_row(np.array([1, 1, 2, 2]), labels, logits)
    assert scores.samples == 4 and scores.auc == 1 and scores.gauc == 1
    np.testing.assert_allclose(
        [scores.logloss, scores.ne, scores.calibration, scores.ece],
        [loss, loss / entropy, (0.75 + 0.5 + 0.25 + 0.2) / 1, (0.25 + 0.5 + 0.25 + 0.2) / 4],
        rtol=1e-12,
    )


def test_predicting_the_base_rate_has_entropy_one_and_is_calibrated():
    labels = np.repeat([1.0, 0.0], [300, 700])
    order = np.random.default_rng(0).permutation(1000)
    scores = metrics.score_table_row(np.zeros(1000), labels[order], np.full(1000, math.log(0.3 / 0.7)))
    np.testing.assert_allclose([scores.auc, scores.ne, scores.calibration], [0.5, 1, 1], rtol=1e-12)
    stored = metrics.score_table_row(np.zeros(1000), labels, np.full(1000, math.log(0.3 / 0.7)))  # clicks first
    assert stored.ece == pytest.approx(0, abs=1e-12) and scores.ece == pytest.approx(0, abs=1e-12)


def test_logloss_of_huge_logits_is_finite():
    assert metrics.logloss(np.array([1.0, 0.0]), np.array([-1e4, 1e4])) == 1e4


def test_the_curve_that_is_drawn_has_the_area_beside_it():
    rng = np.random.default_rng(0)
    for labels, scores in (
        (np.repeat([1.0, 0.0], 50), np.zeros(100)),  # no order but that of storage
        (rng.integers(0, 2, 300) * 1.0, rng.integers(0, 9, 300) * 1.0),
    ):
        false_rate, true_rate = report.roc_points(labels, scores)
        assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(true_rate, false_rate) == pytest.approx(metrics.auc(labels, scores))


def test_one_class_has_no_auc():
    for labels in (np.zeros(3), np.ones(3)):
        scores = metrics.score_table_row(np.arange(3), labels, np.arange(3.0))
        assert math.isnan(scores.auc) and math.isnan(scores.gauc) and math.isnan(scores.ne)


@pytest.mark.parametrize("samples", [5, 20, 21, 1003])
def test_calibration_bins_split_the_samples_evenly_by_prediction(samples):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=samples), rng.random(samples) < 0.5
    predicted, observed, share = metrics.calibration_bins(labels, logits)
    assert len(share) == min(20, samples) and (np.diff(predicted) > 0).all()
    assert share.max() - share.min() <= 1 / samples + 1e-12
    np.testing.assert_allclose([share.sum(), observed @ share], [1, labels.mean()])


@settings(max_examples=50, deadline=None)
@given(predictions, st.sets(st.integers(1, 4)))
def test_length_buckets_partition_the_samples(rows, bounds):
    lengths, labels, logits = columns(rows)
    edges = (0, *sorted(bounds))
    got = metrics.by_length(lengths, np.arange(len(labels)), labels.astype(float), logits, edges)
    assert sum(scores.samples for scores in got.values()) == len(labels)
    for name, scores in got.items():
        low, _, high = name.removesuffix("+").partition("-")
        inside = (lengths >= int(low)) & (lengths <= (int(high) if high else 10**9))
        assert scores.samples == inside.sum() > 0
        np.testing.assert_allclose(scores.auc, metrics.auc(labels[inside], logits[inside]))
