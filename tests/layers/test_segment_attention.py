"""Segmented target attention: the reference against a loop, the folded form against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from laser_jax.layers import packed_segments
from laser_jax.layers import segment_attention as sta
from laser_jax.layers.segment_sums import GATES, cut_segments, loudest_value
from laser_jax.layers.tokens import features_of, gather_fields
from tests.layers import naive

SHAPES = {  # B, C, L, w, f, d, H, dq, dv
    "one candidate, whole segments": (2, 1, 12, 4, 5, 6, 2, 3, 4),
    "four queries, ragged oldest segment": (3, 2, 13, 5, 6, 4, 2, 2, 3),
    "many queries": (2, 5, 7, 3, 4, 6, 3, 2, 2),
    "more features than a register, one short segment": (3, 3, 6, 10, 19, 4, 2, 2, 2),
    "more of everything than is written out": (2, 17, 45, 40, 270, 4, 2, 2, 2),
    "segments of one event": (2, 1, 3, 1, 4, 4, 1, 4, 4),
    "two chunks of two users": (4, 2, 9, 4, 3, 4, 2, 2, 3),
}


def draw(shape, seed=0):
    b, c, length, _, f, d, heads, key, value = shape
    rng = np.random.default_rng(seed)
    sizes = {"q": (b, c, d), "x": (b, length, f), "wq": (d, heads, key), "wk": (f, heads, key), "wv": (f, heads, value)}
    arrays = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    for name in ("wk", "wv"):
        arrays[name] *= min(1, (8 / f) ** 0.5)  # keys and values of order 1, for the tolerances
    return {**arrays, "bias": rng.normal(size=heads).astype(np.float32)}


def masks(b, length):
    rng = np.random.default_rng(1)
    newest = np.arange(length) >= length - rng.integers(0, length + 1, b)[:, None]
    return [rng.random((b, length)) < 0.5, newest, np.zeros((b, length), bool), np.ones((b, length), bool)]


def call(form, arrays, mask, width, gate):
    a = arrays
    return form(a["q"], a["x"], mask, a["wq"], a["wk"], a["wv"], a["bias"], width=width, gate=gate)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", SHAPES)
def test_reference_equals_the_paper_read_as_a_loop(name, gate):
    shape = SHAPES[name]
    arrays, width = draw(shape), shape[3]
    reference = jax.jit(lambda arrays, mask: call(sta.segment_attention_reference, arrays, mask, width, gate))
    for mask in masks(*arrays["x"].shape[:2]):
        tokens, log_mass = reference(arrays, mask)
        want, want_mass = call(naive.segment_attention, arrays, mask, width, gate)
        np.testing.assert_allclose(tokens, want, rtol=1e-5, atol=1e-5)
        alive = np.isfinite(want_mass)
        np.testing.assert_allclose(np.asarray(log_mass)[alive], want_mass[alive], rtol=1e-5, atol=1e-5)
        assert np.isfinite(log_mass).all()


def assert_close(got, want):
    # float32 sums err with the size of what they add up.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(1.0, float(np.abs(want).max(initial=0))))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", [sta.segment_attention_folded, sta.segment_attention_shared])
@pytest.mark.parametrize("name", SHAPES)
def test_fast_forms_equal_the_reference_in_values_and_gradients(name, form, gate):
    shape = SHAPES[name]
    arrays, width = draw(shape), shape[3]
    b, c, length, _, _, _, heads, _, value = shape
    num_segments = -(-length // width)
    rng = np.random.default_rng(2)
    of_tokens = rng.normal(size=(b, c, num_segments, heads * value)).astype(np.float32)
    of_mass = rng.normal(size=(b, c, heads, num_segments)).astype(np.float32)

    def both(form):
        def loss(arrays, mask):
            tokens, log_mass = call(form, arrays, mask, width, gate)
            return jnp.sum(tokens * of_tokens) + jnp.sum(log_mass * of_mass), (tokens, log_mass)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    fast, reference = both(form), both(sta.segment_attention_reference)
    for mask in masks(b, length):
        got, want = fast(arrays, mask), reference(arrays, mask)
        jax.tree.map(assert_close, got, want)
        assert (np.asarray(got[1]["x"])[~mask] == 0).all()
        if mask.any():
            assert all(np.abs(gradient).max() > 1e-3 for gradient in jax.tree.leaves(got[1]))


def a_user_at_a_time(rows, indices, positions, q, mask, *weights, **sizes):
    return sta.segment_attention_chunked(q, rows, indices, mask, *weights, chunk=1, **sizes)


def some_users_at_a_time(rows, indices, positions, q, mask, *weights, **sizes):
    return sta.segment_attention_chunked(q, rows, indices, mask, *weights, chunk=2, **sizes)


def packed(rows, indices, positions, q, mask, *weights, **sizes):
    return sta.segment_attention_packed(q, rows, indices, mask, positions, *weights, **sizes)


def all_gathered(rows, indices, positions, q, mask, *weights, **sizes):
    return sta.segment_attention_reference(q, features_of(gather_fields(rows, indices)), mask, *weights, **sizes)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "name",
    [
        "four queries, ragged oldest segment",
        "more features than a register, one short segment",
        "many queries",
        "two chunks of two users",
    ],
)
@pytest.mark.parametrize("form", [a_user_at_a_time, some_users_at_a_time, packed])
def test_forms_that_gather_equal_the_reference_in_values_and_gradients(form, name, gate):
    shape = SHAPES[name]
    (b, c, length, width, f, _, heads, _, _), arrays = shape, draw(shape)
    rng = np.random.default_rng(2)
    rows = [rng.normal(size=(9, f - 2)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)]
    indices = [jnp.asarray(rng.integers(0, len(row), (b, length), np.int32)) for row in rows]
    weigh = [rng.normal(size=size).astype(np.float32) for size in ((b, c, 1, 1), (b, c, heads, 1))]
    weights = [arrays[name] for name in ("wq", "wk", "wv", "bias")]

    def both(form):
        def loss(rows, q, weights, mask, positions):
            tokens, log_mass = form(rows, indices, positions, q, mask, *weights, width=width, gate=gate)
            return jnp.sum(jnp.sin(tokens) * weigh[0]) + jnp.sum(log_mass * weigh[1]), (tokens, log_mass)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    got, want = both(form), both(all_gathered)
    for mask in masks(b, length):
        alive = np.pad(mask, ((0, 0), (-length % width, 0))).reshape(-1, width).any(axis=1)
        positions = np.full(len(alive) + 2, len(alive), np.int32)  # what is padded must not count
        positions[: alive.sum()] = np.flatnonzero(alive)
        args = (rows, arrays["q"], weights, mask, positions)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got(*args), want(*args))


# Every example is a compilation: to look for a smaller one would take minutes.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    b=st.integers(1, 4),
    c=st.integers(1, 4),
    length=st.integers(1, 30),
    width=st.integers(1, 12),
    f=st.integers(1, 12),
    heads=st.integers(1, 3),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 99),
)
def test_all_forms_agree_in_values_and_gradients_whatever_the_sizes(b, c, length, width, f, heads, gate, seed):
    arrays = draw((b, c, length, width, f, 4, heads, 2, 3), seed)
    rng = np.random.default_rng(seed)
    rows, indices = [arrays["x"].reshape(-1, f)], [jnp.arange(b * length, dtype=jnp.int32).reshape(b, length)]
    mask = np.arange(length) >= length - rng.integers(0, length + 1, b)[:, None]
    mask[0] = rng.random(length) < 0.7
    alive = np.asarray(cut_segments(mask, width)).reshape(-1, width).any(axis=1)
    positions = np.r_[np.flatnonzero(alive), len(alive)].astype(np.int32)
    weights = [arrays[name] for name in ("wq", "wk", "wv", "bias")]

    def gradient(form):
        def loss(rows, q, weights, mask, positions):
            tokens, log_mass = form(rows, indices, positions, q, mask, *weights, width=width, gate=gate)
            return jnp.sum(jnp.sin(tokens)) + jnp.sum(jnp.sin(log_mass)), (tokens, log_mass)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    def features_first(form):
        def gathered(rows, indices, positions, q, mask, *weights, **sizes):
            return form(q, features_of(gather_fields(rows, indices)), mask, *weights, **sizes)

        return gathered

    forms = [all_gathered, some_users_at_a_time, packed]
    forms += [features_first(form) for form in (sta.segment_attention_folded, sta.segment_attention_shared)]
    both = jax.jit(lambda *args: [gradient(form)(*args) for form in forms])
    want, *others = both(rows, arrays["q"], weights, mask, positions)
    for got in others:
        jax.tree.map(assert_close, got, want)


def all_gathered_and_folded(rows, indices, positions, q, mask, *weights, compute="float32", **sizes):
    x = features_of(gather_fields(rows, indices)).astype(compute)
    return sta.segment_attention_folded(q, x, mask, *weights, **sizes)


def all_gathered_in(rows, indices, positions, q, mask, *weights, compute="float32", **sizes):
    x = features_of(gather_fields(rows, indices)).astype(compute)
    return sta.segment_attention_reference(q, x, mask, *weights, **sizes)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("form", [some_users_at_a_time, packed, all_gathered_and_folded, all_gathered_in])
def test_bfloat16_events_give_nearly_the_same(form, gate):
    shape = SHAPES["more features than a register, one short segment"]
    (b, _, length, width, f, *_), arrays = shape, draw(shape)
    rng = np.random.default_rng(2)
    rows = [rng.normal(size=(9, f)).astype(np.float32)]
    indices = [jnp.asarray(rng.integers(0, 9, (b, length), np.int32))]
    mask = jnp.asarray(masks(b, length)[1])
    positions = jnp.asarray(packed_segments.live_segments(np.asarray(mask.sum(axis=1)), length, width, 1))
    weights = [arrays[name] for name in ("wq", "wk", "wv", "bias")]

    def run(compute):
        def loss(rows, q, weights):
            sizes = dict(width=width, gate=gate, compute=compute)
            tokens, log_mass = form(rows, indices, positions, q, mask, *weights, **sizes)
            assert tokens.dtype == log_mass.dtype == jnp.float32
            return jnp.sum(jnp.sin(tokens)), (tokens, log_mass)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(rows, arrays["q"], weights)

    def errors(half, single):
        pairs = zip(jax.tree.leaves(half), jax.tree.leaves(single), strict=True)
        return [np.abs(np.asarray(got) - want).max() / max(1.0, np.abs(want).max()) for got, want in pairs]

    single, half = run("float32"), run("bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(half))
    of_values = errors(half[0][1], single[0][1])
    assert 1e-4 < max(of_values) < 2e-2  # nearer, and it was not computed in half precision at all
    assert max(errors(half[1], single[1])) < 6e-2


def test_live_segments_are_those_with_an_event():
    lengths = np.array([0, 1, 5, 6, 12])
    positions = packed_segments.live_segments(lengths, history_length=12, width=5, multiple=8)
    cut = cut_segments(np.arange(12) >= 12 - lengths[:, None], 5)
    np.testing.assert_array_equal(positions[:7], np.flatnonzero(np.asarray(cut).any(axis=-1)))
    assert positions.dtype == np.int32 and (positions[7:] == 15).all() and len(positions) == 8


@pytest.mark.parametrize(
    "form", [sta.segment_attention_reference, sta.segment_attention_folded, sta.segment_attention_shared]
)
def test_a_softmax_gate_ignores_a_common_shift_and_its_mass_shows_it(form):
    arrays = draw(SHAPES["four queries, ragged oldest segment"])
    mask = np.ones(arrays["x"].shape[:2], bool)
    run = jax.jit(lambda arrays: call(form, arrays, mask, 5, "softmax"))
    tokens, log_mass = run(arrays)
    for shift in (-100.0, -40.0, 100.0):
        shifted, shifted_mass = run({**arrays, "bias": arrays["bias"] + np.float32(shift)})
        np.testing.assert_allclose(shifted, tokens, rtol=1e-3, atol=1e-3, err_msg=f"shift {shift}")
        np.testing.assert_allclose(shifted_mass - shift, log_mass, atol=1e-3, err_msg=f"shift {shift}")


def test_sigmoid_gates_may_stay_silent_and_softmax_gates_speak():
    arrays = draw(SHAPES["one candidate, whole segments"])
    mask = np.ones(arrays["x"].shape[:2], bool)
    closed = {**arrays, "bias": np.full(2, -60, np.float32)}
    tokens, log_mass = call(sta.segment_attention_folded, closed, mask, 4, "sigmoid")
    assert np.abs(tokens).max() < 1e-15 and (np.asarray(log_mass) <= -29).all()
    loud, _ = call(sta.segment_attention_folded, {**arrays, "bias": np.zeros(2, np.float32)}, mask, 4, "softmax")
    assert np.abs(loud).max() > 0.1


def test_segments_are_cut_from_the_newest_event_backwards():
    x = np.arange(1, 8)[None, :, None]
    cut = np.asarray(cut_segments(x, 3))[0, :, :, 0]
    np.testing.assert_array_equal(cut, [[0, 0, 1], [2, 3, 4], [5, 6, 7]])
    mask = np.asarray(cut_segments(np.ones((1, 7), bool), 3))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask[0], [[False, False, True], [True] * 3, [True] * 3])


def test_folding_stops_to_pay_with_more_candidates():
    def picked(candidates):
        return sta.use_fold(candidates, width=128, heads=2, key_width=16, value_width=64, segment=10)

    assert picked(1) and not picked(100)
    choices = [picked(c) for c in range(1, 101)]
    assert choices == sorted(choices, reverse=True)


def test_the_loudest_value_is_the_largest_and_its_gradient_goes_to_one_place():
    s = np.array([[[[1.0, 5.0], [3.0, 5.0], [3.0, -2.0]]]], np.float32)  # [B, C, S, d], with ties
    value, gradient = jax.value_and_grad(lambda s: (loudest_value(s) * np.array([2.0, 7.0])).sum())(s)
    assert value == 2 * 3 + 7 * 5
    np.testing.assert_array_equal(gradient, [[[[0, 7], [2, 0], [0, 0]]]])
