"""Segmented target attention (STA): each segment of w events answers each candidate with a token (arXiv 2602.11562).

Inside a segment each event has a gate per head and candidate: an independent sigmoid (a segment without anything
relevant stays silent) or, as an option, a softmax over the segment. With either gate a segment also reports how loud it
is: the log of its gate mass, for sigmoids log sum g, for softmax the log-sum-exp of its scores.

Exact forms of one function:
  segment_attention_reference reads like the paper's equation: keys and values once a request, shared by all candidates;
  segment_attention_shared is that in another order of axes, for models with many candidates;
  segment_attention_folded moves both projections behind the sum (u = Wk Wq^T q; o = z Wv), so that neither keys nor
    values exist, forward or backward; `use_fold` picks one of the two from the static number of candidates;
  segment_attention_chunked folds a few users at a time, their rows gathered inside;
  segment_attention_packed folds only the segments that hold events.

Segments are cut from the newest event backwards: the last one is full, what is padded is the oldest end.
"""

import jax
import jax.numpy as jnp

from laser_jax.layers.chunked_segments import chunk_size, chunked_segment_tokens
from laser_jax.layers.packed_segments import packed_segment_tokens, spread
from laser_jax.layers.segment_kernel import segment_sums_kernel
from laser_jax.layers.segment_sums import NO_MASS, cut_segments, gates_and_mass, project_heads, segment_sums
from laser_jax.layers.target_attention import fold_queries

KERNELS = ("xla", "pallas", "pallas_interpret")


def segment_attention_reference(q, x, mask, wq, wk, wv, bias, *, width: int, gate: str = "sigmoid"):
    """STA as the paper writes it, keys and values built once a request.

    Args:
      q: [B, C, d] candidates; x: [B, L, f] events, oldest to newest, float32 or bfloat16 (the products with events are
        then taken in bfloat16 and added up in float32); mask: [B, L] bool.
      wq: [d, H, dq]; wk: [f, H, dq]; wv: [f, H, dv]; bias: [H], added to the gate's score.
      width: w, events a segment.
      gate: "sigmoid" or "softmax".

    Returns:
      tokens [B, C, S, H * dv] and log mass [B, C, H, S].
    """
    query = (jnp.einsum("bcd,dhk->bchk", q, wq) * wq.shape[-1] ** -0.5).astype(x.dtype)
    keys = cut_segments(jnp.einsum("blf,fhk->blhk", x, wk.astype(x.dtype)), width)
    values = cut_segments(jnp.einsum("blf,fhv->blhv", x, wv.astype(x.dtype)), width)
    segment_mask = cut_segments(mask, width)[:, None, None]
    scores = jnp.einsum("bchk,bswhk->bchsw", query, keys, preferred_element_type=jnp.float32) + bias[:, None, None]
    gates, log_mass = gates_and_mass(scores, segment_mask, gate, axis=-1)
    tokens = jnp.einsum("bchsw,bswhv->bcshv", gates.astype(x.dtype), values, preferred_element_type=jnp.float32)
    return tokens.reshape(*tokens.shape[:3], -1), log_mass


def segment_attention_shared(q, x, mask, wq, wk, wv, bias, *, width: int, gate: str = "sigmoid"):
    """The same for many candidates, in the order of axes that is fastest: events of a segment are no inner axis."""
    query = (jnp.einsum("bcd,dhk->bchk", q, wq) * wq.shape[-1] ** -0.5).astype(x.dtype)
    keys = cut_segments(jnp.einsum("blf,fhk->blhk", x, wk.astype(x.dtype)), width)
    values = cut_segments(jnp.einsum("blf,fhv->blhv", x, wv.astype(x.dtype)), width)
    segment_mask = cut_segments(mask, width)[:, None, :, :, None]
    scores = jnp.einsum("bchk,bswhk->bhswc", query, keys, preferred_element_type=jnp.float32)
    gates, log_mass = gates_and_mass(scores + bias[:, None, None, None], segment_mask, gate, axis=3)
    dims = (((3,), (2,)), ((0, 2, 1), (0, 1, 3)))
    tokens = jax.lax.dot_general(gates.astype(x.dtype), values, dims, preferred_element_type=jnp.float32)  # b s h c v
    tokens = jnp.einsum("bshcv->bcshv", tokens)
    return tokens.reshape(*tokens.shape[:3], -1), jnp.moveaxis(log_mass, 3, 1)


def segment_attention_folded(q, x, mask, wq, wk, wv, bias, *, width: int, gate: str = "sigmoid", kernel: str = "xla"):
    """The same result as `segment_attention_reference` without ever building keys or values.

    Args:
      kernel: what sums: "xla", or "pallas", one kernel on a GPU or a TPU and XLA on a CPU; "pallas_interpret" runs the
        kernel anywhere, slowly.

    Raises:
      ValueError: a kernel of another name.
    """
    u = _flat_queries(q, wq, wk)
    bias = _flat_bias(bias, q.shape[1])
    segments = cut_segments(x, width), u, bias, cut_segments(mask, width), gate
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is not one of {KERNELS}")
    if kernel == "xla":
        z, log_mass = segment_sums(*segments)
    else:
        z, log_mass = segment_sums_kernel(*segments, interpret=kernel == "pallas_interpret")
    return jnp.moveaxis(project_heads(z, wv), 1, 2), _by_candidate(log_mass, q.shape[1])


def segment_attention_chunked(
    q,
    rows,
    indices,
    mask,
    wq,
    wk,
    wv,
    bias,
    *,
    width: int,
    gate: str = "sigmoid",
    chunk: int = 8,
    compute="float32",
):
    """The same again for events that are still rows of tables: gathered for `chunk` users at a time, so that no array
    as large as the history exists.

    Args:
      rows: one [U, D] a field; indices: one int32 [B, L] a field; f is the sum of D.
      chunk: users at a time, at most. compute: type of the events once they are gathered.
    """
    u = _flat_queries(q, wq, wk)
    bias = _flat_bias(bias, q.shape[1])
    chunk = chunk_size(len(mask), chunk)
    tokens, log_mass = chunked_segment_tokens(
        tuple(rows), tuple(indices), u, wv, bias, mask, width, gate, chunk, compute
    )
    return jnp.moveaxis(tokens, 1, 2), _by_candidate(log_mass, q.shape[1])


def segment_attention_packed(
    q,
    rows,
    indices,
    mask,
    positions,
    wq,
    wk,
    wv,
    bias,
    *,
    width: int,
    gate: str = "sigmoid",
    chunk: int = 8,
    compute="float32",
):
    """The same again for histories of unlike lengths: only the segments at `positions` are gathered and summed.

    Args:
      rows, indices, compute: as for `segment_attention_chunked`.
      chunk: so many full histories of segments at a time, at most.
      positions: int32 [N], of all segments with a real event; see packed_segments.live_segments.
    """
    (b, c, _), segments = q.shape, -(-mask.shape[1] // width)
    u = _flat_queries(q, wq, wk)
    chunk = max(chunk * segments, 1)
    tokens, log_mass = packed_segment_tokens(
        tuple(rows), tuple(indices), positions, u, wv, _flat_bias(bias, c), mask, width, gate, chunk, compute
    )
    tokens = spread(tokens[:, 0], positions, b, segments, 0.0)
    log_mass = spread(log_mass[:, 0], positions, b, segments, NO_MASS)
    return jnp.moveaxis(tokens, 1, 2), _by_candidate(log_mass, c)


def _flat_queries(q, wq, wk):
    """[B, C * H, f]."""
    u = fold_queries(q, wq, wk)
    return u.reshape(u.shape[0], -1, u.shape[-1])


def _flat_bias(bias, c):
    """[H] -> [C * H], for a C that may be symbolic."""
    return jnp.broadcast_to(bias, (c, bias.shape[0])).reshape(-1)


def _by_candidate(log_mass, c):
    """[B, S, C * H] -> [B, C, H, S]."""
    return jnp.moveaxis(log_mass.reshape(*log_mass.shape[:2], c, -1), 1, 3)


def use_fold(candidates: int, width: int, heads: int, key_width: int, value_width: int, segment: int) -> bool:
    """Whether folding is cheaper an event than building K and V once a request.

    Args:
      candidates: C; width: f; key_width, value_width: of one head; segment: w, events that share one value projection.
    """
    # Measured on CPU: the folded sums run at memory speed, a multiply-accumulate there costs about 3 of a large GEMM's.
    # Times w, in integers: a symbolic C has no other order.
    folded = 3 * candidates * heads * (2 * width * segment + width * value_width)
    built = heads * (width + candidates) * (key_width + value_width) * segment
    return folded < built
