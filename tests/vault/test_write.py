"""What a writer takes, what it refuses, and that nothing half-written stays."""

import errno
import os

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema
from tests.vault.conftest import random_log

SCHEMA = Schema(
    fields=(
        Field("item", "int64"),
        Field("action", "uint8"),
        Field("price", "float16"),
        Field("clicked", "bool"),
        Field("brand", "string"),
        Field("pair", "float32", size=2),
    )
)
GOOD = {
    "user": [1, 2],
    "time": [10, 20],
    "item": [1, 2],
    "action": [0, 255],
    "price": [1.5, 2.0],
    "clicked": [True, False],
    "brand": ["a", "b"],
    "pair": [[1.0, 2.0], [3.0, 4.0]],
}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"colour": [1, 2]}, "column 'colour' is not in the schema; its columns: user, time, item"),
        ({"item": None}, "column 'item' is missing"),
        ({"user": [1, None]}, "column 'user', row 1: null user"),
        ({"user": [1.0, float("nan")]}, "column 'user', row 1: null user"),
        ({"user": np.ma.array([1, 2], mask=[True, False])}, "column 'user', row 0: null user"),
        ({"user": [1.0, 2.0]}, "column 'user' has type float64, the schema says int64"),
        ({"user": ["a", "b"]}, "column 'user' has type <U1"),
        ({"user": np.array([1, 2**63], np.uint64)}, "column 'user', row 1: 9223372036854775808 is outside"),
        ({"time": [5, -1]}, "column 'time', row 1: negative time -1"),
        (
            {"time": [5, 4102444800]},
            "column 'time', row 1: absurd time 4102444800; need 0 <= time < 4102444800 in s",
        ),
        ({"time": [1.0, 2.0]}, "column 'time' has type float64"),
        ({"time": np.array(["2020-01-01", "NaT"], "datetime64[s]")}, "column 'time', row 1: null time"),
        ({"item": [1.0, 2.0]}, "column 'item' has type float64, the schema says int64"),
        ({"item": [True, False]}, "column 'item' has type bool"),
        ({"item": [1, None]}, "column 'item', row 1: null item"),
        ({"action": [0, 256]}, "column 'action', row 1: 256 is outside 0..255"),
        ({"action": [-1, 0]}, "column 'action', row 0: -1 is outside 0..255"),
        ({"price": [1.0, 70000.0]}, "column 'price', row 1: 70000.0 does not fit float16"),
        ({"price": [0, -(2**63)]}, "column 'price', row 1: -9223372036854775808 does not fit float16"),
        ({"price": ["1", "2"]}, "column 'price' has type <U1"),
        ({"pair": [[1.0, 2.0], [3.0, np.nan]]}, "column 'pair', row 1: nan in a vector is no finite number; drop the"),
        ({"pair": [[1.0, -np.inf], [3.0, 4.0]]}, "column 'pair', row 0: -inf in a vector"),
        ({"pair": [[1.0, 2.0], [None, 4.0]]}, "column 'pair', row .*: null pair"),
        ({"clicked": [0, 1]}, "column 'clicked' has type int64, the schema says bool"),
        ({"brand": ["a", None]}, "column 'brand', row 1: null brand"),
        ({"brand": ["a", 7]}, "column 'brand', row 1: 7 is not a string"),
        ({"brand": np.array([1, 2])}, "column 'brand' has type int64"),
        ({"brand": ["a", "\ud800"]}, "column 'brand'.*UTF-8"),
        ({"pair": [[1.0], [2.0]]}, "column 'pair' has vectors of 1 values, the schema says 2"),
        ({"pair": [1.0, 2.0]}, r"column 'pair' has shape \(2,\)"),
        ({"item": [[1], [2]]}, r"column 'item' has shape \(2, 1\)"),
        ({"item": [1, 2, 3]}, "column 'item' has 3 rows, user has 2"),
    ],
)
def test_bad_events_are_refused_and_nothing_stays(tmp_path, change, text):
    columns = {name: value for name, value in (GOOD | change).items() if value is not None}
    path = tmp_path / "vault"
    with pytest.raises(seqvault.SchemaError, match=text):
        with seqvault.create(path, SCHEMA, buffer_events=1) as writer:
            writer.write(GOOD)
            writer.write(columns)
    assert not path.exists()


def test_good_events_are_taken(tmp_path):
    with seqvault.create(tmp_path / "vault", SCHEMA) as writer:
        writer.write(GOOD)
        writer.write({name: [] if name != "pair" else np.zeros((0, 2)) for name in GOOD})
        writer.write(
            GOOD | {"time": np.array([11, 21], "datetime64[s]"), "price": [3, 4], "item": np.array([7, 8], "i1")}
        )
    vault = seqvault.open(tmp_path / "vault")
    history = vault.get(2, fields=SCHEMA.names)
    assert {name: history[name].tolist() for name in history.columns} == {
        "time": [20, 21],
        "item": [2, 8],
        "action": [255, 255],
        "price": [2.0, 4.0],
        "clicked": [False, False],
        "brand": ["b", "b"],
        "pair": [[3.0, 4.0], [3.0, 4.0]],
    }
    assert vault.next_sequence == 4


def test_null_string_user(tmp_path):
    for bad in (None, float("nan"), ""):
        with pytest.raises(seqvault.SchemaError, match="column 'user', row 1: null user"):
            with seqvault.create(tmp_path / "vault", Schema(user="string")) as writer:
                writer.write({"user": ["a", bad], "time": [1, 2]})


def test_a_refused_write_leaves_the_writer_usable(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1], "time": [1]})
        with pytest.raises(seqvault.SchemaError):
            writer.write({"user": [1], "time": [-1]})
    assert seqvault.open(tmp_path / "vault").num_events == 1


def test_create_refuses_what_is_in_use(tmp_path):
    with seqvault.create(tmp_path / "vault", Schema()) as writer:
        writer.write({"user": [1], "time": [1]})
        with pytest.raises(seqvault.LockedError, match="another writer"):
            with seqvault.create(tmp_path / "vault", Schema()):
                pass
        with pytest.raises(seqvault.NotAVaultError):
            seqvault.open(tmp_path / "vault")
    with pytest.raises(seqvault.VaultExistsError, match="already holds a vault"):
        seqvault.create(tmp_path / "vault", Schema())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(seqvault.VaultExistsError, match="thesis.txt"):
        seqvault.create(tmp_path / "other", Schema())
    with pytest.raises(seqvault.VaultExistsError, match="is a file"):
        seqvault.create(tmp_path / "other" / "thesis.txt", Schema())
    assert seqvault.open(tmp_path / "vault").num_events == 1
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]


def test_write_outside_the_block(tmp_path):
    writer = seqvault.create(tmp_path / "vault", Schema())
    with pytest.raises(seqvault.VaultError, match="inside its with block"):
        writer.write({"user": [1], "time": [1]})
    with writer:
        pass
    with pytest.raises(seqvault.VaultError, match="inside its with block"):
        writer.write({"user": [1], "time": [1]})


def test_an_error_in_the_block_keeps_a_directory_that_was_there(tmp_path):
    (tmp_path / "vault").mkdir()
    with pytest.raises(ZeroDivisionError):
        with seqvault.create(tmp_path / "vault", Schema()) as writer:
            writer.write({"user": [1], "time": [1]})
            raise ZeroDivisionError
    assert os.listdir(tmp_path / "vault") == []


def test_a_writer_that_fails_at_the_very_end_leaves_nothing(tmp_path, monkeypatch):
    path, replace = tmp_path / "vault", os.replace

    def failing(source, target):
        replace(source, target)
        if target == str(path / "manifest.json"):
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", failing)
        with pytest.raises(seqvault.UnavailableError, match="Input/output error"):
            with seqvault.create(path, Schema()) as writer:
                writer.write({"user": [1], "time": [1]})
    assert not path.exists()
    with seqvault.create(path, Schema()) as writer:
        writer.write({"user": [1], "time": [2]})
    assert seqvault.open(path).get(1)["time"].tolist() == [2]


def test_duplicates_without_a_key(tmp_path):
    fields = (
        Field("item", "int64"),
        Field("price", "float32"),
        Field("pair", "int8", size=2),
        Field("b", "string"),
    )
    rows = [  # user, time, item, price, pair, b
        (1, 5, 7, float("nan"), (1, 2), "x"),
        (1, 5, 7, 1.0, (1, 2), "x"),
        (1, 5, 7, float("nan"), (1, 2), "x"),  # repeats the first
        (1, 5, 7, 1.0, (1, 3), "x"),
        (1, 5, 7, 1.0, (1, 2), "y"),
        (2, 5, 7, 1.0, (1, 2), "x"),
        (1, 6, 7, 1.0, (1, 2), "x"),
        (1, 5, 7, 1.0, (1, 2), "x"),  # repeats the second
    ]
    log = dict(zip(("user", "time", "item", "price", "pair", "b"), map(list, zip(*rows, strict=True)), strict=True))
    for duplicates, events in (("keep", 8), ("drop", 6)):
        path = tmp_path / duplicates
        with seqvault.create(path, Schema(fields=fields, duplicates=duplicates)) as writer:
            writer.write(log)
        assert writer.duplicates_dropped == 8 - events
        assert seqvault.open(path).num_events == events
    assert seqvault.open(tmp_path / "drop").get(1)["b"].tolist() == ["x", "x", "x", "y", "x"]


def test_event_key_orders_ties_and_finds_duplicates(tmp_path):
    schema = Schema(fields=(Field("key", "uint32"), Field("x", "int8")), event_key="key", duplicates="drop")
    with seqvault.create(tmp_path / "vault", schema) as writer:
        writer.write({"user": [1, 1, 1, 1, 2], "time": [9, 9, 3, 12, 9], "key": [8, 5, 2, 5, 5], "x": [0, 1, 2, 3, 4]})
    history = seqvault.open(tmp_path / "vault").get(1)
    assert history["key"].tolist() == [2, 5, 8] and history["x"].tolist() == [2, 1, 0]


def test_duplicates_of_a_user_longer_than_the_buffer(tmp_path):
    """On sorted input, repeated events meet even where a buffer ends."""
    time = np.repeat(np.arange(100), 3)
    with seqvault.create(tmp_path / "vault", Schema(duplicates="drop"), buffer_events=10) as writer:
        writer.write({"user": np.ones(300, np.int64), "time": time})
    vault = seqvault.open(tmp_path / "vault")
    assert vault.get(1)["time"].tolist() == list(range(100))


def test_part_names_are_new_and_leftovers_go(tmp_path, small_schema):
    """A killed writer's parts are removed by the next writer, and names never repeat."""
    stale = tmp_path / "vault" / "parts" / "part-000000-deadbeef"
    stale.mkdir(parents=True)
    (stale / "zarr.json").write_text("{}")
    (tmp_path / "vault" / "manifest.json.draft").touch()
    names = set()
    for path in (tmp_path / "vault", tmp_path / "second"):
        with seqvault.create(path, small_schema) as writer:
            writer.write(random_log(small_schema, [1], 100, 0))
        names.update(os.listdir(path / "parts"))
        assert seqvault.open(path).verify() == []
    assert len(names) == 2 and "part-000000-deadbeef" not in names


def test_wrong_arguments(tmp_path):
    with pytest.raises(seqvault.SchemaError, match="schema must be"):
        seqvault.create(tmp_path / "vault", {"fields": []})
    with pytest.raises(seqvault.VaultError, match="buffer_events"):
        seqvault.create(tmp_path / "vault", Schema(), buffer_events=0)
