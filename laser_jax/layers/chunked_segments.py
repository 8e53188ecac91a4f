"""STA over a few users at a time, rows gathered inside: a history [B, L, f] never exists, forward or backward.

What a chunk of users needs fits the processor's cache; the whole batch's history does not. Backward gathers again, and
adds each chunk's gradients into the rows right away.
"""

import functools

import jax
import jax.numpy as jnp

from laser_jax.layers.segment_products import weighted_sums
from laser_jax.layers.segment_sums import cut_segments, project_heads, segment_sums_bwd, segment_sums_fwd
from laser_jax.layers.tokens import features_of, gather_fields, summed_in


def chunk_size(batch: int, most: int) -> int:
    """The largest number of users up to `most` that cuts a batch into equal chunks."""
    return next(size for size in range(min(most, batch), 0, -1) if batch % size == 0) if batch else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def chunked_segment_tokens(rows, indices, u, wv, bias, mask, width, gate, chunk, compute):
    """Gated sums over each segment of the features of its events, projected to values.

    Args:
      rows: one [U, D] a field; indices: one int32 [B, L] a field. u: [B, C * H, f] folded queries; wv: [f, H, dv];
      bias: [C * H]. mask: [B, L]. width: w. gate: see segment_attention. chunk: users at a time, a divisor of B.
      compute: type of the events once they are gathered.

    Returns:
      tokens [B, S, C, H * dv] and log mass [B, S, C * H].
    """
    return _forward(rows, indices, u, wv, bias, mask, width, gate, chunk, compute)[0]


def _forward(rows, indices, u, wv, bias, mask, width, gate, chunk, compute):
    def one(part):
        index, u, mask = part
        x = cut_segments(features_of(gather_fields(rows, index)).astype(compute), width)
        (z, log_mass), (*_, gates, _, _) = segment_sums_fwd(x, u, bias, cut_segments(mask, width), gate)
        return project_heads(z, wv), log_mass, gates

    found = jax.lax.map(one, _chunks((indices, u, mask), chunk))
    tokens, log_mass, gates = jax.tree.map(_whole, found)
    return (tokens, log_mass), (rows, indices, u, wv, mask, gates, log_mass)


def _backward(width, gate, chunk, compute, saved, cotangents):
    rows, indices, u, wv, mask, gates, log_mass = saved
    length = mask.shape[1]

    def one(totals, part):
        index, u, mask, gates, log_mass, (dtokens, dlog_mass) = part
        drows, dwv = totals
        features, back = jax.vjp(features_of, gather_fields(rows, index))
        x = cut_segments(features.astype(compute), width)
        _, back_to_sums = jax.vjp(project_heads, weighted_sums(gates, x), wv)
        dz, more_dwv = back_to_sums(dtokens)
        saved = (x, u, gates, log_mass, cut_segments(mask, width))
        dx, du, dbias, _ = segment_sums_bwd(gate, saved, (dz, dlog_mass))
        dx = dx.reshape(len(mask), -1, dx.shape[-1])[:, -length:]
        (dvalues,) = back(dx.astype(features.dtype))
        found = zip(drows, index, dvalues, strict=True)
        drows = tuple(total.at[places].add(values.astype(total.dtype)) for total, places, values in found)
        return (drows, dwv + more_dwv), (du, dbias)

    parts = _chunks((indices, u, mask, gates, log_mass, cotangents), chunk)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, summed_in(a)), (rows, wv))
    sums, (du, dbias) = jax.lax.scan(one, zeros, parts)
    drows, dwv = jax.tree.map(lambda total, a: total.astype(a.dtype), sums, (rows, wv))
    return drows, None, _whole(du), dwv, dbias.sum(axis=0), None


chunked_segment_tokens.defvjp(_forward, _backward)


def _chunks(tree, chunk):
    return jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), tree)


def _whole(a):
    return a.reshape(-1, *a.shape[2:])
