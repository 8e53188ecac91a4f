"""The events that every storage benchmark reads: seeded, made block by block, the same for every store.

A user's events fall into sessions of some 12 in one scene. Items are drawn by a Zipf(.99) law; an item has one
category, one author and one content code. So made, all stores take within 2 % the bytes an event that an earlier study
of the same layouts found (pages 15.4, packed 14.8, raw records 17.7, JSON 24.0 by zstd and 41.8 by LZ4).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from laser_jax.schema import Field, Schema

#: Newest events that a lookup returns.
LATEST = 1000
#: The columns of an event and how many bytes they take uncompressed: 28 together.
RAW = {
    "time": np.dtype(np.uint32),
    "item": np.dtype(np.int64),
    "category": np.dtype(np.int32),
    "author": np.dtype(np.int32),
    "content_code": np.dtype(np.int32),
    "dwell": np.dtype(np.uint16),
    "action": np.dtype(np.uint8),
    "scene": np.dtype(np.uint8),
}
RAW_BYTES = sum(dtype.itemsize for dtype in RAW.values())
SCHEMA = Schema(fields=tuple(Field(name, dtype.name) for name, dtype in RAW.items() if name != "time"))
ITEM_EXPONENT, LOOKUP_EXPONENT = 0.99, 0.9
NUM_ITEMS, NUM_CATEGORIES, NUM_AUTHORS, CODE_BITS = 4_000_000, 500, 300_000, 20
USERS_A_BLOCK = 1000
_FIRST_TIME = 1_600_000_000

Columns = dict[str, np.ndarray]


def zipf(rng: np.random.Generator, exponent: float, size: int, draws: int) -> np.ndarray:
    """Ranks 0..size-1 with probability falling as (rank + 1) ** -exponent, int64 [draws]; exponent != 1."""
    power = 1.0 - exponent
    rank = (1.0 + rng.random(draws) * (float(size + 1) ** power - 1.0)) ** (1.0 / power)
    return np.minimum(rank.astype(np.int64), size) - 1


@dataclasses.dataclass(frozen=True)
class Events:
    """All users and how to make their events.

    Attributes:
      seed: everything follows from it and the number of users.
      users: int64 [U], distinct, in no order.
      lengths: int64 [U], events of each user.
    """

    seed: int
    users: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, num_users: int, seed: int = 0) -> "Events":
        """`num_users` users with lognormal history lengths, mean about 486."""
        rng = np.random.default_rng([seed, 0])
        users = rng.permutation(np.unique(rng.integers(0, 2**62, num_users + 100)))[:num_users]
        lengths = np.clip(rng.lognormal(np.log(239), 1.2, num_users), 10, 10_000).astype(np.int64)
        return cls(seed, users, lengths)

    @property
    def num_events(self) -> int:
        """Events of all users together."""
        return int(self.lengths.sum())

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, Columns]]:
        """Users [B], the first row of each and the end int64 [B + 1], columns [N] in order of user and time."""
        rng = np.random.default_rng([self.seed, 1])
        items = rng.integers(0, 2**40, NUM_ITEMS)
        facts = {
            "category": rng.integers(0, NUM_CATEGORIES, NUM_ITEMS, dtype=np.int32),
            "author": rng.integers(0, NUM_AUTHORS, NUM_ITEMS, dtype=np.int32),
            "content_code": rng.integers(0, 1 << CODE_BITS, NUM_ITEMS, dtype=np.int32),
        }
        for first in range(0, len(self.users), USERS_A_BLOCK):
            lengths = self.lengths[first : first + USERS_A_BLOCK]
            start = np.concatenate(([0], np.cumsum(lengths)))
            rng = np.random.default_rng([self.seed, 2, first])
            rank = zipf(rng, ITEM_EXPONENT, NUM_ITEMS, int(start[-1]))
            columns = {"item": items[rank]} | {name: fact[rank] for name, fact in facts.items()}
            yield self.users[first : first + USERS_A_BLOCK], start, columns | _behaviour(rng, start)

    def trace(self, lookups: int, among: np.ndarray | None = None) -> np.ndarray:
        """Positions of the users to look up, by a Zipf(.9) law over a random order of them (or of `among`)."""
        rng = np.random.default_rng([self.seed, 3])
        pool = rng.permutation(len(self.users) if among is None else among)
        return pool[zipf(rng, LOOKUP_EXPONENT, len(pool), lookups)]


def _behaviour(rng: np.random.Generator, start: np.ndarray) -> Columns:
    """What does not depend on the item: times and scenes in sessions, dwell, action."""
    total = int(start[-1])
    begins = rng.random(total) < 1 / 12
    begins[start[:-1]] = True
    pauses = rng.exponential(9 * 3600, total) + 1800
    gaps = np.where(begins, pauses, np.minimum(rng.lognormal(2.8, 1.0, total), 1700)).astype(np.int64)
    gaps[start[:-1]] = _FIRST_TIME + rng.integers(0, 90 * 86400, len(start) - 1)
    time = np.cumsum(gaps)
    time -= np.repeat(time[start[:-1]] - gaps[start[:-1]], np.diff(start))
    session = np.cumsum(begins) - 1
    action = np.where(rng.random(total) < 0.78, 0, rng.integers(1, 8, total))
    return {
        "time": time.astype(np.uint32),
        "dwell": np.minimum(rng.lognormal(2.8, 1.2, total), 65535).astype(np.uint16),
        "action": action.astype(np.uint8),
        "scene": rng.integers(0, 3, session[-1] + 1).astype(np.uint8)[session],
    }
