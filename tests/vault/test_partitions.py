"""A vault in partitions answers as a single one does."""

import concurrent.futures
import os
import pathlib
import pickle
import re

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault.service import VaultService
from tests.faults.test_bit_flips import flip
from tests.vault.conftest import FIELDS, Model, assert_same, random_log, take

WRITING = seqvault.WriterOptions(background=False)


@pytest.fixture(params=["int64", "string"])
def case(request, tmp_path):
    """(path, users, log): 4000 of 6000 events are written in bulk into three partitions."""
    users = np.arange(20) if request.param == "int64" else np.array([f"u{i}" for i in range(20)], object)
    schema = Schema(user=request.param, fields=FIELDS)
    log = random_log(schema, users, 6000, 0)
    with seqvault.create(tmp_path / "vault", schema, partitions=3) as writer:
        writer.write(take(log, slice(0, 4000)))
    return tmp_path / "vault", users, log


def assert_reads(vault, users, model, as_of=None) -> None:
    """Every user by get and in one gather."""
    names = vault.schema.names
    for n, before in ((1, None), (70, 5000), (5000, None)):
        batch = vault.gather(users, before, n, as_of=as_of, fields=names)
        for position, user in enumerate(users):
            expected = model.read(user, n, before)
            assert_same(vault, batch[position], expected, names)
            key = user if isinstance(user, str) else int(user)
            assert_same(vault, vault.get(key, n, before, as_of, fields=names), expected, names)


def test_answers_are_those_of_one_vault(case):
    path, users, log = case
    before = Model(take(log, slice(0, 4000)))
    with seqvault.open(path, writing=WRITING) as vault:
        assert len(vault) == 20 and len({len(part) for part in vault.partitions}) >= 1
        assert min(len(part) for part in vault.partitions) > 0, "users lie in every partition"
        assert_reads(vault, users, before)
        seen = vault.next_sequence
        for row in range(4000, 6000, 400):
            after = vault.append(take(log, slice(row, row + 400)))
        assert sum(after) == 6000 and after == vault.next_sequence
        model = Model(log)
        assert_reads(vault, users, model)
        assert_reads(vault, users, before, as_of=seen)
        reader = seqvault.open(path)
        assert_reads(reader, users, model)
        assert vault.snapshot("then") == "then"
        vault.append(take(log, slice(0, 100)))
        with pytest.raises(seqvault.VaultError, match="has a snapshot 'then'"):
            vault.snapshot("then")
        reader.refresh()
        assert reader.num_events == 6100
        assert_reads(seqvault.open(path, at="then"), users, model)
        vault.merge()
        assert vault.verify() == [] and vault.stats()["users"] == 20
        gone = users[3] if isinstance(users[3], str) else int(users[3])
        assert vault.forget([gone]) > 0 and len(vault.get(gone)) == 0 and len(vault) == 19
    assert pickle.loads(pickle.dumps(seqvault.open(path))).num_events == seqvault.open(path).num_events


def test_many_threads_give_new_strings_their_codes(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema(fields=[Field("brand", "string")]), partitions=2):
        pass
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:

        def write(thread):
            for number in range(30):
                brands = [f"{thread}-{number}", f"all-{number}"]
                vault.append({"user": [thread, thread + 1], "time": [number] * 2, "brand": brands})
                vault.refresh()

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        known = vault.dictionary("brand").tolist()
        assert len(known) == len(set(known)) == 5 * 30
    again = seqvault.open(tmp_path / "vault")
    assert again.dictionary("brand").tolist() == known
    assert again.get(0)["brand"].tolist() == [f"0-{number}" for number in range(30)]


def test_strings_have_one_code_in_all_partitions(tmp_path):
    schema = Schema(fields=[Field("brand", "string")])
    brands = np.array(["a", "b", "c", "a", "b", "c"] * 20, object)
    users = np.arange(120)
    with seqvault.create(tmp_path / "vault", schema, partitions=4) as writer:
        writer.write({"user": users, "time": users, "brand": brands})
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        found = vault.gather(users)
        np.testing.assert_array_equal(found.columns["brand"], vault.encode("brand", brands))
        with pytest.raises(seqvault.SchemaError, match="need a sequence of strings"):
            vault.encode("brand", "food")
        vault.append({"user": users, "time": users + 200, "brand": brands[::-1] + "!"})
        again = seqvault.open(tmp_path / "vault")
        assert again.dictionary("brand").tolist() == vault.dictionary("brand").tolist()
        assert len(set(vault.dictionary("brand"))) == 6
        newest = again.gather(users, n=1)
        np.testing.assert_array_equal(again.dictionary("brand")[newest.columns["brand"]], brands[::-1] + "!")


def test_a_snapshot_without_a_name_moves_none_that_is_there(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema(), partitions=2) as writer:
        writer.write({"user": [1] * 5 + [2] * 5, "time": [*range(5)] * 2})
    with seqvault.open(tmp_path / "vault", writing=seqvault.WriterOptions(background=False)) as vault:
        first = vault.snapshot()
        vault.retain(events=2)
        vault.merge()
        second = vault.snapshot()
        assert vault.snapshots() == sorted([first, second]) and first != second
    for name, count in ((first, 5), (second, 2)):
        pinned = seqvault.open(tmp_path / "vault", at=name)
        assert [len(pinned.get(user)) for user in (1, 2)] == [count] * 2


def test_one_writer_and_no_half_made_vault(tmp_path):
    schema = Schema(fields=[Field("x", "int8")])
    with pytest.raises(seqvault.SchemaError, match="'x', row 0: 999"):
        with seqvault.create(tmp_path / "vault", schema, partitions=2) as writer:
            writer.write({"user": [1, 2], "time": [1, 2], "x": [1, 2]})
            writer.write({"user": [1], "time": [1], "x": [999]})
    with pytest.raises(seqvault.NotAVaultError):
        seqvault.open(tmp_path / "vault")
    with seqvault.create(tmp_path / "vault", schema, partitions=2) as writer:
        writer.write({"user": [1, 2], "time": [1, 2], "x": [1, 2]})
    with pytest.raises(seqvault.VaultExistsError):
        seqvault.create(tmp_path / "vault", schema, partitions=2)
    first, second = seqvault.open(tmp_path / "vault"), seqvault.open(tmp_path / "vault")
    with first:
        first.append({"user": [1], "time": [3], "x": [3]})
        with pytest.raises(seqvault.LockedError):
            second.append({"user": [1], "time": [3], "x": [3]})
    with second:
        second.append({"user": [1], "time": [4], "x": [4]})
    assert len(seqvault.open(tmp_path / "vault").get(1)) == 3
    with pytest.raises(seqvault.VaultError, match="partitions=0"):
        seqvault.create(tmp_path / "other", schema, partitions=0)


def test_a_batch_may_be_sent_again_much_later(tmp_path):
    """Each partition sees some of a client's numbers only."""
    with seqvault.create(tmp_path / "vault", Schema(), partitions=2):
        pass
    rng = np.random.default_rng(0)
    users = rng.integers(0, 1000, 600).tolist()
    with seqvault.open(tmp_path / "vault") as vault:
        for number in range(600):
            if number != 5:
                vault.append({"user": [users[number]], "time": [number]}, origin=("a", number))
        vault.flush()
    with seqvault.open(tmp_path / "vault") as vault:
        for number in (5, 5, 0, 1, 599, 300):
            vault.append({"user": [users[number]], "time": [number]}, origin=("a", number))
        assert vault.num_events == 600
        assert 5 in vault.get(users[5])["time"].tolist()


def test_partitions_of_which_some_are_evolved_already(tmp_path):
    old = Schema(fields=(Field("item", "int32"),))
    new = Schema(fields=(Field("item", "int64"), Field("price", "float64", default=7.5)))
    users = np.arange(40)
    with seqvault.create(tmp_path / "vault", old, partitions=3) as writer:
        writer.write({"user": users, "time": users, "item": users})
    with seqvault.open(tmp_path / "vault") as vault:
        for number in (2, 0):
            vault.partitions[number].evolve(new)
            found = vault.gather(users)
            assert sorted(found.columns) == ["item", "time"]
            assert found.columns["item"].dtype == np.int64 and found.columns["item"].tolist() == users.tolist()
            with pytest.raises(seqvault.UnknownFieldError, match="partition-0000.* has no field 'price'"):
                vault.gather(users, fields=["price"])
        vault.evolve(new)
        assert vault.gather(users).columns["price"].tolist() == [7.5] * 40


def test_bounds_of_another_length_are_refused(case):
    path, users, _ = case
    vault, keys = seqvault.open(path), users[:3]
    for name in ("before", "as_of"):
        for length in (2, 5):
            with pytest.raises(seqvault.SchemaError, match=rf"{name} of shape \({length},\) for 3 users"):
                vault.gather(keys, **{name: np.full(length, 9)})
        with pytest.raises(seqvault.SchemaError, match=f"{name} of type float64"):
            vault.gather(keys, **{name: [1.5, 2.5, 3.5]})
    with pytest.raises(seqvault.SchemaError, match="before=1700000000000"):
        vault.gather(keys, before=[5, 5, 1_700_000_000_000])
    for call in (lambda bounds: vault.gather(keys, as_of=bounds), lambda bounds: vault.get(keys[0], as_of=bounds)):
        with pytest.raises(seqvault.SchemaError, match="as_of of 2 partitions: this vault has 3"):
            call(seqvault.Sequences((5, 5)))
    wrong = "ann" if isinstance(users[0], str) else [1.5]
    with pytest.raises(seqvault.SchemaError, match="users"):
        vault.gather(wrong)
    if not isinstance(users[0], str):
        beyond = np.array([2**64 - 1, 5], np.uint64)  # not user -1, whose bits these are
        assert vault.gather(beyond, n=1).offsets.tolist() == [0, 0, 1]


def test_all_partitions_forget_the_users_of_an_iterator(case):
    path, users, _ = case
    with seqvault.open(path, writing=WRITING) as vault:
        if isinstance(users[0], str):
            with pytest.raises(seqvault.SchemaError, match="need a sequence of strings"):
                vault.forget("u1")  # and not the users "u" and "1"
            assert vault.forget(user for user in users[5:]) > 0
        else:
            assert vault.forget(np.array([*range(5, 20), 2**64 - 1], np.uint64)) > 0
        assert sorted(vault.users().tolist()) == sorted(users[:5].tolist())


@pytest.fixture
def coded(tmp_path):
    """(path, brands of users 0 to 29, where the two records of the codebook begin): the second is of the last ten."""
    schema = Schema(fields=[Field("brand", "string")])
    brands = [f"brand {i}" for i in range(30)]
    with seqvault.create(tmp_path / "vault", schema, partitions=2) as writer:
        writer.write({"user": range(20), "time": range(20), "brand": brands[:20]})
    second = os.path.getsize(tmp_path / "vault" / "codes.log")
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        vault.append({"user": range(20, 30), "time": range(20, 30), "brand": brands[20:]})
    return str(tmp_path / "vault"), brands, (0, second)


@pytest.mark.parametrize("record", [0, 1])
@pytest.mark.parametrize("place", ["shorter", "longer", "checksum", "string"])
def test_damaged_codes_are_named_and_mended(coded, record, place):
    path, brands, starts = coded
    file = os.path.join(path, "codes.log")
    whole = pathlib.Path(file).read_bytes()
    assert seqvault.verify(path) == []
    size = int.from_bytes(whole[starts[record] : starts[record] + 4], "little")
    lowest = (size & -size).bit_length() - 1
    byte, bit = {"shorter": (0, lowest), "longer": (1, 5), "checksum": (5, 0), "string": (40, 1)}[place]
    flip(file, starts[record] + byte, bit)
    damage = f"{file}, byte {starts[record]}: a record is damaged; see `repair`"
    with pytest.raises(seqvault.CorruptionError, match=re.escape(damage)):
        seqvault.open(path)
    assert seqvault.verify(path) == [damage]
    report = seqvault.repair(path)
    assert damage in report.actions and seqvault.verify(path) == []
    vault = seqvault.open(path)
    assert vault.gather(range(30)).columns["brand"].tolist() == vault.encode("brand", brands).tolist()
    assert [vault.get(user)["brand"].tolist() for user in range(30)] == [[brand] for brand in brands]
    found = vault.dictionary("brand").tolist()
    if place in ("shorter", "longer"):
        assert pathlib.Path(file).read_bytes() == whole and not report.loss
    else:
        gone = slice(0, 20) if record == 0 else slice(20, 30)
        kept = [code for code in range(30) if code not in range(*gone.indices(30))]
        assert report.loss and [found[code] for code in kept] == [brands[code] for code in kept]
        assert found[gone] == [f"<lost {code}>" for code in range(*gone.indices(30))]
        assert sorted(found[-len(brands[gone]) :]) == sorted(brands[gone])
        assert pathlib.Path(report.set_aside[0]["path"]).read_bytes() != whole
    with seqvault.open(path, writing=WRITING) as writing:
        writing.append({"user": [1], "time": [99], "brand": ["new"]})
        assert writing.verify() == [] and writing.dictionary("brand").tolist() == [*found, "new"]
    assert seqvault.repair(path).actions == []


@pytest.mark.parametrize("left", [None, 0, 1, 100])
def test_codes_that_nobody_can_know_are_not_given_anew(coded, left):
    """Of a codebook that was removed, or cut: at a record's begin, or inside it."""
    path, brands, starts = coded
    file = os.path.join(path, "codes.log")
    whole = pathlib.Path(file).read_bytes()
    if left is None:
        os.remove(file)
    else:
        os.truncate(file, starts[left] if left < 2 else starts[1] + left)
    (damage,) = seqvault.verify(path)
    assert damage.startswith(f"{file}: {10 if left else 30} strings of field 'brand' have no code, such as 'brand ")
    cut = rf"{file} is cut or missing: \d+ strings of field 'brand' in .*partition-0000\d have no code"
    with seqvault.open(path, writing=WRITING) as vault, pytest.raises(seqvault.CorruptionError, match=cut):
        vault.append({"user": [1], "time": [99], "brand": ["new"]})
    with pytest.raises(seqvault.CorruptionError, match=cut):
        VaultService(os.path.join(path, "partition-00000"))
    with pytest.raises(seqvault.CorruptionError, match=rf"{file} is cut or missing.*'brand'.*from a backup"):
        seqvault.repair(path)
    pathlib.Path(file).write_bytes(whole)
    assert seqvault.verify(path) == [] and seqvault.repair(path).actions == []


def test_a_record_of_codes_that_a_crash_cut_is_no_damage(coded):
    path, brands, _ = coded
    file = os.path.join(path, "codes.log")
    whole = pathlib.Path(file).read_bytes()
    for rest in (b"\x20", whole[:60]):
        pathlib.Path(file).write_bytes(whole + rest)
        assert seqvault.verify(path) == [] and seqvault.repair(path).actions == []
    with seqvault.open(path, writing=WRITING) as vault:
        vault.append({"user": [1], "time": [99], "brand": ["new"]})
    assert seqvault.open(path).dictionary("brand").tolist() == [*brands, "new"]
