"""Mean pooling over the history: the base line without attention."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.tokens import mean_of_events
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource


@dataclasses.dataclass
class MeanConfig:
    """Mean pooling has nothing to set."""

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "MeanEncoder":
        return MeanEncoder(width_in, width)


class MeanEncoder(SequenceEncoder):
    """u = sum mask h / max(n, 1), the same token for every candidate. Order-free."""

    num_tokens = 1

    def __init__(self, width_in: int, width: int):
        self.width_in, self.width = width_in, width

    def precompute(self, history: TokenSource, mask, age):
        # The mean commutes with w_in, so pool the narrow features and project once.
        return mean_of_events(history.features(), mask) @ history.w_in

    def score(self, ctx, q, side) -> SeqOut:
        return SeqOut(tokens=jnp.broadcast_to(ctx[:, None, None], (*q.shape[:2], 1, q.shape[-1])))

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        return length * self.width_in + self.width_in * self.width, 0
