"""The losses of a few training steps: python -m tests.few_steps DATA ENCODER, on as many devices as there are."""

import json
import sys

import jax
import numpy as np

from laser_jax.pipeline import BatchSource
from laser_jax.sharding import MeshConfig, make_mesh, place_batch
from laser_jax.state import StateFactory
from laser_jax.train import make_train_step
from tests.small_config import get_config


def few_steps(path: str, encoder: str, steps: int = 5) -> dict:
    """Mean loss of each step, the sum of squares of what was learned, and leaves that a step gave another type or place
    (each of which compiles the step once more)."""
    config = get_config(encoder)
    config.data.path = path
    mesh = make_mesh(MeshConfig(), config.data.batch_size)
    source = BatchSource(config.data, config.features, "train")
    factory = StateFactory(config.build_model, config.features.tables(), config.optim, mesh)
    state = factory.create(seed=0)
    step = make_train_step(factory, config.optim)
    losses, before = [], described(state)
    with jax.set_mesh(mesh):
        for k in range(steps):
            state, counts = step(state, place_batch(source.batch(k).step, mesh))
            losses.append(float(counts.loss / counts.samples))
    after = described(state)
    learned = jax.device_get((state.params, state.tables))
    return {
        "devices": jax.device_count(),
        "losses": losses,
        "squares": [float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in jax.tree.leaves(learned)],
        "changed": [name for name in before if before[name] != after[name]],
    }


def described(state) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.aval} {leaf.sharding}" for path, leaf in leaves}


if __name__ == "__main__":
    print(json.dumps(few_steps(*sys.argv[1:])))
