"""Requests: what is written comes back, in any order; what is wrong is refused and leaves nothing."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from laser_jax import requests as reqs
from laser_jax.column_files import SHARD


def write(path, counts, calls=1, user="int64", sequence=False):
    """Writes requests whose every value is known from its position; returns the values."""
    counts = np.asarray(counts, np.int64)
    rows, flat = np.arange(len(counts)), np.arange(int(counts.sum()))
    ends = np.cumsum(counts)
    users = [f"ü{r}" * (r % 3) for r in rows] if user == "string" else rows * 7 - 3
    with reqs.RequestsWriter(
        path,
        user=user,
        context={"scene": "uint8"},
        sequence=sequence,
        candidates={"item": "int64", "brand": "int32"},
        references=("oracle",),
    ) as w:
        for part in np.array_split(rows, calls):
            own = flat[ends[part[0]] - counts[part[0]] : ends[part[-1]]] if len(part) else flat[:0]
            w.write(
                user=[users[r] for r in part],
                time=1000 + part,
                counts=counts[part],
                context={"scene": part % 3},
                candidates={"item": own * 2**40, "brand": own % 5 - 1},
                label=own % 4 == 0,
                references={"oracle": own / 8},
                sequence=part * 2 if sequence else None,
            )
    return users


def check(batch, indices, counts, users):
    starts = np.cumsum(counts) - counts
    flat = np.concatenate([np.arange(starts[i], starts[i] + counts[i]) for i in indices] or [np.arange(0)])
    np.testing.assert_array_equal(batch.user, np.array([users[i] for i in indices], batch.user.dtype))
    np.testing.assert_array_equal(batch.time, 1000 + np.asarray(indices))
    np.testing.assert_array_equal(batch.context["scene"], np.asarray(indices) % 3)
    np.testing.assert_array_equal(batch.offsets, np.concatenate([[0], np.cumsum(counts[indices])]))
    np.testing.assert_array_equal(batch.candidates["item"], flat * 2**40)
    np.testing.assert_array_equal(batch.candidates["brand"], flat % 5 - 1)
    np.testing.assert_array_equal(batch.label, (flat % 4 == 0).astype(np.float32))
    np.testing.assert_array_equal(batch.references["oracle"], (flat / 8).astype(np.float32))
    assert batch.candidates["brand"].dtype == np.int32 and batch.offsets.dtype == np.int64


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    calls=st.integers(1, 4),
    data=st.data(),
    user=st.sampled_from(["int64", "string"]),
    cache=st.sampled_from([0, 300, 1 << 20]),
)
def test_any_requests_come_back_in_any_order(tmp_path_factory, counts, calls, data, user, cache):
    path = tmp_path_factory.mktemp("r") / "train"
    users = write(path, counts, calls, user, sequence=True)
    requests = reqs.Requests.open(path, cache_bytes=cache)
    counts = np.array(counts)
    indices = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=20)), np.int64)
    batch = pickle.loads(pickle.dumps(requests)).read(indices)
    check(batch, indices, counts, users)
    np.testing.assert_array_equal(batch.sequence, indices * 2)
    first = np.array([data.draw(st.integers(0, int(counts[index]))) for index in indices], np.int64)
    width = data.draw(st.integers(0, 3))
    part = requests.read(indices, first, np.full(len(indices), width))
    for place, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
        wanted = slice(start + first[place], min(start + first[place] + width, stop))
        mine = slice(part.offsets[place], part.offsets[place + 1])
        np.testing.assert_array_equal(part.label[mine], batch.label[wanted])
        np.testing.assert_array_equal(part.candidates["brand"][mine], batch.candidates["brand"][wanted])
    np.testing.assert_array_equal(part.user, batch.user)
    assert len(requests) == len(counts) and requests.num_candidates == counts.sum()
    assert list(requests.columns) == ["item", "brand"] and requests.references == ("oracle",)
    np.testing.assert_array_equal(requests.counts(), counts)


@pytest.mark.parametrize("cache", [0, 1 << 30])
def test_many_calls_across_shards(tmp_path, cache):
    counts = np.random.default_rng(0).integers(1, 20, 40_000)
    users = write(tmp_path / "train", counts, calls=7)
    assert counts.sum() > SHARD
    requests = reqs.Requests.open(tmp_path / "train", cache_bytes=cache)
    indices = np.random.default_rng(1).integers(0, len(counts), 60)
    batch = requests.read(indices)
    check(batch, indices, counts, users)
    assert batch.sequence is None


def test_no_request_at_all(tmp_path):
    with reqs.RequestsWriter(tmp_path / "none", candidates={"item": "int64"}):
        pass
    requests = reqs.Requests.open(tmp_path / "none")
    assert len(requests) == requests.num_candidates == 0
    assert len(requests.read([])) == 0


GOOD = dict(user=[1, 2], time=[5, 6], counts=[1, 2], candidates={"item": [1, 2, 3]}, label=[0, 1, 0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"candidates": {}}, r"misses \['item'\]"),
        ({"candidates": {"item": [1, 2, 3], "itme": [1, 2, 3]}}, r"undeclared \['itme'\]"),
        ({"candidates": {"item": [1, 2]}}, r"candidates.item.*\(2,\), expected a vector of 3"),
        ({"candidates": {"item": [1, 2, 1 << 40]}}, "1099511627776, which int32 cannot hold"),
        ({"candidates": {"item": [1, 2, 0.5]}}, "cannot become int32"),
        ({"counts": [3, 0]}, "counts.*0 at 1"),
        ({"time": [-1, 3]}, "time.*-1 at 0"),
        ({"label": [0, 1, np.nan]}, "label.*nan"),
        ({"user": ["a", "b"]}, "user.*cannot become int64"),
        ({"user": np.array([1, 1 << 63], np.uint64)}, "9223372036854775808, which int64 cannot hold"),
        ({"sequence": [1, 2]}, "sequence"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, wrong, message):
    with pytest.raises(reqs.RequestsError, match=message):
        with reqs.RequestsWriter(tmp_path / "train", candidates={"item": "int32"}) as w:
            w.write(**(GOOD | wrong))
    assert os.listdir(tmp_path) == []


def test_nothing_is_visible_before_the_end(tmp_path):
    with pytest.raises(KeyError):
        with reqs.RequestsWriter(tmp_path / "train", candidates={"item": "int32"}) as w:
            w.write(**GOOD)
            assert not (tmp_path / "train").exists()
            raise KeyError
    assert os.listdir(tmp_path) == []


def test_refusals(tmp_path):
    with pytest.raises(reqs.RequestsError, match="holds no requests"):
        reqs.Requests.open(tmp_path)
    with pytest.raises(reqs.RequestsError, match="int23"):
        reqs.RequestsWriter(tmp_path / "x", candidates={"item": "int23"})
    write(tmp_path / "train", [1, 2])
    with pytest.raises(reqs.RequestsError, match="exists"):
        reqs.RequestsWriter(tmp_path / "train")
    requests = reqs.Requests.open(tmp_path / "train")
    with pytest.raises(IndexError, match="request 2 of .* has 2"):
        requests.read([0, 2])
    manifest = tmp_path / "train" / "requests.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(reqs.RequestsError, match="version 9"):
        reqs.Requests.open(tmp_path / "train")


def test_a_vocabulary_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path, ids = tmp_path / "data" / "vocab" / "item", np.arange(SHARD + 5) * 3

    def kill(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(reqs.ColumnWriter, "close", kill)  # between two shards
        with pytest.raises(KeyboardInterrupt):
            reqs.write_vocabulary(path, ids)
    assert os.listdir(tmp_path / "data") == ["vocab"] and os.listdir(path.parent) == []
    reqs.write_vocabulary(path, ids)
    np.testing.assert_array_equal(reqs.read_vocabulary(path), ids)
    assert os.listdir(path.parent) == ["item"] and os.listdir(tmp_path / "data") == ["vocab"]


def test_a_flipped_bit_and_a_lost_file_are_errors(tmp_path):
    write(tmp_path / "train", np.full(300, 5))
    chunk = tmp_path / "train" / "candidates.item" / "c" / "0"
    whole = chunk.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole), 12):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        chunk.write_bytes(damaged)
        for cache in (0, 1 << 20):
            with pytest.raises(reqs.RequestsError, match="candidates.item"):
                reqs.Requests.open(tmp_path / "train", cache_bytes=cache).read(np.arange(300))
    chunk.unlink()
    with pytest.raises(reqs.RequestsError, match="candidates.item"):
        reqs.Requests.open(tmp_path / "train").read([3])


def test_columns_are_plain_zarr(tmp_path):
    write(tmp_path / "train", [2, 3])
    column = ts.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/train/candidates.item/"}).result()
    np.testing.assert_array_equal(column.read().result(), np.arange(5) * 2**40)
    zarr = pytest.importorskip("zarr")
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "train" / "offsets", mode="r")[:], [0, 2, 5])


def test_vocabulary(tmp_path):
    reqs.write_vocabulary(tmp_path / "vocab" / "item", [5, -1, 5, 2**62])
    np.testing.assert_array_equal(reqs.read_vocabulary(tmp_path / "vocab" / "item"), [-1, 5, 2**62])
    with pytest.raises(reqs.RequestsError, match="exists"):
        reqs.write_vocabulary(tmp_path / "vocab" / "item", [1])
    with pytest.raises(reqs.RequestsError, match="cannot be opened"):
        reqs.read_vocabulary(tmp_path / "vocab" / "brand")


def test_knows_no_jax():
    code = "import sys, laser_jax.requests; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "no version"),
        ("[]", "no version"),
        ('{"version": 99}', "has version 99"),
        ('{"version": 1}', "damaged"),
        ("\udcff", "damaged"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, text, message):
    write(tmp_path / "train", [2, 1])
    (tmp_path / "train" / reqs.MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(reqs.RequestsError, match=message):
        reqs.Requests.open(tmp_path / "train")


def test_labels_outside_zero_and_one_are_refused(tmp_path):
    with pytest.raises(reqs.RequestsError, match=r"label.*holds 7.0 at 0"):
        with reqs.RequestsWriter(tmp_path / "train", candidates={"item": "int64"}) as writer:
            writer.write(user=[1], time=[5], counts=[2], candidates={"item": [3, 4]}, label=[7, 0])
    assert os.listdir(tmp_path) == []
