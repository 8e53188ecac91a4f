"""The two programs that run on the mesh: a training step and an evaluation step.

Requests and table rows lie over all devices, dense parameters along `model` (sharding.RULES). Each device works on its
requests alone; what crosses the network are unique rows and their gradients (layers/row_exchange), dense parameters
where they are split, dense gradients, and counts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from laser_jax.layers.embedding import pool_rows
from laser_jax.layers.row_exchange import RowExchange
from laser_jax.losses import bce_sum
from laser_jax.metrics import logit_histogram
from laser_jax.sharding import AXES, spec
from laser_jax.state import StateFactory, TrainState

#: Parts of a batch with an entry a device; all others have one a request.
BY_DEVICE = ("unique", "fresh", "bags", "vectors")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What a step tells: sums over all devices that add up over steps, never ratios.

    Attributes:
      loss, samples: summed loss and the candidates it is over. events: of all histories. histogram: int32 [2, bins].
      contrast: summed spread of segment loudness (std / mean over segments), over the `compared` candidates whose
        history has several segments; NaN for encoders without segments.
    """

    loss: jax.Array
    samples: jax.Array
    events: jax.Array
    histogram: jax.Array
    contrast: jax.Array
    compared: jax.Array


def make_train_step(factory: StateFactory) -> Callable:
    """(state, batch) -> (state, Counts): pure, compiled once a shape, the state donated."""
    optim, exchange = factory.optim, _exchange(factory)

    def on_device(params, tables, batch, step):
        """Of one device: gradients of dense parameters (summed over all), its part of the tables, counts."""
        dense = _whole(params, factory.specs.params)
        requested = {name: exchange.requested(wanted[0]) for name, wanted in batch["unique"].items()}
        renewed = {
            name: exchange.renew(tables[name], requested[name], fresh[0], factory.row_optimizer, optim.table_std, step)
            for name, fresh in batch["fresh"].items()
        }
        tables = tables | renewed
        rows = {name: exchange.fetch(tables[name], requested[name]) for name in requested}
        samples = exchange.sum(jnp.sum(batch["mask"], dtype=jnp.float32))
        requests = {name: value for name, value in batch.items() if name not in BY_DEVICE}
        parts = optim.parts(*requests["age"].shape)

        def loss_fn(dense, rows, requests):
            logits, out = apply_model(factory, dense, rows, batch, requests)
            total, _ = bce_sum(logits, requests["label"], requests["mask"])
            # Auxiliary losses are means over a device's requests; scaled so that the sum over devices, divided by
            # `samples` at the end, is their mean.
            share = samples / (exchange.num_devices * parts)
            objective = total + share * sum(out.aux_losses.values(), jnp.zeros(()))
            contrast, compared = _contrast(out.diag.get("loudness"), requests["mask"])
            counts = Counts(
                loss=total,
                samples=jnp.sum(requests["mask"], dtype=jnp.float32),
                events=jnp.sum(requests["length"], dtype=jnp.float32),
                histogram=logit_histogram(logits, requests["label"], requests["mask"]),
                contrast=contrast,
                compared=compared,
            )
            return objective, counts

        lengths = optim.lengths(requests["age"].shape[1])
        gradient = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)
        gradients, counts = _summed(gradient, dense, rows, requests, parts, lengths)
        counts = jax.tree.map(exchange.sum, counts)
        scale = 1 / jnp.maximum(samples, 1)
        dense_gradients = jax.tree.map(lambda g: g * scale, _parts(gradients[0], factory.specs.params, exchange))
        tables = {
            name: exchange.update(tables[name], requested[name], gradients[1][name], factory.row_optimizer, step)
            for name in requested
        }
        return dense_gradients, tables, counts

    mapped = _on_all_devices(
        on_device,
        factory,
        in_specs=(factory.specs.params, factory.specs.tables, spec("requests"), PartitionSpec()),
        out_specs=(factory.specs.params, factory.specs.tables, PartitionSpec()),
    )

    def train_step(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, Counts]:
        gradients, tables, counts = mapped(state.params, state.tables, batch, state.step + 1)
        # Outside: clipping needs the norm over all parts.
        updates, opt_state = factory.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, tables), counts

    return jax.jit(train_step, donate_argnums=0, out_shardings=(factory.shardings, None))


def make_eval_step(factory: StateFactory) -> Callable:
    """(state, batch) -> logits [B, C] and the encoder's diagnostics (leading dimension B), compiled."""
    exchange = _exchange(factory)

    def on_device(params, tables, batch):
        wanted = batch["unique"]
        rows = {name: exchange.fetch(tables[name], exchange.requested(wanted[name][0])) for name in wanted}
        requests = {name: value for name, value in batch.items() if name not in BY_DEVICE}
        logits, out = apply_model(factory, _whole(params, factory.specs.params), rows, batch, requests)
        return logits, out.diag

    mapped = _on_all_devices(
        on_device,
        factory,
        in_specs=(factory.specs.params, factory.specs.tables, spec("requests")),
        out_specs=spec("requests"),
    )
    return jax.jit(lambda state, batch: mapped(state.params, state.tables, batch))


def _on_all_devices(on_device: Callable, factory: StateFactory, in_specs: Any, out_specs: Any) -> Callable:
    """One device needs no `shard_map`, which cost 10 to 20 % of a step on a CPU when measured."""
    if factory.mesh.size == 1:
        return on_device
    # check_vma: gradients are taken inside and summed by hand.
    return jax.shard_map(on_device, mesh=factory.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _exchange(factory: StateFactory) -> RowExchange:
    return RowExchange(AXES, factory.mesh.size)


def apply_model(factory: StateFactory, dense: Any, rows: dict[str, jax.Array], batch: dict[str, Any], requests: dict):
    """Logits [B, C], float32, and what the encoder says (models.base.SeqOut).

    Args:
      factory: of the state. dense: its parameters, whole.
      rows: table -> rows [U, D] that the device wants.
      batch: `bags` and `vectors` of the device, see batch.Batch.
      requests: the rest of the batch, or a part of its requests.
    """
    bags = {
        source: pool_rows(rows[factory.bags[source].table], bag[0], factory.bags[source].mean)
        for source, bag in batch["bags"].items()
    }
    rows = rows | bags | {source: vectors[0] for source, vectors in batch["vectors"].items()}
    if factory.optim.compute == "bfloat16":
        dense, rows = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (dense, rows))
    logits, out = factory.model(dense)(rows, requests)
    return logits.astype(jnp.float32), out


def apply_gathered(factory: StateFactory, dense: Any, requests: dict[str, Any], piece: int = 0) -> jax.Array:
    """The same logits [B, C] from embeddings that were gathered before, see models.base.Ranker.logits_gathered."""
    if factory.optim.compute == "bfloat16":
        sides = {name: requests[name] for name in ("events", "candidates", "context")}
        dense, sides = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (dense, sides))
        requests = requests | sides
    return factory.model(dense).logits_gathered(requests, piece).astype(jnp.float32)


def _summed(
    gradient: Callable, dense: Any, rows: Any, requests: dict[str, Any], parts: int, lengths: list[int]
) -> tuple[Any, Counts]:
    """Gradients and counts over a device's requests, taken in parts.

    Args:
      parts: so many. lengths: numbers of events that one may have room for, see OptimConfig.lengths.
    """
    if parts == len(lengths) == 1:
        return gradient(dense, rows, requests)
    forms = [functools.partial(_of_newest, gradient, length) for length in lengths]

    def of(part):
        form = jnp.searchsorted(jnp.array(lengths), jnp.max(part["length"]))
        return jax.lax.switch(form, forms, dense, rows, part)

    if parts == 1:
        return of(requests)
    if len(lengths) > 1:  # those of like lengths together
        requests = jax.tree.map(lambda x: x[jnp.argsort(requests["length"])], requests)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of(part)), None

    split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), requests)
    first = jax.tree.map(lambda x: x[0], split)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, dense, rows, first))
    return jax.lax.scan(add, zeros, split)[0]


def _of_newest(gradient: Callable, length: int, dense: Any, rows: Any, requests: dict[str, Any]) -> tuple[Any, Counts]:
    """Of requests without the places before the newest `length` ones, which hold no event."""
    history = {name: index[:, -length:] for name, index in requests["history"].items()}
    return gradient(dense, rows, requests | {"history": history, "age": requests["age"][:, -length:]})


def _split_dimension(where: PartitionSpec) -> int | None:
    """The dimension that lies over `model`."""
    return next((place for place, axis in enumerate(where) if axis is not None), None)


def _whole(params: Any, specs: Any) -> Any:
    """Split parameters put together."""

    def gather(x, where):
        place = _split_dimension(where)
        return x if place is None else jax.lax.all_gather(x, "model", axis=place, tiled=True)

    return jax.tree.map(gather, params, specs)


def _parts(gradients: Any, specs: Any, exchange: RowExchange) -> Any:
    """Gradients summed over devices, each device left with the part of the parameters that it keeps."""

    def scatter(x, where):
        place = _split_dimension(where)
        if place is None:
            return exchange.sum(x)
        return jax.lax.psum(jax.lax.psum_scatter(x, "model", scatter_dimension=place, tiled=True), "data")

    return jax.tree.map(scatter, gradients, specs)


def _contrast(loudness: jax.Array | None, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Std / mean of loudness [B, C, S] over the segments that hold events, summed over candidates; and how many.

    A history of a single segment has nothing to compare it with, however sharp its gates are.
    """
    if loudness is None:
        return jnp.full((), jnp.nan), jnp.zeros(())
    loudness = jax.lax.stop_gradient(loudness).astype(jnp.float32)
    alive = loudness > 0
    n = alive.sum(axis=-1)
    mean = loudness.sum(axis=-1) / jnp.maximum(n, 1)
    variance = jnp.where(alive, (loudness - mean[..., None]) ** 2, 0.0).sum(axis=-1) / jnp.maximum(n, 1)
    counted = mask & (n > 1)
    spread = jnp.where(counted, jnp.sqrt(variance) / jnp.maximum(mean, 1e-20), 0.0)
    return jnp.sum(spread), jnp.sum(counted, dtype=jnp.float32)
