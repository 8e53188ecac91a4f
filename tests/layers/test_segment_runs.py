"""How histories are cut into segments."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax.layers.segment_runs import (
    newest_segments,
    num_segments,
    over_segments,
    reaches_of,
    segment_runs,
)
from tests.layers import naive

LENGTHS = st.integers(1, 40)


@settings(deadline=None)  # the first call loads jax
@given(LENGTHS, st.integers(1, 50), st.lists(LENGTHS, max_size=4))
def test_segments_are_those_of_a_walk_from_the_newest_event(length, width, horizons):
    reaches = reaches_of(horizons, length)
    runs = segment_runs(reaches, width)
    places = np.arange(1, length + 1)[None]
    cut = naive.segments(length, width, horizons)
    for reduce in ("max", "sum"):
        want = [getattr(places[0, part.start : part.stop], reduce)() for part in cut]
        got = over_segments(places, runs, lambda events, reduce=reduce: getattr(events, reduce)(axis=-1))
        assert got.tolist() == [want]
    assert num_segments(runs) == len(cut)
    for reach, newest in zip(reaches, newest_segments(reaches, width), strict=True):
        assert sum(len(part) for part in cut[len(cut) - newest :]) == reach


def test_segments_of_one_width_are_one_run():
    assert [run.num_segments for run in segment_runs(reaches_of((20, 50, 200), 1000), 10)] == [100]
    assert [run.num_segments for run in segment_runs(reaches_of((20, 50, 200), 1000), 200)] == [4, 1, 1, 1]
    assert [(run.begin, run.end, run.width) for run in segment_runs((20, 50), 40)] == [(50, 20, 30), (20, 0, 20)]
