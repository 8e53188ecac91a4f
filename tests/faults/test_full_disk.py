"""Storage that refuses, at any step of any writing call: a clear error, nothing lost, and on it goes once there is room."""

import errno
import os

import numpy as np

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema

FIELDS = (Field("item", "int64"), Field("brand", "string"))
SCHEMA = Schema(fields=FIELDS)
WIDER = Schema(fields=(*FIELDS, Field("scene", "string", default="home")))
USERS = np.arange(4)
QUIET = seqvault.WriterOptions(background=False)


def events(start: int, count: int) -> dict:
    """Events of all users."""
    numbers = np.arange(start, start + count)
    brands = np.array([f"brand {number // 10}" for number in numbers.tolist()], object)
    return {"user": numbers % 4, "time": numbers * 7 % 50, "item": numbers, "brand": brands}


def wider(vault, batch: dict) -> dict:
    """The same events as the vault's schema wants them."""
    extra = {"scene": np.array(["home"] * len(batch["item"]), object)} if "scene" in vault.schema.names else {}
    return batch | extra


def seen(vault) -> set[int]:
    """All items that a handle sees, after a look at each of them."""
    found = []
    for user, history in zip(USERS.tolist(), vault.gather(USERS, n=10**6), strict=True):
        items = history["item"]
        assert vault.get(user, 10**6)["item"].tolist() == items.tolist()
        assert (items % 4 == user).all() and history["time"].tolist() == (items * 7 % 50).tolist()
        assert history["brand"].tolist() == [f"brand {item // 10}" for item in items.tolist()]
        assert items[np.lexsort((items, history["time"]))].tolist() == items.tolist()
        found += items.tolist()
    assert len(set(found)) == len(found), "an event is there twice"
    return set(found)


class Refusing:
    """Stands for a disk that is full, from the call number `first` on: functions of `os` that change something fail."""

    NAMES = ("fsync", "fdatasync", "replace", "link", "pwrite", "makedirs", "mkdir", "truncate")

    def __init__(self, monkeypatch, first: int, only_one: bool, error: type[BaseException]):
        self.calls, self.first, self.refused = 0, first, False
        with monkeypatch.context() as patch:
            self.patch = patch
            for name in self.NAMES:
                patch.setattr(os, name, self._wrapped(getattr(os, name), only_one, error))
            # Left by `stop`, so that the functions are there again when the test looks at what happened.
            self._undo = patch.undo

    def _wrapped(self, function, only_one, error):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls - 1 == self.first or (self.calls > self.first and not only_one):
                self.refused = True
                raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return call
