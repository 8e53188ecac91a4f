"""Self-attention block by block against the plain form, in values and gradients; what it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers import self_attention as sa

B, L, H, KEY, VALUE = 2, 13, 3, 4, 5
mask_of_some = np.random.default_rng(1).random((B, L)) < 0.6


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_same_with_gradients(got, want, args):
    weights = draw(*jax.eval_shape(want, *args).shape, seed=7)
    results = [
        jax.jit(jax.value_and_grad(lambda *args, f=f: jnp.sum(f(*args) * weights), argnums=range(len(args))))(*args)
        for f in (got, want)
    ]
    np.testing.assert_allclose(jax.jit(got)(*args), want(*args), rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        assert np.abs(b).max() > 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("rows", "block"), [(L, 4), (L, 13), (L, 1), (6, 4), (6, 100)])
def test_softmax_by_blocks_equals_the_plain_form(rows, block, causal):
    args = draw(B, rows, H, KEY), draw(B, L, H, KEY, seed=1), draw(B, L, H, VALUE, seed=2)
    seen = np.broadcast_to(mask_of_some[:, None], (B, rows, L))
    if causal:  # the rows are the newest ones
        seen = seen & (np.arange(L - rows, L)[:, None] >= np.arange(L))
    got = functools.partial(sa.blockwise_softmax_attention, mask=mask_of_some, causal=causal, block=block)
    assert_same_with_gradients(got, functools.partial(sa.softmax_attention, seen=seen), args)


@pytest.mark.parametrize("block", [1, 4, 13, 100])
def test_silu_by_blocks_equals_the_plain_form(block):
    age = np.sort(np.random.default_rng(2).integers(0, 10**7, (B, L)), axis=1)[:, ::-1].astype(np.int32)
    args = (draw(B, L, H, KEY), draw(B, L, H, KEY, seed=1), draw(B, L, H, VALUE, seed=2))
    args += (draw(L, seed=3), draw(sa.TIME_BUCKETS, seed=4))
    distance = np.arange(L)[:, None] - np.arange(L)

    def want(q, k, v, by_distance, by_gap):
        bias = sa.relative_bias(by_distance, by_gap, distance, age[:, :, None] - age[:, None])
        return sa.silu_attention(q, k, v, mask_of_some[:, None] & (distance >= 0), bias)

    def got(q, k, v, by_distance, by_gap):
        return sa.blockwise_silu_attention(q, k, v, mask_of_some, age, by_distance, by_gap, block=block)

    assert_same_with_gradients(got, want, args)


def test_a_row_that_sees_nothing_reads_zeros():
    seen = np.zeros((B, L, L), bool)
    q, k, v = draw(B, L, H, KEY), draw(B, L, H, KEY), draw(B, L, H, VALUE)
    assert (sa.softmax_attention(q, k, v, seen) == 0).all()
    assert (sa.silu_attention(q, k, v, seen, np.full((B, L, L), 9.0)) == 0).all()


def test_relative_bias_equals_a_loop():
    by_distance, by_gap = draw(8), draw(sa.TIME_BUCKETS)
    gaps = np.array([0, 1, -1, 2, 59, -3600, 86400, 10**7, 2**31 - 1, -(2**31) + 1], np.int32)
    distance = np.arange(-2, 8)[:, None]
    got = sa.relative_bias(by_distance, by_gap, distance, gaps)
    for row, place in zip(got, distance[:, 0], strict=True):
        for value, gap in zip(row, gaps.tolist(), strict=True):
            bucket = math.floor(math.log(max(1, abs(gap))) / 0.301)
            np.testing.assert_allclose(value, by_distance[max(place, 0)] + by_gap[min(bucket, 128)], rtol=1e-6)


def test_places_are_counted_from_the_newest():
    table = np.arange(5)
    np.testing.assert_array_equal(sa.counted_from_newest(table, 3), [2, 1, 0])
    np.testing.assert_array_equal(sa.counted_from_newest(table, 5), [4, 3, 2, 1, 0])
    with pytest.raises(ValueError, match="6 events but positions for 5"):
        sa.counted_from_newest(table, 6)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width=8 is not a multiple of heads=3"):
        sa.TransformerLayer(8, 3, 8, out_scale=1.0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["softmax", "silu"])
def test_all_pairs_never_exist_at_once(kind):
    length, block = 512, 32
    q, mask, age = jnp.zeros((1, length, 1, 8)), np.ones((1, length), bool), np.zeros((1, length), np.int32)

    def loss(q):
        if kind == "softmax":
            return sa.blockwise_softmax_attention(q, q, q, mask, causal=True, block=block).sum()
        by_distance, by_gap = jnp.zeros(length), jnp.zeros(sa.TIME_BUCKETS)
        return sa.blockwise_silu_attention(q, q, q, mask, age, by_distance, by_gap, block=block).sum()

    used = jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes
    assert used < length * length * 4
