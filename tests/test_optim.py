"""Learning rates of dense parameters: constant, warmed up, and falling, over a number of steps or to the run's end."""

import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.optim import TO_THE_END, OptimConfig, dense_optimizer


def rates(config, steps, run=None):
    """What Adam moves a parameter by in each step, under a gradient that stays the same."""
    optimizer, params = dense_optimizer(config, run), jnp.zeros(())
    state, found = optimizer.init(params), []
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state, params)
        found.append(-float(update))
    return found


def cosine(rate, steps):
    return [rate * (1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (dict(), [0.1] * 10),
        (dict(warmup=4), [0, 0.025, 0.05, 0.075, *[0.1] * 6]),
        (dict(decay=5), [*cosine(0.1, 5), *[0] * 5]),
        (dict(warmup=2, decay=5), [0, 0.05, *cosine(0.1, 5), *[0] * 3]),
        (dict(decay=TO_THE_END), cosine(0.1, 10)),
        (dict(warmup=2, decay=TO_THE_END), [0, 0.05, *cosine(0.1, 8)]),
    ],
)
def test_rates_are_as_the_config_says(settings, wanted):
    config = OptimConfig(learning_rate=0.1, **settings)
    config.check()
    np.testing.assert_allclose(rates(config, 10, 10), wanted, rtol=1e-3, atol=1e-7)


def test_a_rate_that_falls_to_the_end_needs_to_know_where_that_is():
    config = OptimConfig(decay=TO_THE_END)
    dense_optimizer(config).init(jnp.zeros(()))  # enough for who only reads a state
    with pytest.raises(ValueError, match=r"optim\.decay=-1 needs the number of the run's steps"):
        rates(config, 1)
    with pytest.raises(ValueError, match="decay=-2"):
        OptimConfig(decay=-2).check()
