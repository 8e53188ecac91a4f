"""TWIN (arXiv 2302.02352): search and attention share one metric. TWIN-V2 (2407.16357): the same over clusters."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.segment_sums import cut_segments
from laser_jax.layers.target_attention import TargetAttention, fold_queries, masked_softmax
from laser_jax.models.base import TokenSource, at_least
from laser_jax.models.retrieval import LongShortEncoder, pick, search


@dataclasses.dataclass
class TwinConfig:
    """One metric for both stages. The paper's user-item cross features are not offered: an event's fields are in h.

    Attributes:
      top: K, events the search keeps. topk_per_head: each head its own K, or one K by the sum of the heads' scores.
      recent: newest events of the short branch.
      heads: H of both attentions. tied: Wk := Wq, Wv Wo := I at init.
    """

    top: int = 100
    topk_per_head: bool = True
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "TwinEncoder":
        return TwinEncoder(self, width_in, width, rngs=rngs)


@dataclasses.dataclass
class TwinV2Config:
    """TWIN over clusters of consecutive events: no offline job, hence nothing that could be newer than the request.

    Attributes:
      segment: w, events a cluster, cut from the newest event backwards. (The paper clusters by k-means in the store.)
      size_coef: times log n, n the cluster's real events, added to its score. With 1 a cluster counts as n events that
        look like their mean.
      top: K, clusters the search keeps. topk_per_head, recent, heads, tied: as for TWIN.
    """

    segment: int = 10
    size_coef: float = 1.0
    top: int = 50
    topk_per_head: bool = True
    recent: int = 50
    heads: int = 4
    tied: bool = True

    def build(self, *, width_in: int, width: int, history_length: int, rngs: nnx.Rngs) -> "TwinV2Encoder":
        return TwinV2Encoder(self, width_in, width, rngs=rngs)


class TwinEncoder(LongShortEncoder):
    """Tokens [long, short]; the long branch is order-free, and target attention over everything where K >= n."""

    def __init__(self, config: TwinConfig | TwinV2Config, width_in: int, width: int, *, rngs: nnx.Rngs):
        at_least(1, config, "top", "recent", "heads")
        super().__init__(width_in, width, recent=config.recent, heads=config.heads, tied=config.tied, rngs=rngs)
        self.config = config
        self.long = TargetAttention(width, config.heads, tied=config.tied, rngs=rngs)

    def prepare(self, history: TokenSource, x, mask):
        """Tokens [B, S, f], their mask [B, S], and what is added to their scores [B, S]."""
        return x, mask, jnp.zeros(mask.shape)

    def long_tokens(self, ctx, q, side):
        x, mask, offset = ctx.prepared
        wk = jnp.einsum("fd,dhk->fhk", ctx.w_in, self.long.wk[...])
        wv = jnp.einsum("fd,dhv->fhv", ctx.w_in, self.long.wv[...])
        if self._fold(q.shape[1]):
            u = fold_queries(q, self.long.wq[...], wk)
            scores = jnp.einsum("bchf,blf->bchl", u, x, preferred_element_type=jnp.float32)
        else:
            query = jnp.einsum("bcd,dhk->bchk", q, self.long.wq[...]) * wk.shape[-1] ** -0.5
            keys = jnp.einsum("blf,fhk->blhk", x, wk)
            scores = jnp.einsum("bchk,blhk->bchl", query, keys, preferred_element_type=jnp.float32)
        scores = scores + offset[:, None, None]
        ranked = scores if self.config.topk_per_head else jnp.sum(scores, axis=2, keepdims=True)
        index, found = search(ranked, mask[:, None, None], self.config.top)  # [B, C, H or 1, K]
        a = masked_softmax(jnp.take_along_axis(scores, index, axis=-1), found)
        z = jnp.matmul(a[..., None, :], pick(x, index))[..., 0, :]
        out = jnp.einsum("bchf,fhv->bchv", z, wv)
        return [out.reshape(*q.shape[:2], -1) @ self.long.wo[...]]

    def _fold(self, candidates: int) -> bool:
        """Whether queries as wide as the features cost less than keys that are built once a request."""
        d, f = self.width, self.width_in
        return candidates * self.config.heads * f < f * d + candidates * d

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        """Values are summed as features, whatever the candidates: of so few events that is cheaper than all values."""
        d, f, heads = self.width, self.width_in, self.config.heads
        found = 2 * d * d + f * d + heads * f * min(self.config.top, length)
        if self._fold(candidates):
            return 0, found + f * d + heads * f * length
        return length * f * d, found + length * d


class TwinV2Encoder(TwinEncoder):
    """Tokens [long, short] over clusters of `segment` consecutive events. Order-aware: order makes the clusters."""

    def __init__(self, config: TwinV2Config, width_in: int, width: int, *, rngs: nnx.Rngs):
        at_least(1, config, "segment")
        super().__init__(config, width_in, width, rngs=rngs)

    def prepare(self, history: TokenSource, x, mask):
        mask = cut_segments(mask, self.config.segment)
        size = mask.sum(axis=2)
        total = jnp.einsum("bswf,bsw->bsf", cut_segments(x, self.config.segment), mask.astype(x.dtype))
        at_least_one = jnp.maximum(size, 1).astype(x.dtype)
        return total / at_least_one[..., None], size > 0, self.config.size_coef * jnp.log(at_least_one)

    def long_macs(self, candidates: int, length: int) -> tuple[int, int]:
        once, each = super().long_macs(candidates, -(-length // self.config.segment))
        return length * self.width_in + once, each
