"""A run that begins with parts of another: those are the same bits, the rest is fresh, what does not fit is named."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from laser_jax import train
from laser_jax.checkpoint import CheckpointError, Checkpoints
from laser_jax.features import FieldConfig
from laser_jax.optim import OptimConfig
from laser_jax.row_placement import places
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from laser_jax.warm_start import WarmStartError, warm_start
from tests.dictionary_config import get_config
from tests.test_train import config_for, flip_a_bit_of_the_largest_chunk


def config_of(known_data, **changes):
    config = get_config("mean")
    config.data.path = known_data.path
    config.data.epochs = 2
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def factory_of(config):
    return StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig(), 12))


@pytest.fixture(scope="module")
def other(known_data, tmp_path_factory):
    """A finished run: its workdir, state and dictionaries."""
    workdir = str(tmp_path_factory.mktemp("other") / "run")
    config = config_of(known_data)
    train.run(config, workdir)
    ids = config.features.dictionaries()
    checkpoints = Checkpoints(workdir, ids)
    state = checkpoints.restore(checkpoints.newest(), factory_of(config).abstract())
    checkpoints.close()
    assert len(ids["item"]) > 10
    return workdir, state, ids


def begin(config, workdir, parts=("dense", "tables")):
    factory, ids = factory_of(config), config.features.dictionaries()
    fresh, again = factory.create(1), factory.create(1)
    state = warm_start(fresh, factory, config.features, ids, config.data, workdir, parts)
    return state, again, ids


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("parts", [("dense",), ("tables",), ("dense", "tables")])
def test_parts_are_the_other_runs_and_the_rest_is_fresh(known_data, other, parts):
    workdir, want, ids = other
    state, fresh, now = begin(config_of(known_data), workdir, parts)
    assert same(state.params, want.params if "dense" in parts else fresh.params)
    assert same(state.tables, want.tables if "tables" in parts else fresh.tables)
    assert same(state.opt_state, fresh.opt_state) and int(state.step) == 0
    assert len(now["item"]) == (len(ids["item"]) if "tables" in parts else 0)


def test_a_table_may_have_grown(known_data, other):
    workdir, want, ids = other
    config = config_of(known_data)
    config.features = dataclasses.replace(
        config.features, item=(FieldConfig("item", 4, 5000, "dictionary", admit=2, keep=3), config.features.item[1])
    )
    state, fresh, now = begin(config, workdir)
    known = np.unique(known_data.events["item"])
    rows = ids["item"].rows(known)
    np.testing.assert_array_equal(now["item"].rows(known), rows)
    rows = rows[rows > 0]
    before, after = want.tables["item"], state.tables["item"]
    assert after.rows.shape[0] > before.rows.shape[0]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[places(rows, 5000)], np.asarray(old)[places(rows, 60)])
    further = places(np.arange(4000, 5000), 5000)
    np.testing.assert_array_equal(np.asarray(after.rows)[further], np.asarray(fresh.tables["item"].rows)[further])


def test_another_optimizer_takes_the_rows_alone(known_data, other, caplog):
    workdir, want, _ = other
    for optim in (OptimConfig(table_optimizer="ftrl"), OptimConfig(table_optimizer="adagrad_rowwise")):
        state, _, _ = begin(config_of(known_data, optim=optim), workdir)
        rows = want.tables["category"].rows
        assert same(state.tables["category"].rows, rows)
        # As if they were born with these rows: FTRL's rows are what its slots say.
        assert same(state.tables["category"].slots, optim.row_optimizer().init(rows))
    assert "fresh optimizer state" in caplog.text
    state, _, _ = begin(config_of(known_data, optim=OptimConfig(table_type="bfloat16")), workdir)
    np.testing.assert_array_equal(
        np.asarray(state.tables["category"].rows), np.asarray(want.tables["category"].rows.astype("bfloat16"))
    )


def test_ftrl_goes_on_only_where_its_state_means_the_same(known_data, tmp_path):
    """Its `linear` holds the rows by these settings: with others the first step would make other rows of them."""
    workdir, ftrl = str(tmp_path / "run"), OptimConfig(table_optimizer="ftrl", table_learning_rate=0.4)
    train.run(config_of(known_data, optim=ftrl), workdir)
    for name, value in (("table_learning_rate", 0.1), ("table_l2", 0.5), ("table_l1", 0.0)):
        optim = dataclasses.replace(ftrl, **{name: value})
        table = begin(config_of(known_data, optim=optim), workdir)[0].tables["category"]
        rows = np.asarray(optim.row_optimizer().update(table.rows, table.slots, np.zeros(table.rows.shape), 1)[0])
        np.testing.assert_allclose(rows, table.rows, rtol=1e-5, atol=1e-6)
        assert same(table.slots, optim.row_optimizer().init(table.rows)) == (optim != ftrl)


def test_what_does_not_fit_is_refused_by_name(known_data, other, tmp_path):
    workdir = other[0]

    def with_item(**changes):
        config = config_of(known_data)
        item = dataclasses.replace(config.features.item[0], **changes)
        config.features = dataclasses.replace(config.features, item=(item, config.features.item[1]))
        return config

    for config, message in (
        (with_item(rows=50), "table 'item' .* 60 rows there, 50 here: a table can grow, not shrink"),
        (with_item(width=8), "table 'item' .* 4 wide there, 8 here"),
        (with_item(ids="hash", admit=1, keep=0), "table 'item' .* are 'dictionary' .1. there, 'hash' .1. here"),
    ):
        with pytest.raises(WarmStartError, match=message):
            begin(config, workdir, ("tables",))
    with pytest.raises(WarmStartError, match="dense parameters .* do not fit .*16.* there, .*32"):
        begin(config_of(known_data, width=32), workdir, ("dense",))
    with pytest.raises(WarmStartError, match="is no run to begin with"):
        begin(config_of(known_data), str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="warm_parts=.'head',."):
        begin(config_of(known_data), workdir, ("head",))


def test_a_damaged_checkpoint_is_no_beginning(known_data, other, tmp_path):
    workdir = str(tmp_path / "run")
    shutil.copytree(other[0], workdir)
    flip_a_bit_of_the_largest_chunk(f"{workdir}/checkpoints/{int(other[1].step)}")
    with pytest.raises(CheckpointError, match="damaged|cannot be read"):
        begin(config_of(known_data), workdir)


def test_a_run_may_begin_with_another(known_data, other, tmp_path):
    config = config_of(known_data)
    config.train.warm_start = other[0]
    warm = train.run(config, str(tmp_path / "warm")).figures()
    cold = train.run(config_for(known_data, "mean", data__epochs=2), str(tmp_path / "cold")).figures()
    assert warm.logloss < cold.logloss
