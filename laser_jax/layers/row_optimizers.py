"""Optimizers of embedding rows: each turns a row, its slots and its gradient into the next row and slots.

They see only the rows that a batch met. A row that is not met keeps its bits, which for Adagrad and FTRL is what their
dense forms do with a zero gradient; Adam's dense form would go on moving it by its decaying moments.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Slots = dict[str, jax.Array]  # name -> [U, D], or [U] where there is one number a row; float32


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """A rule for rows.

    Attributes:
      init: rows [V, D] -> slots of fresh rows.
      update: (rows [U, D], slots, gradients [U, D], step) -> (rows, slots); float32, of the SUM of the losses. `step`
        counts from 1.
    """

    init: Callable[[jax.Array], Slots]
    update: Callable[[jax.Array, Slots, jax.Array, jax.Array], tuple[jax.Array, Slots]]


def adagrad(learning_rate: float, accumulator: float, eps: float = 1e-7) -> RowOptimizer:
    """Element-wise Adagrad (Duchi et al. 2011), equal to dense `optax.adagrad`."""

    def init(rows):
        return {"squares": jnp.full(rows.shape, accumulator, jnp.float32)}

    def update(rows, slots, gradients, step):
        squares = slots["squares"] + gradients * gradients
        return rows - learning_rate * gradients * jax.lax.rsqrt(squares + eps), {"squares": squares}

    return RowOptimizer(init, update)


def adagrad_rowwise(learning_rate: float, accumulator: float, eps: float = 1e-7) -> RowOptimizer:
    """Adagrad with one accumulator a row, the mean of its squared gradients: a slot of 4 bytes a row, not 4 D."""

    def init(rows):
        return {"squares": jnp.full(rows.shape[:1], accumulator, jnp.float32)}

    def update(rows, slots, gradients, step):
        squares = slots["squares"] + jnp.mean(gradients * gradients, axis=-1)
        return rows - learning_rate * gradients * jax.lax.rsqrt(squares + eps)[:, None], {"squares": squares}

    return RowOptimizer(init, update)


def adam(learning_rate: float, b1: float, b2: float, eps: float = 1e-8) -> RowOptimizer:
    """Adam (Kingma and Ba 2015) on the rows met; the bias correction counts all steps."""

    def init(rows):
        return {name: jnp.zeros(rows.shape, jnp.float32) for name in ("mean", "squares")}

    def update(rows, slots, gradients, step):
        mean = b1 * slots["mean"] + (1 - b1) * gradients
        squares = b2 * slots["squares"] + (1 - b2) * gradients * gradients
        count = step.astype(jnp.float32)
        unbiased = jnp.sqrt(squares / (1 - b2**count))
        rows = rows - learning_rate / (1 - b1**count) * mean / (unbiased + eps)
        return rows, {"mean": mean, "squares": squares}

    return RowOptimizer(init, update)


def ftrl(learning_rate: float, accumulator: float, l1: float, l2: float) -> RowOptimizer:
    """FTRL-Proximal (McMahan et al. 2013, algorithm 1, with the accumulator in place of beta).

    Fresh rows are what their slots say, so that without l1 and l2 it walks like Adagrad.
    """

    def init(rows):
        squares = jnp.full(rows.shape, accumulator, jnp.float32)
        return {"squares": squares, "linear": -rows.astype(jnp.float32) * (jnp.sqrt(squares) / learning_rate + l2)}

    def update(rows, slots, gradients, step):
        squares = slots["squares"] + gradients * gradients
        root = jnp.sqrt(squares)
        sigma = (root - jnp.sqrt(slots["squares"])) / learning_rate
        linear = slots["linear"] + gradients - sigma * rows
        rows = -jnp.sign(linear) * jnp.maximum(jnp.abs(linear) - l1, 0) / (root / learning_rate + l2)
        return rows, {"squares": squares, "linear": linear}

    return RowOptimizer(init, update)
