"""What the two-stage rivals share: find a few events for a candidate, read those; and read the newest ones.

Scores are masked before the search and what it found is masked again after it: a user with fewer than K events leaves
surplus slots, which hold arbitrary events and must count for nothing, forward and backward.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from laser_jax.layers.target_attention import TargetAttention
from laser_jax.layers.tokens import rows_at
from laser_jax.models.base import SeqOut, SequenceEncoder, TokenSource
from laser_jax.shapes import CandidateTokens, HistoryFeatures, HistoryMask


def search(scores: jax.Array, mask: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    """The real events of highest score, best first; no gradient.

    Args:
      scores: [..., L], finite; equal scores keep the oldest, so put recency into them where ties are common.
      mask: [..., L], broadcasts with scores.
      number: K, cut to L where the history is shorter.

    Returns:
      Their places, int32 [..., K], and whether each slot holds a real event, bool [..., K]; those that do come first.
    """
    masked = jnp.where(mask, jax.lax.stop_gradient(scores).astype(jnp.float32), -jnp.inf)
    best, index = jax.lax.top_k(masked, min(number, masked.shape[-1]))
    return index, best > -jnp.inf


def newest(mask: HistoryMask, number: int) -> tuple[jax.Array, jax.Array]:
    """Places of the newest real events, newest first, as `search` returns them."""
    return search(jnp.arange(mask.shape[-1]), mask, number)


def pick(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x [B, L, f] at index [B, ..., K] -> [B, ..., K, f]."""
    return jax.vmap(rows_at)(x, index)


def attend_each(attention: TargetAttention, q: CandidateTokens, events, found, w_in=None) -> jax.Array:
    """Every candidate attends over events of its own.

    Args:
      q: [B, C, d]; events: [B, C, K, f]; found: [B, C, K]; w_in: see TargetAttention.

    Returns:
      [B, C, d].
    """
    b, c, number, width = events.shape
    # Every (request, candidate) pair is a request of one candidate here.
    out = attention(
        q.reshape(b * c, 1, -1), events.reshape(b * c, number, width), found.reshape(b * c, number), w_in=w_in
    )
    return out.reshape(b, c, -1)


def hyperplanes(seed: int, width: int, number: int) -> np.ndarray:
    """Normals [width, number] of random hyperplanes, N(0, 1): constants of the seed, neither stored nor trained."""
    return np.random.RandomState(seed).normal(size=(width, number)).astype(np.float32)


def event_planes(w_in: jax.Array, planes: jax.Array) -> jax.Array:
    """Hyperplanes of tokens x @ w_in as hyperplanes of features x [..., f]; in full float32, as `sides`."""
    return jnp.matmul(w_in, planes, precision=jax.lax.Precision.HIGHEST)


def sides(x: jax.Array, planes: jax.Array) -> jax.Array:
    """On which side of each hyperplane x [..., f] lies, bool [..., number]; in full float32, so that train = serve."""
    return jnp.matmul(x, planes, precision=jax.lax.Precision.HIGHEST) > 0


class Context(NamedTuple):
    """A request's history, once for all candidates."""

    x: HistoryFeatures
    w_in: jax.Array
    mask: HistoryMask
    recent: jax.Array  # [B, R, f], the newest real events
    recent_mask: jax.Array  # [B, R]
    prepared: Any  # what the long branch adds


class LongShortEncoder(SequenceEncoder):
    """Tokens [long ..., short]: a model's own view of the whole history, and target attention over its newest events.

    A subclass defines the long branch: `prepare` once a request, `long_tokens` per candidate and `long_macs`.
    """

    num_tokens = 2

    def __init__(self, width_in: int, width: int, *, recent: int, heads: int, tied: bool, rngs: nnx.Rngs):
        self.width_in, self.width, self.recent = width_in, width, recent
        self.short = TargetAttention(width, heads, tied=tied, rngs=rngs)

    def prepare(self, history: TokenSource, x: HistoryFeatures, mask: HistoryMask) -> Any:
        """What the long branch computes once a request."""
        return None

    def long_tokens(self, ctx: Context, q: CandidateTokens, side: dict[str, jax.Array]) -> list[jax.Array]:
        """The long branch's tokens, [B, C, d] each."""
        raise NotImplementedError(f"{type(self).__name__} must define long_tokens")

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        """`macs` of the long branch."""
        raise NotImplementedError(f"{type(self).__name__} must define long_macs")

    def precompute(self, history: TokenSource, mask, age) -> Context:
        x = history.features()
        index, found = newest(mask, self.recent)
        return Context(x, history.w_in, mask, pick(x, index), found, self.prepare(history, x, mask))

    def score(self, ctx: Context, q, side) -> SeqOut:
        short = self.short(q, ctx.recent, ctx.recent_mask, w_in=ctx.w_in)
        return SeqOut(tokens=jnp.stack([*self.long_tokens(ctx, q, side), short], axis=2))

    def macs(self, candidates: int, length: int) -> tuple[int, int]:
        long = self.long_macs(candidates, length)
        short = self.short.macs(candidates, min(self.recent, length), self.width_in)
        return long[0] + short[0], long[1] + short[1]
