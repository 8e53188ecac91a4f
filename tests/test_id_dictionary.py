"""The growing dictionary against a plain model of it."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax.id_dictionary import IdDictionary


class Plain:
    """The same rules with Python dicts, without a bound on those that wait."""

    def __init__(self, num_rows, admit, keep):
        self.admit, self.keep, self.swept = admit, keep, 0
        self.row, self.count, self.seen = {}, {}, {}
        self.free = list(range(num_rows - 1, 0, -1))

    def assign(self, ids, step):
        for i in ids:
            self.count[i] = self.count.get(i, 0) + 1
            self.seen[i] = step
        due = [i for i in ids if i not in self.row and self.count[i] >= self.admit]
        if len(due) > len(self.free) and self.keep:
            if not self.swept or step - self.swept >= max(self.keep // 10, 1):
                self.swept = step
                stale = [i for i in self.row if self.seen[i] < step - self.keep]
                self.free += sorted((self.row.pop(i) for i in stale), reverse=True)
                for i in stale:
                    del self.count[i], self.seen[i]
        given = []
        for i in due:
            if self.free:
                self.row[i] = self.free.pop()
                given.append(i)
        return [self.row.get(i, 0) for i in ids], [i in given for i in ids]


steps = st.lists(st.lists(st.integers(-5, 30), max_size=12, unique=True), max_size=30)


@settings(max_examples=150, deadline=None)
@given(steps, st.integers(2, 40), st.integers(1, 3), st.sampled_from([0, 1, 3, 20]))
def test_it_does_what_the_plain_rules_say(batches, num_rows, admit, keep):
    ours, plain = IdDictionary(max(num_rows, 20), admit, keep), Plain(max(num_rows, 20), admit, keep)
    for step, ids in enumerate(batches, 1):
        got = ours.assign(np.array(ids, np.int64), step)
        rows, fresh = plain.assign(ids, step)
        assert got.rows.tolist() == rows and got.fresh.tolist() == fresh
        np.testing.assert_array_equal(ours.rows(np.array(ids, np.int64)), rows)
    known = list(plain.row)
    assert len(ours) == len(known)
    np.testing.assert_array_equal(ours.rows(np.array(known, np.int64)), [plain.row[i] for i in known])
    counts, seen = ours.counts(np.array(known, np.int64))
    assert counts.tolist() == [plain.count[i] for i in known] and seen.tolist() == [plain.seen[i] for i in known]


@settings(max_examples=60, deadline=None)
@given(steps, st.integers(0, 30))
def test_it_goes_on_from_its_state_as_if_never_stopped(batches, cut):
    straight = IdDictionary(8, 2, 3)
    for step, ids in enumerate(batches[:cut], 1):
        straight.assign(np.array(ids, np.int64), step)
    resumed = IdDictionary(8, 2, 3)
    resumed.load(copy.deepcopy(straight.state()))
    for step, ids in enumerate(batches[cut:], cut + 1):
        a, b = straight.assign(np.array(ids, np.int64), step), resumed.assign(np.array(ids, np.int64), step)
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.fresh, b.fresh)
    for name, value in straight.state().items():
        if name != "free":
            np.testing.assert_array_equal(resumed.state()[name], value, name)


def test_memory_is_bounded_and_no_row_is_given_twice():
    rng = np.random.default_rng(0)
    dictionary = IdDictionary(100, admit=2, keep=5)
    before = dictionary.num_bytes
    fresh = 0
    for step in range(1, 400):
        ids = np.unique(rng.zipf(1.3, 60) % 100_000)
        assigned = dictionary.assign(ids, step)
        taken = assigned.rows[assigned.rows > 0]
        assert len(np.unique(taken)) == len(taken) and taken.max(initial=0) < 100
        assert dictionary.waiting <= 200 - len(dictionary)
        fresh += assigned.fresh.sum()
    assert dictionary.num_bytes == before and fresh > 300  # rows were taken and given again
    assert 50 < len(dictionary) <= 99


def test_steps_may_count_anew():
    """As when another run begins with it: its ids grow stale by the new run's steps."""
    dictionary = IdDictionary(4, keep=5)
    for step in range(100, 110):
        dictionary.assign(np.array([1, 2, 3]), step)
    dictionary.restart(109)
    new = np.array([7, 8])
    rows = [dictionary.assign(new, step).rows for step in range(1, 8)]
    assert (rows[4] == 0).all() and (rows[5] > 0).all()  # not met for more than 5 steps: their rows are free
    assert dictionary.refused > 0


def test_a_table_can_grow_and_its_ids_keep_their_rows():
    small = IdDictionary(5)
    ids = np.array([10, 11, 12, 13])
    want = small.assign(ids, 1).rows
    assert (small.assign(np.array([14]), 2).rows == 0).all() and small.refused == 1  # full
    large = IdDictionary(9)
    large.load(small.state())
    np.testing.assert_array_equal(large.rows(ids), want)
    assert large.assign(np.array([14, 15]), 3).rows.tolist() == [5, 6]
    with pytest.raises(ValueError, match="can grow, not shrink"):
        small.load(large.state())
