"""xhs_synthetic: multi-scene logs of made-up users, with a teacher whose click probabilities are known.

Every user is shown topics that come and go over months (exposures). A third of them are interests, with which
the user engages; the others are only shown, and twice as often. The sessions of a user, each in one of three
scenes, follow one exposure of that time in half of their events; the rest is what is popular. Candidates come
from interests and other exposures, past and present, and from what is popular. Labels are draws from the
probabilities of the teacher (xhs_synthetic_teacher.py), whose logits are stored as reference "oracle".

Calibrated, then frozen with VERSION: README.md has the figures. Memory does not grow with the users.
"""

import contextlib
import dataclasses
import os

import numpy as np

from data import xhs_synthetic_teacher as world
from data.recipe import Recipe, RecipeError, run
from laser_jax import vault as seqvault
from laser_jax.requests import RequestsWriter, write_vocabulary
from laser_jax.schema import Field, Schema

SCHEMA = Schema(
    user="int64",
    time_unit="s",
    fields=(
        Field("item", "int64"),
        Field("category", "int32"),
        Field("author", "int64"),
        Field("scene", "uint8"),
        Field("action", "uint8"),
        Field("dwell", "uint16"),
        Field("content", "float16", world.CONTENT_SIZE),
    ),
)
CANDIDATE = {"item": "int64", "category": "int32", "author": "int64"}

ORIGIN_S = 1_704_067_200  # 1 January 2024
HORIZON_DAYS = 730
REQUEST_DAYS = {"train": (500, 670), "valid": (670, 695), "test": (695, 730)}
INTERESTS = (4, 8)
OTHERS_AN_INTEREST = 2
EXPOSURES = INTERESTS[1] * (1 + OTHERS_AN_INTEREST)
EXPOSURE_DAYS, EXPOSURE_SPREAD = 120.0, 0.5  # median and log spread of how long an exposure lives
INTEREST_FREQUENCY = 0.5  # sessions that follow an interest, against another exposure alive at that time
FAVOURITES = 3  # authors through whom an exposure comes
MIN_LENGTH = 10
LENGTH_SPREAD = 0.6  # log spread of the users' numbers of events
SESSION_EVENTS = 12
FOLLOWING = 0.5  # events of a session that follow its exposure
BY_FAVOURITE = 0.4
ENGAGED_INTEREST, ENGAGED_OTHER = 0.7, 0.02
SCENE_SHARE = np.array([0.5, 0.35, 0.15])
ENGAGED_SHARE = np.array([0.6, 0.2, 0.12, 0.08])  # click, like, save, share
DWELL_S = np.array([4.0, 25.0, 35.0, 45.0, 45.0])  # median of each action
CANDIDATE_SHARE = np.array([0.35, 0.45, 0.2])  # from an interest, another exposure, what is popular
CANDIDATE_BY_FAVOURITE = 0.5
_CHUNK_USERS = 128


@dataclasses.dataclass
class XhsSynthetic(Recipe):
    """The arguments.

    Attributes:
        users: how many; their ids are 0 .. users-1.
        mean_length, max_length: events of a user, lognormal, cut to MIN_LENGTH .. max_length.
        train_requests, valid_requests, test_requests: in all, spread evenly over the users.
        candidates: of a request.
        seed: of the users; the world and the teacher stay.
    """

    users: int = 3_000
    mean_length: int = 1_200
    max_length: int = 10_000
    train_requests: int = 20_000
    valid_requests: int = 1_500
    test_requests: int = 3_500
    candidates: int = 10
    seed: int = 1

    NAME = "xhs_synthetic"
    VERSION = 1

    def check(self):
        arguments = dataclasses.asdict(self)
        for name, least in {**dict.fromkeys(arguments, 1), "max_length": MIN_LENGTH, "seed": 0}.items():
            if arguments[name] < least:
                raise RecipeError(f"{name}={arguments[name]}: give at least {least}")

    def build(self, directory, progress):
        seen_items = np.zeros(world.NUM_ITEMS, bool)
        seen_authors = np.zeros(world.NUM_AUTHORS, bool)
        counts = {"users": self.users, "events": 0}
        with contextlib.ExitStack() as stack:
            vault = stack.enter_context(seqvault.create(os.path.join(directory, "vault"), SCHEMA))
            writers = {
                split: stack.enter_context(
                    RequestsWriter(
                        os.path.join(directory, "requests", split),
                        user="int64",
                        context={"scene": "uint8"},
                        candidates=CANDIDATE,
                        references=("oracle", "popularity"),
                    )
                )
                for split in REQUEST_DAYS
            }
            for first in range(0, self.users, _CHUNK_USERS):
                progress(first, self.users, "users")
                events, item, requests = self.chunk(first)
                vault.write(events)
                known = item[events["time"] < ORIGIN_S + REQUEST_DAYS["train"][1] * world.DAY_S]
                seen_items[known] = True
                seen_authors[known // world.ITEMS_PER_AUTHOR] = True
                counts["events"] += len(item)
                for split, columns in requests.items():
                    writers[split].write(**columns)
            progress(self.users, self.users, "users")
        write_vocabulary(os.path.join(directory, "vocab", "item"), world.item_id(np.flatnonzero(seen_items)))
        write_vocabulary(os.path.join(directory, "vocab", "author"), world.author_id(np.flatnonzero(seen_authors)))
        for split in REQUEST_DAYS:
            counts[f"{split}_requests"] = getattr(self, f"{split}_requests")
            counts[f"{split}_candidates"] = counts[f"{split}_requests"] * self.candidates
        return counts

    def chunk(self, first):
        """A chunk of users, from `first` on: (events, items, requests).

        Events are columns of SCHEMA with user and time, ordered by both; items are indices in the world, one
        an event; requests are what RequestsWriter.write takes, by split. A pure function of the arguments.
        """
        rng = np.random.default_rng([self.VERSION, self.seed, first])
        people = _draw_people(rng, min(_CHUNK_USERS, self.users - first), self.mean_length, self.max_length)
        events, item = _draw_events(rng, people)
        requests = {}
        for split, days in REQUEST_DAYS.items():
            share = np.arange(first, first + len(people["length"]) + 1) * getattr(self, f"{split}_requests")
            asked = _draw_requests(rng, people, np.diff(share // self.users), days, self.candidates)
            requests[split] = _ask_teacher(rng, events, people["length"], asked)
            requests[split]["user"] += first
        events["user"] += first
        return events, item, requests


def _draw_people(rng, count, mean_length, max_length):
    """Users as columns: length [n], and exposures [n, EXPOSURES] from day begin to day end."""
    shape = (count, EXPOSURES)
    mean = np.log(mean_length) - LENGTH_SPREAD**2 / 2
    length = np.exp(mean + LENGTH_SPREAD * rng.standard_normal(count))
    length = length.clip(MIN_LENGTH, max_length).astype(np.int64)
    interests = rng.integers(INTERESTS[0], INTERESTS[1] + 1, (count, 1))
    rank = np.arange(EXPOSURES)
    topic = _pick(rng, world.TOPIC_SHARE, shape)
    # An exposure of a topic that an earlier one has is dropped: a topic is an interest or not.
    again = (np.triu(topic[:, :, None] == topic[:, None, :], k=1)).any(1)
    days = EXPOSURE_DAYS * np.exp(EXPOSURE_SPREAD * rng.standard_normal(shape))
    begin = rng.random(shape) * (HORIZON_DAYS + days) - days
    return {
        "length": length,
        "topic": topic,
        "interest": rank < interests,
        "exists": (rank < interests * (1 + OTHERS_AN_INTEREST)) & ~again,
        "begin": begin,
        "end": begin + days,
        "favourite": _pick(rng, world.AUTHOR_SHARE, (*shape, FAVOURITES)),
    }


def _draw_events(rng, people):
    """Columns of SCHEMA with user and time, ordered by both, and the items' indices in the world."""
    length = people["length"]
    sessions = -(-length // SESSION_EVENTS)
    owner = np.repeat(np.arange(len(length)), sessions)
    begin = rng.random(len(owner)) * HORIZON_DAYS
    begin = begin[np.lexsort((begin, owner))]
    scene = _pick(rng, SCENE_SHARE, len(owner)).astype(np.uint8)
    alive = (
        people["exists"][owner] & (people["begin"][owner] <= begin[:, None]) & (begin[:, None] < people["end"][owner])
    )
    # The smallest of exponential waiting times: one exposure alive, drawn by frequency.
    frequency = np.where(people["interest"][owner], INTEREST_FREQUENCY, 1.0)
    waiting = np.where(alive, -np.log1p(-rng.random(alive.shape)) / frequency, np.inf)
    followed = np.where(alive.any(1), waiting.argmin(1), -1)

    user = np.repeat(np.arange(len(length)), length)
    position = np.arange(len(user)) - (np.cumsum(length) - length)[user]
    session = (np.cumsum(sessions) - sessions)[user] + position // SESSION_EVENTS
    pause = np.floor(5 - 25 * np.log1p(-rng.random(len(user)))).astype(np.int64)
    elapsed = np.cumsum(pause)
    opening = np.flatnonzero(position % SESSION_EVENTS == 0)
    elapsed -= np.repeat((elapsed - pause)[opening], np.diff(np.append(opening, len(user))))
    time = ORIGIN_S + np.floor(begin[session] * world.DAY_S).astype(np.int64) + elapsed

    exposure = followed[session]
    following = (exposure >= 0) & (rng.random(len(user)) < FOLLOWING)
    item = _draw_items(rng, people, user, np.where(following, exposure, -1), BY_FAVOURITE)
    interested = following & people["interest"][user, exposure]
    engaged = rng.random(len(user)) < np.where(interested, ENGAGED_INTEREST, ENGAGED_OTHER)
    action = np.where(engaged, 1 + _pick(rng, ENGAGED_SHARE, len(user)), 0).astype(np.uint8)
    dwell = DWELL_S[action] * np.exp(0.8 * rng.standard_normal(len(user)))
    noise = rng.standard_normal((len(user), world.CONTENT_SIZE), dtype=np.float32)

    order = np.lexsort((time, user))  # sessions may overlap; stable, as the vault's own order
    item = item[order]
    columns = {
        "user": user,
        "time": time[order],
        **_describe(item),
        "scene": scene[session][order],
        "action": action[order],
        "dwell": dwell.clip(1, 3600).astype(np.uint16)[order],
        "content": (world.TOPIC_CONTENT[_topic(item)] + 0.5 * noise).astype(np.float16),
    }
    return columns, item


def _draw_requests(rng, people, counts, days, candidates):
    """Requests of users, counts[u] for each: user, time, scene [R] and columns of CANDIDATE [R, C]."""
    user = np.repeat(np.arange(len(counts)), counts)
    day = days[0] + rng.random(len(user)) * (days[1] - days[0])
    begun = people["exists"][user] & (people["begin"][user] < day[:, None])
    kind = _pick(rng, CANDIDATE_SHARE, (len(user), candidates))[:, :, None]
    interest = people["interest"][user][:, None, :]
    fitting = begun[:, None, :] & (((kind == 0) & interest) | ((kind == 1) & ~interest))
    chosen = np.where(fitting, rng.random(fitting.shape), -1.0).argmax(2)
    chosen = np.where(fitting.any(2), chosen, -1)
    item = _draw_items(rng, people, user[:, None], chosen, CANDIDATE_BY_FAVOURITE)
    return {
        "user": user,
        "time": ORIGIN_S + np.floor(day * world.DAY_S).astype(np.int64),
        "scene": _pick(rng, SCENE_SHARE, len(user)).astype(np.uint8),
        "candidates": _describe(item),
    }


def _ask_teacher(rng, events, lengths, asked):
    """The arguments of RequestsWriter.write for drawn requests: labels and references added."""
    ends = np.cumsum(lengths)
    teacher, shape = world.Teacher(), asked["candidates"]["item"].shape
    oracle = np.empty(shape)
    for r, (user, time, scene) in enumerate(zip(asked["user"], asked["time"], asked["scene"], strict=True)):
        own = slice(ends[user] - lengths[user], ends[user])
        history = {name: events[name][own] for name in (*CANDIDATE, "action", "scene", "time")}
        oracle[r] = teacher.logits(history, time, scene, {k: v[r] for k, v in asked["candidates"].items()})
    flat = {name: values.ravel() for name, values in asked["candidates"].items()}
    return {
        "user": asked["user"],
        "time": asked["time"],
        "context": {"scene": asked["scene"]},
        "counts": np.full(shape[0], shape[1]),
        "candidates": flat,
        "label": (rng.random(shape) * (1 + np.exp(-oracle)) < 1).ravel(),
        "references": {"oracle": oracle.ravel(), "popularity": world.popularity(flat["item"])},
    }


def _draw_items(rng, people, user, exposure, by_favourite):
    """Indices of items from users' exposures, or of any topic where the exposure is -1; shapes broadcast."""
    drawn = exposure >= 0
    topic = np.where(drawn, people["topic"][user, exposure], _pick(rng, world.TOPIC_SHARE, exposure.shape))
    favourite = people["favourite"][user, exposure, rng.integers(0, FAVOURITES, exposure.shape)]
    author = np.where(
        drawn & (rng.random(exposure.shape) < by_favourite), favourite, _pick(rng, world.AUTHOR_SHARE, exposure.shape)
    )
    rank = _pick(rng, world.ITEM_SHARE, exposure.shape)
    return (topic * world.AUTHORS_PER_TOPIC + author) * world.ITEMS_PER_AUTHOR + rank


def _topic(item):
    return item // (world.ITEMS_PER_AUTHOR * world.AUTHORS_PER_TOPIC)


def _describe(item):
    """Columns of CANDIDATE of items by their indices."""
    return {
        "item": world.item_id(item),
        "category": world.TOPIC_CATEGORY[_topic(item)],
        "author": world.author_id(item // world.ITEMS_PER_AUTHOR),
    }


def _pick(rng, share, shape):
    """Independent draws of indices with the given probabilities."""
    return np.searchsorted(np.cumsum(share)[:-1], rng.random(shape), side="right")


if __name__ == "__main__":
    run(XhsSynthetic)
