"""Self-attention over long histories, exact, without ever holding all pairs of events.

`softmax_attention` and `silu_attention` read like their papers' equations and hold a weight for every pair of row and
key. The blockwise forms call them for a block of rows at a time, and again in the backward pass, so that at most
[B, H, block, L] exists.

A place is a slot of the history, the newest event's being the last: causality and distances count slots, so that they
are right for any mask, and padding the old end changes nothing.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from laser_jax.layers.mlp import FeedForward, weight
from laser_jax.layers.target_attention import masked_softmax

TIME_BUCKETS = 129
TIME_BUCKET_WIDTH = 0.301  # of ln(seconds)


def softmax_attention(q, k, v, seen):
    """Attention of rows over keys.

    Args:
      q: [B, R, H, dk], already scaled; k: [B, L, H, dk]; v: [B, L, H, dv].
      seen: bool, broadcasts to [B, R, L]: which keys a row sees.

    Returns:
      [B, R, H, dv]; zeros for a row that sees nothing.
    """
    weights = masked_softmax(jnp.einsum("brhk,blhk->bhrl", q, k), seen[:, None])
    return jnp.einsum("bhrl,blhv->brhv", weights, v)


def silu_attention(q, k, v, seen, bias):
    """HSTU's pointwise attention sum_j seen_ij SiLU(q_i . k_j + bias_ij) v_j: nothing makes the weights sum to one.

    Args:
      q, k, v, seen: as in `softmax_attention`; bias: broadcasts to [B, R, L], shared by the heads.

    Returns:
      [B, R, H, dv].
    """
    scores = jnp.einsum("brhk,blhk->bhrl", q, k) + bias[:, None]
    # The mask comes last: a bias alone makes SiLU of a masked entry nonzero.
    weights = jnp.where(seen[:, None], jax.nn.silu(scores.astype(jnp.float32)), 0.0)
    return jnp.einsum("bhrl,blhv->brhv", weights, v)


def relative_bias(by_distance, by_gap, distance, gap):
    """Bias of a pair of rows by how many places and how many seconds lie between them.

    Args:
      by_distance: [N]; by_gap: [TIME_BUCKETS], log-spaced.
      distance: int, below N; negative ones, of pairs that causality hides, count as 0. gap: int seconds, either sign.

    Returns:
      Shape of distance and gap, broadcast.
    """
    log_gap = jnp.log(jnp.maximum(jnp.abs(gap), 1).astype(jnp.float32))
    bucket = jnp.clip(jnp.floor(log_gap / TIME_BUCKET_WIDTH), 0, TIME_BUCKETS - 1).astype(jnp.int32)
    return by_distance[jnp.maximum(distance, 0)] + by_gap[bucket]


def blockwise_softmax_attention(q, k, v, mask, *, causal: bool, block: int):
    """`softmax_attention` of the newest R of L events over all of them.

    Args:
      q: [B, R, H, dk], already scaled; k: [B, L, H, dk]; v: [B, L, H, dv]; mask: [B, L].
      causal: whether an event sees only events at or before itself.
      block: rows at a time.

    Returns:
      [B, R, H, dv].
    """
    places = jnp.arange(k.shape[1])

    def attend(rows):
        q, place = rows
        seen = mask[:, None, :]
        if causal:
            seen = seen & (place[..., None] >= places)
        return softmax_attention(q, k, v, seen)

    return _by_blocks(attend, (q, places[None, -q.shape[1] :]), block)


def blockwise_silu_attention(q, k, v, mask, age, by_distance, by_gap, *, block: int):
    """Causal `silu_attention` of all events over each other, `relative_bias` built block by block.

    Args:
      q, k: [B, L, H, dk]; v: [B, L, H, dv]; mask: [B, L]; age: [B, L] int seconds.
      by_distance, by_gap: see `relative_bias`.
      block: rows at a time.

    Returns:
      [B, L, H, dv].
    """
    places = jnp.arange(k.shape[1])

    def attend(rows):
        q, place, row_age = rows
        distance = place[..., None] - places
        bias = relative_bias(by_distance, by_gap, distance, row_age[..., None] - age[:, None, :])
        return silu_attention(q, k, v, mask[:, None, :] & (distance >= 0), bias)

    return _by_blocks(attend, (q, places[None], age), block)


def _by_blocks(attend, rows, block: int):
    """attend(rows) by blocks along axis 1 of all leaves, each computed once more for the gradient."""
    length = jax.tree.leaves(rows)[0].shape[1]
    if length <= block:
        return attend(rows)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, -length % block), *((0, 0) for _ in a.shape[2:])))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, block, *a.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), jax.tree.map(cut, rows))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


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

    def macs(self, rows: int, keys: int, seen: int) -> int:
        """Multiply-accumulates of `rows` updated rows over `seen` keys each, of which `keys` are projected here."""
        d, hidden = self.ffn.w1.shape
        return 2 * keys * d * d + rows * (2 * d * d + 2 * seen * d + FeedForward.macs(d, hidden))
