"""Where rows lie: one to one, evenly by owner, the same for any number of devices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax.row_placement import (
    MULTIPLE,
    Wanted,
    bucket_size,
    padded_rows,
    places,
    rows_at,
    rows_per_device,
    unique_keys,
)


@pytest.mark.parametrize("num_rows", [2, MULTIPLE, MULTIPLE + 1, 50_000])
def test_every_row_has_a_place_of_its_own(num_rows):
    found = places(np.arange(num_rows), num_rows)
    assert found[0] == 0 and found.min() >= 0 and found.max() < padded_rows(num_rows)
    assert len(np.unique(found)) == num_rows and padded_rows(num_rows) - num_rows < MULTIPLE
    np.testing.assert_array_equal(rows_at(found, num_rows), np.arange(num_rows))


def test_places_of_a_billion_rows_do_not_overflow():
    rows = np.array([0, 1, 10**9 - 1])
    assert (places(rows, 10**9) < padded_rows(10**9)).all()
    np.testing.assert_array_equal(rows_at(places(rows, 10**9), 10**9), rows)


def test_devices_that_do_not_share_a_table_evenly_are_refused():
    with pytest.raises(ValueError, match="a table of 3072 rows does not divide over 5 devices"):
        rows_per_device(100, 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12), max_size=4))
def test_unique_keys_and_positions_give_the_arrays_back(parts):
    parts = [np.array(part, np.int64) for part in parts]
    unique, positions = unique_keys(parts)
    assert sorted(unique) == sorted(set(np.concatenate([np.zeros(0, np.int64), *parts])))
    for part, position in zip(parts, positions, strict=True):
        np.testing.assert_array_equal(unique[position], part)
        assert position.dtype == np.int32


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([40, 5000]), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_buckets_hold_every_wanted_row_at_its_owner(num_devices, num_rows, seed, count):
    rows = np.random.default_rng(seed).choice(num_rows, count, replace=False)
    wanted, rank = Wanted.of(rows, num_rows, num_devices)
    share = rows_per_device(num_rows, num_devices)
    size = bucket_size(int(wanted.counts.max(initial=0)), share, 8)
    local, slots = wanted.buckets(size, share)
    assert local.shape == (num_devices, size) and (np.diff(local, axis=1) > 0).all() and local.min() >= 0
    slot = slots[rank]
    owner = slot // size
    np.testing.assert_array_equal(local.reshape(-1)[slot] + owner * share, places(rows, num_rows))
    assert (local < share).sum() == count == len(np.unique(slot))


@pytest.mark.parametrize("kind", ["popular codes are small", "hashed"])
def test_popular_ids_spread_over_devices(kind):
    """The fullest bucket of Zipf ids is at most 1.1 times the mean, after per-device unique."""
    rng = np.random.default_rng(0)
    num_rows = 1_000_000
    rows = rng.zipf(1.2, 100_000) % num_rows
    if kind == "hashed":
        rows = rng.permutation(num_rows)[rows]
    unique, _ = unique_keys([rows])
    wanted, _ = Wanted.of(unique, num_rows, 8)
    assert wanted.counts.sum() == len(unique) > 10_000
    assert wanted.counts.max() <= 1.1 * wanted.counts.mean()


def test_bucket_sizes_hold_the_rows_and_are_few():
    counts = range(1, 200_000, 17)
    sizes = [bucket_size(count, 10**6, 1024) for count in counts]
    assert all(size >= count for size, count in zip(sizes, counts, strict=True))
    assert len(set(sizes)) < 20 and sizes == sorted(sizes)
    assert max(s / c for s, c in zip(sizes, counts, strict=True) if c > 1024) < 1.51
    assert [bucket_size(count, 50, 1024) for count in (1, 49, 50)] == [50, 50, 50]
