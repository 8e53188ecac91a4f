"""A vault behind a service answers as the vault itself does; and any Flight client can use it."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from laser_jax.vault import appender, origins, served_partitions
from laser_jax.vault.__main__ import main
from laser_jax.vault.merging import NO_BOUND
from laser_jax.vault.partitioning import partition_of, partition_path
from laser_jax.vault.service import Limits, VaultService
from tests.faults.test_bit_flips import flip
from tests.vault.conftest import FIELDS, Model, assert_same, random_log, take

WRITING = seqvault.WriterOptions(background=False)
ITEMS = Schema(fields=(Field("item", "int64"), Field("brand", "string")))


def url(service) -> str:
    return f"grpc://127.0.0.1:{service.port}"


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """A service of ten users with ten events each."""
    path = tmp_path_factory.mktemp("items") / "vault"
    with seqvault.create(path, ITEMS) as writer:
        rows = np.arange(100)
        writer.write({"user": rows % 10, "time": rows, "item": rows, "brand": [f"b{row % 3}" for row in rows.tolist()]})
    with VaultService(str(path), writing=WRITING, limits=Limits(events=2000, users=20, put_bytes=20_000)) as service:
        yield service


@pytest.fixture(params=["int64", "string"])
def served(request, tmp_path):
    """(schema, users, path of the vault)."""
    users = np.arange(20) if request.param == "int64" else np.array([f"u{i}" for i in range(20)], object)
    return Schema(user=request.param, fields=FIELDS), users, tmp_path / "vault"


def test_a_service_is_verified_by_the_command_and_not_repaired(items, capsys):
    assert main(["verify", url(items), "--json"]) == 0 and json.loads(capsys.readouterr().out) == []
    assert main(["repair", url(items)]) == 1
    assert "repair needs the directory of the vault" in capsys.readouterr().err


def test_what_a_call_cannot_mean_is_refused(items):
    """Milliseconds given to a vault of seconds would show the future; a bare string is not its letters."""
    for vault in (seqvault.open(items.vault.path), seqvault.open(url(items))):
        for before in (1_700_000_000_000, np.int64(1_700_000_000_000)):
            with pytest.raises(seqvault.SchemaError, match="before=1700000000000: need an integer <= 4102444800 in s"):
                vault.get(1, before=before)
            with pytest.raises(seqvault.SchemaError, match="before=1700000000000"):
                vault.gather([1, 2], before=[before, 5])
        assert len(vault.get(1, before=4102444800)) == len(vault.get(1, before=2**63 - 1)) == 10
        with pytest.raises(seqvault.SchemaError, match=r"values 'b1' of 'brand': need a sequence of strings"):
            vault.encode("brand", "b1")


@pytest.mark.parametrize("partitions", [None, 3])
def test_answers_are_those_of_the_vault(served, partitions):
    schema, users, path = served
    log = random_log(schema, users, 6000, 0)
    with seqvault.create(path, schema, partitions=partitions) as writer:
        writer.write(take(log, slice(0, 4000)))
    paths = [str(path)] if partitions is None else [partition_path(str(path), number) for number in range(partitions)]
    services = [VaultService(path, writing=WRITING, limits=Limits(users=7)) for path in paths]
    try:
        vault = seqvault.open(",".join(url(service) for service in services))
        assert vault.schema == schema and len(vault) == 20 and vault.num_events == 4000
        assert sorted(vault.users().tolist()) == sorted(users.tolist())
        seen = vault.next_sequence
        for row in range(4000, 6000, 500):
            after = vault.append(take(log, slice(row, row + 500)))
        assert after == vault.next_sequence
        again = pickle.loads(pickle.dumps(vault))
        names = schema.names
        for model, as_of in ((Model(log), None), (Model(take(log, slice(0, 4000))), seen)):
            for n, before in ((1, None), (70, 5000), (5000, None)):
                batch = again.gather(users, before, n, as_of=as_of, fields=names)
                for position, user in enumerate(users):
                    expected = model.read(user, n, before)
                    assert_same(again, batch[position], expected, names)
                    key = user if isinstance(user, str) else int(user)
                    assert_same(again, again.get(key, n, before, as_of, fields=names), expected, names)
        nobody = "nobody" if schema.user == "string" else 2**63
        assert len(again.get(nobody)) == 0
        two = [nobody, users[0]] if schema.user == "string" else np.array([nobody, 0], np.uint64)
        assert again.gather(two, n=1).offsets.tolist() == [0, 0, 1]
        assert len(again.gather(users[:0])) == 0
        found = again.get(users[1].item() if schema.user == "int64" else users[1], 10, where={"brand": ["a", ""]})
        assert set(found["brand"]) <= {"a", ""} and found.scanned >= len(found)
        assert again.snapshot("then") == "then" and again.snapshots() == ["then"]
        vault.append(take(log, slice(0, 100)))
        then = seqvault.open(vault.path, at="then")
        assert_same(then, then.gather(users, n=5000, fields=names)[0], Model(log).read(users[0], 5000, None), names)
        vault.merge()
        assert vault.verify() == [] and vault.stats()["events"] == 6100
        more = (Field("weight2", "float32", default=1.5), Field("place", "string", default="home"))
        wider = dataclasses.replace(schema, fields=(*schema.fields, *more))
        vault.evolve(wider)
        assert vault.schema == wider
        key = users[1].item() if schema.user == "int64" else users[1]
        event = take(log, slice(0, 1)) | {"user": [key], "time": [10_001], "weight2": [2.5], "place": ["shop"]}
        vault.append(event)
        for handle in (vault, seqvault.open(vault.path)):
            newest = handle.get(key, 2)
            assert newest["weight2"].tolist() == [1.5, 2.5] and newest["place"].tolist() == ["home", "shop"]
        gone = users[3].item() if schema.user == "int64" else users[3]
        assert vault.forget([gone]) > 0 and len(vault.get(gone)) == 0
        vault.close()
    finally:
        for service in services:
            service.close()
    with seqvault.open(path) as vault:
        assert len(vault) == 19, "and it is in the files"


def test_strings_of_partitions_have_one_code_for_all_clients(tmp_path):
    with seqvault.create(tmp_path / "vault", ITEMS, partitions=2) as writer:
        writer.write({"user": np.arange(20), "time": np.arange(20), "item": np.arange(20), "brand": ["a", "b"] * 10})
    services = [VaultService(partition_path(str(tmp_path / "vault"), number), writing=WRITING) for number in range(2)]
    try:
        one, other = (seqvault.open(",".join(map(url, services))) for _ in range(2))
        for number, vault in enumerate((one, other, one)):
            brands = [f"new{number}-{i}" for i in range(20)]
            vault.append(
                {"user": np.arange(20), "time": np.full(20, 50 + number), "item": np.arange(20), "brand": brands}
            )
        newest = [vault.gather(np.arange(20), n=1).columns["brand"] for vault in (one, other)]
        np.testing.assert_array_equal(*newest)
        assert other.dictionary("brand")[newest[1]].tolist() == brands
    finally:
        for service in services:
            service.close()
    local = seqvault.open(tmp_path / "vault")
    np.testing.assert_array_equal(local.encode("brand", brands), newest[0])


def test_a_batch_under_way_is_not_the_callers_any_more(tmp_path):
    with seqvault.create(tmp_path / "vault", ITEMS):
        pass
    numbers, brands = np.zeros(1, np.int64), np.array(["b"], object)
    events = {"user": np.ones(1, np.int64), "time": numbers, "item": numbers, "brand": brands}
    with VaultService(str(tmp_path / "vault"), writing=WRITING) as service, seqvault.open(url(service)) as vault:
        futures = []
        for number in range(40):
            numbers[:], brands[:] = number, f"b{number}"
            futures.append(vault.append_async(events))
        for future in futures:
            future.result()
        found = vault.get(1)
        assert found["item"].tolist() == found["time"].tolist() == list(range(40))
        assert found["brand"].tolist() == [f"b{number}" for number in range(40)]
        for append in (vault.append, vault.append_async):
            with pytest.raises(seqvault.SchemaError, match="origin="):
                append(events, origin=("a", -1))


@pytest.fixture
def parted(tmp_path):
    """(path, a user of each of three partitions) of a vault of items, one event each."""
    path, schema = str(tmp_path / "vault"), Schema(fields=(Field("item", "int64"),))
    owner = partition_of(schema, np.arange(50), 3).tolist()
    users = [owner.index(number) for number in range(3)]
    with seqvault.create(path, schema, partitions=3) as writer:
        writer.write({"user": users, "time": [1] * 3, "item": [1] * 3})
    return path, users


@contextlib.contextmanager
def services_of(path: str):
    """A service for each of three partitions."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(VaultService(partition_path(path, number), writing=WRITING)) for number in range(3)]


def test_an_append_is_written_in_the_partitions_that_are_there(parted):
    """Also if a lost one was never asked before; and its bounds hide nothing."""
    path, users = parted
    with services_of(path) as services:
        where = ",".join(map(url, services))
        services[1].close()
        vault = seqvault.open(where, timeout_s=1)
        events = {"user": users, "time": [2] * 3, "item": [2] * 3}
        with pytest.raises(seqvault.UnavailableError, match=url(services[1])):
            vault.append(events, origin=("me", 1))
        assert [len(vault.get(users[number])) for number in (0, 2)] == [2, 2]
        seen = vault.append({"user": users[:1], "time": [3], "item": [3]})
        assert seen == (3, NO_BOUND, 2)
        with VaultService(partition_path(path, 1), url(services[1]), writing=WRITING):
            deadline = time.monotonic() + 60
            while (seen := vault.append({"user": users[:1], "time": [4], "item": [4]}))[1] != 1:
                assert seen[1] == NO_BOUND and time.monotonic() < deadline
                time.sleep(0.05)
            vault.append(events, origin=("me", 1))
            assert [len(vault.get(user, as_of=seen)) for user in users] == [seen[0], 1, 2]
            assert [len(vault.get(user)) for user in users] == [seen[0], 2, 2]


def test_bounds_show_the_history_of_partitions_that_were_never_asked(parted):
    path, users = parted
    with services_of(path) as services:
        vault = seqvault.open(",".join(map(url, services)))
        found = vault.gather(users[:1])
        seen = vault.append({"user": users[:1], "time": [5], "item": [5]})
        assert seen == vault.next_sequence == (2, 1, 1) and found.as_of == (1, 1, 1)
        for bounds, sizes in ((found.as_of, [1, 1, 1]), (seen, [2, 1, 1])):
            assert np.diff(vault.gather(users, as_of=bounds).offsets).tolist() == sizes
            with pytest.raises(seqvault.SchemaError, match="as_of of 2 partitions"):
                vault.get(users[0], as_of=seqvault.Sequences(bounds[:2]))
        with pytest.raises(seqvault.SchemaError, match="before of shape"):
            vault.gather(users, before=[9] * 4)


@pytest.mark.parametrize("there", [0, 2])
def test_halted_services_hold_up_nobody_who_opens_the_others(parted, monkeypatch, there):
    """They take connections, and say nothing."""
    monkeypatch.setattr(served_partitions, "HEALTH_S", 0.3)
    path, users = parted
    with contextlib.ExitStack() as stack:
        halted = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        urls = [f"grpc://127.0.0.1:{one.getsockname()[1]}" for one in halted]
        service = stack.enter_context(VaultService(partition_path(path, there), writing=WRITING))
        urls.insert(there, url(service))
        began = time.monotonic()
        vault = seqvault.open(",".join(urls), timeout_s=60)
        assert len(vault.get(users[there])) == 1
        seen = vault.append({"user": [users[there]], "time": [5], "item": [5]})
        assert list(seen) == [2 if number == there else NO_BOUND for number in range(3)]
        assert time.monotonic() - began < 20, "not their time-out, and not once for each"


def test_a_service_that_is_the_wrong_one_is_told_of_at_once(parted, items):
    path, _ = parted
    with services_of(path) as services:
        with pytest.raises(seqvault.VaultError, match="by its place it must serve partition 2 of 3"):
            seqvault.open(",".join([*map(url, services[:2]), url(items)]))


def test_the_first_string_field_comes_to_handles_that_are_open(parted):
    path, users = parted
    new = Schema(fields=(Field("item", "int64"), Field("brand", "string", default="none")))
    brands = ["a", "b", "c"]
    with services_of(path) as services:
        where = ",".join(map(url, services))
        evolving, old, stale = (seqvault.open(where) for _ in range(3))
        evolving.evolve(new)
        evolving.append({"user": users, "time": [2] * 3, "item": [2] * 3, "brand": brands})
        fresh = seqvault.open(where)
        fresh.append({"user": users, "time": [3] * 3, "item": [3] * 3, "brand": brands[::-1]})
        expected = fresh.encode("brand", ["none", "a", "c", "none", "b", "b", "none", "c", "a"]).tolist()
        old.refresh()
        assert old.schema == evolving.schema == new
        for vault in (stale, old, evolving, fresh):
            found = vault.gather(users)
            assert found.columns["brand"].tolist() == expected
            assert found[1]["brand"].tolist() == vault.get(users[1])["brand"].tolist() == ["none", "b", "b"]
        assert stale.partitions[0].get(users[0])["brand"].tolist() == ["none", "a", "c"]
        old.append({"user": users, "time": [4] * 3, "item": [4] * 3, "brand": ["new"] * 3})
        assert [fresh.get(user, 1)["brand"].tolist() for user in users] == [["new"]] * 3


def test_codes_that_were_made_anew_mean_nothing_else_to_who_knew_the_old_ones(tmp_path):
    path, users = str(tmp_path / "vault"), list(range(20))
    brands = [f"brand {user}" for user in users]
    with seqvault.create(path, ITEMS, partitions=2) as writer:
        writer.write({"user": users, "time": users, "item": users, "brand": brands})
    paths = [partition_path(path, number) for number in range(2)]
    with contextlib.ExitStack() as stack:
        services = [stack.enter_context(VaultService(one, writing=WRITING)) for one in paths]
        where = list(map(url, services))
        vault = seqvault.open(",".join(where))
        assert [history["brand"].tolist() for history in vault.gather(users)] == [[brand] for brand in brands]
    flip(os.path.join(path, "codes.log"), 40, 1)
    with pytest.raises(seqvault.CorruptionError, match="codes.log, byte 0: a record is damaged; see `repair`"):
        VaultService(paths[0])
    assert seqvault.repair(path).loss
    with contextlib.ExitStack() as stack:
        for place in zip(paths, where, strict=True):
            stack.enter_context(VaultService(*place, writing=WRITING))
        fresh = seqvault.open(",".join(where))
        assert fresh.verify() == []
        fresh.append({"user": [1], "time": [99], "item": [99], "brand": ["new"]})
        told = "`repair` has made codes anew since, open the vault again"
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(seqvault.UnavailableError):  # until it has found the services again
                with pytest.raises(seqvault.CorruptionError, match=told):
                    vault.get(1)
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert fresh.get(1)["brand"].tolist() == [brands[1], "new"]
        assert [fresh.get(user)["brand"].tolist() for user in users[2:]] == [[brand] for brand in brands[2:]]


def test_a_client_that_was_told_of_strings_which_are_gone_is_told_so(tmp_path, monkeypatch):
    """An older vault in its place: to go on asking for them would hold up the handle for ever."""
    path = str(tmp_path / "vault")
    with seqvault.create(path, ITEMS) as writer:
        writer.write({"user": [1], "time": [1], "item": [1], "brand": ["a"]})
    with VaultService(path, writing=WRITING) as service, monkeypatch.context() as patched:
        patched.setattr(service, "_sizes", lambda vault, names: {"brand": 2})
        vault = seqvault.open(url(service))
        with pytest.raises(seqvault.UnavailableError, match="1 values of 'brand', and spoke of 2 before"):
            vault.get(1)["brand"]


def test_a_client_refuses_what_forgetting_cannot_mean(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema(user="string")) as writer:
        writer.write({"user": ["ann", "a", "n"], "time": [1, 2, 3]})
    with VaultService(str(tmp_path / "vault"), writing=WRITING) as service, seqvault.open(url(service)) as vault:
        with pytest.raises(seqvault.SchemaError, match="users 'ann': need a sequence of strings"):
            vault.forget("ann")
        assert len(vault) == 3 and vault.forget(iter(["ann", "nobody"])) == 1
        assert sorted(vault.users().tolist()) == ["a", "n"]


def test_a_batch_sent_again_is_written_once(tmp_path):
    with seqvault.create(tmp_path / "vault", ITEMS):
        pass

    def events(item):
        return {"user": [1, 2], "time": [item, item], "item": [item, item], "brand": ["x", "y"]}

    def read(vault):
        return [vault.get(user)["item"].tolist() for user in (1, 2)]

    with VaultService(str(tmp_path / "vault"), writing=WRITING) as service, seqvault.open(url(service)) as vault:
        assert vault.append(events(1), origin=("a", 7)) == 2
        assert vault.append(events(1), origin=("a", 7)) == 2
        assert vault.append(events(2), origin=("b", 0)) == 4
        assert vault.append(events(1), origin=("a", 7)) == 2
        assert vault.append(events(3), origin=("a", 8)) == 6
        assert read(vault) == [[1, 2, 3]] * 2
    # Over a restart with events in the log, and over one with events in a part.
    for flush in (False, True):
        with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
            for client, number in (("a", 7), ("a", 8), ("b", 0)):
                assert vault.append(events(9), origin=(client, number)) <= 6
            futures = [vault.append_async(events(9), origin=("a", 8)) for _ in range(3)]
            assert [future.result() for future in futures] == [6, 6, 6]
            assert read(vault) == [[1, 2, 3]] * 2
            if flush:
                vault.flush()
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        assert vault.append(events(9), origin=("a", 8)) == 6
        assert vault.append(events(4), origin=("a", 9)) == 8
        assert read(vault) == [[1, 2, 3, 4]] * 2
        for wrong in ("a", ("a",), ("a b", 1), ("a", -1), ("a", True), (1, 1), ("x" * 101, 1)):
            with pytest.raises(seqvault.SchemaError, match="origin="):
                vault.append(events(9), origin=wrong)


def test_batches_of_a_client_may_come_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "MOST_RUNS", 3)
    monkeypatch.setattr(origins, "WINDOW", 0)
    with seqvault.create(tmp_path / "vault", Schema()):
        pass

    def append(number, origin=None):
        return vault.append({"user": [1], "time": [number]}, origin=("a", number if origin is None else origin))

    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        futures = [vault.append_async({"user": [1], "time": [n]}, origin=("a", n)) for n in (5, 3, 0, 5, 1, 3, 4)]
        assert sorted({future.result() for future in futures}) == [1, 2, 3, 4, 5]
        assert vault.get(1)["time"].tolist() == [0, 1, 3, 4, 5]
    for flush in (False, True):  # after a restart with events in the log, and with events in a part
        with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
            for number in (0, 1, 3, 4, 5):
                append(99, number)
            assert vault.num_events == 5
            if flush:
                vault.flush()
                assert vault.manifest["origins"] == {"a": [5, 5, [0, 1, 2, 2], 0]}
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        append(2)  # the one that was left out
        append(7)
        append(9)
        append(11)
        assert vault.get(1)["time"].tolist() == [0, 1, 2, 3, 4, 5, 7, 9, 11]
        for number in (8, 10, 12):  # runs that are still known
            append(number)
        vault.append({"user": [2], "time": [1]}, origin=("b", 7))
        for number in (9, 11, 13):
            vault.append({"user": [2], "time": [number]}, origin=("b", number))
        with pytest.raises(seqvault.SchemaError, match="number 7 is far below the client's last one, 13"):
            vault.append({"user": [2], "time": [1]}, origin=("b", 7))
        assert vault.append({"user": [2], "time": [1]}, origin=("b", 9)) == vault.next_sequence
        vault.flush()
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        assert vault.get(1)["time"].tolist() == [*range(6), *range(7, 13)]
        assert vault.get(2)["time"].tolist() == [1, 9, 11, 13]
        with pytest.raises(seqvault.SchemaError, match="number 7 is far below"):
            vault.append({"user": [2], "time": [1]}, origin=("b", 7))


@hypothesis.given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 40))
def test_what_is_known_of_a_client_is_what_it_wrote(numbers, cut):
    known = origins.Written()
    for number in numbers[:cut]:
        known = known.adding([(number, number)], 1)
    rest = origins.Written()
    for number in numbers[cut:]:
        rest = rest.adding([(number, number)], 2)
    both = origins.joined({"a": known}, {"a": rest})["a"]
    assert [number for number in range(14) if both.has(number)] == sorted(set(numbers))
    if numbers:
        kept = origins.to_manifest({"a": both})
        assert origins.origins_of({"origins": json.loads(json.dumps(kept))}) == {"a": both}
        kept = {"a": [max(numbers), both.sequence, [list(run) for run in both.runs], 0]}  # as it was kept once
        assert origins.origins_of({"origins": kept}) == {"a": both}


@hypothesis.given(st.lists(st.integers(0, 40), max_size=60))
def test_what_was_forgotten_of_a_client_is_never_guessed(numbers):
    known, written = origins.Written(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(origins, "WINDOW", 8)
        patch.setattr(origins, "MOST_RUNS", 2)
        for number in numbers:
            try:
                known.check(number)
            except seqvault.SchemaError:
                assert number < max(written) - 8, "within the window all is known"
                continue
            assert known.has(number) == (number in written)
            known = known.adding([(number, number)], len(written)).trimmed()
            written.add(number)
            assert len(known.runs) <= 6


def test_a_snapshot_changes_under_who_reads_it(tmp_path):
    """Forgotten users leave it, one that was dropped is gone, and a name may come back for another one."""
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1, 2], "time": [5, 6]})
    with VaultService(str(tmp_path / "vault")) as service, seqvault.open(url(service)) as vault:
        vault.snapshot("s")
        at, here = seqvault.open(url(service), at="s"), seqvault.open(tmp_path / "vault", at="s")
        assert [at.get(user)["time"].tolist() for user in (1, 2)] == [[5], [6]]
        reading = VaultService(str(tmp_path / "vault"), read_only=True)
        far = seqvault.open(url(reading), at="s")
        assert len(far.get(1)) == 1
        assert vault.forget([1]) > 0
        for other in (at, seqvault.open(url(service), at="s"), far):
            assert len(other.get(1)) == 0 and len(other.gather([1, 2])[1]) == 1
        here.refresh()
        assert len(here.get(1)) == 0 and len(here.get(2)) == 1
        vault.append({"user": [2], "time": [7]})
        with pytest.raises(seqvault.VaultError, match="has a snapshot 's'"):
            vault.snapshot("s")
        vault.drop_snapshot("s")
        for other in (at, far):
            with pytest.raises(seqvault.VaultError, match="no snapshot 's'"):
                other.get(2)
        with pytest.raises(seqvault.VaultError, match="no snapshot 's'"):
            here.refresh()
        assert vault.snapshot("s") == vault.snapshot("s", replace=True)
        assert at.get(2)["time"].tolist() == far.get(2)["time"].tolist() == [6, 7]
        here.refresh()
        assert here.get(2)["time"].tolist() == [6, 7]
        vault.drop_snapshot("s")
        del here
        vault.merge()
        deadline = time.monotonic() + 60
        while held_of(tmp_path):  # the reading service looks now and then
            assert time.monotonic() < deadline, held_of(tmp_path)
            time.sleep(0.05)
        reading.close()


def held_of(folder) -> list[str]:
    """Files below a folder that have no name any more, and are open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(str(folder)) and name.endswith(" (deleted)")]


def test_only_so_many_clients_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(origins, "MOST", 3)
    monkeypatch.setattr(appender, "MOST", 3)
    with seqvault.create(tmp_path / "vault", Schema()):
        pass
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        for number in range(10):
            vault.append({"user": [1], "time": [number]}, origin=(f"client{number}", 0))
        vault.flush()
        assert sorted(vault.manifest["origins"]) == ["client7", "client8", "client9"]
        assert vault.append({"user": [1], "time": [9]}, origin=("client9", 0)) == 10


def test_a_client_in_other_words(items):
    """What the documentation of the protocol says, with pyarrow's client alone."""
    client = flight.connect(url(items))
    assert {"health", "describe", "merge"} <= {action.type for action in client.list_actions()}
    (health,) = client.do_action(flight.Action("health", b""))
    assert json.loads(health.body.to_pybytes()) == {"status": "ok", "writer": True}
    descriptor = flight.FlightDescriptor.for_command(json.dumps({"user": 3, "n": 2}))
    info = client.get_flight_info(descriptor)
    table = client.do_get(info.endpoints[0].ticket).read_all()
    assert table.schema.remove_metadata() == info.schema
    assert table.to_pydict() == {"time": [83, 93], "item": [83, 93], "brand": ["b2", "b0"]}
    assert table.schema.metadata[b"exhausted"] == b"false" and table.schema.metadata[b"as_of"] == b"100"
    users = client.do_get(flight.Ticket(json.dumps({"list": "users"}))).read_all()
    assert sorted(users["user"].to_pylist()) == list(range(10))

    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(json.dumps({"n": 3, "fields": ["brand"]})))
    batch = pa.record_batch({"user": pa.array([4, 77, 5]), "before": pa.array([90, None, None], pa.int64())})
    with writer:
        writer.begin(batch.schema)
        for _ in range(2):
            writer.write_batch(batch)
            answer = reader.read_chunk()
            found = answer.data.to_pydict()
            assert found == {
                "time": [[64, 74, 84], [], [75, 85, 95]],
                "brand": [["b1", "b2", "b0"], [], ["b0", "b1", "b2"]],
            }
            assert json.loads(answer.app_metadata.to_pybytes())["as_of"] == 100
        writer.done_writing()

    moments = pa.array([datetime.datetime(2020, 1, 1)] * 2, pa.timestamp("ms"))
    brands = pa.array(["b0", "new"]).dictionary_encode()
    batch = pa.record_batch({"user": pa.array([90, 90]), "time": moments, "item": pa.array([1, 2]), "brand": brands})
    command = flight.FlightDescriptor.for_command(json.dumps({"origin": ["me", 0]}))
    for sequences in ((102, 104), (104, 104)):
        writer, reader = client.do_put(command, batch.schema)
        with writer:
            for expected in sequences:
                writer.write_batch(batch)
                assert json.loads(reader.read().to_pybytes()) == {"next_sequence": expected}
            writer.done_writing()
    table = client.do_get(flight.Ticket(json.dumps({"user": 90}))).read_all()
    assert table["item"].to_pylist() == [1, 2, 1, 2] and table["brand"].to_pylist() == ["b0", "new"] * 2
    assert table["time"][0].as_py() == 1577836800


@pytest.mark.parametrize(
    ("ticket", "message"),
    [
        (b"\xff", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (b"{}", 'a ticket without "user"'),
        (b'{"user": 1, "x": 2}', "'x' is not one of user"),
        (b'{"user": "a"}', "user 'a': this vault's users are int64"),
        (b'{"user": true}', "user True"),
        (b'{"user": 1, "n": 2001}', "n=2001: need an integer from 0 to 2000"),
        (b'{"user": 1, "n": 1.5}', "n=1.5"),
        (b'{"user": 1, "before": "now"}', "before"),
        (b'{"user": 1, "fields": "item"}', "fields='item'"),
        (b'{"user": 1, "fields": ["price"]}', "UnknownFieldError: .* has no field 'price'"),
        (b'{"user": 1, "where": 5}', "where=5"),
        (b'{"user": 1, "where": {"item": "x"}}', "item"),
        (b'{"user": 1, "at": "../x"}', "snapshot '../x'"),
        (b'{"user": 1, "at": "gone"}', "no snapshot 'gone'"),
        (b'{"user": 1, "max_scan": 5}', "max_scan"),
        (b'{"list": "items"}', "list"),
        (b'{"user": {"a": 1}}', "user"),
        (b'{"user": 1, "coded": "yes"}', "coded"),
        (b'{"user": 1, "at": 5}', "snapshot 5"),
        (b'{"user": 1, "as_of": [1]}', "as_of=.1.: need an integer"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"user": 1, "fields": ["%s"]}' % (b"x" * 20_000), "UnknownFieldError: .* [.]{3} .20[0-9]+ characters"),
    ],
)
def test_a_wrong_ticket_is_told_what_is_wrong(items, ticket, message):
    client = flight.connect(url(items))
    with pytest.raises(flight.FlightServerError, match=message) as caught:
        client.do_get(flight.Ticket(ticket)).read_all()
    assert "Traceback" not in str(caught.value), "nothing of the service's insides"
    assert client.do_get(flight.Ticket(b'{"user": 1}')).read_all().num_rows == 10


def forged(kind: str, codes, data: bytes = b"") -> pa.Array:
    """What no honest client sends: strings that end beyond their bytes, or codes beyond their dictionary."""
    if kind == "string":
        return pa.Array.from_buffers(
            pa.string(), len(codes) - 1, [None, pa.py_buffer(np.int32(codes)), pa.py_buffer(data)]
        )
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(["p", "q"]), safe=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"brand": forged("string", [0, 2**30, 5], b"abcdefgh")}, "column 'brand' is damaged"),
        ({"item": forged("string", [0, 2**30, 5], b"abcdefgh")}, "column 'item' is damaged"),
        ({"brand": forged("string", [0, 1, 2], b"\xff\xfe")}, "column 'brand' is damaged: .*UTF8"),
        ({"brand": forged("codes", [-1, 0])}, "column 'brand' is damaged"),
        ({"brand": forged("codes", [7, 0])}, "column 'brand' is damaged"),
        ({"item": pa.array(["5", "6"])}, "column 'item' holds strings; the schema says int64"),
        ({"again": pa.array([1, 2])}, "column 'user' is there 2 times"),
    ],
)
def test_a_batch_that_is_not_what_it_says_is_refused(items, changes, message):
    columns = {"user": pa.array([1, 2]), "time": pa.array([1, 2]), "item": pa.array([5, 5])}
    columns |= {"brand": pa.array(["b0", "b1"])} | changes
    batch = pa.record_batch(list(columns.values()), ["user" if name == "again" else name for name in columns])
    client = flight.connect(url(items))
    before = items.vault.next_sequence
    writer, reader = client.do_put(flight.FlightDescriptor.for_command(b"{}"), batch.schema)
    with pytest.raises(flight.FlightServerError, match=message), writer:
        writer.write_batch(batch)
        writer.done_writing()
        reader.read()
    assert items.vault.next_sequence == before
    assert client.do_get(flight.Ticket(b'{"user": 1}')).read_all().num_rows == 10


def test_what_a_dictionary_holds_besides_does_not_count(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema(user="string")):
        pass
    with VaultService(str(tmp_path / "vault"), writing=WRITING) as service:
        users = pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array(["u", ""]))
        batch = pa.record_batch({"user": users, "time": pa.array([1, 2])})
        writer, reader = flight.connect(url(service)).do_put(flight.FlightDescriptor.for_command(b"{}"), batch.schema)
        with writer:
            writer.write_batch(batch)
            assert json.loads(reader.read().to_pybytes()) == {"next_sequence": 2}
            writer.done_writing()
        assert service.vault.get("u")["time"].tolist() == [1, 2]


def exchange(client, command, batch):
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command))
    with writer:
        writer.begin(batch.schema)
        writer.write_batch(batch)
        writer.done_writing()
        return reader.read_all()


@pytest.mark.parametrize(
    ("command", "columns", "message"),
    [
        (b"{", {"user": [1]}, "is not JSON"),
        (b'{"n": 2001}', {"user": [1]}, "n=2001"),
        (b'{"fields": ["x"]}', {"user": [1]}, "has no field 'x'"),
        (b"{}", {"item": [1]}, "columns item: need user"),
        (b"{}", {"user": [1], "then": [1]}, "columns user, then"),
        (b"{}", {"user": ["1"]}, "users"),
        (b"{}", {"user": [1, None]}, "null"),
        (b"{}", {"user": [1.5]}, "users of type float64"),
        (b"{}", {"user": [1], "before": ["x"]}, "before has Arrow type string"),
        (b"{}", {"user": [1], "as_of": [1.5]}, "as_of has Arrow type double"),
        (b'{"as_of": "x"}', {"user": [1]}, "as_of"),
        (b"{}", {"user": list(range(21))}, "21 users in a batch; at most 20"),
    ],
)
def test_a_wrong_exchange_is_told_what_is_wrong(items, command, columns, message):
    client = flight.connect(url(items))
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items()})
    with pytest.raises(flight.FlightServerError, match=message) as caught:
        exchange(client, command, batch)
    assert "Traceback" not in str(caught.value)
    assert exchange(client, b'{"n": 1}', pa.record_batch({"user": pa.array([1])})).num_rows == 1


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        (b'{"origin": "me"}', {}, "origin 'me'"),
        (b'{"origin": ["me", 1.5]}', {}, "origin"),
        (b"{}", {"brand": None}, "column 'brand' is missing"),
        (b"{}", {"price": [1]}, "column 'price' is not in the schema"),
        (b"{}", {"item": ["a"]}, "column 'item'"),
        (b"{}", {"item": [None]}, "column 'item'"),
        (b"{}", {"time": [-1]}, "negative time -1"),
        (b"{}", {"brand": [1]}, "column 'brand' has type int64"),
        (b"{}", {"item": [[1, 2]]}, "column 'item' has Arrow type list"),
        (b"{}", {"item": [{"a": 1}]}, "column 'item' has Arrow type struct"),
    ],
)
def test_a_wrong_put_is_told_what_is_wrong_and_nothing_is_written(items, command, changes, message):
    client = flight.connect(url(items))
    before = items.vault.next_sequence
    columns = {"user": [1], "time": [1], "item": [1], "brand": ["a"]} | changes
    batch = pa.record_batch({name: pa.array(values) for name, values in columns.items() if values is not None})
    writer, reader = client.do_put(flight.FlightDescriptor.for_command(command), batch.schema)
    with pytest.raises(flight.FlightServerError, match=message) as caught:
        writer.write_batch(batch)
        writer.done_writing()
        reader.read()
        writer.close()
    assert "Traceback" not in str(caught.value)
    assert items.vault.next_sequence == before


def test_too_much_at_once_is_refused(items):
    with seqvault.open(url(items)) as vault:
        rows = np.arange(1000)
        before = items.vault.next_sequence
        with pytest.raises(seqvault.SchemaError, match="at most 20000 bytes"):
            vault.append({"user": rows, "time": rows, "item": rows, "brand": ["a"] * 1000})
        assert items.vault.next_sequence == before


def test_errors_of_actions(items):
    client = flight.connect(url(items))
    for name, body, message in (
        ("nothing", b"", "action 'nothing' is not one of"),
        ("snapshot", b'{"x": 1}', "snapshot"),
        ("dictionary", b'{"field": "item"}', "'item' is not a string field"),
        ("drop_snapshot", b'{"name": "x"}', "no snapshot 'x'"),
        ("codes", b'{"sizes": {}}', "is not the first of some partitions"),
        ("snapshot", b'{"name": 5}', "snapshot 5"),
        ("forget", b'{"users": ["x"]}', "users"),
    ):
        with pytest.raises(flight.FlightServerError, match=message) as caught:
            list(client.do_action(flight.Action(name, body)))
        assert "Traceback" not in str(caught.value)


def test_a_crowd_is_told_to_come_again(tmp_path, monkeypatch):
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1], "time": [1]})
    with VaultService(str(tmp_path / "vault"), limits=Limits(in_flight=2)) as service:
        hold, entered = threading.Event(), threading.Semaphore(0)
        get = service.vault.get

        def slow(*arguments):
            entered.release()
            assert hold.wait(60)
            return get(*arguments)

        monkeypatch.setattr(service.vault, "get", slow)
        vault = seqvault.open(url(service))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(vault.get, 1) for _ in range(2) if vault.schema]
            for _ in range(2):
                assert entered.acquire(timeout=60)
            with pytest.raises(seqvault.UnavailableError, match="2 calls are under way"):
                vault.get(1)
            hold.set()
            assert [len(future.result()) for future in waiting] == [1, 1]


def test_a_service_that_is_too_slow_or_gone_is_unavailable(tmp_path, monkeypatch):
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1], "time": [1]})
    hold = threading.Event()
    with VaultService(str(tmp_path / "vault")) as service:
        vault = seqvault.open(url(service), timeout_s=0.5)
        assert len(vault.get(1)) == 1
        monkeypatch.setattr(service.vault, "get", lambda *_: hold.wait(60))
        with pytest.raises(seqvault.UnavailableError, match="did not answer in time"):
            vault.get(1)
        hold.set()
    for call in (lambda: vault.get(1), lambda: vault.gather([1]), lambda: vault.append({"user": [1], "time": [1]})):
        with pytest.raises(seqvault.UnavailableError, match="does not answer"):
            call()
    with pytest.raises(seqvault.UnavailableError, match="does not answer"):
        seqvault.open(url(service))


def test_a_token_lets_in_who_has_it(tmp_path, monkeypatch):
    with seqvault.create(tmp_path / "vault", Schema()):
        pass
    with VaultService(str(tmp_path / "vault"), token="secret") as service:
        for wrong in (None, "Secret", "secre"):
            monkeypatch.delenv("SEQVAULT_TOKEN", raising=False)
            if wrong is not None:
                monkeypatch.setenv("SEQVAULT_TOKEN", wrong)
            with pytest.raises(seqvault.UnavailableError, match="the token is missing or wrong.*SEQVAULT_TOKEN"):
                seqvault.open(url(service))
        monkeypatch.setenv("SEQVAULT_TOKEN", "secret")
        with seqvault.open(url(service)) as vault:
            assert vault.append({"user": [1], "time": [1]}) == 1
            assert len(vault.gather([1])[0]) == 1


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Files of a certificate for localhost, signed by itself, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    return folder / "certificate.pem", folder / "key.pem"


def test_what_goes_over_the_wire_can_be_encrypted(tmp_path, certificate, monkeypatch):
    with seqvault.create(tmp_path / "vault", ITEMS):
        pass
    public, private = certificate
    tls = public.read_bytes(), private.read_bytes()
    with VaultService(str(tmp_path / "vault"), "grpc+tls://localhost:0", tls=tls) as service:
        where = f"grpc+tls://localhost:{service.port}"
        with pytest.raises(seqvault.UnavailableError):
            seqvault.open(where, timeout_s=5)  # nobody vouches for the certificate
        with pytest.raises(seqvault.UnavailableError):
            seqvault.open(f"grpc://localhost:{service.port}", timeout_s=5)
        monkeypatch.setenv("SEQVAULT_CA", str(public))
        with seqvault.open(where) as vault:
            assert vault.append({"user": [1], "time": [1], "item": [5], "brand": ["a"]}) == 1
            assert vault.get(1)["brand"].tolist() == ["a"]
        monkeypatch.setenv("SEQVAULT_CA", str(tmp_path / "none"))
        with pytest.raises(seqvault.VaultError, match="cannot be used"):
            seqvault.open(where)


def test_where_and_how_it_cannot_listen_is_told(tmp_path, items, certificate, monkeypatch, capsys):
    with seqvault.create(tmp_path / "vault", Schema()):
        pass
    (tmp_path / "pem").write_text("no certificate")
    public, private = certificate
    wrong = ((tmp_path / "pem", private), (public, tmp_path / "pem"), (private, public), (public, public))
    monkeypatch.delenv("SEQVAULT_TOKEN", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # they are those of the tests
    for flags, message in (
        ([f"--port={items.port}"], "cannot be listened on"),
        (["--host=nowhere.invalid", "--port=0"], "cannot be listened on"),
        (["--port=70000"], "port 70000: need 0 to 65535"),
        (["--port=0", "--metrics-port=70000"], "port of metrics 70000"),
        (["--port=0", "--tls-key=/none"], "needs both"),
        (["--port=0", "--tls-key=/none", "--tls-certificate=/none"], "/none cannot be read"),
        (["--port=0", f"--tls-key={tmp_path}", f"--tls-certificate={tmp_path}"], "cannot be read"),
        *(
            (["--port=0", f"--tls-certificate={one}", f"--tls-key={other}"], "are no certificate and its key")
            for one, other in wrong
        ),
    ):
        assert main(["serve", str(tmp_path / "vault"), *flags]) == 1
        assert message in capsys.readouterr().err
    for token in ("", "two words", "line\n", "schl\u00fcssel"):
        monkeypatch.setenv("SEQVAULT_TOKEN", token)
        assert main(["serve", str(tmp_path / "vault"), "--port=0"]) == 1
        assert "SEQVAULT_TOKEN" in capsys.readouterr().err
        with pytest.raises(seqvault.VaultError, match="SEQVAULT_TOKEN"):
            seqvault.open(url(items))


def test_what_cannot_be_opened(tmp_path, items):
    with seqvault.create(tmp_path / "vault", Schema(), partitions=2):
        pass
    with pytest.raises(seqvault.VaultError, match="is in 2 partitions: serve each"):
        VaultService(str(tmp_path / "vault"))
    first = partition_path(str(tmp_path / "vault"), 0)
    with VaultService(first) as service:
        with pytest.raises(seqvault.LockedError):
            VaultService(first)
        with pytest.raises(seqvault.VaultError, match="serves partition 0 of 2: name all services"):
            seqvault.open(url(service))
        with pytest.raises(seqvault.VaultError, match="serves no partition; by its place .* partition 1 of 2"):
            seqvault.open(f"{url(service)},{url(items)}").gather(np.arange(100))
    # Partitions of another vault, though as many.
    with seqvault.create(tmp_path / "other", Schema(), partitions=2):
        pass
    with VaultService(first) as one, VaultService(partition_path(str(tmp_path / "other"), 1)) as two:
        with pytest.raises(seqvault.VaultError, match="serves a partition of another vault"):
            seqvault.open(f"{url(one)},{url(two)}").gather(np.arange(100))
    with pytest.raises(seqvault.VaultError, match="need a URL between any two commas"):
        seqvault.open(f"{url(items)},")
    for seconds in (0, -1, float("nan"), float("inf"), None, "1"):
        with pytest.raises(seqvault.VaultError, match="timeout_s"):
            seqvault.open(url(items), timeout_s=seconds)
    with pytest.raises(seqvault.VaultError, match="when it is started"):
        seqvault.open(url(items), writing=WRITING)
    with pytest.raises(seqvault.NotAVaultError):
        VaultService(str(tmp_path))


def test_a_reading_service_follows_the_writer(tmp_path):
    with seqvault.create(tmp_path / "vault", ITEMS):
        pass
    with (
        seqvault.open(tmp_path / "vault", writing=WRITING) as writer,
        VaultService(str(tmp_path / "vault"), read_only=True) as service,
        seqvault.open(url(service)) as vault,
    ):
        with pytest.raises(seqvault.VaultError, match="read-only"):
            vault.append({"user": [1], "time": [1], "item": [1], "brand": ["a"]})
        with pytest.raises(seqvault.VaultError, match="read-only"):
            vault.merge()
        for number in range(3):
            writer.append({"user": [1], "time": [number], "item": [number], "brand": [f"b{number}"]})
            if number == 1:
                writer.flush()
            deadline = threading.Event()
            for _ in range(200):
                found = vault.get(1)
                if len(found) == number + 1:
                    break
                deadline.wait(0.05)
            assert found["brand"].tolist() == [f"b{i}" for i in range(number + 1)]


def test_the_command_serves_until_it_is_told_to_stop(tmp_path):
    with seqvault.create(tmp_path / "vault", ITEMS):
        pass
    command = [sys.executable, "-m", "laser_jax.vault"]
    process = subprocess.Popen(
        [*command, "serve", str(tmp_path / "vault"), "--port=0", "--metrics-port=0"], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "serving" in line and "0 users" in line
        where = line.split(" at ")[1].split(",")[0]
        metrics = line.split("metrics at ")[1].strip()
        event = '{"user": 1, "time": 1, "item": 5, "brand": "a"}\n'
        options = {"capture_output": True, "text": True, "timeout": 120}
        done = subprocess.run([*command, "append", where, "--json"], input=event, **options)
        assert done.returncode == 0 and json.loads(done.stdout)["events"] == 1, done.stderr
        done = subprocess.run([*command, "get", where, "1", "--json"], **options)
        assert json.loads(done.stdout) == {"time": [1], "item": [5], "brand": ["a"]}, done.stderr
        with urllib.request.urlopen(metrics, timeout=60) as answer:
            text = answer.read().decode()
        assert 'seqvault_events_total{call="append"} 1.0' in text and "seqvault_next_sequence 1.0" in text
        assert 'seqvault_call_seconds_count{call="get"} 1.0' in text
        # A client that opens a stream and then says nothing more does not keep the service.
        batch = pa.record_batch({"user": [2], "time": [1], "item": [6], "brand": ["a"]})
        writer, reader = flight.connect(where).do_put(flight.FlightDescriptor.for_command(b"{}"), batch.schema)
        writer.write_batch(batch)
        assert json.loads(reader.read().to_pybytes()) == {"next_sequence": 2}
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and "everything acknowledged is in" in rest
        with pytest.raises(flight.FlightError):
            writer.close()
    finally:
        process.kill()
        process.wait()
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        vault.begin_writing()
        assert [vault.get(user)["item"].tolist() for user in (1, 2)] == [[5], [6]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_of_no_finite_numbers_come_through_no_door(tmp_path, bad):
    """Nor does a client that checks nothing bring them in."""
    with seqvault.create(tmp_path / "vault", Schema(fields=(Field("pair", "float16", 2),))):
        pass
    good = {"user": [1, 2], "time": [1, 2], "pair": np.ones((2, 2), np.float16)}
    wrong = good | {"pair": np.array([[1, 2], [1, bad]], np.float16)}
    with VaultService(str(tmp_path / "vault"), writing=WRITING) as service, seqvault.open(url(service)) as vault:
        for append in (vault.append, vault.append_async, service.vault.append, service.vault.append_async):
            with pytest.raises(seqvault.SchemaError, match=f"column 'pair', row 1: {bad} in a vector is no finite"):
                append(wrong)
        client = flight.connect(url(service))
        pairs = pa.FixedSizeListArray.from_arrays(pa.array(wrong["pair"].ravel()), 2)
        batch = pa.record_batch({"user": pa.array([1, 2]), "time": pa.array([1, 2]), "pair": pairs})
        writer, reader = client.do_put(flight.FlightDescriptor.for_command(b"{}"), batch.schema)
        with pytest.raises(flight.FlightError, match="column 'pair', row 1"), writer:
            writer.write_batch(batch)
            reader.read()
        assert vault.num_events == 0 and vault.append(good) == 2
