"""RankMixer: the ranking head (arXiv 2507.15551)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import xavier


def mix_tokens(x: jax.Array) -> jax.Array:
    """Parameter-free mixing: token t of the result gathers slice t of every token. Its own inverse.

    Args:
      x: [T, ..., D] with D a multiple of T.
    """
    tokens, *rest, width = x.shape
    split = x.reshape(tokens, *rest, tokens, width // tokens)
    return jnp.swapaxes(split, 0, -2).reshape(x.shape)


def per_token_weight(rngs: nnx.Rngs, tokens: int, width_in: int, width_out: int, scale: float = 1.0) -> nnx.Param:
    """[T, in, out], each token's matrix initialised on its own (the token axis is no part of the fan-in)."""
    keys = jax.random.split(rngs.params(), tokens)
    return nnx.Param(scale * jax.vmap(lambda key: xavier(key, (width_in, width_out), jnp.float32))(keys))


class RankMixerBlock(nnx.Module):
    """S = LN(Mix(X) + X); X = LN(PFFN(S) + S), with a feed-forward of its own for every token.

    Tokens are the leading axis, [T, B, C, D]: each token's matrix is then one product over all candidates.
    """

    def __init__(self, tokens: int, width: int, expansion: int, num_blocks: int, *, rngs: nnx.Rngs):
        hidden = expansion * width
        self.norm_mix = nnx.LayerNorm(width, rngs=rngs)
        self.norm_out = nnx.LayerNorm(width, rngs=rngs)
        self.w1 = per_token_weight(rngs, tokens, width, hidden)
        self.b1 = nnx.Param(jnp.zeros((tokens, hidden)))
        self.w2 = per_token_weight(rngs, tokens, hidden, width, 1 / math.sqrt(2 * num_blocks))
        self.b2 = nnx.Param(jnp.zeros((tokens, width)))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm_mix(mix_tokens(x) + x)
        hidden = jax.nn.gelu(jnp.einsum("tbcd,tdk->tbck", y, self.w1[...]) + self.b1[...][:, None, None])
        return self.norm_out(jnp.einsum("tbck,tkd->tbcd", hidden, self.w2[...]) + self.b2[...][:, None, None] + y)


class RankMixer(nnx.Module):
    """Features -> T tokens -> mixing blocks -> mean -> one logit.

    Args:
      features: K, the width of the concatenated features; they are cut into T equal pieces (padded with zeros).
      tokens: T; width: D, a multiple of T; expansion: k, hidden width of a token's feed-forward over D.
    """

    def __init__(self, features: int, *, tokens: int, width: int, expansion: int, num_blocks: int, rngs: nnx.Rngs):
        if width % tokens:
            raise ValueError(f"RankMixer width={width} is not a multiple of tokens={tokens}")
        self.tokens = tokens
        self.piece = -(-features // tokens)
        self.w_in = per_token_weight(rngs, tokens, self.piece, width)
        self.b_in = nnx.Param(jnp.zeros((tokens, width)))
        self.blocks = nnx.List(
            [RankMixerBlock(tokens, width, expansion, num_blocks, rngs=rngs) for _ in range(num_blocks)]
        )
        self.w_out = nnx.Param(xavier(rngs.params(), (width, 1), jnp.float32) * 0.1)
        self.b_out = nnx.Param(jnp.zeros(()))

    def __call__(self, features: jax.Array) -> jax.Array:
        """features [B, C, K] -> logits [B, C]."""
        b, c, k = features.shape
        padded = jnp.pad(features, ((0, 0), (0, 0), (0, self.tokens * self.piece - k)))
        x = jnp.moveaxis(padded.reshape(b, c, self.tokens, self.piece), 2, 0)
        x = jnp.einsum("tbcp,tpd->tbcd", x, self.w_in[...]) + self.b_in[...][:, None, None]
        for block in self.blocks:
            x = block(x)
        # Logits are float32 whatever the head computes in: rounded to bfloat16, candidates would tie.
        logits = jnp.matmul(jnp.mean(x, axis=0), self.w_out[...], preferred_element_type=jnp.float32)
        return logits[..., 0] + self.b_out[...]

    def macs(self) -> int:
        """Multiply-accumulates a candidate."""
        tokens, piece, width = self.w_in.shape
        blocks = sum(2 * block.w1.size for block in self.blocks)
        return tokens * piece * width + blocks + width
