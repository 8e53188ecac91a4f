"""MIRRN (arXiv 2411.15005): three searches by three queries, each result mixed along time into one token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models.base import TokenSource
from laser_jax.models.eta import hash_codes, nearest
from laser_jax.models.retrieval import LongShortEncoder, attend_each, hyperplanes, newest, pick

FILTERS = ("diag", "block")


@dataclasses.dataclass
class MirrnConfig:
    """Searches and filters. The released code's dropout is left out: one pass over the data needs none.

    Attributes:
      bits: m of a hash code. seed: of the hyperplanes, one set for the three searches.
      top: K, events of a search. summarised: newest events whose mean is the second query.
      filter: "diag", one complex number a channel (what the released code computes), or "block", a complex matrix for
        each of `blocks` groups of channels (what the paper describes); the same at every frequency.
      recent: newest events of the short branch.
      heads: H of both attentions. tied: Wk := Wq, Wv Wo := I at init.
    """

    bits: int = 32
    seed: int = 0
    top: int = 100
    summarised: int = 16
    filter: str = "diag"
    blocks: int = 4
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "MirrnEncoder":
        return MirrnEncoder(self, width_in, width, history_length, rngs=rngs)


class MirrnEncoder(LongShortEncoder):
    """Tokens [long, short]. Order-aware: what is found is sorted back to time order and knows its place.

    Two of the three queries are means over the history (its newest events, all of it), so their tokens are found once a
    request; the long token is target attention over all three.
    """

    def __init__(self, config: MirrnConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        if config.filter not in FILTERS:
            raise ValueError(f"filter={config.filter!r} is not one of {FILTERS}")
        if config.filter == "block" and width % config.blocks:
            raise ValueError(f"width={width} is not a multiple of blocks={config.blocks}")
        super().__init__(width_in, width, recent=config.recent, heads=config.heads, tied=config.tied, rngs=rngs)
        self.config = config
        self.position = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (history_length, width)))
        self.mixers = nnx.List([TimeMixer(config, width, rngs=rngs) for _ in range(3)])
        self.long = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def prepare(self, history: TokenSource, x, mask):
        length, most = mask.shape[1], self.position.shape[0]
        if length > most:
            raise ValueError(
                f"{length} events but position embeddings for {most}: "
                "set history_length to the longest history that is to be scored"
            )
        h = x @ history.w_in
        codes = hash_codes(h, self._planes())
        index, found = newest(mask, self.config.summarised)
        queries = jnp.stack([masked_mean(pick(h, index), found), masked_mean(h, mask)], axis=1)  # [B, 2, d]
        x, found = self._found(h, codes, mask, queries)
        shared = [mixer(x[:, i], found[:, i]) for i, mixer in enumerate(self.mixers[1:])]
        return h, codes, jnp.stack(shared, axis=1)

    def long_tokens(self, ctx, q, side):
        h, codes, shared = ctx.prepared
        own = self.mixers[0](*self._found(h, codes, ctx.mask, q))
        shared = jnp.broadcast_to(shared[:, None], (*q.shape[:2], *shared.shape[1:]))
        tokens = jnp.concatenate([own[:, :, None], shared], axis=2)  # [B, C, 3, d]
        return [attend_each(self.long, q, tokens, jnp.ones(tokens.shape[:3], bool))]

    def _found(self, h, codes, mask, queries):
        """Events near each query [B, C, d], oldest first, with their place: [B, C, K, d], and which are real."""
        length, number = mask.shape[1], self.config.top
        index, found = nearest(hash_codes(queries, self._planes()), codes, mask, number)
        # Always K slots, empty ones at the old end: the filter must not depend on how far a history is padded.
        index = jnp.pad(jnp.where(found, index, -1), ((0, 0), (0, 0), (0, number - index.shape[2])), constant_values=-1)
        index = jnp.sort(index, axis=-1)
        found = index >= 0
        place = self.position[...][jnp.where(found, length - 1 - index, 0)]
        x = pick(h, jnp.maximum(index, 0)) + 0.02 * place
        return jnp.where(found[..., None], x, 0.0), found

    def _planes(self):
        return hyperplanes(self.config.seed, self.width, self.config.bits)

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        d, f, bits = self.width, self.width_in, self.config.bits
        search_macs = d * bits
        mixer_macs = self.mixers[0].macs(self.config.top)
        means = (length + min(self.config.summarised, length)) * d
        once = length * f * d + length * d * bits + means + 2 * (search_macs + mixer_macs)
        return once, search_macs + mixer_macs + sum(self.long.macs(1, 3, d))


class TimeMixer(nnx.Module):
    """Events in time order -> LN(x + filter(x)), then their mean. The filter multiplies the spectrum over K slots."""

    def __init__(self, config: MirrnConfig, width: int, *, rngs: nnx.Rngs):
        self.blocked = config.filter == "block"
        size = width // config.blocks
        shape = (config.blocks, size, size) if self.blocked else (width,)
        small = nnx.initializers.normal(0.02)
        self.real = nnx.Param(small(rngs.params(), shape))
        self.imaginary = nnx.Param(small(rngs.params(), shape))
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array, found: jax.Array) -> jax.Array:
        """x [..., K, d], zero where not found [..., K] -> [..., d]."""
        spectrum = jnp.fft.rfft(x, axis=-2, norm="ortho")
        by = jax.lax.complex(self.real[...], self.imaginary[...])
        if self.blocked:
            parts = spectrum.reshape(*spectrum.shape[:-1], *by.shape[:2])
            spectrum = jnp.einsum("...ni,nio->...no", parts, by).reshape(spectrum.shape)
        else:
            spectrum = spectrum * by
        return masked_mean(self.norm(x + jnp.fft.irfft(spectrum, n=x.shape[-2], axis=-2, norm="ortho")), found)

    def macs(self, number: int) -> int:
        """Two transforms of each channel at (5/2) K log2 K real operations, and the filter between them."""
        width = self.norm.num_features
        transforms = 2 * width * round(1.25 * number * math.log2(number))
        products = 4 * (number // 2 + 1) * width * (self.real.shape[-1] if self.blocked else 1)
        return transforms + products


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the second last axis of x [..., K, d] where mask [..., K]; zeros where nothing is."""
    total = jnp.einsum("...kd,...k->...d", x, mask.astype(x.dtype))
    return total / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
