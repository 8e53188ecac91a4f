"""SIM, soft and hard search (arXiv 2006.05639): the general search finds K events, exact attention reads them."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import weight
from laser_jax.layers.target_attention import TargetAttention, fold_queries
from laser_jax.models.base import GatheredSource, TokenSource, at_least
from laser_jax.models.retrieval import LongShortEncoder, attend_each, pick, search


@dataclasses.dataclass
class SimSoftConfig:
    """Search by inner product.

    Attributes:
      top: K, events the search keeps. recent: newest events of the short branch.
      heads: H of both attentions. tied: key := query projections (the search's too), value projections := I at init.
    """

    top: int = 100
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "SimSoftEncoder":
        return SimSoftEncoder(self, width_in, width, rngs=rngs)


@dataclasses.dataclass
class SimHardConfig:
    """Search by equality of one field.

    Attributes:
      field: of both history and candidates; the newest events that share the candidate's value are kept.
      top, recent, heads, tied: as for soft search.
    """

    field: str = "category"
    top: int = 100
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "SimHardEncoder":
        return SimHardEncoder(self, width_in, width, rngs=rngs)


class SearchEncoder(LongShortEncoder):
    """long = TA(q, the K events that `find` returns)."""

    def __init__(self, config: SimSoftConfig | SimHardConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        at_least(1, config, "top", "recent", "heads")
        super().__init__(width_in, width, recent=config.recent, heads=config.heads, tied=config.tied, rngs=rngs)
        self.config = config
        self.long = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def attend_found(self, ctx, q, index, found) -> jax.Array:
        return attend_each(self.long, q, pick(ctx.x, index), found, ctx.w_in)

    def found_macs(self, length: int) -> int:
        return sum(self.long.macs(1, min(self.config.top, length), self.width_in))


class SimSoftEncoder(SearchEncoder):
    """Tokens [long, pooled, short]; the long branch is order-free.

    The search's score is (q Wa) . (h Wb), here over sqrt(d), which ranks alike. Indices carry no gradient: in the paper
    Wa and Wb learn from a second loss, on p = sum_i s_i h_i. An encoder sees no labels, so p, over the number of
    events, is a token of its own (`pooled`): the head's loss trains the search through it.
    """

    num_tokens = 3

    def __init__(self, config: SimSoftConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width_in, width, rngs=rngs)
        self.wa = weight(rngs, (width, width))
        self.wb = nnx.Param(self.wa[...]) if config.tied else weight(rngs, (width, width))

    def long_tokens(self, ctx, q, side):
        wa, wb = self.wa[...], ctx.w_in @ self.wb[...]
        u = fold_queries(q, wa[:, None], wb[:, None])[:, :, 0]
        scores = jnp.einsum("bcf,blf->bcl", u, ctx.x, preferred_element_type=jnp.float32)
        index, found = search(scores, ctx.mask[:, None], self.config.top)
        num_events = jnp.maximum(ctx.mask.sum(axis=1), 1)[:, None, None]
        weights = (jnp.where(ctx.mask[:, None], scores, 0.0) / num_events).astype(ctx.x.dtype)
        pooled = jnp.einsum("bcl,blf->bcf", weights, ctx.x) @ ctx.w_in
        return [self.attend_found(ctx, q, index, found), pooled]

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        d, f = self.width, self.width_in
        return 0, d * d + d * f + 2 * length * f + f * d + self.found_macs(length)


class SimHardEncoder(SearchEncoder):
    """The K newest events of the candidate's category; the search has no parameters. Order-aware."""

    def __init__(self, config: SimHardConfig, width_in: int, width: int, *, rngs: nnx.Rngs):
        super().__init__(config, width_in, width, rngs=rngs)
        self.compares = (config.field,)

    def prepare(self, history: TokenSource | GatheredSource, x, mask):
        return history.field(self.config.field)

    def long_tokens(self, ctx, q, side):
        name = self.config.field
        if name not in side:
            raise ValueError(f"hard search by {name!r} needs it on the candidates, which have {sorted(side)}")
        # Both sides hold indices into the same unique rows: equal indices are equal values.
        same = ctx.prepared[:, None] == side[name][:, :, None]
        index, found = search(jnp.arange(ctx.x.shape[1]), same & ctx.mask[:, None], self.config.top)
        return [self.attend_found(ctx, q, index, found)]

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        return 0, self.found_macs(length)
