"""The mesh, and which dimension of which array lies on which axis of it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laser_jax.row_placement import DeviceShare

AXES = ("data", "model")


@dataclasses.dataclass
class MeshConfig:
    """Devices along the axes `data` and `model`; data=-1 takes what is left.

    Requests and table rows lie over all devices. Dense parameters and their optimizer state are the same along `data`
    and split over `model`, those of at least `split_from` elements.
    """

    data: int = -1
    model: int = 1
    split_from: int = 1 << 16


def make_mesh(config: MeshConfig, *batch_sizes: int) -> Mesh:
    """The mesh of a run.

    Raises:
      ValueError: the axes do not use the devices exactly, or a batch size does not divide over them.
    """
    devices = jax.device_count()
    if config.model < 1 or config.data < -1 or config.data == 0:
        raise ValueError(f"mesh data={config.data} x model={config.model}: give at least 1 (data=-1: what is left)")
    data = devices // config.model if config.data == -1 else config.data
    if data * config.model != devices:
        raise ValueError(f"mesh data={data} x model={config.model} does not use the {devices} devices exactly")
    for batch_size in batch_sizes:
        if batch_size % devices:
            raise ValueError(f"a batch of {batch_size} requests does not divide over the {devices} devices of the mesh")
    # Auto axes, written out: jax.make_mesh makes explicit ones, which want an out_sharding at every gather.
    return jax.make_mesh((data, config.model), AXES, axis_types=(AxisType.Auto, AxisType.Auto))


# Logical dimension -> mesh axes. Both a batch's requests and a table's rows lie over all devices: rows are exchanged
# (layers/row_exchange), and no device does another's work again.
RULES: dict[str, str | tuple[str, ...]] = {"requests": AXES, "rows": AXES, "dense": "model"}


def spec(*dimensions: str | None) -> PartitionSpec:
    """The placement of an array whose leading dimensions are those named; None is whole on every device.

    Raises:
      ValueError: two fall on one mesh axis.
    """
    axes = [None if dimension is None else RULES[dimension] for dimension in dimensions]
    used = [axis for found in axes if found is not None for axis in ((found,) if isinstance(found, str) else found)]
    if len(set(used)) != len(used):
        raise ValueError(f"dimensions {dimensions} fall on one mesh axis twice: {axes}")
    while axes and axes[-1] is None:  # as jit writes it: P(None) and P() are the same place but another cache key
        axes.pop()
    return PartitionSpec(*axes)


def dense_spec(shape: tuple[int, ...], mesh: Mesh, split_from: int) -> PartitionSpec:
    """Of a dense parameter or what its optimizer keeps for it: the largest dimension that divides lies over `model`."""
    parts = mesh.shape["model"]
    fitting = [(size, -place) for place, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or not fitting or np.prod(shape) < split_from:
        return spec()
    return spec(*[None] * -max(fitting)[1], "dense")


def device_share(mesh: Mesh) -> DeviceShare:
    """Which part of every batch this process reads."""
    return DeviceShare(mesh.size, tuple(all_shares(mesh)[jax.process_index()]))


def all_shares(mesh: Mesh) -> list[list[int]]:
    """Of each process, the numbers of its devices; all processes must have as many.

    Raises:
      ValueError: they have not.
    """
    shares: list[list[int]] = [[] for _ in range(jax.process_count())]
    for number, device in enumerate(mesh.devices.ravel()):
        shares[device.process_index].append(number)
    if len({len(share) for share in shares}) != 1:
        raise ValueError(f"processes have {[len(share) for share in shares]} devices: give each as many")
    return shares


def place_batch(step: dict, mesh: Mesh) -> dict:
    """A host batch's arrays on the mesh: each of this process's devices gets its part of their leading dimension."""
    share = device_share(mesh)
    devices = [mesh.devices.ravel()[i] for i in share.local]
    requests = NamedSharding(mesh, spec("requests"))

    def place(array: np.ndarray) -> jax.Array:
        if len(devices) == 1 == share.num_devices:
            return jax.device_put(array, requests)
        parts = np.split(array, len(devices))
        shape = (len(parts[0]) * share.num_devices, *array.shape[1:])
        placed = jax.device_put(parts, devices)
        return jax.make_array_from_single_device_arrays(shape, requests, placed)

    return jax.tree.map(place, step)
