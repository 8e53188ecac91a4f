"""The kernel's benchmark where there is no accelerator: its figures, of the kernel as it is interpreted."""

import functools
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import kernel
from laser_jax.layers import segment_attention as sta


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is one")
def test_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel"])
    with pytest.raises(SystemExit, match="jax finds neither here"):
        kernel.main()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_tells_ratios_and_how_far_the_kernel_is_from_naive(dtype, monkeypatch, capsys):
    monkeypatch.setattr(kernel, "L", 2 * kernel.W)
    interpreted = functools.partial(sta.segment_attention_folded, kernel="pallas_interpret")
    found = kernel.forms()

    def form(q, x, *weights):
        mask, bias = jnp.ones(x.shape[:2], bool), jnp.full((kernel.H,), -2.2)
        return interpreted(q, x, mask, *weights, bias, width=kernel.W)[0]

    monkeypatch.setattr(kernel, "forms", lambda: {**found, "kernel": form})
    figures = kernel.measure(2, 1, dtype, True, rounds=1, calls=1, bandwidth=1e9)
    kind = f"fwd_bwd_{jnp.dtype(dtype).name}_c1"
    assert figures.keys() == {f"{name}_{kind}" for name in ("naive_over_kernel", "fold_over_kernel")} | {
        f"kernel_share_of_bandwidth_{kind}",
        f"kernel_apart_{kind}",
    }
    assert 0 < figures[f"kernel_apart_{kind}"] < (1e-5 if dtype == jnp.float32 else 3e-2)
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()] == ["naive", "fold", "kernel"]
    # What is not the kernel is told to be far from it.
    monkeypatch.setattr(kernel, "forms", lambda: {**found, "kernel": lambda *arrays: 2 * form(*arrays)})
    assert kernel.measure(2, 1, dtype, True, rounds=1, calls=1, bandwidth=1e9)[f"kernel_apart_{kind}"] > 0.5
