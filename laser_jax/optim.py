"""Optimizers: Adam for dense parameters (optax), row-sparse Adagrad for tables (layers/embedding)."""

import dataclasses

import optax


@dataclasses.dataclass
class OptimConfig:
    """The paper trains dense parameters with Adam(.9, .9999) and embeddings with Adagrad.

    Attributes:
      learning_rate, b1, b2: of Adam. warmup: steps over which it rises linearly. clip: global norm of dense gradients
        (0: none).
      table_learning_rate, table_accumulator: of Adagrad and its initial sum of squares. Row gradients are those of the
        summed loss, of order 1 and more, so an accumulator of .1 does not freeze them.
      table_std: standard deviation of fresh rows.
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.9999
    warmup: int = 0
    clip: float = 0.0
    table_learning_rate: float = 0.4
    table_accumulator: float = 0.1
    table_std: float = 0.1


TABLE_EPS = 1e-7  # optax.adagrad's


def dense_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Adam, after clipping, with a linear warm-up."""
    rate = optax.linear_schedule(0.0, config.learning_rate, config.warmup) if config.warmup else config.learning_rate
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(clip, optax.adam(rate, b1=config.b1, b2=config.b2))
