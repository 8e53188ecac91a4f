"""MIRRN (arXiv 2411.15005): three searches by three queries, each result mixed along time into one token."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from laser_jax.layers.target_attention import TargetAttention
from laser_jax.layers.tokens import rows_at, summed_in
from laser_jax.models.base import TokenSource, at_least
from laser_jax.models.eta import hash_codes, nearest
from laser_jax.models.retrieval import LongShortEncoder, attend_each, event_planes, hyperplanes, newest, pick

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
    request; the long token is target attention over all three. Codes and means are taken of features, w_in folded into
    the hyperplanes: tokens are built of what a search found, unless candidates are so many that all events cost less.
    """

    def __init__(self, config: MirrnConfig, width_in: int, width: int, history_length: int, *, rngs: nnx.Rngs):
        if config.filter not in FILTERS:
            raise ValueError(f"filter={config.filter!r} is not one of {FILTERS}")
        at_least(1, config, "bits", "top", "summarised", "blocks", "recent", "heads")
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
        codes = hash_codes(x, event_planes(history.w_in, self._planes()))
        index, found = newest(mask, self.config.summarised)
        queries = jnp.stack([masked_mean(pick(x, index), found), masked_mean(x, mask)], axis=1) @ history.w_in
        index, found = self._search(codes, mask, queries)
        tokens = pick(x, index) @ history.w_in  # [B, 2, K, d]
        shared = [
            self._mix(mixer, tokens[:, i], index[:, i], found[:, i], length) for i, mixer in enumerate(self.mixers[1:])
        ]
        return codes, jnp.stack(shared, axis=1)

    def long_tokens(self, ctx, q, side):
        codes, shared = ctx.prepared
        index, found = self._search(codes, ctx.mask, q)
        tokens = pick(ctx.x, index) @ ctx.w_in if self._fold(q.shape[1]) else pick(ctx.x @ ctx.w_in, index)
        own = self._mix(self.mixers[0], tokens, index, found, ctx.mask.shape[1])
        shared = jnp.broadcast_to(shared[:, None], (*q.shape[:2], *shared.shape[1:]))
        tokens = jnp.concatenate([own[:, :, None], shared], axis=2)  # [B, C, 3, d]
        return [attend_each(self.long, q, tokens, jnp.ones(tokens.shape[:3], bool))]

    def unused(self, candidates: int) -> list[str]:
        blocks = self.config.blocks
        if self.config.filter == "block" or blocks == MirrnConfig.blocks:
            return []
        return [f"encoder.blocks={blocks} does nothing: it is of filter='block', and this is {self.config.filter!r}"]

    def _search(self, codes, mask, queries):
        """Places of the events near each query [B, C, d], oldest first, and which are real: [B, C, K]."""
        number = self.config.top
        index, found = nearest(hash_codes(queries, self._planes()), codes, mask, number)
        # Always K slots, empty ones at the old end: the filter must not depend on how far a history is padded.
        index = jnp.pad(jnp.where(found, index, -1), ((0, 0), (0, 0), (0, number - index.shape[2])), constant_values=-1)
        index = jnp.sort(index, axis=-1)
        return jnp.maximum(index, 0), index >= 0

    def _mix(self, mixer, tokens, index, found, length):
        """Tokens [..., K, d] of the events at `index`, mixed along time -> [..., d]."""
        x = tokens + 0.02 * rows_at(self.position[...], length - 1 - index)
        return mixer(jnp.where(found[..., None], x, 0.0), found)

    def _fold(self, candidates: int) -> bool:
        """Whether tokens of what each candidate's search finds cost less than those of all events."""
        return candidates * self.config.top < self.position.shape[0]

    def _planes(self):
        return hyperplanes(self.config.seed, self.width, self.config.bits)

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        d, f, bits, number = self.width, self.width_in, self.config.bits, self.config.top
        search_macs, mixer_macs = d * bits, self.mixers[0].macs(number)
        means = (length + min(self.config.summarised, length)) * f + 2 * f * d
        once = length * f * bits + means + 2 * (search_macs + number * f * d + mixer_macs)
        each = search_macs + mixer_macs + sum(self.long.macs(1, 3, d))
        if self._fold(candidates):
            return once, each + number * f * d
        return once + length * f * d, each


class TimeMixer(nnx.Module):
    """Events in time order -> LN(x + filter(x)), then their mean. The filter multiplies the spectrum over K slots.

    By one complex number a channel, a + ib: that is a x + b Hilbert(x), and one product with a matrix that depends on K
    alone takes half the time of two transforms.
    """

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
        x = x.astype(summed_in(x))  # there are no transforms in bfloat16
        real, imaginary = self.real[...].astype(x.dtype), self.imaginary[...].astype(x.dtype)
        if self.blocked:
            spectrum, by = jnp.fft.rfft(x, axis=-2, norm="ortho"), jax.lax.complex(real, imaginary)
            parts = spectrum.reshape(*spectrum.shape[:-1], *by.shape[:2])
            spectrum = jnp.einsum("...ni,nio->...no", parts, by).reshape(spectrum.shape)
            filtered = jnp.fft.irfft(spectrum, n=x.shape[-2], axis=-2, norm="ortho")
        else:
            filtered = real * x + imaginary * jnp.matmul(hilbert(x.shape[-2]).astype(x.dtype), x)
        return masked_mean(self.norm(x + filtered), found)

    def macs(self, number: int) -> int:
        """Two transforms of each channel at (5/2) K log2 K real operations, and the filter between them.

        Also where a matrix takes less time: transforms are the fewest multiply-accumulates.
        """
        width = self.norm.num_features
        transforms = 2 * width * round(1.25 * number * math.log2(number))
        products = 4 * (number // 2 + 1) * width * (self.real.shape[-1] if self.blocked else 1)
        return transforms + products


def hilbert(number: int) -> np.ndarray:
    """The matrix [K, K] that turns every frequency of K slots by a quarter: i times their spectrum."""
    return np.fft.irfft(1j * np.fft.rfft(np.eye(number), axis=0), n=number, axis=0)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the second last axis of x [..., K, d] where mask [..., K]; zeros where nothing is."""
    total = jnp.einsum("...kd,...k->...d", x, mask.astype(x.dtype))
    return total / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
