"""The bookkeeping of the online experiment: what arrives when, and what the intervals say."""

import numpy as np

from data.xhs_synthetic import XhsSynthetic
from experiments.paper.online import BEGIN_S, COMPARISONS, SHOWN, Arrivals, Played, World, _chunks, rows_of


def small_world(path) -> World:
    recipe = XhsSynthetic(users=40, mean_length=200, train_requests=40, valid_requests=40, test_requests=200)
    recipe.prepare(str(path / "data"))
    return World(str(path / "data"))


def test_every_event_arrives_once_and_not_before_its_delay(tmp_path):
    world = small_world(tmp_path)
    delays = {user: 86_400 * (user % 2) for user in world.life}
    arrivals, got = Arrivals(world, delays), {user: [] for user in world.life}
    clicks = 0
    for user, moment, scene, candidates in world.requests:
        for event in arrivals.by(user, moment):
            assert event["user"] == user and BEGIN_S <= event["time"] < moment - delays[user]
            got[user].append((event["time"], event["item"], event["action"]))
        arrivals.clicked(user, world.event(moment, scene, candidates, 1))
        clicks += 1
    for user in world.life:
        got[user] += [(e["time"], e["item"], e["action"]) for e in arrivals.by(user, 2**40)]
        life = world.life[user]
        after = life["time"] >= BEGIN_S
        own = list(zip(life["time"][after], life["item"][after], life["action"][after], strict=True))
        clicked = [(time, candidates["item"][1], 1) for u, time, _, candidates in world.requests if u == user]
        assert sorted(got[user]) == sorted([*own, *clicked])
    assert clicks == len(world.requests) == 200
    # A click raises the chance of the same item later, and never earlier.
    user, moment, scene, candidates = world.requests[-1]
    event = world.event(moment - 60, scene, candidates, 0)
    request = (user, moment, scene, candidates)
    before, after = (world.probabilities(user, clicked, request) for clicked in ([], [event]))
    assert after[0] > before[0]
    late = world.event(moment, scene, candidates, 0)
    np.testing.assert_array_equal(world.probabilities(user, [late], request), before)


def test_no_user_is_twice_in_a_chunk(tmp_path):
    world = small_world(tmp_path)
    chunks = list(_chunks(world.requests))
    assert [request for chunk in chunks for request in chunk] == world.requests
    assert all(len({request[0] for request in chunk}) == len(chunk) <= 16 for chunk in chunks)


def test_a_difference_shows_where_there_is_one_only():
    rng = np.random.default_rng(0)
    users = rng.integers(0, 400, 8000)
    arms = users % 2

    def played(chance):
        clicks = rng.binomial(SHOWN, chance[arms])
        return Played(users, arms, clicks, np.full(len(users), SHOWN * 0.3))

    same = rows_of("a/a", COMPARISONS["a/a"], played(np.array([0.3, 0.3])))
    other = rows_of("model", COMPARISONS["model"], played(np.array([0.3, 0.35])))
    assert float(same[0][4]) == np.round(float(same[0][4]), 2) and abs(float(same[0][4]) - 30) < 2
    for rows, low, high in ((same, -3, 0), (other, 2, 5)):
        bounds = [float(bound) for bound in rows[2][5].split(" .. ")]
        assert low < bounds[0] < bounds[1] and (bounds[0] > 0) == (high == 5), rows
    # The same users with other luck: pairs know better than halves do.
    base = played(np.array([0.3, 0.3]))
    worse = Played(base.users, base.arms, base.clicks, base.expected - 0.03)
    pair = rows_of("day", COMPARISONS["day"], worse, base)[3]
    assert float(pair[4]) == 0 and float(pair[6]) == -1.0 and pair[7] == "-1.00 .. -1.00" and pair[8] == "-0.0300"
    assert [float(bound) for bound in (rows[2][6], *rows[2][7].split(" .. "))] == [0, 0, 0]
