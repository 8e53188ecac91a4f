"""A few training steps on meshes of all devices there are: python -m tests.few_steps DATA ENCODER STEPS 8x1,4x2 OUT

Writes OUT/MESH.npz with what was learned, prints a JSON object by mesh: the losses, and the largest collective of the
compiled step.
"""

import json
import os
import re
import sys

import jax
import numpy as np

from laser_jax.pipeline import BatchSource
from laser_jax.sharding import MeshConfig, device_share, make_mesh, place_batch, spec
from laser_jax.state import StateFactory
from laser_jax.step import make_eval_step, make_train_step
from tests import dictionary_config
from tests.abstract_batch import abstract_batch
from tests.small_config import get_config

SPLIT_FROM = 128  # elements: small enough for the small model's matrices to be split over `model`


def few_steps(path: str, encoder: str, steps: int, mesh: MeshConfig, make_config=get_config, **changes) -> dict:
    """Mean loss of each step, what was learned, and what a step changed but should not.

    Args:
      changes: fields of the OptimConfig.
    """
    config = make_config(encoder)
    config.data.path, config.data.batch_size = path, 16
    config.head.matches, config.head.mean = ("item", "category"), True
    config.train.seed = 3
    for name, value in changes.items():
        setattr(config.optim, name, value)
    mesh = make_mesh(mesh, config.data.batch_size)
    source = BatchSource(config.data, config.features, "train", device_share(mesh))
    factory = StateFactory(config.build_model, config.features, config.optim, mesh, SPLIT_FROM)
    state = factory.create(seed=0)
    step = make_train_step(factory)
    losses, before = [], described(state)
    with jax.set_mesh(mesh):
        for batch in source.stream(0, steps):
            state, counts = step(state, place_batch(batch.step, mesh))
            losses.append(float(counts.loss / counts.samples))
        batch = source.batch(0)
        logits = np.asarray(make_eval_step(factory)(state, place_batch(batch.step, mesh))[0])
        logits = np.where(batch.step["mask"], logits, 0)  # what pads a row is whatever a device has there
    after = described(state)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get((state.params, state.tables)))
    split = [x for x in jax.tree.leaves((state.params, state.opt_state)) if "model" in x.sharding.spec]
    return {
        "devices": jax.device_count(),
        "losses": losses,
        "learned": {jax.tree_util.keystr(p): np.asarray(x, np.float32) for p, x in leaves} | {"logits": logits},
        # Leaves that a step gave another type or place (each of which compiles the step once more).
        "changed": [name for name in before if before[name] != after[name]],
        "split": len(split),
    }


LENGTH, REQUESTS = 400, 64


def exchanged(encoder: str, mesh: MeshConfig) -> dict[str, int]:
    """Kind of collective -> elements of the largest, in the step compiled for REQUESTS histories of LENGTH events."""
    config = get_config(encoder)
    config.data.history_length, config.data.batch_size = LENGTH, REQUESTS
    mesh = make_mesh(mesh, REQUESTS)
    factory = StateFactory(config.build_model, config.features, config.optim, mesh, SPLIT_FROM)
    batch = abstract_batch(config, mesh.size, UNIQUE, jax.sharding.NamedSharding(mesh, spec("requests")))
    with jax.set_mesh(mesh):
        return collectives(make_train_step(factory).lower(factory.abstract(), batch).compile().as_text())


WITH_DICTIONARY, EXAMINED = "4x2", "2x4"
IN_PARTS = {"2x4": {"microbatches": 2, "length_steps": 3}}  # of one request each
UNIQUE = 32  # rows that a device wants of another


def described(state) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.aval} {leaf.sharding}" for path, leaf in leaves}


def collectives(program: str) -> dict[str, int]:
    """Kind of collective -> elements of the largest one in a compiled program's text."""
    largest: dict[str, int] = {}
    kinds = "all-to-all|all-reduce|all-gather|reduce-scatter|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n], dtype=int)
            for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]
        largest[kind] = max(largest.get(kind, 0), int(sum(sizes)))
    return largest


if __name__ == "__main__":
    path, encoder, steps, meshes, out = sys.argv[1:]
    told = {}
    for name in meshes.split(","):
        data, model = map(int, name.split("x"))
        found = few_steps(path, encoder, int(steps), MeshConfig(data, model), **IN_PARTS.get(name, {}))
        if name == WITH_DICTIONARY:  # as it takes as long again
            kept = few_steps(path, encoder, int(steps), MeshConfig(data, model), dictionary_config.get_config)
            np.savez(os.path.join(out, f"{name}-dictionary.npz"), **kept.pop("learned"))
            found["dictionary"] = kept
        if name == EXAMINED:
            found["exchanged"] = exchanged(encoder, MeshConfig(data, model))
        np.savez(os.path.join(out, f"{name}.npz"), **found.pop("learned"))
        told[name] = found
    print(json.dumps(told))
