"""Plain target attention over the whole history, folded: the baseline to beat."""

import dataclasses

from flax import nnx

from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource


@dataclasses.dataclass
class TaConfig:
    """heads: H, a divisor of the model width. tied: Wk := Wq, Wv Wo := I at init."""

    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "TaEncoder":
        return TaEncoder(self, width_in, width, rngs=rngs)


class TaEncoder(SequenceEncoder):
    """One token: MHTA of the candidate over all events. Order-free but for the age in each event's embedding."""

    num_tokens = 1

    def __init__(self, config: TaConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        self.width_in = width_in
        self.attention = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def precompute(self, history: TokenSource, mask, age):
        return history.features(), history.w_in, mask

    def score(self, ctx, q, side) -> SeqOut:
        x, w_in, mask = ctx
        return SeqOut(tokens=self.attention(q, x, mask, w_in=w_in)[:, :, None])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        return self.attention.macs(candidates, length, self.width_in)
