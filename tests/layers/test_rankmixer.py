"""RankMixer: what its parameter-free mixing promises, and the block against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers.rankmixer import RankMixer, mix_tokens, per_token_weight
from tests.layers import naive


def run(module, x):
    return jax.jit(lambda x: module(x))(x)


def make(features=21, tokens=4, width=8, blocks=2):
    return RankMixer(features, tokens=tokens, width=width, expansion=2, num_blocks=blocks, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("tokens", "width"), [(1, 3), (4, 8), (8, 8), (3, 12)])
def test_mixing_is_its_own_inverse_and_keeps_the_norm(tokens, width):
    x = np.random.default_rng(0).normal(size=(tokens, 2, 3, width)).astype(np.float32)
    mixed = np.asarray(mix_tokens(x))
    np.testing.assert_array_equal(mix_tokens(mixed), x)
    np.testing.assert_allclose((mixed**2).sum((0, -1)), (x**2).sum((0, -1)), rtol=1e-5)
    assert (tokens == 1) == np.array_equal(mixed, x)


def test_a_mixed_token_gathers_one_slice_of_every_token():
    x = np.arange(8.0).reshape(2, 1, 4)  # two tokens of four
    np.testing.assert_array_equal(mix_tokens(x)[:, 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_the_logit_equals_the_equation():
    module = make()
    x = np.random.default_rng(0).normal(size=(2, 3, 21)).astype(np.float32)
    padded = np.concatenate([x, np.zeros((2, 3, 3))], axis=-1).reshape(2, 3, 4, 6)
    t = np.einsum("bctp,tpd->bctd", padded, np.asarray(module.w_in[...], np.float64)) + module.b_in[...]
    for block in module.blocks:
        mixed = t.reshape(2, 3, 4, 4, 2).swapaxes(2, 3).reshape(t.shape)
        y = naive.layer_norm(mixed + t, block.norm_mix.scale[...], block.norm_mix.bias[...])
        out = np.empty_like(y)
        for token in range(4):  # a feed-forward of its own
            hidden = naive.gelu(y[:, :, token] @ np.asarray(block.w1[...][token]) + block.b1[...][token])
            out[:, :, token] = hidden @ np.asarray(block.w2[...][token]) + block.b2[...][token]
        t = naive.layer_norm(out + y, block.norm_out.scale[...], block.norm_out.bias[...])
    want = (t.mean(2) @ np.asarray(module.w_out[...]))[..., 0] + module.b_out[...]
    np.testing.assert_allclose(run(module, x), want, rtol=1e-5, atol=1e-5)


def test_permuting_tokens_changes_the_result():
    module = make(features=24)
    x = np.random.default_rng(0).normal(size=(1, 1, 4, 6)).astype(np.float32)
    a, b = run(module, x.reshape(1, 1, 24)), run(module, x[:, :, [1, 0, 2, 3]].reshape(1, 1, 24))
    assert np.abs(a - b).max() > 1e-4


def test_the_token_axis_is_no_part_of_the_fan_in():
    bound = (6 / (16 + 16)) ** 0.5
    largest = np.abs(per_token_weight(nnx.Rngs(0), 50, 16, 16)[...]).max(axis=(1, 2))
    assert (largest > 0.9 * bound).all() and (largest <= bound).all()


def test_candidates_do_not_see_each_other():
    module = make()
    x = np.random.default_rng(0).normal(size=(2, 3, 21)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(module(x)[:, 1])))(x)
    assert (gradient[:, [0, 2]] == 0).all() and (np.abs(gradient[:, 1]) > 0).all()


def test_macs_are_those_of_its_matrices():
    assert make().macs() == 4 * 6 * 8 + 2 * 2 * (4 * 8 * 16) + 8


def test_width_must_be_a_multiple_of_tokens():
    with pytest.raises(ValueError, match="width=10 is not a multiple of tokens=4"):
        make(width=10)
