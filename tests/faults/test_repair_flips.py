"""A flipped bit in a small file of a part costs no event: it is made anew, or set aside until its bytes come back."""

import json
import os
import shutil
import sys

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.__main__ import main
from laser_jax.vault.log import RECORD_HEADER, log_numbers, log_path
from tests.faults.test_log_damage import QUIET, SCHEMA, events, flip, read

#: What nothing else of a part says.
UNIQUE = ("users/c/0", "user_bytes/c/0", "user_offsets/c/0", "user_covers/c/0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A vault of a bulk part, a merged one with snapshot `old`, and a delta part; one user has several pages."""
    path = tmp_path_factory.mktemp("repair") / "vault"
    with seqvault.create(path, SCHEMA) as writer:
        writer.write(events(1, 899))
    with seqvault.open(path, writing=QUIET) as vault:
        vault.append(events(900, 100))
        vault.merge()
        vault.snapshot("old")
        vault.append(events(1000, 100))
        vault.flush()
        assert [part.entry["covers"] for part in vault.state.parts.values()] == [True, False]
    return path


@pytest.fixture
def copy(whole, tmp_path):
    """The vault, to be damaged."""
    shutil.copytree(whole, tmp_path / "vault")
    return tmp_path / "vault"


def part_of(path, number: int):
    """A part of a vault, in order."""
    return list(seqvault.open(path).state.parts.values())[number]


def small_files(path, number: int) -> list[str]:
    """Files of a part that have one checksum for all they hold, inside the part."""
    return sorted(name for name, recorded in part_of(path, number).entry["files"].items() if len(recorded) == 2)


@pytest.mark.parametrize("number", [0, 1])
def test_what_follows_from_the_rest_is_made_anew(whole, copy, number):
    rng = np.random.default_rng(number)
    expected, folder = read(seqvault.open(whole)), part_of(whole, number).folder.path.replace(str(whole), str(copy))
    for name in small_files(whole, number):
        if name in UNIQUE:
            continue
        size = os.path.getsize(f"{folder}/{name}")
        for offset in (0, size - 1, int(rng.integers(size))):
            flip(f"{folder}/{name}", offset, int(rng.integers(8)))
            report = seqvault.repair(copy)
            assert report.events_lost == 0 and not report.loss and name in report.actions[0], name
        os.remove(f"{folder}/{name}")
        assert not seqvault.repair(copy).loss
    assert seqvault.verify(copy) == [] and read(seqvault.open(copy)) == expected
    assert not os.path.exists(copy / "damaged")


@pytest.mark.parametrize("user", ["int64", "string"])
def test_all_that_can_be_made_anew_at_once(tmp_path, user):
    fields = [Field("item", "int64"), Field("brand", "string"), Field("pair", "float32", 2)]
    users = np.arange(700) % 50
    log = {
        "user": users if user == "int64" else np.array([f"user {u}" for u in users.tolist()], object),
        "time": np.arange(1, 701),
        "item": np.arange(700),
        "brand": np.array(["a"] * 700, object),
        "pair": np.ones((700, 2), np.float32),
    }
    with seqvault.create(tmp_path / "vault", Schema(user=user, fields=fields)) as writer:
        writer.write(log)
    before = [seqvault.open(tmp_path / "vault").get(key)["time"].tolist() for key in log["user"][:50].tolist()]
    part = part_of(tmp_path / "vault", 0)
    for name in small_files(tmp_path / "vault", 0):
        if name not in UNIQUE:
            flip(f"{part.folder.path}/{name}", 1, 1)
    shard = f"{part.folder.path}/pages/c/0/0/0"
    flip(shard, os.path.getsize(shard) - 7, 1)
    assert seqvault.repair(tmp_path / "vault").events_lost == 0
    assert seqvault.verify(tmp_path / "vault") == []
    assert [seqvault.open(tmp_path / "vault").get(key)["time"].tolist() for key in log["user"][:50].tolist()] == before


def test_a_shard_index_and_a_dictionary_are_made_anew(whole, copy):
    part, manifest = part_of(copy, 0), seqvault.open(copy).manifest
    for array in ("pages", "vectors/pair"):
        shard = f"{part.folder.path}/{array}/c/0/0/0"
        flip(shard, os.path.getsize(shard) - 5, 3)
    piece = manifest["dictionaries"]["brand"][0]["name"]
    for name in ("bytes/zarr.json", "offsets/zarr.json"):
        flip(copy / "dictionaries" / piece / name, 9, 1)
    report = seqvault.repair(copy)
    assert not report.loss and len(report.actions) == 2
    assert seqvault.verify(copy) == [] and read(seqvault.open(copy)) == read(seqvault.open(whole))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("kind", ["users", "pages"])
def test_what_is_given_up_is_set_aside_and_comes_back(whole, copy, number, kind, capsys):
    part = part_of(copy, number)
    if kind == "users":
        place, offset, lost = "user_bytes/c/0", 1, part.entry["events"]
    else:
        place, offset, lost = "pages/c/0/0/0", int(part.offset[0]) + 30, int(part.page_count[0])
    original = f"{part.folder.path}/{place}".replace(str(copy), str(whole))
    flip(f"{part.folder.path}/{place}", offset, 2)
    assert main(["repair", str(copy), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    kept = copy / "damaged" / "parts" / part.name
    assert report["events_lost"] == lost and report["loss"]
    assert report["set_aside"] == [{"path": str(kept), "events": part.entry["events"], "lost": lost}]
    assert seqvault.verify(copy) == [] and read(seqvault.open(copy)) != read(seqvault.open(whole))
    assert main(["repair", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"set aside: {kept}" in out and "still damaged" in out and out.endswith(f"whole: {copy}\n")
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(1100, 10))
    shutil.copyfile(original, kept / place)
    assert f"part {part.name} is back" in str(seqvault.repair(copy))
    assert seqvault.repair(copy).set_aside == [] and seqvault.verify(copy) == []
    found, expected = read(seqvault.open(copy, at="old")), read(seqvault.open(whole, at="old"))
    assert found == expected
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.merge()
        assert vault.num_events == 1109


def test_pages_that_do_not_say_where_a_user_begins_are_set_aside(tmp_path):
    """Two users with one full page each, and a third with two: a page less of one could be a page more of another."""
    users = np.repeat([1, 2, 3], [256, 256, 512])
    with seqvault.create(tmp_path / "vault", Schema(fields=[Field("item", "int64")])) as writer:
        writer.write({"user": users, "time": np.arange(1, 1025), "item": np.arange(1024)})
    part = part_of(tmp_path / "vault", 0)
    flip(f"{part.folder.path}/user_first_page/c/0", 20, 1)
    report = seqvault.repair(tmp_path / "vault")
    assert report.events_lost == 1024 and os.path.exists(report.set_aside[0]["path"])


def test_a_part_comes_back_beside_a_merge_of_newer_parts(whole, copy):
    part = part_of(copy, 0)
    kept = give_up(copy, part)
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(2000, 30))
        vault.flush()
        vault.append(events(2030, 30))
        vault.merge()
    flip(f"{kept}/user_bytes/c/0", 1, 1)
    report = seqvault.repair(copy)
    assert f"part {part.name} is back" in str(report) and report.set_aside == []
    assert sum(map(len, seqvault.open(copy).gather(["ann", "bob", "cem"], n=9999))) == 1099 + 60
    assert read(seqvault.open(copy, at="old")) == read(seqvault.open(whole, at="old"))


def test_a_part_whose_users_were_merged_since_stays_aside(copy):
    part = part_of(copy, 1)
    kept = give_up(copy, part)
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(2000, 30))
        vault.merge()
        before = read(vault)
    flip(f"{kept}/user_bytes/c/0", 1, 1)
    report = seqvault.repair(copy)
    assert report.actions == [] and "cannot come back: its users were merged" in str(report) and os.path.isdir(kept)
    assert read(seqvault.open(copy)) == before


def give_up(path, part) -> str:
    """Damages the users of a part, and repairs the vault; where the part is set aside."""
    flip(f"{part.folder.path}/user_bytes/c/0", 1, 1)
    return seqvault.repair(path).set_aside[0]["path"]


def test_forgetting_deletes_what_was_set_aside(copy):
    part = part_of(copy, 1)
    assert os.path.isdir(give_up(copy, part))
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.forget(["somebody else"])
    assert not os.path.exists(copy / "damaged") and seqvault.repair(copy).set_aside == []


def test_a_repair_that_is_killed_is_called_again(copy, monkeypatch):
    part = part_of(copy, 0)
    flip(f"{part.folder.path}/user_bytes/c/0", 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["laser_jax.vault.repair"], "commit_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            seqvault.repair(copy)
    assert seqvault.repair(copy).events_lost == part.entry["events"]
    assert seqvault.verify(copy) == [] and os.listdir(copy / "damaged" / "parts")


@pytest.mark.parametrize("where", ["header", "body"])
@pytest.mark.parametrize("mark", ["there", "gone"])
def test_the_numbers_of_a_damaged_record_are_never_given_again(copy, where, mark):
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(1100, 10))
        last = vault.append(events(1110, 7))
    path = log_path(str(copy), log_numbers(str(copy))[-1])
    with open(path, "rb") as file:
        start = file.read().rfind((0x1DA7E5).to_bytes(4, "little"))
    flip(path, start + (5 if where == "header" else RECORD_HEADER + 40), 1)
    if mark == "gone":
        os.remove(copy / "log" / "acknowledged")
    report = seqvault.repair(copy)
    # Without either nobody knows how many events there were.
    assert report.events_lost == (0 if where == "header" and mark == "gone" else 7)
    assert report.loss and os.path.basename(path) in str(report.set_aside)
    with seqvault.open(copy, writing=QUIET) as vault:
        assert vault.next_sequence >= last
        assert vault.append(events(1120, 1)) > last
        assert vault.get("cem", 1, as_of=last)["item"][0] < 1120
    assert seqvault.verify(copy) == []


def test_copies_of_the_manifest_are_verified_and_repaired(copy):
    reader = seqvault.open(copy)
    with seqvault.open(copy, writing=QUIET) as vault:
        vault.append(events(1100, 10))
        vault.flush()
    names = os.listdir(copy / "manifests")
    (older,) = [name for name in names if not os.path.samefile(copy / "manifests" / name, copy / "manifest.json")]
    for name in ("manifest.copy.json", f"manifests/{older}"):
        flip(copy / name, 40, 1)
    damages = seqvault.verify(copy)
    assert len(damages) == 2 and "manifest.copy.json" in damages[0] and older in damages[1]
    assert "manifest.copy.json is written anew" in str(seqvault.repair(copy))
    assert seqvault.verify(copy) == [] and seqvault.repair(copy).actions == []
    assert (copy / "manifest.copy.json").read_bytes() == (copy / "manifest.json").read_bytes()
    assert reader.num_events == 1099


def test_a_part_that_was_lost_comes_back_from_a_backup(whole, copy):
    part = part_of(copy, 0)
    shutil.rmtree(part.folder.path)
    report = seqvault.repair(copy)
    (aside,) = report.set_aside
    assert report.events_lost == part.entry["events"] and aside["path"] == str(copy / "damaged" / "parts" / part.name)
    shutil.rmtree(aside["path"])
    shutil.copytree(whole / "parts" / part.name, aside["path"])
    assert not seqvault.repair(copy).set_aside and read(seqvault.open(copy)) == read(seqvault.open(whole))


def test_a_whole_file_of_another_part_is_not_taken_for_its_own(tmp_path):
    """Each is what a checksum says of it, and of the same size: a copy that went to the wrong place."""
    with seqvault.create(tmp_path / "vault", SCHEMA):
        pass
    with seqvault.open(tmp_path / "vault", writing=QUIET) as vault:
        for start in (1, 2):
            vault.append(events(start, 1))
            vault.flush()
        before = read(vault)
    one, other = (part_of(tmp_path / "vault", number).folder.path for number in (0, 1))
    for name in ("page_first_time/c/0", "page_last_sequence/c/0"):
        assert os.path.getsize(f"{one}/{name}") == os.path.getsize(f"{other}/{name}")
        shutil.copy(f"{one}/{name}", f"{other}/{name}")
        assert [damage for damage in seqvault.verify(tmp_path / "vault") if f"{other}/{name}" in str(damage)]
        assert not seqvault.repair(tmp_path / "vault").loss
        assert seqvault.verify(tmp_path / "vault") == [] and read(seqvault.open(tmp_path / "vault")) == before
