"""State, mesh and optimizer: born reproducibly, placed as asked, the same on several devices as on one."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from laser_jax.checkpoint import Checkpoints
from laser_jax.optim import OptimConfig, dense_optimizer
from laser_jax.sharding import MeshConfig, make_mesh, sharding
from laser_jax.state import StateFactory, num_parameters
from tests.few_steps import few_steps
from tests.small_config import get_config


@pytest.fixture(scope="module")
def factory():
    config = get_config("mean")
    return StateFactory(config.build_model, config.features.tables(), config.optim, make_mesh(MeshConfig(), 12))


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
    told = num_parameters(state)
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
    assert sorted(name for name in os.listdir(tmp_path / "checkpoints") if name.isdigit()) == ["2", "5"]


@pytest.fixture(scope="module")
def alone(known_data):
    return few_steps(known_data.path, "laser_plus")


def test_a_step_leaves_every_type_and_place_as_it_was(alone):
    assert alone["changed"] == []


def test_several_devices_learn_the_same_as_one(known_data, alone):
    done = subprocess.run(
        [sys.executable, "-m", "tests.few_steps", known_data.path, "laser_plus"],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout.splitlines()[-1])
    assert (alone["devices"], together["devices"]) == (1, 4)
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-5)
    # A softmax gate ignores its bias, so Adam walks on the sign of rounding noise there: hence an absolute part.
    np.testing.assert_allclose(together["squares"], alone["squares"], rtol=1e-5, atol=1e-6)
    assert alone["losses"][0] != alone["losses"][-1]


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
    mesh = make_mesh(MeshConfig(), 12)
    with pytest.raises(ValueError, match="fall on one mesh axis twice"):
        sharding(mesh, "batch", "batch")
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert sharding(mesh, "batch", "unique").is_equivalent_to(rows, ndim=2)


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
