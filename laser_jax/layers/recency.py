"""Ages of events as embeddings: log-spaced buckets, so that minutes differ now and months differ long ago."""

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.tokens import rows_at

MINUTE_S = 60.0
MAX_AGE_S = 4 * 365 * 86400  # older events share the last bucket


def age_bucket(age: jax.Array, num_buckets: int) -> jax.Array:
    """Log-spaced bucket of an age.

    Args:
      age: int32 seconds, any shape; negative ages count as zero.
      num_buckets: bucket 0 holds ages below about a minute, the last one everything from four years on.

    Returns:
      int32 buckets in [0, num_buckets), same shape.
    """
    minutes = jnp.maximum(age, 0).astype(jnp.float32) / MINUTE_S
    spread = (num_buckets - 1) / jnp.log1p(MAX_AGE_S / MINUTE_S)
    return jnp.clip(jnp.log1p(minutes) * spread, 0, num_buckets - 1).astype(jnp.int32)


class SegmentRecency(nnx.Module):
    """One vector a segment: its place counted from the newest, and the log-spaced age of its newest event.

    The paper adds a recency embedding to segment tokens; by place, by age or by both the paper leaves open.
    Args:
      by: "age", "position" or "both".
    """

    def __init__(self, by: str, num_segments: int, width: int, num_buckets: int, *, rngs: nnx.Rngs):
        if by not in ("age", "position", "both"):
            raise ValueError(f"recency={by!r} is not one of 'age', 'position', 'both'")
        init = nnx.initializers.normal(0.02)
        self.num_buckets = num_buckets
        self.age = nnx.Param(init(rngs.params(), (num_buckets, width))) if by != "position" else None
        self.position = nnx.Param(init(rngs.params(), (num_segments, width))) if by != "age" else None

    def __call__(self, newest_age: jax.Array) -> jax.Array:
        """newest_age int32 [B, S], segments oldest to newest -> [B, S, width]."""
        out = jnp.zeros((*newest_age.shape, 1))
        if self.age is not None:
            out = out + rows_at(self.age[...], age_bucket(newest_age, self.num_buckets))
        if self.position is not None:
            num_segments = newest_age.shape[1]
            if num_segments > self.position.shape[0]:
                raise ValueError(
                    f"{num_segments} segments but position embeddings for {self.position.shape[0]}: "
                    "set history_length to the longest history that is to be scored"
                )
            out = out + self.position[...][num_segments - 1 - jnp.arange(num_segments)]
        return out
