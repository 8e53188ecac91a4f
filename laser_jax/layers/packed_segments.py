"""STA over the real segments of many users in one dense array: users of unlike lengths pay for no padded event.

Which segments are real is known on the host (`live_segments`), so the number of packed segments is a static shape. What
comes out is padded again, but by then a segment is one token and not w events.
"""

import jax.numpy as jnp
import numpy as np

from laser_jax.layers.chunked_segments import chunk_size, chunked_segment_tokens
from laser_jax.layers.tokens import rows_at


def live_segments(lengths: np.ndarray, history_length: int, width: int, multiple: int = 256) -> np.ndarray:
    """Positions, in [B, S] laid flat, of the segments that hold real events; on the host.

    Args:
      lengths: int [B], real events of each history, at its newest end.
      history_length: L. width: w.
      multiple: the result is padded to a multiple of it, so that few shapes are compiled.

    Returns:
      int32 [N], ascending; B * S where padded.
    """
    segments = -(-history_length // width)
    alive = np.arange(segments) >= segments - -(-np.asarray(lengths)[:, None] // width)
    positions = np.flatnonzero(alive).astype(np.int32)
    return np.pad(positions, (0, -len(positions) % multiple), constant_values=alive.size)


def packed_segment_tokens(rows, indices, positions, u, wv, bias, mask, width: int, gate: str, chunk: int, compute: str):
    """Gated sums over the segments at `positions`.

    Args:
      rows, indices, u, wv, bias, mask, width, gate, compute: as for chunked_segment_tokens.
      positions: int32 [N], as of `live_segments`.
      chunk: segments at a time, at most.

    Returns:
      tokens [N, 1, C, H * dv] and log mass [N, 1, C * H].
    """
    b, length = mask.shape
    segments = -(-length // width)
    user, segment = positions // segments, positions % segments
    place = segment[:, None] * width + jnp.arange(width) - (segments * width - length)
    real = (user < b)[:, None] & (place >= 0)  # the oldest segment may be ragged
    at = jnp.where(real, user[:, None] * length + place, 0)
    real &= mask.reshape(-1)[at]
    # Every segment is a request of its own here, with the queries of its user.
    tokens, log_mass = chunked_segment_tokens(
        rows,
        tuple(index.reshape(-1)[at] for index in indices),
        rows_at(u, jnp.minimum(user, b - 1)),
        wv,
        bias,
        real,
        width,
        gate,
        chunk_size(len(positions), chunk),
        compute,
    )
    return tokens, log_mass


def spread(packed, positions, users: int, segments: int, fill: float):
    """[N, ...] of the segments at `positions` -> [B, S, ...], `fill` elsewhere."""
    out = jnp.full((users * segments, *packed.shape[1:]), fill, packed.dtype)
    # Each real segment stands at one place; what lies behind the last is dropped.
    out = out.at[positions].set(packed, mode="drop")
    return out.reshape(users, segments, *packed.shape[1:])
