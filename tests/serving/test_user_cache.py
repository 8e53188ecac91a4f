"""What is kept of users is what would be looked up anew, whatever became of their histories meanwhile."""

import weakref

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax.serving.exported import Events
from laser_jax.serving.user_cache import UserCache

LENGTH = 6  # events that are read at most


class LookUp:
    """Counts the events that are looked up."""

    def __init__(self):
        self.events = 0

    def __call__(self, columns):
        self.events += len(columns["time"])
        embeddings = np.stack([columns["item"], columns["item"] * 2 + columns["time"]], axis=1).astype(np.float32)
        return Events(columns["time"], embeddings, {"item": columns["item"].astype(np.int32)})


def history(events):
    """(time, item) pairs -> columns, oldest first, the newest LENGTH of them."""
    events = sorted(events, key=lambda event: event[0])[-LENGTH:]
    return {
        "time": np.array([time for time, _ in events], np.int64),
        "item": np.array([item for _, item in events], np.int64),
    }


def assert_same(found, wanted):
    np.testing.assert_array_equal(found.time, wanted.time)
    np.testing.assert_array_equal(found.embeddings, wanted.embeddings)
    np.testing.assert_array_equal(found.compared["item"], wanted.compared["item"])


EVENT = st.tuples(st.integers(0, 8), st.integers(0, 3))
#: A user, what happens to its events, and how it is read: of events before a time, or all.
ACTION = st.tuples(
    st.sampled_from("ab"),
    st.one_of(EVENT, st.just("forget"), st.just("drop the oldest"), st.none()),
    st.one_of(st.none(), st.integers(0, 9)),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(ACTION, max_size=40), st.sampled_from([0, 2500, 10**6]))
def test_it_never_says_anything_else_than_a_look_up(actions, budget):
    events = {"a": [], "b": []}
    cache = UserCache(budget, LookUp())
    for user, change, before in actions:
        if change == "forget":
            events[user] = []
        elif change == "drop the oldest":
            events[user] = events[user][1:]
        elif change is not None:
            events[user] = [*events[user], change]  # late ones too
        columns = history([event for event in events[user] if before is None or event[0] < before])
        assert_same(cache.read(user, columns), LookUp()(columns))
        assert 0 <= cache.num_bytes <= budget
        assert (cache.num_bytes > 0) == (len(cache) > 0)
    assert cache.hits + cache.extended + cache.misses == len(actions)


def test_only_new_events_are_looked_up():
    look_up = LookUp()
    cache = UserCache(10**6, look_up)
    events = [(time, time % 3) for time in range(20)]
    cache.read("a", history(events))
    assert look_up.events == LENGTH
    cache.read("a", history(events))
    assert look_up.events == LENGTH and cache.hits == 1
    assert_same(cache.read("a", history([*events, (20, 1), (21, 2)])), LookUp()(history([*events, (20, 1), (21, 2)])))
    assert look_up.events == LENGTH + 2 and cache.extended == 1
    late = [*events, (20, 1), (21, 2), (18, 3)]
    assert_same(cache.read("a", history(late)), LookUp()(history(late)))
    assert (cache.hits, cache.extended, cache.misses) == (1, 1, 2)


def test_a_request_about_the_past_leaves_what_the_present_needs():
    look_up = LookUp()
    cache = UserCache(10**6, look_up)
    events = [(time, time % 3) for time in range(20)]
    cache.read("a", history(events))
    cache.read("a", history(events[:10]))
    asked = look_up.events
    cache.read("a", history(events))
    assert look_up.events == asked


def test_whoever_was_not_asked_for_goes_first():
    look_up = LookUp()
    events = [(time, time % 3) for time in range(LENGTH)]
    one = UserCache(10**6, look_up)
    one.read("a", history(events))
    cache = UserCache(2 * one.num_bytes, look_up)
    for user in "abac":
        cache.read(user, history(events))
    asked = look_up.events
    cache.read("a", history(events))
    cache.read("c", history(events))
    assert look_up.events == asked and len(cache) == 2
    cache.read("b", history(events))
    assert look_up.events == asked + LENGTH


def test_the_batch_that_a_history_came_in_is_let_go():
    batch, cache = {name: np.arange(3000) for name in ("time", "item")}, UserCache(10**6, LookUp())
    whole = [weakref.ref(column) for column in batch.values()]
    cache.read("a", {name: column[:3] for name, column in batch.items()})
    cache.read("a", {name: column[:5] for name, column in batch.items()})
    del batch
    assert [column() for column in whole] == [None, None] and len(cache) == 1
