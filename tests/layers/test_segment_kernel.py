"""The kernel of segmented target attention, interpreted, against `segment_sums` and autodiff; and its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax.layers import segment_attention as sta
from laser_jax.layers import segment_kernel
from laser_jax.layers.segment_kernel import segment_sums_kernel
from laser_jax.layers.segment_sums import GATES, NO_MASS, gates_and_mass, segment_sums

CASES = {  # B, S, w, f, K, gate, whose form
    "three blocks, the last one ragged": (2, 37, 7, 33, 3, "sigmoid", "gpu"),
    "two blocks, the last one ragged": (1, 70, 10, 5, 2, "softmax", "tpu"),
    "two tiles of queries, the last one ragged": (2, 5, 3, 5, 3, "softmax", "gpu"),
    "two tiles of queries, wide events": (1, 3, 10, 82, 9, "sigmoid", "tpu"),
    "one event a segment, one feature": (3, 4, 1, 1, 1, "softmax", "gpu"),
}


def draw(b, s, w, f, k, *_):
    rng = np.random.default_rng(0)
    x, u, bias = (rng.normal(size=size).astype(np.float32) for size in ((b, s, w, f), (b, k, f), k))
    cotangents = [rng.normal(size=size).astype(np.float32) for size in ((b, s, k, f), (b, s, k))]
    return [x, u / np.float32(np.sqrt(f)), bias], cotangents


def masks(b, s, w, *_):
    rng = np.random.default_rng(1)
    ragged = np.arange(s * w) >= rng.integers(0, s * w, (b, 1))
    some = [rng.random((b, s, w)) < 0.5, ragged.reshape(b, s, w), np.zeros((b, s, w), bool), np.ones((b, s, w), bool)]
    some[0][:, s // 2] = False
    return some


def plain(x, u, bias, mask, gate):
    gates, log_mass = gates_and_mass(jnp.einsum("bswf,bkf->bswk", x, u) + bias, mask[..., None], gate, axis=2)
    return jnp.einsum("bswk,bswf->bskf", gates, x), log_mass


@functools.cache
def both(form, *args):
    """Values and gradients of a form of the sums, compiled once."""

    def loss(arrays, mask, cotangents):
        sums = form(*arrays, mask, *args)
        return sum(jnp.sum(jnp.sin(a) * c) for a, c in zip(sums, cotangents, strict=True)), sums

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_close(got, want, tolerance):
    def one(a, b):
        a, b = (np.asarray(n, np.float32) for n in (a, b))
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(np.abs(b).max(), 1e-3))

    jax.tree.map(one, got, want)


@pytest.mark.parametrize("name", CASES)
def test_equals_segment_sums_and_autodiff_in_values_and_gradients(name, monkeypatch):
    if name == "two tiles of queries, the last one ragged":
        monkeypatch.setattr(segment_kernel, "QUERIES", 2)
    *shape, gate, on = CASES[name]
    (x, u, bias), cotangents = draw(*shape)
    kernel = both(segment_sums_kernel, gate, on)
    for mask in masks(*shape):
        # Quiet segments fall below the least mass, loud ones need the softmax's maximum.
        for shift in (0, -34, 60):
            arrays = [x, u, bias + np.float32(shift)]
            got = kernel(arrays, mask, cotangents)
            for form in (segment_sums, plain):
                assert_close(got, both(form, gate)(arrays, mask, cotangents), 1e-5 if shift == 0 else 1e-4)
            if shift == 0 and mask.any():
                assert all(np.abs(gradient).max() > 1e-3 for gradient in got[0])


@pytest.mark.parametrize("name", list(CASES)[:2])
def test_what_stands_in_the_padding_changes_nothing(name):
    *shape, gate, on = CASES[name]
    (x, u, bias), cotangents = draw(*shape)
    kernel = both(segment_sums_kernel, gate, on)
    noise = np.random.default_rng(3).normal(size=x.shape).astype(np.float32) * 1e30
    noise[:, :, 0], noise[..., 0] = np.inf, np.nan
    for mask in masks(*shape):
        want = kernel([np.where(mask[..., None], x, 0), u, bias], mask, cotangents)
        got = kernel([np.where(mask[..., None], x, noise), u, bias], mask, cotangents)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        assert (np.asarray(got[0][0])[~mask] == 0).all()


@pytest.mark.parametrize("name", list(CASES)[:2])
def test_an_empty_history_is_silent_and_teaches_nothing(name):
    *shape, gate, on = CASES[name]
    arrays, cotangents = draw(*shape)
    mask = np.ones(shape[:3], bool)
    mask[0] = False
    gradients, (z, log_mass) = both(segment_sums_kernel, gate, on)(arrays, mask, cotangents)
    assert (np.asarray(z)[0] == 0).all() and (np.asarray(log_mass)[0] == NO_MASS).all()
    assert all((np.asarray(gradient)[0] == 0).all() for gradient in gradients[:2])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11
@pytest.mark.parametrize("queries", [1, 9])  # one tile of them, and two
@pytest.mark.parametrize("on", ["gpu", "tpu", False])  # False: on the device at hand
def test_bfloat16_events_and_queries(on, queries):
    *shape, gate = 2, 3, 3, 33, queries, "softmax"
    (x, u, bias), cotangents = draw(*shape)
    halves = [jnp.asarray(x, jnp.bfloat16), jnp.asarray(u, jnp.bfloat16), bias]
    mask = masks(*shape)[0]
    (dx, du, dbias), (z, log_mass) = both(segment_sums_kernel, gate, on)(halves, mask, cotangents)
    assert (dx.dtype, du.dtype, dbias.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    gradients, sums = both(segment_sums, gate)([x, u, bias], mask, cotangents)
    assert_close((dx, du, dbias, z, log_mass), (*gradients, *sums), 2e-2)
    # Of the rounded inputs everything but the rounding of the results is float32.
    rounded = [np.asarray(half, np.float32) for half in halves]
    assert_close((z, log_mass), both(segment_sums, gate)(rounded, mask, cotangents)[1], 1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("platform, call", [("cuda", "__gpu$xla.gpu.triton"), ("tpu", "tpu_custom_call")])
def test_lowers_to_a_kernel_forward_and_one_backward(platform, call, gate):
    unstable = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")  # a format that may change
    # Without a GPU, jax 0.11 must be told of one.
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("all",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    for *shape, dtype in (3, 70, 10, 82, 9, jnp.float32), (2, 5, 1, 1, 1, jnp.bfloat16):
        (x, u, bias), cotangents = draw(*shape)
        args = [[x.astype(dtype), u.astype(dtype), bias], masks(*shape)[0], cotangents]
        with jax.sharding.use_abstract_mesh(mesh):
            kernel = both(segment_sums_kernel, gate)
            module = jax.export.export(kernel, platforms=[platform], disabled_checks=[unstable])(*args).mlir_module()
        assert module.count(f"custom_call @{call}(") == 2


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11
def test_segment_attention_takes_a_kernel_by_name():
    rng = np.random.default_rng(0)
    sizes = ((2, 1, 4), (2, 7, 5), (4, 2, 3), (5, 2, 3), (5, 2, 3), (2,))
    q, x, wq, wk, wv, bias = (rng.normal(size=size).astype(np.float32) for size in sizes)

    def attend(kernel, *args):
        return sta.segment_attention_folded(*args, width=3, kernel=kernel)

    args = (q, x, rng.random((2, 7)) < 0.7, wq, wk, wv, bias)
    xla, interpreted, kernel, unknown = (
        jax.jit(functools.partial(attend, name)) for name in ("xla", "pallas_interpret", "pallas", "triton")
    )
    assert_close(interpreted(*args), xla(*args), 1e-5)
    for form, calls in (xla, 0), (interpreted, 1):
        assert str(form.trace(*args).jaxpr).count("pallas_call[") == calls
    assert_close(kernel(*args), xla(*args), 1e-3)  # on a GPU XLA's products are in TF32 unless told otherwise
    with pytest.raises(ValueError, match="kernel='triton'"):
        unknown(*args)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_the_device_at_hand(name):
    """On a CPU that is XLA."""
    *shape, gate, _ = CASES[name]
    arrays, cotangents = draw(*shape)
    with jax.default_matmul_precision("highest"):
        for mask in masks(*shape):
            got = both(segment_sums_kernel, gate)(arrays, mask, cotangents)
            assert_close(got, both(segment_sums, gate)(arrays, mask, cotangents), 1e-5)
