"""Checksums that do not depend on how an array is sharded: a sum over all elements of a hash of (bits, place)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from laser_jax import hosts

_A, _B, _C = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE35)
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by size of an element


@njit(nogil=True, cache=True)
def _sum_in_order(bits, first):
    """Of elements whose places follow each other from `first`; modulo 2^32."""
    total = np.uint32(0)
    place = np.uint32(first)
    for i in range(len(bits)):
        x = np.uint32((np.uint32(bits[i]) ^ np.uint32(place * _A)) * _B)
        x = np.uint32((x ^ (x >> np.uint32(15))) * _C)
        total = np.uint32(total + (x ^ (x >> np.uint32(13))))
        place = np.uint32(place + np.uint32(1))
    return total


def _sum_on_host(x: jax.Array) -> int:
    """This process's part of an array's sum; where the devices' memory is the host's, nothing is copied."""
    total = 0
    for shard in x.addressable_shards:
        if shard.replica_id:
            continue
        part = np.asarray(shard.data)
        part = part.view(_BITS[x.dtype.itemsize])
        starts = [index.start or 0 for index in shard.index]
        if part.shape[1:] == x.shape[1:]:  # whole lines: places follow each other
            first = starts[0] * (part.size // max(part.shape[0], 1)) if part.ndim else 0
            total += int(_sum_in_order(part.reshape(-1), np.uint32(first % 2**32)))
            continue
        axes = [np.arange(n) + start for n, start in zip(part.shape, starts, strict=True)]
        place = np.ravel_multi_index(np.ix_(*axes), x.shape)
        for value, at in zip(part.reshape(-1, 1), np.broadcast_to(place, part.shape).ravel(), strict=True):
            total += int(_sum_in_order(value, np.uint32(at % 2**32)))
    return total % 2**32


@jax.jit
def _sums_on_devices(arrays: list[jax.Array]) -> list[jax.Array]:
    """The same sums, where the compiler fuses them into one pass (on a CPU it would write out all hashes)."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = (bits ^ (place * _A)) * _B
        mixed = (mixed ^ (mixed >> 15)) * _C
        return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)

    return [one(x) for x in arrays]


def checksums(arrays: Any) -> dict[str, int]:
    """A checksum of every array, 32 bits, by its path in the tree; all processes call it and get the same."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if jax.default_backend() == "cpu":
        mine = np.array([_sum_on_host(leaf) for _, leaf in leaves], np.uint32)
        sums = hosts.gather(mine).sum(axis=0, dtype=np.uint64) % 2**32
    else:
        sums = jax.device_get(_sums_on_devices([leaf for _, leaf in leaves]))
    return {jax.tree_util.keystr(path): int(found) for (path, _), found in zip(leaves, sums, strict=True)}
