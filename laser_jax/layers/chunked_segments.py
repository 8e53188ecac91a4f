"""STA over a few users at a time, rows gathered inside: a history [B, L, f] never exists, forward or backward.

What a chunk of users needs fits the processor's cache; the whole batch's history does not. Backward gathers again, and
adds each chunk's gradients into the rows right away.
"""

import functools

import jax
import jax.numpy as jnp

from laser_jax.layers.segment_sums import cut_segments, segment_sums_bwd, segment_sums_fwd
from laser_jax.layers.tokens import features_of, gather_fields


def chunk_size(batch: int, most: int) -> int:
    """The largest number of users up to `most` that cuts a batch into equal chunks."""
    return next(size for size in range(min(most, batch), 0, -1) if batch % size == 0) if batch else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def chunked_segment_sums(rows, indices, u, bias, mask, width, gate, chunk):
    """Gated sums over each segment of the features of its events.

    Args:
      rows: one [U, D] a field; indices: one int32 [B, L] a field. u: [B, K, f] folded queries; bias: [K].
      mask: [B, L]. width: w. gate: see segment_attention. chunk: users at a time, a divisor of B.

    Returns:
      z [B, S, K, f] and log mass [B, S, K].
    """
    return _forward(rows, indices, u, bias, mask, width, gate, chunk)[0]


def _forward(rows, indices, u, bias, mask, width, gate, chunk):
    def one(part):
        index, u, mask = part
        x = cut_segments(features_of(gather_fields(rows, index)), width)
        (z, log_mass), (*_, gates, _, _) = segment_sums_fwd(x, u, bias, cut_segments(mask, width), gate)
        return z, log_mass, gates

    found = jax.lax.map(one, _chunks((indices, u, mask), chunk))
    z, log_mass, gates = jax.tree.map(_whole, found)
    return (z, log_mass), (rows, indices, u, mask, gates, log_mass)


def _backward(width, gate, chunk, saved, cotangents):
    rows, indices, u, mask, gates, log_mass = saved
    length = mask.shape[1]

    def one(drows, part):
        index, u, mask, gates, log_mass, cotangents = part
        x, back = jax.vjp(features_of, gather_fields(rows, index))
        saved = (cut_segments(x, width), u, gates, log_mass, cut_segments(mask, width))
        dx, du, dbias, _ = segment_sums_bwd(gate, saved, cotangents)
        dx = dx.reshape(len(mask), -1, dx.shape[-1])[:, -length:]
        (dvalues,) = back(dx)
        drows = tuple(total.at[places].add(values) for total, places, values in zip(drows, index, dvalues, strict=True))
        return drows, (du, dbias)

    parts = _chunks((indices, u, mask, gates, log_mass, cotangents), chunk)
    drows, (du, dbias) = jax.lax.scan(one, tuple(jnp.zeros_like(row) for row in rows), parts)
    return drows, None, _whole(du), dbias.sum(axis=0), None


chunked_segment_sums.defvjp(_forward, _backward)


def _chunks(tree, chunk):
    return jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), tree)


def _whole(a):
    return a.reshape(-1, *a.shape[2:])
