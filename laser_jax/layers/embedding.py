"""Embedding tables outside the model, updated row by row.

A step gathers the U unique rows of a batch, differentiates with respect to them, and updates those rows in place: its
cost does not depend on the size of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from laser_jax.layers.row_optimizers import RowOptimizer, Slots

#: Entries are ascending and distinct, and those beyond the table are padding.
_SORTED = dict(unique_indices=True, indices_are_sorted=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """rows [V, D], float32 or bfloat16, and the optimizer's slots: float32 [V, D] or [V]."""

    rows: jax.Array
    slots: Slots


def init_table(
    key: jax.Array, num_rows: int, width: int, std: float, optimizer: RowOptimizer, dtype: jnp.dtype = jnp.float32
) -> Table:
    """Normal rows of standard deviation `std`."""
    rows = (std * jax.random.normal(key, (num_rows, width), jnp.float32)).astype(dtype)
    return Table(rows, optimizer.init(rows))


def gather_rows(table: Table, unique: Int[Array, "unique"]) -> Float[Array, "unique width"]:
    """Rows at `unique`, float32; entries beyond the table (padding) read as zeros."""
    return table.rows.at[unique].get(mode="fill", fill_value=0, **_SORTED).astype(jnp.float32)


def pool_rows(
    rows: Float[Array, "unique width"], bags: Int[Array, "bags values"], mean: bool
) -> Float[Array, "bags width"]:
    """Sum or mean of several rows each; -1 in a bag stands for no value, and an empty bag is zeros."""
    real = bags >= 0
    summed = jnp.sum(jnp.where(real[..., None], rows[jnp.maximum(bags, 0)], 0), axis=1)
    return summed / jnp.maximum(jnp.sum(real, axis=1), 1)[:, None].astype(rows.dtype) if mean else summed


def update_rows(
    table: Table,
    unique: Int[Array, "unique"],
    gradients: Float[Array, "unique width"],
    optimizer: RowOptimizer,
    step: jax.Array,
    first_row: jax.Array | int = 0,
) -> Table:
    """The table after one step of its optimizer on the rows that a batch met; all others keep their bits.

    Args:
      unique: ascending and distinct; entries >= V are padding and change nothing.
      gradients: with respect to those rows. Give the gradient of the SUM of the losses: of a mean it is so small that
        Adagrad's initial accumulator freezes the rows.
      step: counts from 1.
      first_row: number of the first row in `table`, where it is a part of a larger one. Rows in bfloat16 are rounded
        at random, by a hash of (step, row, column).
    """
    rows = gather_rows(table, unique)
    slots = {name: slot.at[unique].get(mode="fill", fill_value=1, **_SORTED) for name, slot in table.slots.items()}
    rows, slots = optimizer.update(rows, slots, gradients, step)
    if table.rows.dtype == jnp.bfloat16:
        rows = _round_at_random(rows, unique + first_row, step)
    return Table(
        table.rows.at[unique].set(rows.astype(table.rows.dtype), mode="drop", **_SORTED),
        {name: slot.at[unique].set(slots[name], mode="drop", **_SORTED) for name, slot in table.slots.items()},
    )


def renew_rows(
    table: Table,
    rows: Int[Array, "n"],
    fresh: Bool[Array, "n"],
    optimizer: RowOptimizer,
    std: float,
    step: jax.Array,
    first_row: jax.Array | int = 0,
) -> Table:
    """The table with some rows as if never used: another id has them now.

    Args:
      rows: in any order, repeats allowed. fresh: which of them to renew.
      std: standard deviation of the new values, which are uniform and a function of (step, row, column).
      first_row: see update_rows.
    """
    width = table.rows.shape[1]
    uniform = _noise(rows + first_row, width, step, salt=1).astype(jnp.float32) * np.float32(2.0**-32) - 0.5
    values = (uniform * np.float32(std * np.sqrt(12))).astype(table.rows.dtype)
    slots = optimizer.init(values)
    at = jnp.where(fresh, rows, table.rows.shape[0])
    return Table(
        table.rows.at[at].set(values, mode="drop"),
        {name: slot.at[at].set(slots[name], mode="drop") for name, slot in table.slots.items()},
    )


def _round_at_random(rows: jax.Array, numbers: jax.Array, step: jax.Array) -> jax.Array:
    """float32 [U, D] -> bfloat16: up or down with the probability that makes the mean exact.

    Rounding to nearest would lose every update smaller than 2^-9 of its row. By a hash and not by a generator, so that
    a row is rounded alike on any number of devices.
    """
    noise = _noise(numbers, rows.shape[1], step) >> 16
    bits = jax.lax.bitcast_convert_type(rows, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + noise) & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(rows), rounded, rows).astype(jnp.bfloat16)


def _noise(numbers: jax.Array, width: int, step: jax.Array, salt: int = 0) -> jax.Array:
    """uint32 [U, width], a hash of (salt, step, number, column)."""
    columns = jnp.arange(width, dtype=jnp.uint32)
    seed = numbers.astype(jnp.uint32)[:, None] * np.uint32(0x9E3779B1) + columns * np.uint32(0x85EBCA77)
    return _mixed(seed ^ _mixed(2 * step.astype(jnp.uint32) + np.uint32(salt)))


def _mixed(x: jax.Array) -> jax.Array:
    """A 32-bit mix in which every bit depends on every other (murmur3's finalizer constants)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
