"""The loss of a ranking batch."""

import jax
import jax.numpy as jnp

from laser_jax.shapes import CandidateMask, Labels, Logits


def bce_sum(logits: Logits, labels: Labels, mask: CandidateMask) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy summed over real candidates, and their number, both float32 scalars.

    The loss of a batch is sum / number over the whole (global) batch: the same as scoring each pair alone.
    """
    each = jax.nn.softplus(logits) - labels * logits
    return jnp.sum(jnp.where(mask, each, 0.0)), jnp.sum(mask.astype(jnp.float32))
