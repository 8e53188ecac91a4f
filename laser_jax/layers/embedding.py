"""Embedding tables outside the model, updated row by row.

A step gathers the U unique rows of a batch, differentiates with respect to them, and updates those rows in place: its
cost does not depend on the size of the vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Table:
    """rows [V, D] and, for each element, Adagrad's sum of squared gradients [V, D]; both float32."""

    rows: jax.Array
    accumulator: jax.Array


def init_table(key: jax.Array, num_rows: int, width: int, std: float, initial_accumulator: float) -> Table:
    """Normal rows of standard deviation `std`."""
    rows = std * jax.random.normal(key, (num_rows, width), jnp.float32)
    return Table(rows, jnp.full((num_rows, width), initial_accumulator, jnp.float32))


def gather_rows(table: Table, unique: jax.Array) -> jax.Array:
    """Rows [U, D] at unique [U]; entries beyond the table (padding) read as zeros."""
    return table.rows.at[unique].get(mode="fill", fill_value=0.0, unique_indices=True, indices_are_sorted=True)


def adagrad_rows(table: Table, unique: jax.Array, gradients: jax.Array, learning_rate: float, eps: float) -> Table:
    """Element-wise Adagrad on the rows a batch met, equal to dense `optax.adagrad` on the whole table.

    Args:
      unique: int32 [U], ascending and distinct; entries >= V are padding and change nothing.
      gradients: [U, D] with respect to those rows. Give the gradient of the SUM of the losses: of a mean it is so small
        that the initial accumulator freezes the rows.
    """
    how = dict(unique_indices=True, indices_are_sorted=True)
    accumulator = table.accumulator.at[unique].get(mode="fill", fill_value=1.0, **how) + gradients * gradients
    step = learning_rate * gradients * jax.lax.rsqrt(accumulator + eps)
    return Table(
        table.rows.at[unique].add(-step, mode="drop", **how),
        table.accumulator.at[unique].set(accumulator, mode="drop", **how),
    )
