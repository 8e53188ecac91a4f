"""Embeddings of an event's fields, side by side at unit RMS."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def unit_rms(x: jax.Array) -> jax.Array:
    """x over its root mean square along the last axis; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def features_of(embeddings: Sequence[jax.Array]) -> jax.Array:
    """One [..., D] a field -> [..., f], f the sum of D."""
    return unit_rms(jnp.concatenate(embeddings, axis=-1))


def rows_at(rows: jax.Array, index: jax.Array) -> jax.Array:
    """rows[index], [U, ...] at [...], whose gradient is added up in float32 or better.

    Thousands of events share a row: a sum in bfloat16 stops growing when an addend is less than 1/256 of it.
    """
    return rows.astype(summed_in(rows))[index].astype(rows.dtype)


def summed_in(x: jax.Array) -> jnp.dtype:
    """The type in which many x are added up."""
    return jnp.promote_types(x.dtype, jnp.float32)


def gather_fields(rows: Sequence[jax.Array], indices: Sequence[jax.Array]) -> list[jax.Array]:
    """Rows [U, D] at indices [...], for each field: [..., D]."""
    return [rows_at(jnp.asarray(row), index) for row, index in zip(rows, indices, strict=True)]


def mean_of_events(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Features [B, L, f] of events, mask [B, L] of the real ones -> [B, f]; zeros of an empty history."""
    total = jnp.einsum("blf,bl->bf", x, mask.astype(x.dtype))
    return total / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
