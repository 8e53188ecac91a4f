"""Segmented target attention (STA): each segment of w events answers each candidate with a token (arXiv 2602.11562).

Inside a segment each event has a gate per head and candidate: an independent sigmoid (a segment without anything
relevant stays silent) or, as an option, a softmax over the segment. With either gate a segment also reports how loud it
is: the log of its gate mass, for sigmoids log sum g, for softmax the log-sum-exp of its scores.

Two exact forms. `segment_attention_reference` reads like the paper's equation and builds keys and values once a
request, shared by all candidates. `segment_attention_folded` moves both projections behind the sum (u = Wk Wq^T q;
o = z Wv), so that neither keys nor values exist, forward or backward. `use_fold` picks one from the static number of
candidates.

Segments are cut from the newest event backwards: the last one is full, what is padded is the oldest end.
"""

import functools

import jax
import jax.numpy as jnp

from laser_jax.layers.target_attention import fold_queries

GATES = ("sigmoid", "softmax")
_NO_MASS = -30.0  # log mass of a segment without a real event: silent, yet finite


def cut_segments(x: jax.Array, width: int) -> jax.Array:
    """[B, L, ...] -> [B, S, w, ...], S = ceil(L / w), padding the old end with zeros (False for a mask)."""
    b, length, *rest = x.shape
    missing = -length % width
    padded = jnp.pad(x, ((0, 0), (missing, 0), *((0, 0) for _ in rest)))
    return padded.reshape(b, (length + missing) // width, width, *rest)


def _gates_and_mass(scores, mask, gate, axis):
    """Scores and a mask that broadcasts with them; a segment's events lie along `axis`.

    Returns:
      Gates like scores, and the log mass without that axis, both float32.
    """
    scores = scores.astype(jnp.float32)
    if gate == "sigmoid":
        gates = jnp.where(mask, jax.nn.sigmoid(scores), 0.0)
        return gates, jnp.log(jnp.maximum(jnp.sum(gates, axis=axis), jnp.exp(_NO_MASS)))
    top = jnp.max(jnp.where(mask, scores, -jnp.inf), axis=axis, keepdims=True)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    e = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(e, axis=axis, keepdims=True)
    log_mass = jnp.where(total > 0, jnp.log(jnp.maximum(total, 1e-20)) + top, _NO_MASS)
    return e / jnp.maximum(total, 1e-20), jnp.squeeze(log_mass, axis)


def segment_attention_reference(q, x, mask, wq, wk, wv, bias, *, width: int, gate: str = "sigmoid"):
    """STA as the paper writes it, keys and values built once a request.

    Args:
      q: [B, C, d] candidates; x: [B, L, f] events, oldest to newest; mask: [B, L] bool.
      wq: [d, H, dq]; wk: [f, H, dq]; wv: [f, H, dv]; bias: [H], added to the gate's score.
      width: w, events a segment.
      gate: "sigmoid" or "softmax".

    Returns:
      tokens [B, C, S, H * dv] and log mass [B, C, H, S].
    """
    query = jnp.einsum("bcd,dhk->bchk", q, wq) * wq.shape[-1] ** -0.5
    keys = cut_segments(jnp.einsum("blf,fhk->blhk", x, wk), width)
    values = cut_segments(jnp.einsum("blf,fhv->blhv", x, wv), width)
    segment_mask = cut_segments(mask, width)[:, None, None]
    scores = jnp.einsum("bchk,bswhk->bchsw", query, keys) + bias[:, None, None]
    gates, log_mass = _gates_and_mass(scores, segment_mask, gate, axis=-1)
    tokens = jnp.einsum("bchsw,bswhv->bcshv", gates, values)
    return tokens.reshape(*tokens.shape[:3], -1), log_mass


def segment_attention_folded(q, x, mask, wq, wk, wv, bias, *, width: int, gate: str = "sigmoid"):
    """The same result as `segment_attention_reference` without ever building keys or values."""
    b, c, _ = q.shape
    heads, f = wk.shape[1], wk.shape[0]
    u = fold_queries(q, wq, wk).reshape(b, c * heads, f)
    z, log_mass = _segment_sums(cut_segments(x, width), u, jnp.tile(bias, c), cut_segments(mask, width), gate)
    tokens = jnp.einsum("bschf,fhv->bcshv", z.reshape(b, -1, c, heads, f), wv)
    log_mass = jnp.moveaxis(log_mass.reshape(b, -1, c, heads), 1, 3)
    return tokens.reshape(*tokens.shape[:3], -1), log_mass


# Below, K = candidates x heads, and K stands after S: the products over an event's features and over a segment's events
# are then batched matrix products without transposing anything as large as the history.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _segment_sums(x, u, bias, mask, gate):
    """x [B, S, w, f], u [B, K, f], bias [K], mask [B, S, w] -> z [B, S, K, f], log mass [B, S, K]."""
    return _segment_sums_fwd(x, u, bias, mask, gate)[0]


def _segment_sums_fwd(x, u, bias, mask, gate):
    b, s, w, f = x.shape
    scores = (jnp.einsum("bnf,bkf->bnk", x.reshape(b, s * w, f), u) + bias).reshape(b, s, w, -1)
    gates, log_mass = _gates_and_mass(scores, mask[..., None], gate, axis=2)  # [B, S, w, K], [B, S, K]
    # A multiply and a sum, not a dot: the sum over w is far too short for a matrix product.
    z = jnp.sum(gates[..., None] * x[:, :, :, None], axis=2)
    return (z, log_mass), (x, u, gates, log_mass, mask)


def _segment_sums_bwd(gate, saved, cotangents):
    x, u, gates, log_mass, mask = saved
    dz, dlog_mass = cotangents
    b, s, w, f = x.shape
    dgates = _event_products(x, dz)
    if gate == "sigmoid":
        alive = log_mass > _NO_MASS
        dgates = dgates + jnp.where(alive, dlog_mass * jnp.exp(-log_mass), 0.0)[:, :, None]
        dscores = dgates * gates * (1.0 - gates)
    else:
        centred = dgates - jnp.sum(dgates * gates, axis=2, keepdims=True)
        dscores = gates * (centred + dlog_mass[:, :, None])
    dscores = jnp.where(mask[..., None], dscores, 0.0)
    du = jnp.einsum("bnk,bnf->bkf", dscores.reshape(b, s * w, -1), x.reshape(b, s * w, f))
    # An event is reached through the sum (gates x dz) and through its score (dscores x u): one product over 2K rows.
    left = jnp.concatenate([gates, dscores], axis=3)
    right = jnp.concatenate([dz, jnp.broadcast_to(u[:, None], dz.shape)], axis=2)
    dx = jnp.einsum("bswk,bskf->bswf", left, right)
    return dx, du, jnp.sum(dscores, axis=(0, 1, 2)), None


def _event_products(x, dz):
    """x [B, S, w, f], dz [B, S, K, f] -> [B, S, w, K], on CPU by blocks of users that fit its cache (1.5x faster)."""
    block = next(size for size in (8, 4, 2, 1) if x.shape[0] % size == 0) if x.shape[0] else 1
    if jax.default_backend() != "cpu" or x.shape[0] <= block:
        return jnp.einsum("bswf,bskf->bswk", x, dz)

    def blocks(a):
        return a.reshape(-1, block, *a.shape[1:])

    products = jax.lax.map(lambda pair: jnp.einsum("bswf,bskf->bswk", *pair), (blocks(x), blocks(dz)))
    return products.reshape(*x.shape[:3], dz.shape[2])


_segment_sums.defvjp(_segment_sums_fwd, _segment_sums_bwd)


def use_fold(candidates: int, width: int, heads: int, key_width: int, value_width: int, segment: int) -> bool:
    """Whether folding is cheaper an event than building K and V once a request.

    Args:
      candidates: C; width: f; key_width, value_width: of one head; segment: w, events that share one value projection.
    """
    # Measured on CPU: the folded sums run at memory speed, a multiply-accumulate there costs about 3 of a large GEMM's.
    folded = 3 * candidates * heads * (2 * width + width * value_width / segment)
    built = heads * (width + candidates) * (key_width + value_width)
    return folded < built
