"""The core of STA: gates of each event, and the gated sums over each segment, with a hand-written gradient.

K = candidates x heads stands after S: the products over an event's features and over a segment's events are then
batched matrix products without transposing anything as large as the history. Events may be bfloat16; gates, sums and
everything that is added up are float32.
"""

import functools

import jax
import jax.numpy as jnp

from laser_jax.layers.segment_products import event_products, spread_vectors, weighted_sums

GATES = ("sigmoid", "softmax")
NO_MASS = -30.0  # log mass of a segment without a real event: silent, yet finite


def cut_segments(x: jax.Array, width: int) -> jax.Array:
    """[B, L, ...] -> [B, S, w, ...], S = ceil(L / w), padding the old end with zeros (False for a mask)."""
    b, length, *rest = x.shape
    missing = -length % width
    padded = jnp.pad(x, ((0, 0), (missing, 0), *((0, 0) for _ in rest)))
    return padded.reshape(b, (length + missing) // width, width, *rest)


def gates_and_mass(scores, mask, gate, axis):
    """Scores and a mask that broadcasts with them; a segment's events lie along `axis`.

    Returns:
      Gates like scores, and the log mass without that axis, both float32.
    """
    scores = scores.astype(jnp.float32)
    if gate == "sigmoid":
        gates = jnp.where(mask, jax.nn.sigmoid(scores), 0.0)
        return gates, jnp.log(jnp.maximum(jnp.sum(gates, axis=axis), jnp.exp(NO_MASS)))
    top = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    # Masked before the exponential too: an infinite one would make the gradient of what is masked NaN.
    e = jnp.where(mask, jnp.exp(jnp.where(mask, scores - top, 0.0)), 0.0)
    total = jnp.sum(e, axis=axis, keepdims=True)
    log_mass = jnp.where(total > 0, jnp.log(jnp.maximum(total, 1e-20)) + top, NO_MASS)
    return e / jnp.maximum(total, 1e-20), jnp.squeeze(log_mass, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def segment_sums(x, u, bias, mask, gate):
    """x [B, S, w, f], u [B, K, f], bias [K], mask [B, S, w] -> z [B, S, K, f], log mass [B, S, K]."""
    return segment_sums_fwd(x, u, bias, mask, gate)[0]


def segment_sums_fwd(x, u, bias, mask, gate):
    b, s, w, f = x.shape
    if s == 1:  # packed: every segment has queries of its own
        scores = event_products(x, u[:, None]) + bias
    else:
        events = x.reshape(b, s * w, f)
        scores = jnp.einsum("bnf,bkf->bnk", events, u.astype(x.dtype), preferred_element_type=jnp.float32) + bias
    gates, log_mass = gates_and_mass(scores.reshape(b, s, w, -1), mask[..., None], gate, axis=2)
    gates, log_mass = jax.lax.optimization_barrier((gates, log_mass))
    return (weighted_sums(gates, x), log_mass), (x, u, gates, log_mass, mask)


def segment_sums_bwd(gate, saved, cotangents):
    x, u, gates, log_mass, mask = saved
    dz, dlog_mass = cotangents
    b, s, w, f = x.shape
    dgates = event_products(x, dz)
    if gate == "sigmoid":
        alive = log_mass > NO_MASS
        dgates = dgates + jnp.where(alive, dlog_mass * jnp.exp(-log_mass), 0.0)[:, :, None]
        dscores = dgates * gates * (1.0 - gates)
    else:
        centred = dgates - jnp.sum(dgates * gates, axis=2, keepdims=True)
        dscores = gates * (centred + dlog_mass[:, :, None])
    dscores = jnp.where(mask[..., None], dscores, 0.0)
    if s == 1:
        du = weighted_sums(dscores, x)[:, 0]
    else:
        du = jnp.einsum("bnk,bnf->bkf", dscores.reshape(b, s * w, -1), x.reshape(b, s * w, f).astype(jnp.float32))
    # An event is reached through the sum (gates x dz) and through its score (dscores x u): one product over 2K rows.
    left = jnp.concatenate([gates, dscores], axis=3)
    right = jnp.concatenate([dz, jnp.broadcast_to(u.astype(jnp.float32)[:, None], dz.shape)], axis=2)
    left, right = jax.lax.optimization_barrier((left, right))
    dx = spread_vectors(left, right)
    return dx.astype(x.dtype), du.astype(u.dtype), jnp.sum(dscores, axis=(0, 1, 2)), None


segment_sums.defvjp(segment_sums_fwd, segment_sums_bwd)


def project_heads(z: jax.Array, wv: jax.Array) -> jax.Array:
    """z [B, S, C * H, f], wv [f, H, dv] -> [B, S, C, H * dv]: the value projection, after the sum."""
    f, heads, _ = wv.shape
    # A product a head: one for all would hand the sums' gradient back in an order that no pass over events likes.
    of_heads = jnp.split(z.reshape(*z.shape[:2], -1, heads, f), heads, axis=3)
    return jnp.concatenate([of_head[:, :, :, 0] @ wv[:, h] for h, of_head in enumerate(of_heads)], axis=-1)


@jax.custom_vjp
def loudest_value(s: jax.Array) -> jax.Array:
    """[B, C, S, d] -> the largest value over S, [B, C, d].

    The gradient goes to the first place that has it. That of jnp.max asks once more which value is the largest: where a
    compiler computes s twice and rounds it otherwise the second time, none is, and the gradient is lost.
    """
    return jnp.max(s, axis=2)


def _loudest_value_fwd(s):
    return jnp.max(s, axis=2), s


def _loudest_value_bwd(s, gradient):
    here = jnp.arange(s.shape[2])[:, None] == jnp.argmax(s, axis=2)[:, :, None]
    return (jnp.where(here, gradient[:, :, None], 0.0),)


loudest_value.defvjp(_loudest_value_fwd, _loudest_value_bwd)
