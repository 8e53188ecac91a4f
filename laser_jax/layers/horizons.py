"""Target attention over several horizons at once, read out of segment tokens.

A segment's gated sum and its log mass are all that attention over any run of whole segments needs: the newest 20
events, the newest 200 and the whole history cost one pass over the events between them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import weight

_SILENT = -1e30


def read_horizons(s, log_mass, alive, newest: tuple[int, ...], gate: str):
    """What the gates let through of the newest events, for each horizon.

    Args:
      s: [B, C, S, H * dv] gated sums of each segment (softmax: means); log_mass: [B, C, H, S]; alive: [B, S].
      newest: K numbers of segments, counted from the newest.
      gate: "softmax": the result is exactly softmax attention over those events; "sigmoid": their gated mean.

    Returns:
      means [B, C, K, H * dv] and log mass [B, C, K, H]; zeros where there is no event.
    """
    b, c, segments, width = s.shape
    heads = log_mass.shape[2]
    means, masses, behind = [], [], segments
    top = jnp.full((b, c, heads), _SILENT)  # so far, as is all that follows
    total, sums = jnp.zeros((b, c, heads)), jnp.zeros((b, c, heads, width // heads))
    # A horizon is what the one before holds and some older segments: every segment is read once.
    for count in newest:
        begin = max(segments - count, 0)
        if begin < behind:
            real = alive[:, None, None, begin:behind]
            scores = jnp.where(real, log_mass[..., begin:behind].astype(jnp.float32), _SILENT)
            higher = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(scores, axis=-1)))
            share = jnp.where(real, jnp.exp(scores - higher[..., None]), 0.0)
            # A softmax segment holds a mean, to be weighted by its mass; a sigmoid segment a sum, which has its weight.
            before = jnp.exp(top - higher) if gate == "softmax" else jnp.ones_like(top)
            weights = share if gate == "softmax" else jnp.broadcast_to(real, share.shape).astype(s.dtype)
            total = total * jnp.exp(top - higher) + jnp.sum(share, axis=-1)
            sums = sums * before[..., None] + _of_heads(weights, s[:, :, begin:behind])
            top, behind = higher, begin
        some = total > 0
        mass = jnp.where(some, jnp.log(jnp.maximum(total, 1e-20)) + top, 0.0)
        scale = 1 / jnp.maximum(total, 1e-20) if gate == "softmax" else jnp.where(some, jnp.exp(-mass), 0.0)
        means.append((sums * scale[..., None]).reshape(b, c, width))
        masses.append(mass)
    return jnp.stack(means, axis=2), jnp.stack(masses, axis=2)


def _of_heads(weights, s):
    """[B, C, H, S], [B, C, S, H * dv] -> each head's weighted sum of its own share of the width, [B, C, H, dv]."""
    b, c, heads, segments = weights.shape
    # Over all of the width at first: more products, but s is read as it lies.
    sums = weights.reshape(b * c, heads, segments) @ s.reshape(b * c, segments, -1)
    sums = sums.reshape(b, c, heads, heads, -1)
    return jnp.stack([sums[:, :, head, head] for head in range(heads)], axis=2)


class HorizonReadout(nnx.Module):
    """A token a horizon, what the gates let through of it, and one token of how much gate and how many events it holds.

    Args:
      width: d. heads: H. reaches: K numbers of events, the horizons. newest: in segments. gate: see read_horizons.
    """

    def __init__(
        self, width: int, heads: int, reaches: tuple[int, ...], newest: tuple[int, ...], gate: str, *, rngs: nnx.Rngs
    ):
        self.reaches, self.newest, self.gate, self.heads = reaches, newest, gate, heads
        self.num_tokens = len(newest) + 1
        self.w_mass = weight(rngs, (len(newest) * (heads + 1), width))

    def __call__(self, s, log_mass, alive, num_events) -> jax.Array:
        """s [B, C, S, d], log_mass [B, C, H, S], alive [B, S], num_events [B, S] -> [B, C, K + 1, d]."""
        b, c, segments, _ = s.shape
        means, mass = read_horizons(s, log_mass, alive, self.newest, self.gate)
        within = jnp.arange(segments) >= segments - jnp.asarray(self.newest)[:, None]
        events = jnp.sum(jnp.where(within, num_events[:, None], 0), axis=-1)  # [B, K]
        # Both as parts of a full horizon: of order 1, and a count stays a count whatever the history's length.
        full = jnp.log(jnp.asarray(self.reaches, jnp.float32))
        mass = jnp.where((events > 0)[:, None, :, None], mass - full[:, None], 0.0)
        filled = jnp.log(jnp.maximum(events, 1)) - full
        filled = jnp.broadcast_to(filled[:, None, :, None], (b, c, len(self.newest), 1))
        masses = jnp.concatenate([mass, filled], axis=-1).reshape(b, c, 1, -1) @ self.w_mass[...]
        return jnp.concatenate([means, masses], axis=2)

    def macs(self, segments: int) -> int:
        """Multiply-accumulates a candidate."""
        inputs, width = self.w_mass.shape
        return self.heads * segments * width + inputs * width
