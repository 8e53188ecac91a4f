"""Ages as buckets, and the vector a segment gets for its age and place."""

import numpy as np
import pytest
from flax import nnx

from laser_jax.layers.recency import MAX_AGE_S, SegmentRecency, age_bucket

INT32_MAX = np.iinfo(np.int32).max


@pytest.mark.parametrize("buckets", [2, 8, 32])
def test_buckets_grow_with_age_and_stay_in_range(buckets):
    age = np.unique(np.r_[0, np.geomspace(1, INT32_MAX, 5000)].astype(np.int32))
    got = np.asarray(age_bucket(age, buckets))
    assert got.dtype == np.int32 and got[0] == 0 and got[-1] == buckets - 1
    assert (np.diff(got) >= 0).all() and set(got) == set(range(buckets))
    assert age_bucket(np.int32(2 * MAX_AGE_S), buckets) == buckets - 1


def test_negative_ages_count_as_zero():
    np.testing.assert_array_equal(age_bucket(np.array([-1, -(2**31)], np.int32), 32), [0, 0])


def test_buckets_are_log_spaced():
    minute, day = 60, 86400
    near = age_bucket(np.array([minute, 10 * minute]), 32)
    far = age_bucket(np.array([100 * day, 100 * day + 10 * minute]), 32)
    assert near[0] < near[1] and far[0] == far[1]


@pytest.mark.parametrize("by", ["age", "position", "both"])
def test_a_segment_gets_the_sum_of_what_is_asked_for(by):
    module = SegmentRecency(by, 5, 4, 16, rngs=nnx.Rngs(0))
    ages = np.array([[10**7, 10**5, 0], [3 * 10**7, 60, 59]], np.int32)
    got = np.asarray(module(ages))
    want = np.zeros((2, 3, 4), np.float32)
    if by != "position":
        want += module.age[...][age_bucket(ages, 16)]
    if by != "age":
        want += module.position[...][np.array([2, 1, 0])]  # counted from the newest
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert np.abs(got[:, 0] - got[:, 2]).max() > 1e-3


def test_unknown_kind_and_too_many_segments_are_refused():
    with pytest.raises(ValueError, match="'time' is not one of 'age', 'position', 'both'"):
        SegmentRecency("time", 3, 4, 16, rngs=nnx.Rngs(0))
    module = SegmentRecency("both", 3, 4, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="4 segments but position embeddings for 3.*history_length"):
        module(np.zeros((1, 4), np.int32))
