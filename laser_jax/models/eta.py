"""ETA (arXiv 2108.04468): the search compares hash codes; exact attention reads the K nearest events."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.models.base import TokenSource, at_least
from laser_jax.models.retrieval import event_planes, hyperplanes, search, sides
from laser_jax.models.sim import SearchEncoder

WORD = 32  # bits of a packed word


@dataclasses.dataclass
class EtaConfig:
    """Search by Hamming distance.

    Attributes:
      bits: m of a code. seed: of the hyperplanes, which are the same at every step and in serving.
      top: K, events the search keeps. recent: newest events of the short branch.
      heads: H of both attentions. tied: Wk := Wq, Wv Wo := I at init.
    """

    bits: int = 32
    seed: int = 0
    top: int = 100
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "EtaEncoder":
        return EtaEncoder(self, width_in, width, rngs=rngs)


def hash_codes(x: jax.Array, planes: jax.Array) -> jax.Array:
    """x [..., f], planes [f, m] -> uint32 [..., ceil(m / 32)], a bit a hyperplane."""
    bits = sides(x, planes)
    missing = -bits.shape[-1] % WORD
    bits = jnp.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, missing)])
    words = bits.reshape(*bits.shape[:-1], -1, WORD).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def hamming(a: jax.Array, b: jax.Array) -> jax.Array:
    """Bits in which codes [..., words] differ: int32 [...]."""
    return jnp.sum(jax.lax.population_count(a ^ b), axis=-1, dtype=jnp.int32)


def nearest(query_codes: jax.Array, codes: jax.Array, mask: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """The real events of smallest Hamming distance, the newest first among equals.

    Args:
      query_codes: [B, C, words]; codes: [B, L, words]; mask: [B, L]; number: K.

    Returns:
      Places and whether they are real, [B, C, K]; see `search`.
    """
    length, bits = mask.shape[1], codes.shape[-1] * WORD
    if bits * length >= 2**24:
        raise ValueError(
            f"codes of {bits} bits of {length} events: distances and places are told apart in float32 only below 2^24 "
            f"bits in all; take fewer bits, or {2**24 // bits - 1} events"
        )
    distance = hamming(query_codes[:, :, None], codes[:, None])
    # m + 1 distances for thousands of events: ties decide most places.
    return search(jnp.arange(length) - distance * length, mask[:, None], number)


class EtaEncoder(SearchEncoder):
    """Tokens [long, short]. The long branch is order-free but for ties, which go to the newest."""

    def __init__(self, config: EtaConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        at_least(1, config, "bits")
        super().__init__(config, width_in, width, rngs=rngs)

    def prepare(self, history: TokenSource, x, mask):
        return hash_codes(x, event_planes(history.w_in, self._planes()))

    def long_tokens(self, ctx, q, side):
        index, found = nearest(hash_codes(q, self._planes()), ctx.prepared, ctx.mask, self.config.top)
        return [self.attend_found(ctx, q, index, found)]

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        bits = self.config.bits
        return length * self.width_in * bits, self.width * bits + self.found_macs(length)

    def _planes(self):
        return hyperplanes(self.config.seed, self.width, self.config.bits)
