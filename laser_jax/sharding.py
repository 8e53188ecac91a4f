"""The mesh, and which dimension of which array lies on which axis of it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass
class MeshConfig:
    """Devices along the axes `data` and `model`; data=-1 takes what is left."""

    data: int = -1
    model: int = 1


def make_mesh(config: MeshConfig, *batch_sizes: int) -> Mesh:
    """The mesh of a run.

    Raises:
      ValueError: the axes do not use the devices exactly, or a batch size does not divide over `data`.
    """
    devices = jax.device_count()
    if config.model < 1 or config.data < -1 or config.data == 0:
        raise ValueError(f"mesh data={config.data} x model={config.model}: give at least 1 (data=-1: what is left)")
    data = devices // config.model if config.data == -1 else config.data
    if data * config.model != devices:
        raise ValueError(f"mesh data={data} x model={config.model} does not use the {devices} devices exactly")
    for batch_size in batch_sizes:
        if batch_size % data:
            raise ValueError(f"a batch of {batch_size} does not divide over the {data} devices of the mesh's data axis")
    # Auto axes, written out: jax.make_mesh makes explicit ones, which want an out_sharding at every gather.
    return jax.make_mesh((data, config.model), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


# Logical dimension -> mesh axis. Tables and dense parameters are whole on every device.
RULES: dict[str, str | None] = {"batch": "data", "unique": None, "vocabulary": None}


def sharding(mesh: Mesh, *dimensions: str) -> NamedSharding:
    """The sharding of an array whose leading dimensions are those named; two may not fall on one axis."""
    axes = [RULES[dimension] for dimension in dimensions]
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) != len(used):
        raise ValueError(f"dimensions {dimensions} fall on one mesh axis twice: {axes}")
    while axes and axes[-1] is None:  # as jit writes it: P(None) and P() are the same place but another cache key
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))


def place_batch(step: dict, mesh: Mesh) -> dict:
    """A host batch's arrays on the mesh: unique rows on every device, everything else split over requests."""
    rows, requests = sharding(mesh, "unique"), sharding(mesh, "batch")

    def place(path, array: np.ndarray) -> jax.Array:
        return jax.device_put(array, rows if path[0].key == "unique" else requests)

    return jax.tree_util.tree_map_with_path(place, step)
