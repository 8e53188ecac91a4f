"""Plain target attention over the whole history, folded: the baseline to beat."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import weight
from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least


@dataclasses.dataclass
class TaConfig:
    """heads: H, a divisor of the model width. tied: Wk := Wq, Wv Wo := I at init.

    mass: a second token tells how much there is to attend to: each head's log mass, and the number of events.
    """

    heads: int = 4
    tied: bool = True
    mass: bool = False

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "TaEncoder":
        return TaEncoder(self, width_in, width, history_length, rngs=rngs)


class TaEncoder(SequenceEncoder):
    """MHTA of the candidate over all events. Order-free but for the age in each event's embedding."""

    def __init__(self, config: TaConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        at_least(1, config, "heads")
        self.width_in, self.history_length = width_in, history_length
        self.num_tokens = 1 + int(config.mass)
        self.w_mass = weight(rngs, (config.heads + 1, width)) if config.mass else None
        self.attention = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def precompute(self, history: TokenSource, mask, age):
        return history.features(), history.w_in, mask

    def score(self, ctx, q, side) -> SeqOut:
        x, w_in, mask = ctx
        out, mass = self.attention.with_mass(q, x, mask, w_in=w_in)
        if self.w_mass is None:
            return SeqOut(tokens=out[:, :, None])
        events = mask.sum(axis=1)[:, None, None]
        # Both as parts of a full history, as in layers/horizons.py.
        mass = jnp.where(events > 0, mass - math.log(self.history_length), 0.0)
        filled = jnp.log(jnp.maximum(events, 1)) - math.log(self.history_length)
        facts = jnp.concatenate([mass, jnp.broadcast_to(filled, (*q.shape[:2], 1))], axis=-1)
        return SeqOut(tokens=jnp.stack([out, facts @ self.w_mass[...]], axis=2))

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        once, each = self.attention.macs(candidates, length, self.width_in)
        return once, each + (0 if self.w_mass is None else self.w_mass.size)
