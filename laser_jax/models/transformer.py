"""A Transformer encoder over the history, then target attention over what it says.

No public source fixes the "Transformer" that others compare with: `ffn=1` has the cost that LASER quotes.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.blockwise_attention import pairs_computed
from laser_jax.layers.self_attention import TransformerLayer, counted_from_newest
from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource, at_least, residual_scale


@dataclasses.dataclass
class TransformerConfig:
    """A pre-norm encoder. Training is one pass, so there is no dropout.

    Attributes:
      layers: M (0: target attention alone). heads: H. ffn: hidden width of the feed-forwards over d.
      causal: whether an event sees only events at or before itself.
      tied: Wk := Wq, Wv Wo := I of the target attention at init.
      block: events that attend at a time; only memory depends on it.
    """

    layers: int = 1
    heads: int = 4
    ffn: int = 4
    causal: bool = False
    tied: bool = True
    block: int = 128

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "TransformerEncoder":
        return TransformerEncoder(self, width_in, width, history_length, rngs=rngs)


class TransformerEncoder(SequenceEncoder):
    """z_c = MHTA(q_c, LN(layers(h + position))). Time gaps are in h already: the ranker embeds each event's age."""

    num_tokens = 1

    def __init__(self, config: TransformerConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        at_least(0, config, "layers")
        at_least(1, config, "heads", "ffn", "block")
        self.config, self.width_in = config, width_in
        self.position = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (history_length, width)))
        self.layers = nnx.List(
            [
                TransformerLayer(
                    width, config.heads, config.ffn * width, out_scale=residual_scale(config.layers), rngs=rngs
                )
                for _ in range(config.layers)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def precompute(self, history: TokenSource, mask, age):
        h = history.dense()
        x = jnp.where(mask[..., None], h + counted_from_newest(self.position[...], h.shape[1]), 0.0)
        for layer in self.layers:
            x = layer(x, mask, causal=self.config.causal, block=self.config.block)
        return self.norm(x), mask

    def score(self, ctx, q, side) -> SeqOut:
        return SeqOut(tokens=self.attention(q, *ctx)[:, :, None])

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        d = self.position.shape[1]
        once, each = self.attention.macs(candidates, length, d)
        pairs = pairs_computed(length, length, self.config.causal, self.config.block)
        layers = sum(layer.macs(length, length, pairs) for layer in self.layers)
        return length * self.width_in * d + layers + once, each
