"""Wide fields lie in smaller shards: what a writer holds of them is bounded; earlier vaults are read as they are."""

import functools
import json
import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import format as vault_format
from tests.faults.test_log_damage import QUIET, flip

#: 128 KiB a page of vectors: 512 pages in 64 MiB.
SCHEMA = Schema(fields=(Field("item", "int32"), Field("pair", "float32", 128)))
SHARD_PAGES = 512


def events(users: np.ndarray, time: int) -> dict:
    """One event a user, so one page."""
    pair = np.zeros((len(users), 128), np.float32)
    pair[:, [0, -1]] = np.stack([users, -users], axis=1)
    return {"user": users, "time": np.full(len(users), time), "item": users.astype(np.int32), "pair": pair}


def written_by_version_2(monkeypatch) -> None:
    """From now on parts have 4096 pages in a shard, whatever their size."""
    for name in ("pages_metadata", "vector_metadata"):
        monkeypatch.setattr(vault_format, name, functools.partial(getattr(vault_format, name), shard_bytes=None))


def check(vault: seqvault.Vault, users: np.ndarray, count: int = 1) -> None:
    """Around the ends of shards, alone and together."""
    some = users[[0, 1, SHARD_PAGES - 1, SHARD_PAGES, SHARD_PAGES + 1, -1]]
    found = vault.gather(some, 9, fields=["item", "pair"])
    np.testing.assert_array_equal(found.columns["item"], np.repeat(some, count))
    np.testing.assert_array_equal(found.columns["pair"][:, [0, -1]], np.repeat(np.stack([some, -some], 1), count, 0))
    for user in some.tolist():
        np.testing.assert_array_equal(vault.get(user, fields=["pair"])["pair"][:, [0, -1]], [[user, -user]] * count)


def shards(vault: seqvault.Vault, array: str) -> list[int]:
    """How many shard files each part has."""
    paths = [f"{part.folder.path}/{array}/c" for part in vault.state.parts.values()]
    return [len(os.listdir(path)) for path in paths]


def test_parts_of_both_kinds_are_read_together_and_merged(tmp_path, monkeypatch):
    users = np.arange(SHARD_PAGES + 90)
    with monkeypatch.context() as patch:
        written_by_version_2(patch)
        with seqvault.create(tmp_path / "vault", SCHEMA) as writer:
            writer.write(events(users, 1))
    with seqvault.open(tmp_path / "vault", writing=QUIET) as vault:
        assert shards(vault, "vectors/pair") == [1]
        check(vault, users)
        vault.append(events(users, 2))
        vault.flush()
        assert shards(vault, "vectors/pair") == [1, 2] and shards(vault, "pages") == [1, 1]
        check(vault, users, 2)
        assert vault.verify() == []
        seqvault.publish(tmp_path / "vault", "memory://shards/both")
        check(seqvault.open("memory://shards/both"), users, 2)
        vault.merge()
        assert shards(vault, "vectors/pair") == [2]
        check(vault, users, 2)
        assert vault.verify() == []


def test_wide_pages_lie_in_smaller_shards_too(tmp_path):
    """100 words of scalars a page: 655 pages in 64 MiB."""
    fields = tuple(Field(f"f{number}", "float32") for number in range(99))
    users = np.arange(1400)
    columns = {field.name: (users * number).astype(np.float32) for number, field in enumerate(fields)}
    with seqvault.create(tmp_path / "vault", Schema(fields=fields)) as writer:
        writer.write({"user": users, "time": np.ones(1400, np.int64), **columns})
    vault = seqvault.open(tmp_path / "vault")
    assert shards(vault, "pages") == [3] and vault.verify() == []
    some = np.array([0, 654, 655, 656, 1309, 1310, 1399])
    np.testing.assert_array_equal(vault.gather(some, 9).columns["f98"], some * 98)
    for user in some.tolist():
        assert vault.get(user)["f7"].tolist() == [user * 7]


@pytest.mark.parametrize("version", [2, 3])
def test_what_says_where_pages_lie_is_made_anew(tmp_path, monkeypatch, version):
    users = np.arange(SHARD_PAGES + 90)
    with monkeypatch.context() as patch:
        if version == 2:
            written_by_version_2(patch)
        with seqvault.create(tmp_path / "vault", SCHEMA) as writer:
            writer.write(events(users, 1))
    (part,) = seqvault.open(tmp_path / "vault").state.parts.values()
    arrays = [f"{part.folder.path}/{name}" for name in ("pages", "vectors/pair")]
    for array in arrays:
        flip(f"{array}/zarr.json", 40, 1)
        for shard in os.listdir(f"{array}/c"):
            flip(f"{array}/c/{shard}/0/0", os.path.getsize(f"{array}/c/{shard}/0/0") - 5, 3)
    report = seqvault.repair(tmp_path / "vault")
    assert report.events_lost == 0 and not report.loss
    vault = seqvault.open(tmp_path / "vault")
    assert vault.verify() == []
    check(vault, users)


def test_a_lost_shard_of_vectors_is_named(tmp_path):
    users = np.arange(SHARD_PAGES + 90)
    with seqvault.create(tmp_path / "vault", SCHEMA) as writer:
        writer.write(events(users, 1))
    (part,) = seqvault.open(tmp_path / "vault").state.parts.values()
    with open(f"{part.folder.path}/vectors/pair/zarr.json", encoding="utf-8") as file:
        assert json.load(file)["chunk_grid"]["configuration"]["chunk_shape"] == [SHARD_PAGES, 256, 128]
    seqvault.publish(tmp_path / "vault", "memory://shards/lost")
    far = seqvault.open("memory://shards/lost", cache_bytes=0)
    far._storage.remove(f"parts/{part.name}/vectors/pair/c/1")
    shutil.rmtree(f"{part.folder.path}/vectors/pair/c/1")
    assert far.get(int(users[0]), fields=["pair"])["pair"].shape == (1, 128)
    with pytest.raises(seqvault.CorruptionError, match="vectors/pair/c/1/0/0 is missing"):
        far.get(int(users[-1]), fields=["pair"])
    with pytest.raises(seqvault.CorruptionError, match="vectors/pair/c/1/0/0 is missing"):
        seqvault.open(tmp_path / "vault")
