"""The feed-forward layer and the initialisation of per-head matrices."""

import numpy as np
import pytest
from flax import nnx

from laser_jax.layers.mlp import FeedForward, weight
from tests.layers import naive


def test_feed_forward_equals_its_equation():
    module = FeedForward(6, 24, rngs=nnx.Rngs(0))
    module.b1[...] += np.linspace(-1, 1, 24)
    module.b2[...] += np.linspace(-1, 1, 6)
    x = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)
    want = naive.gelu(x @ np.asarray(module.w1[...], np.float64) + module.b1[...]) @ np.asarray(module.w2[...])
    np.testing.assert_allclose(module(x), want + module.b2[...], rtol=1e-5, atol=1e-5)
    assert FeedForward.macs(6, 24) == module.w1.size + module.w2.size


def test_a_branch_of_scale_zero_is_silent_at_init():
    assert (np.asarray(FeedForward(6, 24, rngs=nnx.Rngs(0), out_scale=0.0)(np.ones((2, 6)))) == 0).all()


@pytest.mark.parametrize("shape", [(32, 64), (32, 4, 16), (32, 64, 1)])
def test_heads_are_initialised_like_one_matrix(shape):
    bound = (6 / (32 + 64)) ** 0.5
    values = np.abs(weight(nnx.Rngs(0), shape)[...])
    assert values.shape == shape and 0.98 * bound < values.max() <= bound
