"""Target attention: both orders of the sum, against softmax by hand and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers import target_attention as ta
from tests.layers import naive

SHAPES = {  # B, C, L, f, d, H, dq, dv
    "one candidate": (2, 1, 7, 6, 8, 2, 4, 4),
    "many candidates": (3, 5, 4, 6, 8, 4, 3, 2),
    "one event": (2, 3, 1, 5, 4, 1, 4, 4),
}


def draw(shape, seed=0):
    b, c, length, f, d, heads, key, value = shape
    rng = np.random.default_rng(seed)
    sizes = [(b, c, d), (b, length, f), (d, heads, key), (f, heads, key), (f, heads, value), (b, c, heads, length)]
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def masks(b, length):
    rng = np.random.default_rng(1)
    some = rng.random((b, length)) < 0.5
    one_empty = np.ones((b, length), bool)
    one_empty[0] = False
    return {"any": some, "full": np.ones((b, length), bool), "a row without events": one_empty}


def test_masked_softmax_equals_softmax_where_everything_is_real():
    scores = np.random.default_rng(0).normal(scale=30, size=(5, 9)).astype(np.float32)
    got = ta.masked_softmax(scores, np.ones((5, 9), bool))
    np.testing.assert_allclose(got, jax.nn.softmax(scores, axis=-1), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -500.0, 500.0])
def test_masked_softmax_is_a_softmax_over_the_real_entries(shift):
    scores = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1], [0] * 6, [1] * 6], bool)
    poisoned = np.where(mask, scores + np.float32(shift), np.float32(3e4))  # padding would win
    got = np.asarray(ta.masked_softmax(poisoned, mask))
    for row in (0, 1, 3):
        np.testing.assert_allclose(got[row][mask[row]], jax.nn.softmax(scores[row][mask[row]]), rtol=1e-4)
    assert (got[~mask] == 0).all() and (got[2] == 0).all()


def test_masked_softmax_of_low_precision_is_computed_in_float32():
    got = ta.masked_softmax(jnp.ones((1, 3), jnp.bfloat16), np.ones((1, 3), bool))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1 / 3, rtol=1e-6)


@pytest.mark.parametrize(("name", "with_offset"), [*((name, True) for name in SHAPES), ("many candidates", False)])
def test_folded_equals_shared_in_values_and_gradients(name, with_offset):
    *args, offset = draw(SHAPES[name])
    q, x, *weights = args
    weight = np.random.default_rng(2).normal(size=(*q.shape[:2], weights[0].shape[1], weights[2].shape[2]))

    def loss(form):
        def run(args, offset, mask):
            out, mass = form(*args[:2], mask, *args[2:], offset)
            return jnp.sum(out * weight) + jnp.sum(mass * weight[..., 0]), (out, mass)

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1) if with_offset else 0, has_aux=True))

    forms = loss(ta.attend_folded), loss(ta.attend_shared)
    for mask in masks(*x.shape[:2]).values():
        (folded, shared) = (form(args, offset if with_offset else None, mask) for form in forms)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), folded, shared)


@pytest.mark.parametrize("form", [ta.attend_folded, ta.attend_shared])
def test_scores_of_bfloat16_events_are_added_up_in_float32(form):
    # 257 and 258 are one number in bfloat16.
    x, q = jnp.array([[[256, 1], [256, 2], [256, 0]]], jnp.bfloat16), jnp.ones((1, 1, 2), jnp.bfloat16)
    same = jnp.eye(2, dtype=jnp.bfloat16)[:, None]
    _, mass = form(q, x, np.ones((1, 3), bool), same, same, same)
    scores = np.array([257.0, 258.0, 256.0]) * 2**-0.5
    np.testing.assert_allclose(mass[0, 0, 0], np.log(np.exp(scores - 182).sum()) + 182, atol=0.02)
    out, _ = form(q, x, np.ones((1, 3), bool), same, same, same)
    weights = np.exp(scores - 182) / np.exp(scores - 182).sum()
    np.testing.assert_allclose(out[0, 0, 0, 1], weights @ [1, 2, 0], atol=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_both_forms_equal_a_triple_loop(name):
    *args, offset = draw(SHAPES[name])
    forms = jax.jit(ta.attend_folded), jax.jit(ta.attend_shared)
    for mask in masks(*args[1].shape[:2]).values():
        want = naive.target_attention(*args[:2], mask, *args[2:], offset)
        for form in forms:
            for got, wanted in zip(form(*args[:2], mask, *args[2:], offset), want, strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_cheaper_form_is_picked():
    # With f = d, folding pays while C (H - 1) < d.
    for heads, most in ((4, 42), (2, 127)):
        key = 128 // heads
        assert ta.use_fold(most, 128, heads, key, key)
        assert not ta.use_fold(most + 1, 128, heads, key, key)


@pytest.mark.parametrize("tied", [False, True])
def test_the_module_folds_the_input_projection(tied):
    module = ta.TargetAttention(8, 2, tied=tied, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    q, x, w_in = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 8), (2, 5, 6), (6, 8)))
    mask = masks(2, 5)["any"]
    offset = rng.normal(size=(2, 3, 2, 5)).astype(np.float32)
    got = module(q, x, mask, w_in=w_in, offset=offset)
    np.testing.assert_allclose(got, module(q, x @ w_in, mask, offset=offset), rtol=1e-5, atol=1e-5)
    want, _ = naive.target_attention(q, x @ w_in, mask, module.wq[...], module.wk[...], module.wv[...], offset)
    np.testing.assert_allclose(got, want.reshape(2, 3, 8) @ module.wo[...], rtol=1e-5, atol=1e-5)


def test_tied_scores_are_similarities_and_values_the_events():
    module = ta.TargetAttention(8, 2, tied=True, rngs=nnx.Rngs(0))
    event = np.random.default_rng(0).normal(size=(1, 1, 8)).astype(np.float32)
    np.testing.assert_allclose(module(event, event, np.ones((1, 1), bool)), event, rtol=1e-5)
    np.testing.assert_array_equal(module.wq[...], module.wk[...])


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width=8 is not a multiple of heads=3"):
        ta.TargetAttention(8, 3, tied=True, rngs=nnx.Rngs(0))
