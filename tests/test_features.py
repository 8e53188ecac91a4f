"""Ids to embedding rows, and the few distinct rows of a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax.assembly import Assembly
from laser_jax.features import FeatureConfig, FieldConfig, rows_of

INT64 = np.iinfo(np.int64)


def field(ids="code", rows=10, **changes):
    return FieldConfig(**{"name": "item", "width": 4, "rows": rows, "ids": ids, **changes})


def test_codes_are_shifted_by_one_and_the_rest_is_row_zero():
    values = np.array([0, 1, 8, 9, 10, -1, -7, INT64.max, INT64.min])
    np.testing.assert_array_equal(rows_of(field(), values, None), [1, 2, 9, 0, 0, 0, 0, 0, 0])
    assert rows_of(field(), np.array([True, False]), None).tolist() == [2, 1]
    assert rows_of(field(), np.array([255], np.uint8), None).tolist() == [0]


def test_a_vocabulary_gives_positions_and_unseen_ids_row_zero():
    vocabulary = np.array([-5, 3, 10, 2**40, 2**62])
    values = np.array([3, -5, 2**62, 4, INT64.min, INT64.max, 2**40])
    np.testing.assert_array_equal(rows_of(field("vocab"), values, vocabulary), [2, 1, 5, 0, 0, 0, 4])
    # A table smaller than the vocabulary keeps the ids that fit.
    np.testing.assert_array_equal(rows_of(field("vocab", rows=4), values, vocabulary), [2, 1, 0, 0, 0, 0, 0])


def test_an_empty_vocabulary_knows_nobody():
    np.testing.assert_array_equal(rows_of(field("vocab"), np.array([1, 2]), np.zeros(0, np.int64)), [0, 0])


def test_hashes_are_fixed_spread_and_never_row_zero():
    values = np.arange(-5000, 5000) * 2**33
    rows = rows_of(field("hash", rows=11), values, None)
    np.testing.assert_array_equal(rows, rows_of(field("hash", rows=11), values, None))
    counts = np.bincount(rows, minlength=11)
    assert counts[0] == 0 and counts[1:].min() > 800
    # A table's rows must mean the same in every later version.
    assert rows_of(field("hash", rows=10**6), np.array([0, 1, -1]), None).tolist() == [318419, 652893, 201258]


def test_quantities_grow_in_half_powers_of_two_and_are_clipped():
    values = np.array([0, 1, 2, 3, 7, 1e9, -4.0])
    np.testing.assert_array_equal(rows_of(field("log"), values, None), [1, 3, 4, 5, 7, 9, 1])
    steps = rows_of(field("log", rows=100), np.arange(60_000, dtype=np.uint16), None)
    assert (np.diff(steps) >= 0).all() and steps.max() < 40


def test_a_missing_quantity_is_row_zero():
    np.testing.assert_array_equal(rows_of(field("log"), np.array([np.nan, 3.0], np.float32), None), [0, 5])


@pytest.mark.parametrize("ids", ["code", "vocab", "hash", "log"])
@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(INT64.min, INT64.max), max_size=20), rows=st.integers(2, 50))
def test_rows_lie_in_the_table(ids, values, rows):
    got = rows_of(field(ids, rows), np.array(values, np.int64), np.array([1, 5, 2**50]))
    assert got.dtype == np.int32 and len(got) == len(values) and ((got >= 0) & (got < rows)).all()


def test_fields_may_share_a_table():
    config = FeatureConfig(item=(field(),), event=(field(name="last_item", table="item"),))
    assert config.tables() == {"item": (10, 4)}


def test_an_id_has_one_row_in_a_shared_table():
    fields = FeatureConfig(item=(field("vocab"),), event=(field("vocab", name="last", table="item"),))
    ids = np.array([10, 20, 30])
    shared = Assembly(fields, {"item": ids, "last": ids.copy()})
    columns = {"item": np.array([20, 30, 5]), "last": np.array([20, 30, 5])}
    rows = shared.rows((*fields.item, *fields.event), columns)
    assert rows["item"].tolist() == rows["last"].tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match="'item' and 'last' share table 'item', but their vocabularies differ"):
        Assembly(fields, {"item": ids, "last": ids[1:]})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FeatureConfig(), "features.item is empty"),
        (FeatureConfig(item=(field("sorted"),)), "'item': ids='sorted' is not one of"),
        (FeatureConfig(item=(field(rows=1),)), "'item': rows=1"),
        (FeatureConfig(item=(field(width=0),)), "'item': .*width=0"),
        (
            FeatureConfig(item=(field(),), event=(field(name="last", table="item", width=8),)),
            "'last' wants table 'item' as",
        ),
        (
            FeatureConfig(item=(field("vocab"),), event=(field("hash", name="last", table="item"),)),
            "fields of table 'item' disagree about where an id's row is .*'vocab'.* and, for 'last', .*'hash'",
        ),
    ],
)
def test_features_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        config.tables()
