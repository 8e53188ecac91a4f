"""get and gather give what a brute-force filter of the raw log gives."""

import concurrent.futures
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from tests.vault.conftest import FIELDS, Model, assert_same, random_log, take


@pytest.mark.parametrize("user_type", ["int64", "string"])
@pytest.mark.parametrize("time_unit", ["s", "ms"])
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_reads_equal_brute_force(tmp_path_factory, user_type, time_unit, data):
    keys = data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True))
    users = np.array(keys) if user_type == "int64" else np.array([f"u{key}" for key in keys], object)
    schema = Schema(user=user_type, time_unit=time_unit, fields=FIELDS)
    rows = data.draw(st.integers(1, 1500))
    # A short span makes ties of time, a long one makes gaps.
    span = data.draw(st.sampled_from([1, 50, 5000, schema.time_limit]))
    log = random_log(schema, users, rows, data.draw(st.integers(0, 99)), span)
    if data.draw(st.booleans()):
        log = take(log, np.argsort(log["time"], kind="stable"))
    path = tmp_path_factory.mktemp("vault") / "v"
    model = Model(log)
    with seqvault.create(path, schema, buffer_events=data.draw(st.sampled_from([200, 700, 5000]))) as writer:
        cut = data.draw(st.integers(0, rows))
        writer.write(take(log, slice(None, cut)))
        writer.write(take(log, slice(cut, None)))
    vault = seqvault.open(path)
    assert vault.num_events == rows
    assert set(vault.users().tolist()) == set(log["user"].tolist())

    n = data.draw(st.sampled_from([0, 1, 7, 255, 256, 257, 600, 5000]))
    names = data.draw(st.sampled_from([schema.names, ("embedding",), ("clicked", "price"), ("brand", "tiny")]))
    asked = data.draw(st.lists(st.integers(0, len(keys)), min_size=1, max_size=8))
    unknown = 12345 if user_type == "int64" else "nobody"
    batch = [unknown if place == len(keys) else users[place] for place in asked]
    kind = data.draw(st.sampled_from(["none", "one", "each"]))
    times = st.integers(-1, span + 1) | st.sampled_from(log["time"].tolist())
    bounds = [data.draw(times) if kind != "none" else None for _ in batch]
    if kind == "one":
        bounds = [bounds[0]] * len(batch)
    before = {"none": None, "one": bounds[0], "each": np.array(bounds)}[kind]

    histories = vault.gather(batch if user_type == "string" else np.array(batch), before, n, fields=names)
    assert len(histories) == len(batch)
    assert histories.offsets[0] == 0 and histories.offsets[-1] == len(histories.columns["time"])
    for position, (user, bound) in enumerate(zip(batch, bounds, strict=True)):
        expected = model.read(user, n, bound)
        assert_same(vault, histories[position], expected, names)
        assert_same(vault, vault.get(user, n, bound, fields=names), expected, names)


def test_all_columns_but_vectors_by_default(make_vault):
    schema = Schema(fields=FIELDS)
    vault = make_vault(schema, random_log(schema, [1, 2], 600, 0))
    scalars = ["time", *(field.name for field in FIELDS if field.size is None)]
    assert list(vault.get(1).columns) == scalars
    assert list(vault.gather([1, 2]).columns) == scalars
    assert list(vault.get(1, fields=["time"]).columns) == ["time"]


def test_sixty_day_gap_in_milliseconds(make_vault):
    day = 86_400_000
    times = np.array([0, 1, 60 * day, 60 * day, 200 * day, 4_102_444_799_999])
    vault = make_vault(Schema(time_unit="ms"), {"user": np.ones(6, np.int64), "time": times})
    np.testing.assert_array_equal(vault.get(1).columns["time"], times)
    np.testing.assert_array_equal(vault.gather([1], 60 * day).columns["time"], times[:2])
    np.testing.assert_array_equal(vault.get(1, before=60 * day + 1).columns["time"], times[:4])


def test_parts_that_overlap_in_time_are_read_as_one_history(make_vault, small_schema):
    log = random_log(small_schema, [5, 6, 7], 6000, 1, span=900)
    vault = make_vault(small_schema, log, parts=5)
    assert len(vault.state.parts) >= 5
    model = Model(log)
    for user in (5, 6, 7):
        for n in (1, 300, 1000, 9999):
            for before in (None, 0, 450, 900):
                assert_same(vault, vault.get(user, n, before), model.read(user, n, before), small_schema.names)


@pytest.mark.parametrize("asked", [{}, {"as_of": 10**6}])  # the short way, and the other
def test_what_a_reader_does_to_its_columns_reaches_no_other(make_vault, small_schema, asked):
    times = np.arange(20)
    log = {"user": np.ones(20, np.int64), "time": times, "item": times, "action": np.zeros(20, np.uint8)}
    vault = make_vault(small_schema, log)
    columns = vault.get(1, **asked).columns
    try:
        del columns["item"]
    except TypeError:  # read-only
        pass
    for _ in range(3):
        np.testing.assert_array_equal(vault.get(1, **asked)["item"], times)


def test_reads_no_more_parts_than_needed(make_vault, small_schema):
    """Parts that follow each other in time: the newest events come from the newest part alone."""
    times = np.arange(4000)
    log = {"user": np.ones(4000, np.int64), "time": times, "item": times, "action": np.zeros(4000, np.uint8)}
    vault = make_vault(small_schema, log, parts=4)
    assert len(vault.state.parts) >= 4
    read = []
    words, unpack = vault._pages.words, vault._pages.unpack
    vault._pages.words = lambda parts, first, end: read.extend((end - first).tolist()) or words(parts, first, end)
    vault._pages.unpack = lambda part, table, *run: read.append(run[1] - run[0]) or unpack(part, table, *run)
    for before, pages in ((3900, 4), (None, 3)):
        assert len(vault.gather([1], before, 500)) == len(vault.gather([1], before, 500)) == 1
        assert sum(read) // 2 <= pages
        read.clear()
        assert len(vault.get(1, 500, before, as_of=4000)) == 500
        assert sum(read) <= pages
        read.clear()


def test_many_users_find_their_own(make_vault):
    users = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    vault = make_vault(Schema(fields=[Field("twin", "int64")]), {"user": users, "time": users % 99, "twin": users})
    assert len(vault) == len(np.unique(users))
    np.testing.assert_array_equal(vault.gather(users, n=1).columns["twin"], users)
    strangers = vault.gather(users + 1, n=1)
    known = np.isin(users + 1, users)
    np.testing.assert_array_equal(np.diff(strangers.offsets), known)


def test_string_users_whose_hashes_collide_stay_apart(make_vault, monkeypatch):
    monkeypatch.setattr("laser_jax.vault.hashing.hash_string", lambda key: len(key))
    monkeypatch.setattr("laser_jax.vault.state.hash_string", lambda key: len(key))
    users = np.array(["aa", "bb", "c", "bb", "aa", "dd", "c", "aa"], object)
    vault = make_vault(Schema(user="string"), {"user": users, "time": np.arange(8)}, parts=4)
    assert sorted(vault.users()) == ["aa", "bb", "c", "dd"]
    for user in ("aa", "bb", "c", "dd", "ee"):
        expected = np.flatnonzero(users == user)
        np.testing.assert_array_equal(vault.get(user).columns["time"], expected)
        np.testing.assert_array_equal(vault.gather([user]).columns["time"], expected)


def test_more_than_one_shard(make_vault):
    """A user of each page number: reads around the border between two shards."""
    users = np.repeat(np.arange(4500), 2)
    schema = Schema(fields=[Field("twin", "int32"), Field("pair", "float32", size=2)])
    pair = np.stack([users, -users], axis=1).astype(np.float32)
    log = {"user": users, "time": np.tile([3, 8], 4500), "twin": users.astype(np.int32), "pair": pair}
    vault = make_vault(schema, log)
    batch = np.array([4499, 0, 4095, 4096, 4097, 4095])
    found = vault.gather(batch, 9, fields=["twin", "pair"])
    np.testing.assert_array_equal(found.columns["twin"], np.repeat(batch, 2))
    np.testing.assert_array_equal(found.columns["pair"][:, 1], -np.repeat(batch, 2))
    for user in batch.tolist():
        np.testing.assert_array_equal(vault.get(user, fields=["pair"])["pair"][:, 0], [user, user])


def test_a_run_across_two_shards(make_vault):
    rows = 4200 * 256
    vault = make_vault(
        Schema(fields=[Field("x", "int32")]),
        {
            "user": np.zeros(rows, np.int64),
            "time": np.arange(rows),
            "x": np.arange(rows, dtype=np.int32),
        },
    )
    history = vault.get(0, n=100 * 256)
    np.testing.assert_array_equal(history["x"], np.arange(rows - 100 * 256, rows))
    wide = vault.get(0, n=400 * 256, before=rows - 1)
    np.testing.assert_array_equal(wide["x"], np.arange(rows - 1 - 400 * 256, rows - 1))


def test_dictionary(make_vault):
    schema = Schema(fields=[Field("brand", "string")])
    brands = np.array(["b", "a", "b", "c"], object)
    vault = make_vault(schema, {"user": [1, 1, 2, 2], "time": [1, 2, 3, 4], "brand": brands}, parts=2)
    assert vault.dictionary("brand").tolist() == ["b", "a", "c"]
    np.testing.assert_array_equal(vault.encode("brand", ["c", "zzz", "b"]), [2, -1, 0])
    assert vault.get(2)["brand"].tolist() == ["b", "c"]
    with pytest.raises(seqvault.UnknownFieldError, match="'item' is not a string field"):
        vault.dictionary("item")


def test_pickles_to_its_path(make_vault, small_schema):
    log = random_log(small_schema, [1, 2], 500, 0)
    vault = make_vault(small_schema, log)
    vault.gather([1])
    again = pickle.loads(pickle.dumps(vault))
    assert len(pickle.dumps(vault)) < 1000
    assert again.cache_bytes == vault.cache_bytes
    np.testing.assert_array_equal(again.get(1).columns["time"], vault.get(1).columns["time"])


def test_threads_share_a_handle(make_vault):
    schema = Schema(fields=FIELDS)
    log = random_log(schema, list(range(20)), 8000, 3)
    vault, model = make_vault(schema, log, parts=3), Model(log)

    def read(user):
        names = ("item", "embedding")
        assert_same(vault, vault.get(user, 300, 5000, fields=names), model.read(user, 300, 5000), names)
        assert_same(vault, vault.gather([user], 5000, 300, fields=names)[0], model.read(user, 300, 5000), names)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(read, list(range(20)) * 4))


def test_empty_vault_and_empty_batch(make_vault, small_schema, tmp_path):
    with seqvault.create(tmp_path / "empty", small_schema):
        pass
    vault = seqvault.open(tmp_path / "empty")
    assert len(vault) == 0 and vault.num_events == 0 and vault.verify() == []
    assert len(vault.get(1)) == 0
    assert vault.gather([1, 2], 5).offsets.tolist() == [0, 0, 0]
    assert vault.stats()["events"] == 0
    with seqvault.create(tmp_path / "vectors", Schema(fields=FIELDS)):
        pass
    vectors = seqvault.open(tmp_path / "vectors")
    assert vectors.gather([1], fields=["embedding"]).columns["embedding"].shape == (0, 3)
    assert vectors.get(1, fields=["embedding"])["embedding"].shape == (0, 3)
    full = make_vault(small_schema, random_log(small_schema, [1], 10, 0))
    empty = full.gather(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert empty.offsets.tolist() == [0] and empty.columns["item"].dtype == np.int64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda v: v.get(1, fields=["itme"]),
            seqvault.UnknownFieldError,
            "no field 'itme'; its fields: time, item",
        ),
        (lambda v: v.gather([1], fields=["x"]), seqvault.UnknownFieldError, "no field 'x'"),
        (lambda v: v.get(1, fields="item"), seqvault.UnknownFieldError, "sequence of names"),
        (lambda v: v.get("1"), seqvault.SchemaError, "users are int64"),
        (lambda v: v.gather([1.5]), seqvault.SchemaError, "float64"),
        (lambda v: v.gather(["a"]), seqvault.SchemaError, "users of type"),
        (lambda v: v.get(1, n=-1), seqvault.SchemaError, "n=-1"),
        (lambda v: v.get(1, before=1.5), seqvault.SchemaError, "before"),
        (lambda v: v.gather([1, 2], np.array([1, 2, 3])), seqvault.SchemaError, "3.* for 2 users"),
        (lambda v: v.get(1)["dwell"], KeyError, "'dwell' was not read"),
    ],
)
def test_wrong_reads_say_what_is_wrong(make_vault, small_schema, call, error, text):
    vault = make_vault(small_schema, random_log(small_schema, [1], 10, 0))
    with pytest.raises(error, match=text):
        call(vault)


def test_a_user_that_is_no_utf8_is_nobody(make_vault):
    vault = make_vault(Schema(user="string"), {"user": ["a"], "time": [1]})
    assert len(vault.get("\ud800")) == 0 and vault.gather(["\ud800", "a"]).offsets.tolist() == [0, 0, 1]


def test_small_and_large_integers_together_are_not_rounded(tmp_path):
    """numpy makes floats of them."""
    fields = (Field("hash", "uint64"), Field("pair", "uint64", 2))
    with seqvault.create(tmp_path / "vault", Schema(fields=fields)) as writer:
        hashes = [1, 2**63 + 5, 2**63]
        writer.write({"user": [1] * 3, "time": [1, 2, 3], "hash": hashes, "pair": [[1, one] for one in hashes]})
    vault = seqvault.open(tmp_path / "vault")
    assert vault.get(1, fields=["pair"])["pair"].tolist() == [[1, one] for one in hashes]
    for wanted in ([1, 2**63 + 5], {2**63, -1}, (np.uint64(2**63 + 5), 2**64)):
        found = vault.get(1, where={"hash": wanted})["hash"].tolist()
        assert found == [one for one in hashes if one in wanted]
    with pytest.raises(seqvault.SchemaError, match="column 'hash' has type float64"):
        with seqvault.create(tmp_path / "other", Schema(fields=fields[:1])) as writer:
            writer.write({"user": [1, 1], "time": [1, 2], "hash": [-1, 2**63 + 5]})


def test_ids_beyond_int64_are_nobodys(make_vault):
    vault = make_vault(Schema(), {"user": [-1, 5], "time": [1, 2]})
    assert vault.gather(np.array([2**64 - 1, 5], np.uint64)).offsets.tolist() == [0, 0, 1]
    assert len(vault.get(2**64 - 1)) == 0 and len(vault.get(-1)) == 1
