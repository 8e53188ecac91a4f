"""The three small products of STA: an event with its segment's K vectors, a segment's events with K gates, and back.

Each is a batch of tiny matrix products, one a segment: [w, f] x [f, K]. Accelerators take them as such. XLA's CPU calls
a matrix routine for every one of them, at a third of memory's speed; written out as sums of arrays they run at it.
"""

import jax
import jax.numpy as jnp

LANES = 8  # features summed side by side: one vector register
MOST_TERMS = 32  # a longer sum is not written out: it would take long to compile


def _written_out(terms: int) -> bool:
    return jax.default_backend() == "cpu" and terms <= MOST_TERMS


def weighted_sums(gates: jax.Array, x: jax.Array) -> jax.Array:
    """gates [B, S, w, K], x [B, S, w, f] -> [B, S, K, f], float32: sums over a segment's events."""
    width = x.shape[2]
    if not _written_out(width):
        return jnp.einsum("bswk,bswf->bskf", gates.astype(x.dtype), x, preferred_element_type=jnp.float32)
    return sum(gates[:, :, i, :, None] * x[:, :, i, None] for i in range(width))


def event_products(x: jax.Array, vectors: jax.Array) -> jax.Array:
    """x [B, S, w, f], vectors [B, S, K, f] -> [B, S, w, K], float32: each event with the vectors of its segment."""
    features, count = x.shape[3], vectors.shape[2]
    whole = features - features % LANES
    if not whole or not _written_out(whole // LANES):
        return jnp.einsum("bswf,bskf->bswk", x, vectors.astype(x.dtype), preferred_element_type=jnp.float32)

    def product(start, stop):  # [B, S, w, K, stop - start]
        return x[:, :, :, None, start:stop] * vectors[:, :, None, :, start:stop].astype(jnp.float32)

    lanes = sum(product(start, start + LANES) for start in range(0, whole, LANES))
    # A product with ones and not a sum: over the last axis that is the faster one.
    products = (lanes.reshape(-1, LANES) @ jnp.ones((LANES, 1))).reshape(*x.shape[:3], count)
    return products + sum(product(at, at + 1)[..., 0] for at in range(whole, features))


def spread_vectors(weights: jax.Array, vectors: jax.Array) -> jax.Array:
    """weights [B, S, w, K], vectors [B, S, K, f] -> [B, S, w, f], float32: what a segment's vectors give each event."""
    count = weights.shape[3]
    if not _written_out(count):
        return jnp.einsum("bswk,bskf->bswf", weights, vectors, preferred_element_type=jnp.float32)
    return sum(weights[:, :, :, k, None] * vectors[:, :, None, k] for k in range(count))
