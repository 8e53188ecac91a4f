"""A Transformer layer over events, and tables of places."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.blockwise_attention import blockwise_softmax_attention
from laser_jax.layers.mlp import FeedForward, weight


def counted_from_newest(table: jax.Array, length: int) -> jax.Array:
    """Rows of a table of places counted from the newest event, for events oldest to newest: [N, ...] -> [L, ...]."""
    if length > len(table):
        raise ValueError(
            f"{length} events but positions for {len(table)}: "
            "set history_length to the longest history that is to be scored"
        )
    return table[:length][::-1]


class TransformerLayer(nnx.Module):
    """A pre-norm layer in parts, x + MHA(LN x), then x + FFN(LN x), so that callers choose who attends to whom.

    Args:
      width: d. heads: H. hidden: width of the feed-forward.
      out_scale: of the two matrices that write to the residual stream, at init (0: both are silent).
    """

    def __init__(self, width: int, heads: int, hidden: int, *, out_scale: float, rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        shape = (width, heads, width // heads)
        self.wq, self.wk, self.wv = (weight(rngs, shape) for _ in range(3))
        self.wo = weight(rngs, (width, width), out_scale)
        self.ffn = FeedForward(width, hidden, rngs=rngs, out_scale=out_scale)
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.norm_ffn = nnx.LayerNorm(width, rngs=rngs)

    def queries(self, x: jax.Array) -> jax.Array:
        """[..., d] -> [..., H, d / H], scaled."""
        return jnp.einsum("...d,dhk->...hk", self.norm_attention(x), self.wq[...]) / math.sqrt(self.wq.shape[-1])

    def keys_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., d] -> two of [..., H, d / H]."""
        x = self.norm_attention(x)
        return jnp.einsum("...d,dhk->...hk", x, self.wk[...]), jnp.einsum("...d,dhk->...hk", x, self.wv[...])

    def update(self, x: jax.Array, heads: jax.Array) -> jax.Array:
        """x [..., d] and what its heads read [..., H, d / H] -> [..., d]."""
        x = x + heads.reshape(x.shape) @ self.wo[...]
        return x + self.ffn(self.norm_ffn(x))

    def __call__(self, x, mask, *, causal: bool, block: int):
        """Events attend to each other: x [B, L, d], mask [B, L] -> [B, L, d], zeros where there is no event."""
        heads = blockwise_softmax_attention(self.queries(x), *self.keys_values(x), mask, causal=causal, block=block)
        return jnp.where(mask[..., None], self.update(x, heads), 0.0)

    def macs(self, rows: int, keys: int, pairs: int) -> int:
        """Multiply-accumulates where `rows` are updated, `keys` projected and so many `pairs` of both looked at."""
        d, hidden = self.ffn.w1.shape
        return 2 * keys * d * d + 2 * pairs * d + rows * (2 * d * d + FeedForward.macs(d, hidden))
