"""Configs: every experiment builds with every encoder, and a workdir belongs to one config."""

import importlib
import json
import os
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from laser_jax.config import check_sizes, remember, to_dict
from laser_jax.features import source_of
from laser_jax.models import ENCODERS
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from laser_jax.step import make_train_step
from tests.abstract_batch import abstract_batch
from tests.small_config import get_config

EXPERIMENTS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "experiments").glob("*.py")
    if "def get_config" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_and_steps_with_every_encoder(experiment, encoder):
    config = importlib.import_module(f"experiments.{experiment}").get_config(encoder)
    assert config.name == encoder and config.data.recipe is not None
    mesh = make_mesh(MeshConfig(), config.data.batch_size)
    factory = StateFactory(config.build_model, config.features, config.optim, mesh, steps=100)
    state = factory.abstract()
    after, counts = jax.eval_shape(make_train_step(factory), state, abstract_batch(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert counts.loss.shape == () and counts.histogram.dtype == np.int32


def test_there_are_experiments():
    assert {"completejourney", "tiny", "xhs"} <= set(EXPERIMENTS)


def test_a_default_is_laser_plus():
    for experiment in EXPERIMENTS:
        assert importlib.import_module(f"experiments.{experiment}").get_config().name == "laser_plus"


def test_a_config_as_plain_values_tells_encoders_apart_and_survives_json():
    seen = set()
    for encoder in ENCODERS:
        plain = to_dict(get_config(encoder))
        assert json.loads(json.dumps(plain)) == plain
        seen.add(json.dumps(plain["encoder"], sort_keys=True))
    assert len(seen) == len(ENCODERS)


def test_what_does_not_change_the_result_may_change_in_a_workdir(tmp_path):
    remember(get_config(), str(tmp_path / "run"), {}, {})
    stored = (tmp_path / "run" / "config.json").read_text(encoding="utf-8")
    config = get_config()
    config.data.path, config.data.threads, config.train.log_every = "elsewhere", 7, 3
    remember(config, str(tmp_path / "run"), {}, {})
    assert (tmp_path / "run" / "config.json").read_text(encoding="utf-8") == stored
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_every_field_that_differs_is_named(tmp_path):
    remember(get_config(), str(tmp_path), {"vault": "a"}, {"brand": [3, "x"]})
    config = get_config()
    config.width, config.optim.b2, config.features.item[0].rows = 32, 0.99, 200
    with pytest.raises(ValueError) as refused:
        remember(config, str(tmp_path), {"vault": "b"}, {"brand": [4, "y"]})
    for part in (
        str(tmp_path),
        "fingerprint.vault: 'a' -> 'b'",
        "width: 16 -> 32",
        "optim.b2: 0.9999 -> 0.99",
        "features.item",
        "another --workdir",
    ):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "field, value",
    [
        ("data.batch_size", 0),
        ("data.epochs", -1),
        ("data.seed", -1),
        ("data.cache_bytes", -1),
        ("train.save_every", 0),
        ("train.seed", -1),
        ("train.gate_maps", -1),
        ("train.length_edges", (5, 1)),
        ("width", 0),
        ("head.tokens", 0),
        ("head.width", -8),
        ("features.age_buckets", 0),
        ("features.age_width", 0),
        ("optim.learning_rate", 0.0),
        ("optim.learning_rate", float("nan")),
        ("optim.learning_rate", float("inf")),
        ("optim.b2", 1.0),
        ("optim.clip", float("nan")),
        ("optim.table_learning_rate", float("nan")),
        ("optim.table_std", -0.1),
    ],
)
def test_sizes_that_no_run_can_have_are_named(field, value):
    config = get_config()
    check_sizes(config)
    part, _, name = field.rpartition(".")
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(ValueError) as refused:
        check_sizes(config)
    assert str(refused.value).startswith(part) and f"{name}={value}" in str(refused.value)


def test_horizons_of_matches_that_are_not_there_are_refused_where_a_run_starts():
    """And only there: a model that was exported so stays what it is."""
    config = get_config()
    config.head.matches, config.head.match_horizons = (), (5,)
    with pytest.raises(ValueError, match=r"head.match_horizons=\(5,\) are of head.matches, of which there are none"):
        check_sizes(config)
    config.head.matches = ("item",)
    check_sizes(config)


def test_fields_reach_the_model_by_table_and_side():
    config = get_config()
    model = nnx.eval_shape(lambda: config.build_model(nnx.Rngs(0)))
    features = config.features
    for fields, layout in ((features.item, model.layout.candidate), (features.context, model.layout.context)):
        assert layout == tuple((field.name, source_of(field), field.width) for field in fields)
    assert [name for name, *_ in model.layout.history] == ["item", "category", "action", "dwell"]
