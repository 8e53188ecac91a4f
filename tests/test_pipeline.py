"""Batches against a brute-force assembly from the raw log."""

import contextlib
import dataclasses
import pickle
import threading

import jax
import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig, FieldConfig, rows_of
from laser_jax.fingerprint import fingerprint
from laser_jax.pipeline import BatchSource, DataConfig, epoch_order, prepare
from laser_jax.requests import RequestsWriter, read_vocabulary
from laser_jax.row_placement import DeviceShare
from laser_jax.schema import Field, Schema
from laser_jax.vault import UnknownFieldError
from laser_jax.vault.partitioning import partition_paths
from laser_jax.vault.service import VaultService
from tests.conftest import write_known_data

FEATURES = FeatureConfig(
    item=(FieldConfig("item", 8, 100, "vocab"), FieldConfig("category", 4, 10)),
    event=(FieldConfig("action", 2, 3), FieldConfig("dwell", 2, 8, "log")),
    context=(FieldConfig("scene", 2, 4),),
)
L, B, C = 16, 4, 3


def config(data, **changes):
    settings = dict(path=data.path, history_length=L, batch_size=B, candidates=C, eval_batch_size=5, eval_candidates=4)
    return DataConfig(**{**settings, "shuffle_block": 8, **changes})


@pytest.fixture(scope="module", params=["s", "ms"])
def data(request, tmp_path_factory):
    return write_known_data(str(tmp_path_factory.mktemp("data") / "set"), request.param)


def expected_rows(data, name, column):
    side = {field.name: field for field in (*FEATURES.item, *FEATURES.event, *FEATURES.context)}
    vocabulary = read_vocabulary(f"{data.path}/vocab/item") if name == "item" else None
    return rows_of(side[name], np.asarray(column), vocabulary)


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_equal_a_brute_force_assembly(data, split):
    source = BatchSource(config(data), FEATURES, split)
    width = C if split == "train" else 4
    requests = data.requests[split]
    pieces = [(r, first) for r, row in enumerate(requests) for first in range(0, len(row["item"]), width)]
    met, strangers = [], 0
    for k in range(source.batches_per_epoch):
        batch = source.batch(k)
        rows = source.rows(k)
        met += rows.tolist()
        step = batch.step
        size = source.batch_size
        assert step["mask"].shape == (size, width) and step["age"].shape == (size, L)
        for row, piece in enumerate(rows):
            r, first = pieces[piece]
            request = requests[r]
            part = slice(first, first + width)
            history = data.history(request["user"], request["time"], L)
            n = len(history["time"])
            assert batch.users[row] == request["user"] and batch.lengths[row] == step["length"][row] == n
            unit = 1000 if data.time_unit == "ms" else 1
            age = (request["time"] - history["time"]) // unit
            np.testing.assert_array_equal(step["age"][row], np.r_[np.zeros(L - n, int), age])
            for name in ("item", "category", "action", "dwell"):
                got = batch.rows("history", name)[row, L - n :]
                np.testing.assert_array_equal(got, expected_rows(data, name, history[name]), name)
            count = len(request["item"][part])
            np.testing.assert_array_equal(step["mask"][row], np.arange(width) < count)
            for name in ("item", "category"):
                got = batch.rows("candidates", name)[row, :count]
                np.testing.assert_array_equal(got, expected_rows(data, name, request[name][part]))
                mine = batch.rows("history", name)[row, L - n :]
                alike = step["side"][name][row, :count, None] == step["history"][name][row, L - n :]
                # What training never met has one row, and is not alike for that.
                np.testing.assert_array_equal(alike, (got[:, None] == mine) & (got[:, None] != 0))
                strangers += ((got[:, None] == 0) & (mine == 0)).sum()
            np.testing.assert_array_equal(step["label"][row, :count], request["label"][part])
            np.testing.assert_array_equal(batch.references["oracle"][row, :count], request["oracle"][part])
            assert batch.rows("context", "scene")[row] == request["scene"] + 1
        assert not step["mask"][len(rows) :].any() and not step["length"][len(rows) :].any()
        assert batch.num_events == step["length"].sum()
        for table, unique in step["unique"].items():
            num_rows = FEATURES.tables()[table][0]
            assert unique.shape[:2] == (1, 1) and (np.diff(unique[0, 0]) > 0).all() and unique.size <= num_rows
    # Every piece of every request exactly once, so every candidate is.
    assert sorted(met) == list(range(len(pieces))) and strangers
    if split == "test":
        assert met == sorted(met)  # predictions are stored in the order of the requests


@pytest.mark.parametrize(("num_devices", "shares"), [(4, [(0, 1), (2, 3)]), (2, [(0,), (1,)]), (4, [(0, 2), (1, 3)])])
def test_processes_together_read_what_one_reads(data, num_devices, shares):
    """The same requests, each by one device, whatever the number of devices and processes."""
    alone = BatchSource(config(data, batch_size=8), FEATURES, "train")
    parts = [BatchSource(config(data, batch_size=8), FEATURES, "train", DeviceShare(num_devices, s)) for s in shares]
    assert alone.num_batches > 3
    for k in (0, 1, alone.num_batches - 1):  # the last one is partial: some devices have nothing to do
        whole, batches = alone.batch(k), [part.batch(k) for part in parts]
        each = 8 // num_devices
        for number, share in enumerate(shares):
            rows = np.concatenate([np.arange(device * each, (device + 1) * each) for device in share])
            got = batches[number]
            assert got.step["unique"]["item"].shape[:2] == (len(share), num_devices)
            for name in ("age", "length", "label", "mask"):
                np.testing.assert_array_equal(got.step[name], whole.step[name][rows])
            real = rows[rows < len(whole.users)]
            np.testing.assert_array_equal(got.users, whole.users[real])
            np.testing.assert_array_equal(got.lengths, whole.lengths[real])
            for side, valid in (("history", got.step["age"] >= 0), ("candidates", got.step["mask"])):
                if side == "history":
                    valid = np.arange(L) >= L - got.step["length"][:, None]
                for name in ("item", "category"):
                    mine, its = got.rows(side, name), whole.rows(side, name)[rows]
                    np.testing.assert_array_equal(mine[valid], its[valid])


def test_batches_of_one_shape_are_made_again_where_another_process_needs_more_room(known_data):
    source = BatchSource(config(known_data), FEATURES, "train")
    plain = [batch.step["unique"]["dwell"].shape for batch in source.stream(0, 2)]
    asked = []

    class Peers:
        def agree(self, sizes):
            asked.append(sizes)
            return [2 * size for size in sizes]

    batches = list(source.stream(0, 2, Peers()))
    assert [batch.step["unique"]["dwell"].shape for batch in batches] == [(1, 1, 2 * shape[2]) for shape in plain]
    assert len(asked) == 2
    for k, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.rows("history", "dwell"), source.batch(k).rows("history", "dwell"))


def test_the_data_tries_what_it_should(data):
    rows = data.requests["train"]
    times = [(r, data.events["time"][data.events["user"] == r["user"]]) for r in rows]
    assert any(r["time"] in t for r, t in times), "a request at the very time of an event"
    assert any(not len(t) for _, t in times), "a user without a history"
    assert any(len(r["item"]) > 2 * C for r in rows), "a request wider than two rows"
    assert any((t < r["time"]).sum() > L for r, t in times), "a history longer than L"


def test_the_last_batch_of_an_epoch_is_partial_and_the_next_epoch_starts_afresh(known_data):
    source = BatchSource(config(known_data, batch_size=7, epochs=2), FEATURES, "train")
    rows = [source.rows(k) for k in range(source.num_batches)]
    half = source.batches_per_epoch
    total = sum(-(-len(r["item"]) // C) for r in known_data.requests["train"])
    assert len(rows) == 2 * half and len(rows[half - 1]) == len(rows[-1]) == total % 7 > 0
    first, second = np.concatenate(rows[:half]), np.concatenate(rows[half:])
    np.testing.assert_array_equal(np.sort(first), np.arange(total))
    np.testing.assert_array_equal(np.sort(second), np.arange(total))
    assert (first != second).any()
    batch = source.batch(half - 1)
    assert len(batch.users) == len(batch.lengths) == total % 7 and batch.step["label"].shape == (7, C)


def test_a_stream_from_the_middle_and_a_pickled_source_give_the_same_batches(known_data):
    source = BatchSource(config(known_data), FEATURES, "train")
    copy = pickle.loads(pickle.dumps(source))
    streamed = list(copy.stream(3, 9))
    assert len(streamed) == 6
    for k, batch in enumerate(streamed, start=3):
        want = dataclasses.asdict(source.batch(k))
        got = dataclasses.asdict(batch)
        assert want.keys() == got.keys()
        np.testing.assert_equal(got, want)


def test_threads_at_the_border_of_two_epochs_get_the_right_rows(known_data):
    source = BatchSource(config(known_data, epochs=3), FEATURES, "train")
    want = [source.rows(k) for k in range(source.num_batches)]
    border = source.batches_per_epoch
    wrong = []

    def read():
        for k in [border - 1, border, 2 * border] * 30:
            if not np.array_equal(source.rows(k), want[k]):
                wrong.append(k)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(("num", "block"), [(1, 8), (100, 8), (1000, 1), (777, 10), (5, 100)])
def test_an_epoch_is_a_permutation_of_its_own_by_seed(num, block):
    order = epoch_order(num, seed=3, epoch=1, block=block)
    np.testing.assert_array_equal(np.sort(order), np.arange(num))
    np.testing.assert_array_equal(order, epoch_order(num, seed=3, epoch=1, block=block))
    if num > 10:
        for seed, epoch in ((3, 2), (4, 1)):
            assert (order != epoch_order(num, seed, epoch, block)).mean() > 0.5


def test_a_shuffle_keeps_neighbours_on_disk_near_each_other():
    order = epoch_order(64 * 10 * 5, seed=0, epoch=0, block=10)
    first_window = order[: 64 * 10]
    assert len(set(first_window // 10)) == 64  # whole blocks, from all over
    assert np.ptp(first_window) > 64 * 10 * 4


def test_a_piece_of_a_wide_request_meets_its_own_candidates_alone(data, tmp_path):
    source = BatchSource(config(data), FEATURES, "train")
    for k in range(source.num_batches):
        batch = source.batch(k)
        events = np.arange(L) >= L - batch.step["length"][:, None]
        used = [batch.rows("history", "category")[events], batch.rows("candidates", "category")[batch.step["mask"]]]
        assert batch.num_unique["category"] == len(np.unique(np.concatenate(used)))
    for split in ("train", "valid", "test"):  # one request, three times as wide as a row
        with RequestsWriter(tmp_path / "requests" / split, candidates={"item": "int64"}) as writer:
            ids = {"item": 1000 + np.arange(3 * C)}
            writer.write(user=[0], time=[9], counts=[3 * C], candidates=ids, label=np.zeros(3 * C))
    for admit, known in ((1, 3 * C), (2, 0)):
        features = FeatureConfig(item=(FieldConfig("item", 4, 100, "dictionary", admit=admit),))
        wide = config(data, path=str(tmp_path), vault=f"{data.path}/vault", batch_size=1)
        source = BatchSource(wide, features, "train")
        assert len(list(source.stream(0, source.num_batches))) == 3
        assert np.count_nonzero(source.dictionaries["item"].rows(ids["item"])) == known


def test_wide_requests_are_described_honestly(known_data):
    rows = known_data.requests["train"]
    told = BatchSource(config(known_data), FEATURES, "train").describe()
    candidates = sum(len(r["item"]) for r in rows)
    pieces = sum(-(-len(r["item"]) // C) for r in rows)
    assert told["requests"] == len(rows) and told["candidates"] == candidates
    assert told["batches"] == -(-pieces // B) and told["candidate_fill"] == round(candidates / (pieces * C), 3)


def replaced(side, *fields):
    return dataclasses.replace(FEATURES, **{side: fields})


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (replaced("event", FieldConfig("actoin", 2, 3)), UnknownFieldError, "'actoin'.*the vault has item, category"),
        (replaced("event", FieldConfig("embedding", 2, 3)), ValueError, "'embedding' holds 2 values each"),
        (
            dataclasses.replace(FEATURES, item=(FieldConfig("action", 2, 3),), event=()),
            ValueError,
            "candidate column 'action'; there is .*item",
        ),
        (replaced("event", FEATURES.item[0]), ValueError, "features name a column twice"),
        (replaced("context", FieldConfig("page", 2, 3)), ValueError, "context column 'page'; there is scene"),
    ],
)
def test_unknown_columns_are_named(known_data, features, error, message):
    with pytest.raises(error, match=message):
        BatchSource(config(known_data), features, "train")


def test_unknown_splits_and_missing_data_are_named(known_data, tmp_path):
    with pytest.raises(ValueError, match="split 'dev' is not one of"):
        BatchSource(config(known_data), FEATURES, "dev")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none is no data set"):
        prepare(DataConfig(path=f"{tmp_path}/none"))
    with pytest.raises(ValueError, match="data.path is empty"):
        prepare(DataConfig())


def test_prepare_asks_the_recipe(tmp_path):
    asked = []

    class Recipe:
        def prepare(self, path, progress=True):
            asked.append(path)
            return path

    prepare(DataConfig(path=str(tmp_path), recipe=Recipe()))
    assert asked == [str(tmp_path)]


def test_what_the_server_had_not_seen_is_kept_out_and_a_snapshot_stands_still(tmp_path):
    schema = Schema(fields=[Field("item", "int64")])
    with seqvault.create(tmp_path / "vault", schema) as writer:
        writer.write({"user": [1, 1, 2], "time": [10, 20, 10], "item": [1, 2, 3]})
    with seqvault.open(tmp_path / "vault") as vault:
        seen = vault.append({"user": [1], "time": [30], "item": [4]})
        # It happened before the request, and was written after it.
        vault.append({"user": [1, 2], "time": [15, 5], "item": [5, 6]})
        vault.snapshot("training")
        vault.append({"user": [1], "time": [1], "item": [7]})
    for split in ("train", "valid", "test"):
        with RequestsWriter(tmp_path / "requests" / split, candidates={"item": "int64"}, sequence=True) as writer:
            writer.write(
                user=[1, 2, 1],
                time=[40, 40, 40],
                counts=[1, 1, 1],
                candidates={"item": [9, 9, 9]},
                label=[1, 0, 1],
                sequence=[seen, seen, seen + 2],
            )
    features = FeatureConfig(item=(FieldConfig("item", width=4, rows=64, ids="hash"),), event=())
    data = DataConfig(path=str(tmp_path), snapshot="training", history_length=8, eval_batch_size=4, eval_candidates=1)
    batch = BatchSource(data, features, "test").batch(0)
    assert batch.lengths.tolist() == [3, 1, 4]
    before = fingerprint(data)
    with seqvault.open(tmp_path / "vault") as vault:
        vault.append({"user": [1], "time": [2], "item": [8]})
        vault.merge()
    assert fingerprint(data) == before
    assert BatchSource(data, features, "test").batch(0).lengths.tolist() == [3, 1, 4]
    live = dataclasses.replace(data, snapshot="")
    assert fingerprint(live) != before and BatchSource(live, features, "test").batch(0).lengths.tolist() == [3, 1, 4]


def test_what_was_appended_to_one_partition_changes_the_fingerprint(known_data, tmp_path):
    schema = Schema(fields=[Field("item", "int64")])
    with seqvault.create(tmp_path / "vault", schema, partitions=2) as writer:
        writer.write({"user": np.arange(8), "time": np.arange(8), "item": np.arange(8)})
    data = config(known_data, vault=str(tmp_path / "vault"))
    before = fingerprint(data)
    assert sum("vault" in name for name in before) == 2
    with seqvault.open(tmp_path / "vault") as vault:
        vault.append({"user": [3], "time": [9], "item": [9]})
    new = fingerprint(data).keys() - before.keys()
    assert len(new) == 1 and new.pop().startswith("vault/partition-0000")


def test_a_service_gives_the_batches_of_its_vault(known_data):
    at_home = config(known_data)
    with VaultService(at_home.vault_path, read_only=True) as service:
        served = dataclasses.replace(at_home, vault=f"grpc://127.0.0.1:{service.port}")
        for split in ("train", "test"):
            ours, theirs = (BatchSource(data, FEATURES, split).batch(1).step for data in (at_home, served))
            for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_array_equal(one, other)
        found = fingerprint(served)
        assert found == fingerprint(served) and found.keys() >= {"vault"}
        assert {name: value for name, value in found.items() if "vault" not in name} == {
            name: value for name, value in fingerprint(at_home).items() if "vault" not in name
        }


@pytest.mark.parametrize("partitions", [None, 3])
@pytest.mark.parametrize("sequence", [False, True])
def test_what_comes_into_a_service_meanwhile_is_not_in_the_batches_of_a_run(tmp_path, partitions, sequence):
    """Late events too: else one step of validation would be of other histories than the next."""
    path, users = str(tmp_path / "data" / "vault"), np.arange(6)
    schema = Schema(fields=(Field("item", "int64"),))
    with seqvault.create(path, schema, partitions=partitions) as writer:
        writer.write({"user": users, "time": users, "item": users})
    with RequestsWriter(f"{tmp_path}/data/requests/train", sequence=sequence, candidates={"item": "int64"}) as writer:
        asked = {"user": users, "time": np.full(6, 50), "candidates": {"item": users}}
        more = {"sequence": np.full(6, 100)} if sequence else {}
        writer.write(**asked, **more, counts=np.ones(6, int), label=np.zeros(6))
    features = FeatureConfig(item=(FieldConfig("item", 2, 100),))
    with contextlib.ExitStack() as stack:
        paths = [path] if partitions is None else partition_paths(path)
        writing = seqvault.WriterOptions(background=False)
        services = [stack.enter_context(VaultService(one, writing=writing)) for one in paths]
        where = ",".join(f"grpc://127.0.0.1:{service.port}" for service in services)
        data = DataConfig(path=f"{tmp_path}/data", vault=where, history_length=4, batch_size=6, candidates=1)
        source = BatchSource(data, features, "train")
        before = source.batch(0).step
        with seqvault.open(where) as vault:
            vault.append({"user": users, "time": users + 10, "item": users})
        now, later = source.batch(0).step, BatchSource(data, features, "train").batch(0).step
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
        np.testing.assert_array_equal(one, other)
    assert before["length"].tolist() == [1] * 6 and later["length"].tolist() == [2] * 6


def test_numbers_that_mostly_have_no_row_are_told(known_data, caplog):
    """The ids of items, say, with ids="code", which is what a field has that does not say otherwise."""
    BatchSource(config(known_data), FEATURES, "train").tell_unknown_codes()
    assert not caplog.messages
    features = dataclasses.replace(FEATURES, item=(FieldConfig("item", 8, 10), FieldConfig("category", 4, 3)))
    BatchSource(config(known_data), features, "train").tell_unknown_codes()
    told = [message.partition(",")[0] for message in caplog.messages]
    assert [line.partition(" of the ")[2] for line in told[:2]] == ["events have a 'item'", "events have a 'category'"]
    assert any("candidates have a 'item'" in line for line in told) and "rows for 0 to 8" in caplog.text
