"""Attention of events over events, exact, without ever holding all pairs, forward or backward.

A block of rows at a time meets the keys; backward computes its weights again, transposed, so that every product is of
matrices as they lie in memory. On a CPU few users come at a time: what their blocks need fits the processor's cache.

A place is a slot of the history, the newest event's being the last: causality and distances count slots, so that they
are right for any mask, and padding the old end changes nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from laser_jax.layers.chunked_segments import chunk_size
from laser_jax.layers.tokens import rows_at, summed_in

CACHED = 2**17  # weights at a time on a CPU
TIME_BUCKETS = 129
TIME_BUCKET_WIDTH = 0.301  # of ln(seconds)
STAGES = 4  # of causal attention, each over the keys up to its newest row: five eighths of all pairs are computed


def blockwise_softmax_attention(q, k, v, mask, *, causal: bool, block: int):
    """Multi-head attention of the newest R of L events over all of them.

    Args:
      q: [B, R, H, dk], already scaled; k: [B, L, H, dk]; v: [B, L, H, dv]; mask: [B, L].
      causal: whether an event sees only events at or before itself.
      block: rows at a time.

    Returns:
      [B, R, H, dv]; zeros for a row that sees nothing.
    """
    return _heads_last(_softmax(*map(_heads_first, (q, k, v)), mask, causal, block))


def blockwise_silu_attention(q, k, v, mask, age, by_distance, by_gap, *, block: int):
    """HSTU's causal pointwise attention sum_j SiLU(q_i . k_j + bias_ij) v_j: nothing makes the weights sum to one.

    Args:
      q, k: [B, L, H, dk]; v: [B, L, H, dv]; mask: [B, L]; age: [B, L] int seconds.
      by_distance, by_gap: see `relative_bias`; shared by the heads.
      block: rows at a time.

    Returns:
      [B, L, H, dv].
    """
    tables = jnp.asarray(by_distance), jnp.asarray(by_gap)
    return _heads_last(_silu(*map(_heads_first, (q, k, v)), *tables, mask, age, block))


def relative_bias(by_distance, by_gap, distance, gap):
    """Bias of a pair of rows by how many places and how many seconds lie between them (arXiv 2402.17152).

    Args:
      by_distance: [N]; by_gap: [TIME_BUCKETS], log-spaced.
      distance: int, below N; negative ones, of pairs that causality hides, count as 0. gap: int seconds, either sign.

    Returns:
      Shape of distance and gap, broadcast.
    """
    # In a loop, since else XLA would take logarithms one by one as it looks them up: twice as slow on a CPU.
    bucket = jax.lax.map(_bucket, gap) if _on_cpu() else _bucket(gap)
    return rows_at(by_distance, jnp.maximum(distance, 0)) + rows_at(by_gap, bucket)


def _bucket(gap):
    log_gap = jnp.log(jnp.maximum(jnp.abs(gap), 1).astype(jnp.float32))
    return jnp.clip(jnp.floor(log_gap / TIME_BUCKET_WIDTH), 0, TIME_BUCKETS - 1).astype(jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _softmax(q, k, v, mask, causal, block):
    return _softmax_forward(q, k, v, mask, causal, block)[0]


def _softmax_forward(q, k, v, mask, causal, block):
    def one(q, k, v, mask):  # a user: [H, R, dk], [H, L, dk], [H, L, dv], [L]
        def attend(k, v, mask, q, place):
            scores = jnp.einsum("hrk,hlk->hrl", q, k, preferred_element_type=jnp.float32)
            seen = _seen(mask, place, causal)
            top = jnp.max(jnp.where(seen, scores, -1e30), axis=-1, keepdims=True)
            e = jnp.where(seen, jnp.exp(scores - top), 0.0)
            total = jnp.maximum(jnp.sum(e, axis=-1, keepdims=True), 1e-20)
            return jnp.einsum("hrl,hlv->hrv", e, v) / total, (top + jnp.log(total))[..., 0]

        return _map_blocks(attend, (k, v, mask), (q, _places(q, k)), causal, block)

    out, log_total = _over_users(one, _block_weights(q, k, block), q, k, v, mask)
    return out, (q, k, v, mask, out, log_total)


def _softmax_backward(causal, block, saved, dout):
    def one(q, k, v, mask, out, log_total, dout):
        def attend(k, v, mask, q, place, log_total, dout, dot):
            seen = _seen(mask, place, causal).swapaxes(-1, -2)
            scores = jnp.einsum("hlk,hrk->hlr", k, q, preferred_element_type=jnp.float32)
            p = jnp.where(seen, jnp.exp(scores - log_total[:, None]), 0.0)
            ds = p * (jnp.einsum("hlv,hrv->hlr", v, dout) - dot[:, None])
            return _gradients(p, ds, q, k, dout)

        rows = q, _places(q, k), log_total, dout, jnp.sum(dout * out, axis=-1)
        return _sum_blocks(attend, (k, v, mask), rows, causal, block)

    return *_typed(_over_users(one, _block_weights(*saved[:2], block), *saved, dout), saved[:3]), None


_softmax.defvjp(_softmax_forward, _softmax_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _silu(q, k, v, by_distance, by_gap, mask, age, block):
    return _silu_forward(q, k, v, by_distance, by_gap, mask, age, block)[0]


def _silu_forward(q, k, v, by_distance, by_gap, mask, age, block):
    def one(q, k, v, mask, age):
        def attend(k, v, mask, age, q, place, row_age):
            distance = place[:, None] - jnp.arange(len(mask))
            bias = relative_bias(by_distance, by_gap, distance, row_age[:, None] - age)
            scores = jnp.einsum("hrk,hlk->hrl", q, k, preferred_element_type=jnp.float32) + bias
            # The mask comes last: a bias alone makes SiLU of a masked entry nonzero.
            weights = jnp.where(mask & (distance >= 0), jax.nn.silu(scores), 0.0)
            return (jnp.einsum("hrl,hlv->hrv", weights, v),)

        return _map_blocks(attend, (k, v, mask, age), (q, _places(q, k), age), True, block)

    (out,) = _over_users(one, _block_weights(q, k, block), q, k, v, mask, age)
    return out, (q, k, v, by_distance, by_gap, mask, age)


def _silu_backward(block, saved, dout):
    q, k, v, *tables, mask, age = saved
    by_distance, by_gap = (a.astype(summed_in(a)) for a in tables)

    def one(q, k, v, mask, age, dout):
        def attend(k, v, mask, age, q, place, row_age, dout):
            distance = place - jnp.arange(len(mask))[:, None]
            gap = row_age - age[:, None]
            bias, back = jax.vjp(lambda *tables: relative_bias(*tables, distance, gap), by_distance, by_gap)
            scores = jnp.einsum("hlk,hrk->hlr", k, q, preferred_element_type=jnp.float32) + bias
            seen = mask[:, None] & (distance >= 0)
            open_ = jax.nn.sigmoid(scores)
            weights = jnp.where(seen, scores * open_, 0.0)
            slope = jnp.where(seen, open_ * (1 + scores * (1 - open_)), 0.0)
            ds = slope * jnp.einsum("hlv,hrv->hlr", v, dout)
            return *_gradients(weights, ds, q, k, dout), *back(ds.sum(axis=0))

        return _sum_blocks(attend, (k, v, mask, age), (q, _places(q, k), age, dout), True, block)

    *dqkv, dby_distance, dby_gap = _over_users(one, _block_weights(q, k, block), q, k, v, mask, age, dout)
    return *_typed((*dqkv, dby_distance.sum(axis=0), dby_gap.sum(axis=0)), saved[:5]), None, None


_silu.defvjp(_silu_forward, _silu_backward)


def _typed(gradients, primals):
    """Gradients, added up in float32, in the types of what they are of."""
    return [gradient.astype(primal.dtype) for gradient, primal in zip(gradients, primals, strict=True)]


def _gradients(weights, ds, q, k, dout):
    """Of a block's queries, of its keys and of its values; weights and what came to scores are [H, L, r]."""
    dq = jnp.einsum("hkl,hlr->hkr", k.swapaxes(1, 2), ds).swapaxes(1, 2)
    return dq, jnp.einsum("hlr,hrk->hlk", ds, q), jnp.einsum("hlr,hrv->hlv", weights, dout)


def _seen(mask, place, causal):
    """[r, L]: which keys each row sees."""
    seen = jnp.broadcast_to(mask, (len(place), len(mask)))
    return seen & (place[:, None] >= jnp.arange(len(mask))) if causal else seen


def _places(q, k):
    """Of the rows [R], the newest of the L."""
    return jnp.arange(k.shape[1] - q.shape[1], k.shape[1])


def _over_users(one: Callable, weights: int, *arrays: jax.Array) -> Any:
    """one(*arrays of a user) for all users, along the leading axis of all arrays and results.

    Args:
      weights: of a block of one user.
    """
    users = arrays[0].shape[0]
    few = _on_cpu() and isinstance(users, int)  # an exported program's number of users is a symbol
    together = chunk_size(users, max(1, CACHED // weights)) if few else users
    if together == users:
        return jax.vmap(one)(*arrays)
    return jax.lax.map(lambda arrays: one(*arrays), arrays, batch_size=together)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _block_weights(q, k, block: int) -> int:
    return q.shape[1] * min(q.shape[2], block) * k.shape[2]


def _stages(rows: int, keys: int, causal: bool, block: int) -> Iterator[tuple[int, int, int]]:
    """Runs of rows (begin, end) and how many keys they can see at all, in whole blocks."""
    step = -(-rows // (STAGES * block)) * block if causal else rows
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield begin, end, keys - rows + end if causal else keys


def pairs_computed(rows: int, keys: int, causal: bool, block: int) -> int:
    """How many pairs of the newest `rows` of `keys` events are looked at, seen or not."""
    return sum((end - begin) * seen for begin, end, seen in _stages(rows, keys, causal, block))


def _map_blocks(attend: Callable, keys, rows, causal, block: int):
    """attend(*keys, *rows of a block) for all blocks of rows; results are joined along axis 1.

    The last axis but one of k and v counts keys, the last one of all else; for rows likewise.
    """
    found = []
    for begin, end, seen in _stages(len(rows[1]), len(keys[2]), causal, block):
        near = [_part(a, 0, seen) for a in keys]
        blocks = [_cut(_part(a, begin, end), block) for a in rows]
        out = jax.lax.map(lambda rows, near=near: attend(*near, *rows), blocks)
        found.append([_join(a, end - begin) for a in out])
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))


def _sum_blocks(attend: Callable, keys, rows, causal, block: int):
    """Gradients by queries, joined, and by keys, values and whatever else attend returns, summed over blocks."""
    total, found = None, []
    for begin, end, seen in _stages(len(rows[1]), len(keys[2]), causal, block):
        near = [_part(a, 0, seen) for a in keys]
        blocks = [_cut(_part(a, begin, end), block) for a in rows]

        def add(sums, rows, near=near):
            dq, *more = attend(*near, *rows)
            return jax.tree.map(jnp.add, sums, more), dq

        shapes = jax.eval_shape(lambda rows, near=near: attend(*near, *rows), [a[0] for a in blocks])[1:]
        sums, dq = jax.lax.scan(add, [jnp.zeros(a.shape, a.dtype) for a in shapes], blocks)
        found.append(_join(dq, end - begin))
        missing = ((0, 0), (0, len(keys[2]) - seen), (0, 0))
        sums = [jnp.pad(a, missing) for a in sums[:2]] + sums[2:]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    return jnp.concatenate(found, axis=1), *total


def _axis(a):
    return 1 if a.ndim > 1 else 0


def _part(a, begin, end):
    return jax.lax.slice_in_dim(a, begin, end, axis=_axis(a))


def _cut(a, block):
    """[R] or [H, R, ...] -> blocks first, the last one filled with zeros."""
    axis = _axis(a)
    a = jnp.pad(a, [(0, -a.shape[i] % block if i == axis else 0) for i in range(a.ndim)])
    return jnp.moveaxis(a.reshape(*a.shape[:axis], -1, block, *a.shape[axis + 1 :]), axis, 0)


def _join(a, rows):
    """Blocks of [H, r, ...] -> [H, R, ...]."""
    a = jnp.moveaxis(a, 0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :rows]


def _heads_first(a):
    return jnp.moveaxis(a, 2, 1)


def _heads_last(a):
    return jnp.moveaxis(a, 1, 2)
