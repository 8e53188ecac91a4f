"""State, mesh and optimizer: born reproducibly, placed as asked, the same on several devices as on one."""

import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laser_jax.checkpoint import Checkpoints
from laser_jax.metrics import HISTOGRAM_BINS
from laser_jax.optim import OptimConfig, dense_optimizer
from laser_jax.sharding import MeshConfig, make_mesh, spec
from laser_jax.state import StateFactory
from tests import dictionary_config
from tests.compilation import with_devices
from tests.few_steps import EXAMINED, IN_PARTS, LENGTH, REQUESTS, UNIQUE, WITH_DICTIONARY, few_steps
from tests.small_config import get_config
from tests.test_train import flip_a_bit_of_the_largest_chunk


@pytest.fixture(scope="module")
def factory():
    config = get_config("mean")
    return StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig(), 12))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def fresh(factory):
    return factory.create(0)


def test_a_seed_fixes_the_state(factory, fresh):
    state = fresh
    assert same(state, factory.create(0))
    other = factory.create(1)
    assert not same(state.params, other.params) and not same(state.tables, other.tables)
    assert int(state.step) == 0
    kinds = [table.rows[:3, :2] for table in state.tables.values()]
    assert not same(kinds[0], kinds[1])  # tables do not share their random numbers


def test_an_abstract_state_describes_a_concrete_one(factory, fresh):
    state = fresh
    described = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), factory.abstract())
    assert described == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    config = get_config("mean")
    tables = sum(rows * width for rows, width in config.features.tables().values())
    told = factory.num_parameters()
    assert told["tables"] == tables and told["dense"] == sum(x.size for x in jax.tree.leaves(state.params))


def test_a_checkpoint_gives_the_same_bits_back_and_the_best_stays(factory, fresh, tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.newest() is None and checkpoints.best() is None
    states = {step: jax.tree.map(functools.partial(jnp.add, step), fresh) for step in range(1, 6)}
    for step, auc in {1: None, 2: 0.7, 3: 0.6, 4: None, 5: 0.65}.items():
        checkpoints.save(states[step], step, None if auc is None else {"auc": auc, "logloss": 0.5})
    assert checkpoints.newest() == 5 and checkpoints.best() == 2
    checkpoints.close()
    again = Checkpoints(str(tmp_path))
    assert again.newest() == 5 and again.best() == 2
    for step in (2, 5):
        assert same(again.restore(step, factory.abstract()), states[step])
    again.close()
    assert sorted(name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()) == ["2", "4", "5"]


def test_whoever_only_reads_leaves_a_run_that_is_saving_alone(factory, fresh, tmp_path):
    running = Checkpoints(str(tmp_path))
    states = {step: jax.tree.map(functools.partial(jnp.add, step), fresh) for step in range(1, 6)}
    running.save(states[1], 1, {"auc": 0.5})
    running.save(states[2], 2, {"auc": 0.6})
    running.close()
    half = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"  # as while it is being written
    shutil.copytree(tmp_path / "checkpoints" / "2", half)
    reader = Checkpoints(str(tmp_path), read_only=True)
    assert reader.best() == 2
    shutil.rmtree(half)
    running = Checkpoints(str(tmp_path))
    for step in (3, 4, 5):
        running.save(states[step], step, {"auc": step / 10 + 0.3})
    running.close()
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    assert "2" not in before
    state, step = reader.restore_best(factory.abstract())  # 2 was the best when it looked, and has gone
    assert step == 5 and same(state, states[5])
    flip_a_bit_of_the_largest_chunk(tmp_path / "checkpoints" / "5")
    assert reader.restore_best(factory.abstract())[1] == 4
    reader.close()
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"] and sorted(os.listdir(tmp_path / "checkpoints")) == before


STEPS = 20
MESHES = ("8x1", "4x2", "2x4")


@pytest.fixture(scope="module")
def alone(known_data):
    return few_steps(known_data.path, "laser_plus", STEPS, MeshConfig())


@pytest.fixture(scope="module")
def together(known_data, tmp_path_factory):
    """The same steps on meshes of eight devices: what was said, and what was learned."""
    out = str(tmp_path_factory.mktemp("meshes"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.few_steps", known_data.path, "laser_plus", str(STEPS), ",".join(MESHES), out],
        env={**os.environ, "XLA_FLAGS": with_devices(8)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for name in MESHES:
        with np.load(os.path.join(out, f"{name}.npz")) as stored:
            told[name]["learned"] = dict(stored)
    with np.load(os.path.join(out, f"{WITH_DICTIONARY}-dictionary.npz")) as stored:
        told[WITH_DICTIONARY]["dictionary"]["learned"] = dict(stored)
    return told


def test_a_step_leaves_every_type_and_place_as_it_was(alone, together):
    assert alone["changed"] == []
    assert all(told["changed"] == [] for told in together.values())


@pytest.fixture(scope="module")
def alone_with_dictionary(known_data):
    return few_steps(known_data.path, "laser_plus", STEPS, MeshConfig(), dictionary_config.get_config)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_learns_the_same(alone, together, mesh):
    # Adam divides a gradient by its size: where that is next to nothing, another order of summing shows.
    check_the_same(together[mesh], alone, 1e-4 if mesh in IN_PARTS else 1e-5)


def test_a_growing_dictionary_gives_the_same_rows_on_every_mesh(alone_with_dictionary, together):
    check_the_same(together[WITH_DICTIONARY]["dictionary"], alone_with_dictionary)


def check_the_same(told, alone, near=1e-5):
    assert (alone["devices"], told["devices"]) == (1, 8)
    np.testing.assert_allclose(told["losses"], alone["losses"], rtol=1e-5)
    assert alone["losses"][0] > 1.2 * alone["losses"][-1]
    for name, want in alone["learned"].items():
        # Adam divides by what may be next to nothing: rounding, another on every kind of CPU, counts for more there.
        room = 5 * near * np.abs(want).max()
        np.testing.assert_allclose(told["learned"][name], want, rtol=near, atol=room, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"microbatches": 1},
        {"microbatches": 1, "length_steps": 4},
        {"microbatches": 4},
        {"microbatches": 4, "length_steps": 3},
        {"microbatches": 16, "length_steps": 20},
        {"compute": "bfloat16"},
    ],
)
def test_parts_of_a_batch_add_up_and_bfloat16_is_near(alone, known_data, changes):
    told = few_steps(known_data.path, "laser_plus", 5, MeshConfig(), **changes)
    exact = "microbatches" in changes
    np.testing.assert_allclose(told["losses"], alone["losses"][:5], rtol=1e-5 if exact else 2e-2)
    assert told["changed"] == [] and (exact or told["losses"] != alone["losses"][:5])


def test_dense_parameters_are_split_over_model_only(together):
    assert together["8x1"]["split"] == 0
    assert together["4x2"]["split"] > 10 and together["2x4"]["split"] > 10


def test_nothing_of_the_size_of_the_histories_crosses_the_mesh(together):
    """Only unique rows, their gradients, dense parameters and counts do."""
    found = together[EXAMINED]["exchanged"]
    dense = max(x.size for name, x in together[EXAMINED]["learned"].items() if "tables" not in name)
    rows = 8 * UNIQUE * 8  # a bucket from each of 8 devices, of rows 8 numbers wide
    assert found["all-to-all"] <= rows and found.keys() <= {"all-to-all", "all-reduce", "all-gather", "reduce-scatter"}
    largest = max(rows, dense, 2 * HISTOGRAM_BINS)
    assert all(size <= largest for size in found.values()), found
    width = get_config("laser_plus").width
    assert largest < REQUESTS // 8 * LENGTH * width  # the tokens of one device's requests


@pytest.mark.parametrize(
    ("mesh", "batch_size", "message"),
    [
        (MeshConfig(data=3), 12, "data=3 x model=1 does not use the 1 devices"),
        (MeshConfig(model=2), 12, "x model=2 does not use the 1 devices"),
        (MeshConfig(model=0), 12, "model=0"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, batch_size, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(mesh, batch_size)


def test_two_dimensions_on_one_axis_are_refused():
    with pytest.raises(ValueError, match="fall on one mesh axis twice"):
        spec("requests", "dense")
    assert spec(None, "dense", None) == jax.sharding.PartitionSpec(None, "model")


def test_the_dense_optimizer_warms_up_clips_and_is_adam():
    params = {"w": jnp.ones(3)}
    gradients = {"w": jnp.array([3.0, 0.0, 4.0])}

    def updates(config, steps=1):
        optimizer = dense_optimizer(config)
        state = optimizer.init(params)
        for _ in range(steps):
            out, state = optimizer.update(gradients, state, params)
        return np.asarray(out["w"])

    adam = optax.adam(0.1, b1=0.9, b2=0.9999)
    want, _ = adam.update(gradients, adam.init(params), params)
    np.testing.assert_array_equal(updates(OptimConfig(learning_rate=0.1)), want["w"])
    warm = OptimConfig(learning_rate=0.1, warmup=10)
    assert (updates(warm) == 0).all()
    np.testing.assert_allclose(updates(warm, 2), 0.1 * want["w"], rtol=1e-3)
    clipped = dense_optimizer(OptimConfig(learning_rate=0.1, clip=1.0))
    _, state = clipped.update(gradients, clipped.init(params), params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3,)]
    np.testing.assert_allclose(moments[0], 0.1 * np.array([0.6, 0, 0.8]), rtol=1e-5)  # (1 - b1) times norm 1


@pytest.mark.parametrize(("requests", "parts"), [(32, 8), (12, 3), (9, 1), (6, 1), (10, 2), (31, 1), (3, 1), (1, 1)])
def test_a_cpu_takes_a_few_requests_at_a_time(requests, parts):
    assert OptimConfig().parts(requests, 1000) == parts
    assert OptimConfig(microbatches=1).parts(requests, 1000) == 1
    with pytest.raises(ValueError, match=f"microbatches={requests + 1} does not divide the {requests} requests"):
        OptimConfig(microbatches=requests + 1).parts(requests, 1000)


@pytest.mark.parametrize(("length", "parts"), [(50, 1), (200, 1), (500, 4), (2000, 16), (10_000, 16)])
def test_a_cpu_takes_more_of_short_histories_at_a_time(length, parts):
    assert OptimConfig().parts(32, length) == parts


def test_only_long_histories_are_worth_several_lengths():
    assert OptimConfig().lengths(511) == [511] and OptimConfig().lengths(1000) == [250, 500, 750, 1000]
    assert OptimConfig(length_steps=3).lengths(20) == [7, 14, 20]
    assert OptimConfig(length_steps=9).lengths(4) == [1, 2, 3, 4]
    assert OptimConfig(length_steps=1).lengths(1000) == [1000]
    with pytest.raises(ValueError, match="optim.length_steps=-1"):
        OptimConfig(length_steps=-1).check()
