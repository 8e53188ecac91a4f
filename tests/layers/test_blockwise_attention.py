"""Self-attention block by block against the plain form, in values and gradients; what it refuses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers import blockwise_attention as ba
from laser_jax.layers import self_attention as sa
from laser_jax.layers.target_attention import masked_softmax

B, L, H, KEY, VALUE = 2, 13, 3, 4, 5
mask_of_some = np.random.default_rng(1).random((B, L)) < 0.6


def softmax_attention(q, k, v, seen):
    """Rows q [B, R, H, dk], scaled, over keys k [B, L, H, dk] and values v; seen: broadcasts to [B, R, L]."""
    weights = masked_softmax(jnp.einsum("brhk,blhk->bhrl", q, k), seen[:, None])
    return jnp.einsum("bhrl,blhv->brhv", weights, v)


def silu_attention(q, k, v, seen, bias):
    """The same with a weight of SiLU(score + bias) a pair."""
    scores = jnp.einsum("brhk,blhk->bhrl", q, k) + bias[:, None]
    return jnp.einsum("bhrl,blhv->brhv", jnp.where(seen[:, None], jax.nn.silu(scores), 0.0), v)


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
    got = functools.partial(ba.blockwise_softmax_attention, mask=mask_of_some, causal=causal, block=block)
    assert_same_with_gradients(got, functools.partial(softmax_attention, seen=seen), args)


@pytest.mark.parametrize("block", [1, 4, 13, 100])
def test_silu_by_blocks_equals_the_plain_form(block):
    age = np.sort(np.random.default_rng(2).integers(0, 10**7, (B, L)), axis=1)[:, ::-1].astype(np.int32)
    args = (draw(B, L, H, KEY), draw(B, L, H, KEY, seed=1), draw(B, L, H, VALUE, seed=2))
    args += (draw(L, seed=3), draw(ba.TIME_BUCKETS, seed=4))
    distance = np.arange(L)[:, None] - np.arange(L)

    def want(q, k, v, by_distance, by_gap):
        bias = ba.relative_bias(by_distance, by_gap, distance, age[:, :, None] - age[:, None])
        return silu_attention(q, k, v, mask_of_some[:, None] & (distance >= 0), bias)

    def got(q, k, v, by_distance, by_gap):
        return ba.blockwise_silu_attention(q, k, v, mask_of_some, age, by_distance, by_gap, block=block)

    assert_same_with_gradients(got, want, args)


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_that_sees_nothing_reads_zeros_and_hands_no_gradient_on(causal):
    mask = np.ones((B, L), bool)
    mask[0] = False
    args = draw(B, L, H, KEY), draw(B, L, H, KEY), draw(B, L, H, VALUE)
    age, by_distance, by_gap = np.zeros((B, L), np.int32), np.full(L, 9.0, np.float32), np.zeros(ba.TIME_BUCKETS)

    def softmax(q, k, v):
        return ba.blockwise_softmax_attention(q, k, v, mask, causal=causal, block=4)

    def silu(q, k, v):
        return ba.blockwise_silu_attention(q, k, v, mask, age, by_distance, by_gap, block=4)

    for attend in (softmax, silu):
        gradients = jax.grad(lambda *args, attend=attend: (attend(*args) ** 2).sum(), argnums=(0, 1, 2))
        for values in (jax.jit(attend)(*args), *jax.jit(gradients)(*args)):
            assert (values[0] == 0).all() and np.abs(values[1]).max() > 0


def test_users_are_the_same_alone_and_together(monkeypatch):
    mask = np.random.default_rng(1).random((6, L)) < 0.6
    age = np.sort(np.random.default_rng(2).integers(0, 10**7, (6, L)), axis=1)[:, ::-1].astype(np.int32)
    q, k, v, by_distance, by_gap = draw(6, L, H, KEY), draw(6, L, H, KEY), draw(6, L, H, VALUE), draw(L), draw(129)

    def results():
        def loss(q, k, v, by_distance, by_gap):
            soft = ba.blockwise_softmax_attention(q, k, v, mask, causal=True, block=4)
            pointwise = ba.blockwise_silu_attention(q, k, v, mask, age, by_distance, by_gap, block=4)
            return (soft**2 + pointwise**2).sum()

        return jax.jit(jax.value_and_grad(loss, argnums=range(5)))(q, k, v, by_distance, by_gap)

    monkeypatch.setattr(ba, "CACHED", 2**30)
    want = results()
    for cached in (1, 2 * H * 4 * L):  # one user, two users at a time
        monkeypatch.setattr(ba, "CACHED", cached)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results(), want)
    monkeypatch.setattr(ba, "_on_cpu", lambda: False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results(), want)


def test_relative_bias_equals_a_loop():
    by_distance, by_gap = draw(8), draw(ba.TIME_BUCKETS)
    gaps = np.array([0, 1, -1, 2, 59, -3600, 86400, 10**7, 2**31 - 1, -(2**31) + 1], np.int32)
    distance = np.arange(-2, 8)[:, None]
    got = ba.relative_bias(by_distance, by_gap, distance, gaps)
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
            return ba.blockwise_softmax_attention(q, q, q, mask, causal=True, block=block).sum()
        by_distance, by_gap = jnp.zeros(length), jnp.zeros(ba.TIME_BUCKETS)
        return ba.blockwise_silu_attention(q, q, q, mask, age, by_distance, by_gap, block=block).sum()

    used = jax.jit(jax.grad(loss)).lower(q).compile().memory_analysis().temp_size_in_bytes
    assert used < length * length * 4
