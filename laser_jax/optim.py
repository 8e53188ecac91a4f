"""Optimizers: Adam for dense parameters (optax), row-sparse ones for tables (layers/row_optimizers)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from laser_jax.layers import row_optimizers
from laser_jax.layers.row_optimizers import RowOptimizer

TABLE_OPTIMIZERS = ("adagrad", "adagrad_rowwise", "adam", "ftrl")
TABLE_TYPES = ("float32", "bfloat16")
#: What is computed of requests with so many events in all fits a core's caches: with 4 of 1000 events at a time, a step
#: on one core took .4 to .8 of what all 32 at once took, by encoder; on two .7.
CPU_EVENTS = 4000
CPU_REQUESTS = 2  # at least: of one alone, XLA makes loops that took twice as long at 4000 events, for every model
#: Histories of so many events are worth the time that it takes to compile forms for shorter ones as well: with four, a
#: step of `transformer` took .4 of the time and one of `laser_plus` .8 where histories fill 45 % of 1000 places.
LONG, LENGTH_STEPS = 512, 4
TO_THE_END = -1


@dataclasses.dataclass
class OptimConfig:
    """The paper trains dense parameters with Adam(.9, .9999) and embeddings with Adagrad.

    Attributes:
      learning_rate, b1, b2: of Adam. warmup: steps over which it rises linearly. decay: steps after the warm-up over
        which it falls to zero along a cosine; 0: it stays, TO_THE_END (-1): the rest of the run. clip: global norm of
        dense gradients (0: none).
      microbatches: parts in which a device takes its requests of a batch, one after the other; gradients are summed, so
        only time and memory depend on it. 0: see `parts`.
      length_steps: a part holds requests of like history lengths and has room for its longest, rounded up to one of so
        many equal steps of L: what is left out is padding. 1: room for L always; 0: see `lengths`.
      compute: "float32", or "bfloat16": forward and backward from parameters and rows in bfloat16; what many events add
        to a row is added up in float32, logits are float32, and so is what attention sums up over events, with all that
        a model computes from there on: `transformer`, `longer` and `laser` do most of their products in float32 still.
      table_optimizer: "adagrad" (element-wise), "adagrad_rowwise", "adam" or "ftrl".
      table_learning_rate: of it. table_accumulator: initial sum of squares (Adagrad, FTRL). Row gradients are those of
        the summed loss, of order 1 and more, so an accumulator of .1 does not freeze them. table_b1, table_b2: of Adam.
        table_l1, table_l2: of FTRL.
      table_std: standard deviation of fresh rows. table_type: "float32", or "bfloat16" with stochastic rounding.
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.9999
    warmup: int = 0
    decay: int = 0
    clip: float = 0.0
    microbatches: int = 0
    length_steps: int = 0
    compute: str = "float32"
    table_optimizer: str = "adagrad"
    table_learning_rate: float = 0.4
    table_accumulator: float = 0.1
    table_b1: float = 0.9
    table_b2: float = 0.999
    table_l1: float = 0.0
    table_l2: float = 0.0
    table_std: float = 0.1
    table_type: str = "float32"

    def row_optimizer(self) -> RowOptimizer:
        """The rule for table rows.

        Raises:
          ValueError: there is none of that name.
        """
        if self.table_optimizer == "adagrad":
            return row_optimizers.adagrad(self.table_learning_rate, self.table_accumulator)
        if self.table_optimizer == "adagrad_rowwise":
            return row_optimizers.adagrad_rowwise(self.table_learning_rate, self.table_accumulator)
        if self.table_optimizer == "adam":
            return row_optimizers.adam(self.table_learning_rate, self.table_b1, self.table_b2)
        if self.table_optimizer == "ftrl":
            return row_optimizers.ftrl(self.table_learning_rate, self.table_accumulator, self.table_l1, self.table_l2)
        raise ValueError(f"optim.table_optimizer={self.table_optimizer!r} is not one of {TABLE_OPTIMIZERS}")

    def check(self) -> None:
        """Raises ValueError, naming the field, for values that no run can have."""
        self.row_optimizer()
        for name in ("compute", "table_type"):
            if getattr(self, name) not in TABLE_TYPES:
                raise ValueError(f"optim.{name}={getattr(self, name)!r} is not one of {TABLE_TYPES}")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.b1 < 1 or not 0 <= self.b2 < 1:
            raise ValueError(
                f"optim.learning_rate={self.learning_rate}, b1={self.b1}, b2={self.b2}: give a rate above 0 and decays "
                "in [0, 1)"
            )
        if self.microbatches < 0:
            raise ValueError(f"optim.microbatches={self.microbatches}: give at least 1, or 0 for what is fast here")
        if self.length_steps < 0:
            raise ValueError(f"optim.length_steps={self.length_steps}: give at least 1, or 0 for what is fast here")
        if not 0 < self.table_learning_rate < math.inf or not 0 <= self.table_b1 < 1 or not 0 <= self.table_b2 < 1:
            raise ValueError(
                f"optim.table_learning_rate={self.table_learning_rate}, table_b1={self.table_b1}, "
                f"table_b2={self.table_b2}: give a rate above 0 and decays in [0, 1)"
            )
        if self.warmup < 0 or self.decay < TO_THE_END or not self.clip >= 0:
            raise ValueError(
                f"optim.warmup={self.warmup}, decay={self.decay}, clip={self.clip}: give 0 or more, or for decay "
                f"{TO_THE_END}, to the end of the run"
            )
        if not self.table_accumulator > 0:
            raise ValueError(f"optim.table_accumulator={self.table_accumulator}: give more than 0, it is divided by")
        if not self.table_std >= 0 or not self.table_l1 >= 0 or not self.table_l2 >= 0:
            raise ValueError(
                f"optim.table_std={self.table_std}, table_l1={self.table_l1}, table_l2={self.table_l2}: give 0 or more"
            )

    def parts(self, requests: int, history_length: int) -> int:
        """In how many parts a device takes its requests of a batch.

        By itself a CPU takes CPU_EVENTS at a time, or as few more requests as divide them evenly; other devices all.

        Raises:
          ValueError: `microbatches` does not divide them.
        """
        if self.microbatches:
            if requests % self.microbatches:
                raise ValueError(
                    f"optim.microbatches={self.microbatches} does not divide the {requests} requests of a device"
                )
            return self.microbatches
        if jax.default_backend() != "cpu":
            return 1
        least = min(max(CPU_EVENTS // history_length, CPU_REQUESTS), requests)
        return requests // next(size for size in range(least, requests + 1) if requests % size == 0)

    def lengths(self, history_length: int) -> list[int]:
        """The numbers of events that a part of a batch may have room for, ascending; the last one is `history_length`.

        By itself a CPU has LENGTH_STEPS of them for histories of LONG events and more. Elsewhere there is one.
        """
        worth = jax.default_backend() == "cpu" and history_length >= LONG
        steps = self.length_steps or (LENGTH_STEPS if worth else 1)
        return sorted({-(-history_length * step // steps) for step in range(1, steps + 1)})

    @property
    def table_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.table_type)


def dense_optimizer(config: OptimConfig, steps: int | None = None) -> optax.GradientTransformation:
    """Adam, after clipping, with a linear warm-up and a cosine decay.

    Args:
      steps: of the run, for a decay to its end; without them such an optimizer has a state, but makes no step.
    """
    rates = [optax.linear_schedule(0.0, config.learning_rate, config.warmup)] if config.warmup else []
    if config.decay:
        rates.append(_falling(config, steps))
    elif rates:
        rates.append(optax.constant_schedule(config.learning_rate))
    rate = optax.join_schedules(rates, [config.warmup] * (len(rates) - 1)) if rates else config.learning_rate
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optax.adam(rate, b1=config.b1, b2=config.b2))


def _falling(config: OptimConfig, steps: int | None) -> optax.Schedule:
    if config.decay != TO_THE_END:
        return optax.cosine_decay_schedule(config.learning_rate, config.decay)
    if steps is not None:
        return optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup, 1))

    def unknown(step: jax.Array) -> jax.Array:
        raise ValueError(f"optim.decay={TO_THE_END} needs the number of the run's steps: StateFactory(steps=...)")

    return unknown
