"""A damaged vault is an error that names the place, on every read path; never wrong data."""

import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Schema
from laser_jax.vault.inspection import verify
from tests.vault.conftest import FIELDS, random_log, take

FLIPS_A_FILE = 12


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A vault with every kind of file: two parts, string users, vectors, a dictionary; and what it holds."""
    path = tmp_path_factory.mktemp("faults") / "vault"
    users = np.array(["ann", "bob", "cem"], object)
    log = random_log(Schema(user="string", fields=FIELDS), users, 900, 0)
    with seqvault.create(path, Schema(user="string", fields=FIELDS), buffer_events=500) as writer:
        writer.write(take(log, slice(None, 500)))
        writer.write(take(log, slice(500, None)))
    vault = seqvault.open(path)
    assert len(vault.state.parts) == 2
    return path, users, read_by_get(vault, users), read_by_gather(vault, users)


def files_of(path) -> list[str]:
    """Every file that a reader of a vault needs: not the lock, which holds nothing, nor the copies of the manifest."""
    names = [os.path.relpath(os.path.join(folder, name), path) for folder, _, names in os.walk(path) for name in names]
    spare = ("writer.lock", "manifest.copy.json")
    return sorted(name for name in names if name not in spare and not name.startswith("manifests/"))


def read_by_get(vault, users) -> list:
    """Everything, user by user; strings decoded."""
    histories = [vault.get(user, 9999, fields=vault.schema.names) for user in users]
    return [(name, history[name].tolist()) for history in histories for name in history.columns]


def read_by_gather(vault, users) -> list:
    """Everything in one batch; strings decoded."""
    batch = vault.gather(users, n=9999, fields=vault.schema.names)
    return [(name, batch[b][name].tolist()) for b in range(len(users)) for name in batch.columns]


def flip(path, offset: int, bit: int) -> None:
    """Inverts one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ (1 << bit)]))


@pytest.mark.parametrize("read", [read_by_get, read_by_gather])
def test_every_single_bit_flip_is_an_error(whole, tmp_path, read):
    path, users, *_ = whole
    rng = np.random.default_rng(0)
    copy = tmp_path / "vault"
    shutil.copytree(path, copy)
    flips = 0
    for name in files_of(path):
        target = copy / name
        size = target.stat().st_size
        offsets = {0, size - 1, size // 2, *rng.integers(0, size, FLIPS_A_FILE).tolist()}
        for offset in sorted(offsets):
            bit = int(rng.integers(8))
            flip(target, offset, bit)
            # A flip in the manifest's format or version makes it another thing, and is as much an error.
            kinds = (seqvault.CorruptionError, seqvault.NotAVaultError, seqvault.VersionError)
            allowed = kinds if name == "manifest.json" else seqvault.CorruptionError
            with pytest.raises(allowed) as caught:
                read(seqvault.open(copy), users)
            if name != "manifest.json":
                assert name.split("/")[1] in str(caught.value), "the error names the part or dictionary"
            flip(target, offset, bit)
            flips += 1
    assert flips > 300
    assert read(seqvault.open(copy), users) == whole[2 if read is read_by_get else 3]


def test_a_damaged_page_is_named(whole, tmp_path):
    path, users, *_ = whole
    copy = tmp_path / "vault"
    shutil.copytree(path, copy)
    vault = seqvault.open(copy)
    part = list(vault.state.parts.values())[1]
    user = part.user_of_page(1)
    flip(os.path.join(part.folder.path, "pages/c/0/0/0"), int(part.offset[1]) + 9, 3)
    text = rf"part {part.name}, page 1 of pages, user '{user}': its checksum does not match"
    with pytest.raises(seqvault.CorruptionError, match=text):
        vault.get(user, 9999)
    with pytest.raises(seqvault.CorruptionError, match=text):
        vault.gather(users, n=9999)
    assert len(vault.verify()) == 1 and text in vault.verify()[0]
    others = [other for other in users if other != user]
    assert all(len(history) for history in map(vault.get, others)), "whole pages are still read"


def test_verify_names_every_damage(whole, tmp_path):
    path, *_ = whole
    assert seqvault.open(path).verify() == []
    copy = tmp_path / "vault"
    shutil.copytree(path, copy)
    vault = seqvault.open(copy)
    part, other = (part.folder.path for part in vault.state.parts.values())
    flip(os.path.join(part, "pages/c/0/0/0"), 5, 1)
    flip(os.path.join(part, "vectors/tiny/c/0/0/0"), 5, 1)
    flip(os.path.join(other, "page_count/c/0"), 0, 1)
    brand = vault.manifest["dictionaries"]["brand"][0]["name"]
    flip(copy / "dictionaries" / brand / "bytes/c/0", 0, 0)
    damages = vault.verify()
    assert len(damages) == 4
    for place in ("page 0 of pages", "page 0 of vectors/tiny", "page_count", brand):
        assert any(place in damage for damage in damages), place


def test_a_missing_or_cut_file_is_an_error(whole, tmp_path):
    path, users, *_ = whole
    copy = tmp_path / "vault"
    shutil.copytree(path, copy)
    for name in files_of(path):
        data = (copy / name).read_bytes()
        for damage in (data[:-1], None):
            if damage is None:
                os.remove(copy / name)
            else:
                (copy / name).write_bytes(damage)
            with pytest.raises((seqvault.CorruptionError, seqvault.NotAVaultError), match=name.split("/")[-1]):
                seqvault.open(copy)
            assert verify(str(copy))
        (copy / name).write_bytes(data)
    assert verify(str(copy)) == []


def test_a_shard_that_vanishes_under_an_open_vault(whole, tmp_path):
    """zarr reads a missing shard as zeros; a vault must not."""
    path, users, expected_get, expected_gather = whole
    for lost in ("pages/c/0/0/0", "vectors/tiny/c/0/0/0"):
        for read in (read_by_get, read_by_gather):
            copy = tmp_path / "vault"
            shutil.copytree(path, copy)
            vault = seqvault.open(copy)
            os.remove(os.path.join(list(vault.state.parts.values())[0].folder.path, lost))
            with pytest.raises(seqvault.CorruptionError, match=list(vault.state.parts.values())[0].name):
                read(vault, users)
            shutil.rmtree(copy)


def test_a_shard_index_damaged_under_an_open_vault(whole, tmp_path):
    """An open vault has the index in memory and reads on; verify and the next one to open it notice."""
    path, users, by_get, by_gather = whole
    copy = tmp_path / "vault"
    shutil.copytree(path, copy)
    vault = seqvault.open(copy)
    part = list(vault.state.parts.values())[0]
    shard = os.path.join(part.folder.path, "pages/c/0/0/0")
    flip(shard, os.path.getsize(shard) - 8, 2)
    assert read_by_get(vault, users) == by_get and read_by_gather(vault, users) == by_gather
    with pytest.raises(seqvault.CorruptionError, match=f"{part.name}.*shard index"):
        seqvault.open(copy)
    assert any("shard index" in damage for damage in vault.verify())


def test_blank_pages_are_told_from_lost_ones(tmp_path):
    """Events that are all zero make pages that look like a lost shard's; they are real."""
    schema = Schema(fields=[field for field in FIELDS if field.name in ("item", "tiny")])
    zeros = {"user": [0, 0], "time": [0, 0], "item": [0, 0], "tiny": np.zeros((2, 5), np.int8)}
    with seqvault.create(tmp_path / "vault", schema) as writer:
        writer.write(zeros)
    vault = seqvault.open(tmp_path / "vault")
    assert vault.gather([0], fields=["item", "tiny"]).columns["tiny"].tolist() == [[0] * 5] * 2
    assert vault.get(0)["item"].tolist() == [0, 0]
    os.remove(os.path.join(list(vault.state.parts.values())[0].folder.path, "pages/c/0/0/0"))
    with pytest.raises(seqvault.CorruptionError, match="missing"):
        seqvault.open(tmp_path / "vault")
