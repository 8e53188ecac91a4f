"""What the tests of the model side share: a small data set whose raw logs are known."""

import atexit
import dataclasses
import json
import os
import shutil
import tempfile

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.requests import RequestsWriter, write_vocabulary
from laser_jax.schema import Field, Schema
from tests.compilation import compile_fast

# One folder a worker of pytest-xdist, which the processes that its tests start share with it.
PROGRAMS = tempfile.mkdtemp(prefix="laser_jax-programs-")
atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
compile_fast(PROGRAMS)

USERS = np.array([-(2**40), -3, 0, 5, 17, 2**40, 2**62, 8, 9, 10, 11, 12])
LENGTHS = np.array([0, 1, 5, 40, 60, 3, 25, 16, 17, 30, 50, 33])  # users[0] has no history at all
CATEGORIES, SPAN = 6, 10_000
SPLITS = {"train": 150, "valid": 30, "test": 80}


@dataclasses.dataclass(frozen=True)
class KnownData:
    """A data set on disk and what was written into it.

    Attributes:
      path: of the data set. time_unit: of its vault.
      events: columns of all events with user and time. Times repeat inside a user, and requests fall on them.
      requests: split -> a list with one dict a request: user, time, scene, and lists item, category, label, oracle.
    """

    path: str
    time_unit: str
    events: dict[str, np.ndarray]
    requests: dict[str, list[dict]]

    def history(self, user: int, before: int, n: int) -> dict[str, np.ndarray]:
        """The newest n events strictly before a time, oldest first, by a plain filter of the log."""
        mine = np.flatnonzero((self.events["user"] == user) & (self.events["time"] < before))
        mine = mine[np.argsort(self.events["time"][mine], kind="stable")][-n:]
        return {name: column[mine] for name, column in self.events.items()}


def write_known_data(path: str, time_unit: str = "s", seed: int = 0) -> KnownData:
    """Candidates of a category that a user has met lately are clicked with probability .98, others with .02."""
    rng = np.random.default_rng(seed)
    user = np.repeat(USERS, LENGTHS)
    favourites = rng.permuted(np.tile(np.arange(CATEGORIES), (len(USERS), 1)), axis=1)[:, :2]
    category = favourites[np.repeat(np.arange(len(USERS)), LENGTHS), rng.integers(0, 2, len(user))].astype(np.int32)
    unit = 1000 if time_unit == "ms" else 1
    events = {
        "user": user,
        "time": rng.integers(0, SPAN, len(user)) * unit,
        "item": category * np.int64(2**40) + rng.integers(0, 20, len(user)),
        "category": category,
        "action": rng.integers(0, 3, len(user)).astype(np.uint8),
        "dwell": rng.integers(0, 3000, len(user)).astype(np.uint16),
        "embedding": rng.normal(size=(len(user), 2)).astype(np.float16),
    }
    fields = (
        Field("item", "int64"),
        Field("category", "int32"),
        Field("action", "uint8"),
        Field("dwell", "uint16"),
        Field("embedding", "float16", size=2),
    )
    with seqvault.create(os.path.join(path, "vault"), Schema(time_unit=time_unit, fields=fields)) as writer:
        writer.write(events)
    data = KnownData(path, time_unit, events, {})
    for split, count in SPLITS.items():
        rows = data.requests[split] = [_request(rng, data, unit) for _ in range(count)]
        with RequestsWriter(
            os.path.join(path, "requests", split),
            context={"scene": "uint8"},
            candidates={"item": "int64", "category": "int32"},
            references=("oracle",),
        ) as requests:
            requests.write(
                user=np.array([r["user"] for r in rows]),
                time=np.array([r["time"] for r in rows]),
                counts=np.array([len(r["item"]) for r in rows]),
                context={"scene": np.array([r["scene"] for r in rows], np.uint8)},
                candidates={name: np.concatenate([r[name] for r in rows]) for name in ("item", "category")},
                label=np.concatenate([r["label"] for r in rows]),
                references={"oracle": np.concatenate([r["oracle"] for r in rows])},
            )
    write_vocabulary(os.path.join(path, "vocab", "item"), np.unique(events["item"])[::2])
    with open(os.path.join(path, "dataset.json"), "w", encoding="utf-8") as file:
        json.dump({"recipe": "known"}, file)
    return data


def _request(rng, data: KnownData, unit: int) -> dict:
    user = rng.choice(USERS)
    own = data.events["time"][data.events["user"] == user]
    # Half of the requests fall exactly on an event's time: strictly before is then what matters.
    time = rng.choice(own) if len(own) and rng.random() < 0.5 else rng.integers(0, SPAN * unit)
    count = rng.integers(1, 8)
    category = rng.integers(0, CATEGORIES, count).astype(np.int32)
    liked = np.isin(category, data.history(user, time, 16)["category"])
    return {
        "user": user,
        "time": int(time),
        "scene": int(rng.integers(0, 3)),
        "item": category * np.int64(2**40) + rng.integers(0, 20, count),
        "category": category,
        "label": (rng.random(count) < np.where(liked, 0.98, 0.02)).astype(np.float32),
        "oracle": np.where(liked, 3.0, -3.0).astype(np.float32),
    }


@pytest.fixture(scope="session")
def known_data(tmp_path_factory) -> KnownData:
    return write_known_data(str(tmp_path_factory.mktemp("known") / "data"))
