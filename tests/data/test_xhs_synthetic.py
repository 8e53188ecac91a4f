"""xhs_synthetic: the same bytes for the same arguments, and labels from nothing but the visible history."""

import hashlib

import numpy as np
import pytest

from data import xhs_synthetic_teacher as world
from data.recipe import RecipeError, read_dataset
from data.xhs_synthetic import REQUEST_DAYS, XhsSynthetic
from laser_jax import vault as seqvault
from laser_jax.requests import Requests, read_vocabulary

TINY = dict(users=150, mean_length=120, max_length=900, train_requests=400, valid_requests=50, test_requests=150)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return XhsSynthetic(**TINY).prepare(tmp_path_factory.mktemp("xhs") / "tiny", progress=False)


def everything(path, split):
    requests = Requests.open(f"{path}/requests/{split}")
    return requests.read(np.arange(len(requests)))


def content_hash(path):
    """Of everything a reader can see."""
    seen = hashlib.sha256()
    vault = seqvault.open(f"{path}/vault")
    histories = vault.gather(np.arange(len(vault)), None, 10_000)
    arrays = [histories.offsets, *(histories.columns[name] for name in sorted(histories.columns))]
    for split in REQUEST_DAYS:
        batch = everything(path, split)
        arrays += [batch.user, batch.time, batch.label, batch.context["scene"]]
        arrays += [batch.candidates[name] for name in sorted(batch.candidates)]
        # A last bit of float arithmetic may differ among machines.
        arrays += [np.round(batch.references[name], 3) + 0.0 for name in sorted(batch.references)]
    arrays += [read_vocabulary(f"{path}/vocab/{name}") for name in ("item", "author")]
    for array in arrays:
        seen.update(np.ascontiguousarray(array).tobytes())
    return seen.hexdigest()


def test_frozen(dataset):
    """Version 1 for ever: whatever changes this must raise VERSION and be calibrated anew."""
    assert XhsSynthetic.VERSION == 1
    assert content_hash(dataset) == "6e766270490bc39377fd80f7a44ae19431e3f3cbc5f6dd7debc28e276a214e37"


def test_same_arguments_same_data(dataset, tmp_path):
    again = XhsSynthetic(**TINY).prepare(tmp_path / "again", progress=False)
    assert content_hash(again) == content_hash(dataset)
    other = XhsSynthetic(**{**TINY, "seed": 2}).prepare(tmp_path / "other", progress=False)
    assert content_hash(other) != content_hash(dataset)


def test_teacher_frozen():
    history = {
        "item": world.item_id(np.array([0, 500, 900, 0, 12_345])),
        "author": world.author_id(np.array([0, 41, 75, 0, 1028])),
        "category": np.array([7, 7, 8, 7, 9], np.int32),
        "action": np.array([1, 2, 0, 4, 3], np.uint8),
        "scene": np.array([0, 1, 2, 1, 0], np.uint8),
        "time": np.array([0, 40, 80, 90, 100]) * world.DAY_S,
    }
    candidates = {
        "item": world.item_id(np.array([0, 12_345, 901])),
        "author": world.author_id(np.array([0, 1028, 75])),
        "category": np.array([7, 9, 8], np.int32),
    }
    at = 100 * world.DAY_S
    for teacher, golden in ((world.Teacher(), GOLDEN_FULL), (world.Teacher(newest=1), GOLDEN_ONE)):
        np.testing.assert_allclose(teacher.logits(history, at, 1, candidates), golden, atol=1e-6)
    later = world.Teacher().logits(history, at + 1, 1, candidates)
    assert later[1] > GOLDEN_FULL[1]  # the event of that very second is not visible, a second later it is
    np.testing.assert_allclose(
        world.Teacher().probabilities(history, at, 1, candidates), 1 / (1 + np.exp(-np.array(GOLDEN_FULL))), atol=1e-6
    )


GOLDEN_FULL = [3.1227036, -3.1998381, -2.2245705]
GOLDEN_ONE = [2.8204396, -3.1998381, -2.2245705]


@pytest.mark.parametrize("split", REQUEST_DAYS)
def test_oracle_is_the_teacher_on_the_visible_history(dataset, split):
    vault = seqvault.open(f"{dataset}/vault")
    batch = everything(dataset, split)
    visible = vault.gather(batch.user, batch.time, 10_000)
    for r in range(len(batch)):
        own, shown = (slice(o[r], o[r + 1]) for o in (visible.offsets, batch.offsets))
        history = {name: values[own] for name, values in visible.columns.items()}
        logits = world.Teacher().logits(
            history,
            batch.time[r],
            batch.context["scene"][r],
            {name: values[shown] for name, values in batch.candidates.items()},
        )
        np.testing.assert_allclose(batch.references["oracle"][shown], logits, rtol=1e-5, atol=1e-5)


def test_shape_of_the_data(dataset):
    counts = read_dataset(dataset)["counts"]
    vault = seqvault.open(f"{dataset}/vault")
    assert len(vault) == counts["users"] == TINY["users"] and vault.num_events == counts["events"]
    newest = 0
    for split in REQUEST_DAYS:
        batch = everything(dataset, split)
        assert len(batch) == TINY[f"{split}_requests"] and (np.diff(batch.offsets) == 10).all()
        assert np.bincount(batch.user, minlength=150).max() <= -(-len(batch) // 150)
        assert batch.time.min() >= newest
        newest = batch.time.max()
        np.testing.assert_allclose(
            batch.references["popularity"], world.popularity(batch.candidates["item"]), rtol=1e-6
        )
    assert vault.verify() == []


def test_ids_mean_the_same_in_events_and_candidates(dataset):
    events = seqvault.open(f"{dataset}/vault").gather(np.arange(150), None, 10_000).columns
    of_item = {
        i: (a, c)
        for i, a, c in zip(events["item"].tolist(), events["author"].tolist(), events["category"].tolist(), strict=True)
    }
    shown = everything(dataset, "train").candidates
    columns = (shown[name].tolist() for name in ("item", "author", "category"))
    both = [(of_item[i], (a, c)) for i, a, c in zip(*columns, strict=True) if i in of_item]
    assert len(both) > 100 and all(a == b for a, b in both)
    known = read_vocabulary(f"{dataset}/vocab/item")
    assert set(known.tolist()) <= set(of_item) and len(known) > 0.8 * len(of_item)


def test_the_oracle_ranks_and_popularity_hardly_does(dataset):
    batch = everything(dataset, "train")
    clicked, ignored = batch.label == 1, batch.label == 0

    def wins(score):
        return (score[clicked][:, None] > score[ignored]).mean()

    assert 0.05 < clicked.mean() < 0.35
    assert wins(batch.references["oracle"]) > 0.65
    assert 0.5 < wins(batch.references["popularity"]) < 0.62


@pytest.mark.parametrize("wrong", [{"users": 0}, {"max_length": 5}, {"candidates": 0}, {"seed": -1}])
def test_wrong_arguments(tmp_path, wrong):
    with pytest.raises(RecipeError, match=f"{next(iter(wrong))}="):
        XhsSynthetic(**wrong).prepare(tmp_path / "set")


def test_item_ids_are_unique():
    ids = world.item_id(np.arange(world.NUM_ITEMS))
    assert len(np.unique(ids)) == world.NUM_ITEMS and ids.min() >= 0 and ids.max() < 1 << 40
    rank = np.arange(world.ITEMS_PER_AUTHOR)
    assert (np.diff(world.popularity(world.item_id(rank))) < 0).all()
