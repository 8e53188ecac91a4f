"""The tests that every model of the zoo must pass (padding, empty histories, candidates, order, rows, ...)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers import blockwise_attention, segment_products
from laser_jax.models import encoder_config
from laser_jax.models.base import SequenceEncoder
from tests.models import harness, naive
from tests.models.harness import NAMES, histories

every_model = pytest.mark.parametrize("name", NAMES)


def any_mask(shape, seed=3):
    return np.random.default_rng(seed).random(shape) < 0.5


def assert_same(got, want, tolerance=1e-5):
    scale = max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


@every_model
def test_padding_content_reaches_neither_output_nor_gradient(name):
    encoder = harness.encoder(name)
    x, newest, age, q = histories()
    rng = np.random.default_rng(1)
    weights = harness.normal(rng, *encoder(x, newest, age, q).shape)
    for mask in (newest, any_mask(newest.shape)):
        noise = np.where(mask[..., None], x, 1e3 * harness.normal(rng, *x.shape))
        noisy_age = np.where(mask, age, rng.integers(0, 2**31 - 1, age.shape)).astype(np.int32)
        got = encoder.gradient(encoder.params, x, mask, age, q, weights)
        noisy = encoder.gradient(encoder.params, noise, mask, noisy_age, q, weights)
        (_, out), (params, history, candidates) = got
        (_, noisy_out), (noisy_params, noisy_history, noisy_candidates) = noisy
        np.testing.assert_array_equal(noisy_out, out)
        jax.tree.map(np.testing.assert_array_equal, noisy_params, params)
        np.testing.assert_array_equal(noisy_candidates, candidates)
        assert (np.asarray(history)[~mask] == 0).all() and (np.asarray(noisy_history)[~mask] == 0).all()
        assert np.abs(history).max() > 0


# Fewer segments than recent tokens; a ragged oldest segment that fills up and overflows; a whole segment more.
@pytest.mark.parametrize(("length", "more"), [(3, 7), (10, 3), (10, harness.SEGMENT)])
@every_model
def test_padding_length_changes_nothing(name, length, more):
    encoder = harness.encoder(name)
    x, mask, age, q = histories(length=length)
    want = encoder(x, mask, age, q)
    padded = [np.pad(a, ((0, 0), (more, 0)) + ((0, 0),) * (a.ndim - 2)) for a in (x, mask, age)]
    assert_same(encoder(*padded, q), want, 1e-6)


@every_model
def test_an_empty_history_is_finite_and_independent_of_its_padding(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    nothing = np.zeros_like(mask)
    weights = np.ones_like(encoder(x, mask, age, q))
    results = encoder.gradient(encoder.params, x, nothing, age, q, weights)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    _, gradients = results
    assert (np.asarray(gradients[1]) == 0).all()
    np.testing.assert_array_equal(encoder(x[::-1] * 7, nothing, age, q), encoder(x, nothing, age, q))


@every_model
def test_candidates_are_independent(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    together = encoder(x, mask, age, q)
    alone = np.concatenate([encoder(x, mask, age, q[:, c : c + 1]) for c in range(q.shape[1])], axis=1)
    assert_same(alone, together)
    order = np.array([3, 0, 2, 1])
    assert_same(encoder(x, mask, age, q[:, order]), together[:, order], 1e-6)
    if name != "mean":
        assert np.abs(together[:, 0] - together[:, 1]).max() > 1e-3


# Each as its config has it by default, and the other forms that a field picks.
FORMS = [
    *((name, {}) for name in NAMES),
    ("ta", {"mass": True}),
    ("laser_plus", {"segment": 200}),
    ("laser_plus", {"layers": 2, "pool": True, "recency": "age"}),
    ("laser_plus", {"layers": 2, "pool": True, "recency": "age", "segment_ffn": 1, "recent": 2}),
    *(("laser", {"recency": recency}) for recency in ("none", "age", "position")),
    *(("laser", {"norm": norm}) for norm in ("none", "pre")),
    ("laser", {"gate": "softmax", "mass_logit": True}),
    ("laser", {"segment_ffn": 0, "gsta_ffn": 0}),
    ("laser", {"layers": 0, "pool": False, "recent": 2}),
    ("laser", {"horizons": (5, 9)}),
    ("laser", {"joined": "sum"}),
    ("laser", {"gsta_gate": "sigmoid"}),
    ("laser", {"gsta_gate": "sigmoid", "gate": "softmax", "mass_logit": True}),
    ("laser", {"fusion": "sum"}),
    ("laser_plus", {"gate": "sigmoid"}),
    ("din", {"softmax": True}),
    ("din", {"softmax": False}),
]


@pytest.mark.parametrize(("name", "overrides"), FORMS)
def test_equals_a_naive_loop(name, overrides):
    encoder = harness.Encoder(name, **overrides) if overrides else harness.encoder(name)
    for length in (10, 3):
        x, newest, age, q = histories(length=length)
        for mask in (newest, any_mask(newest.shape), np.zeros_like(newest)):
            assert_same(encoder(x, mask, age, q), naive.encode(encoder, x, mask, age, q), 2e-5)


@every_model
def test_what_is_kept_of_a_request_scores_other_candidates_later(name):
    """As a server does it: two compiled calls, of which the first knows no candidates."""
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    graph, params = nnx.split(encoder.module)
    source = harness.source(jnp.asarray(x), encoder.params["w_in"], age)
    kept = jax.jit(lambda params: nnx.merge(graph, params).precompute(source, mask, age))(params)
    score = jax.jit(lambda params, kept, q: nnx.merge(graph, params).score(kept, q, harness.side(q)).tokens)
    for candidates in (q, q[:, 1:3]):
        tokens = score(params, kept, candidates)
        assert tokens.shape == (*candidates.shape[:2], encoder.module.num_tokens, harness.WIDTH)
        assert_same(tokens, encoder(x, mask, age, candidates))


TOO_SMALL = [
    *((name, "heads") for name in NAMES if name not in ("mean", "din")),
    *((name, "segment") for name in ("laser", "laser_plus", "twin_v2")),
    *((name, "top") for name in ("sim_soft", "sim_hard", "eta", "twin", "twin_v2", "mirrn")),
    *((name, "recent") for name in ("sim_soft", "sim_hard", "eta", "sdim", "twin", "twin_v2", "mirrn")),
    *((name, "bits") for name in ("eta", "sdim", "mirrn")),
    *((name, "block") for name in ("transformer", "hstu")),
    *((name, "layers") for name in ("hstu", "stca", "longer")),
    ("din", "hidden"), ("laser", "key_width"), ("laser", "age_buckets"), ("longer", "group"), ("longer", "newest"),
    ("mirrn", "summarised"), ("mirrn", "blocks"), ("sdim", "tables"), ("transformer", "ffn"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "field"), TOO_SMALL)
def test_a_size_of_nothing_is_refused_by_its_name(name, field):
    config = encoder_config(name, **{**harness.SMALL[name], field: 0})
    with pytest.raises(ValueError, match=f"^{field}=0 must be at least [12]$"):
        config.build(width_in=harness.FEATURES, width=harness.WIDTH, history_length=24, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("name", "settings"), [("laser", {"layers": -1}), ("transformer", {"layers": -1})])
def test_a_negative_number_of_layers_is_refused(name, settings):
    with pytest.raises(ValueError, match="layers=-1 must be at least 0"):
        encoder_config(name, **settings).build(width_in=8, width=8, history_length=24, rngs=nnx.Rngs(0))


def test_a_hash_table_of_too_many_buckets_is_refused():
    with pytest.raises(ValueError, match=r"bits=40: a table has 2\^bits buckets, give at most 16"):
        encoder_config("sdim", bits=40).build(width_in=8, width=8, history_length=24, rngs=nnx.Rngs(0))


@every_model
def test_order_counts_only_where_the_card_says_so(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    order = np.random.default_rng(0).permutation(x.shape[1])
    got = encoder(x[:, order], mask[:, order], age[:, order], q)
    want = encoder(x, mask, age, q)
    if name in ("mean", "ta", "din", "stca"):
        assert_same(got, want, 1e-5)
    else:
        assert np.abs(got[0] - want[0]).max() > 1e-2


@every_model
def test_a_request_does_not_depend_on_the_others(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    want = encoder(x, mask, age, q)
    other, *_ = histories(seed=9)
    x[1:] = other[1:]
    mask[1:] = True
    np.testing.assert_array_equal(encoder(x, mask, age, q)[0], want[0])


class Given:
    """A token source whose features are given, so that only the encoder's own work is counted."""

    def __init__(self, x, w_in):
        self._x, self.w_in = x, w_in

    def features(self):
        return self._x

    def dense(self):
        return self._x @ self.w_in

    def field(self, name):
        return jnp.zeros(self._x.shape[:2], jnp.int32)


def counted_macs(
    module: SequenceEncoder, requests: int, candidates: int, length: int, width_in: int, width: int
) -> float:
    """XLA's own count of a forward pass, a multiply-accumulate being two operations."""
    graph, params = nnx.split(module, nnx.Param)

    def forward(params, x, w_in, mask, age, q):
        side = {"category": jnp.zeros(q.shape[:2], jnp.int32)}
        return nnx.merge(graph, params)(Given(x, w_in), mask, age, q, side).tokens

    def shape(*size, dtype=np.float32):
        return jax.ShapeDtypeStruct(size, dtype)

    lowered = jax.jit(forward).lower(
        params,
        shape(requests, length, width_in),
        shape(width_in, width),
        shape(requests, length, dtype=bool),
        shape(requests, length, dtype=np.int32),
        shape(requests, candidates, width),
    )
    return lowered.compile().cost_analysis()["flops"] / 2


def din(length, **settings):
    """The module, and what it keeps of some histories; and their mask and candidates."""
    config = encoder_config("din", **settings)
    size = dict(width_in=harness.FEATURES, width=harness.WIDTH, history_length=length)
    module = config.build(**size, rngs=nnx.Rngs(0))
    x, mask, age, q = histories(length=length)
    w_in = harness.normal(np.random.default_rng(1), harness.FEATURES, harness.WIDTH)
    return module, module.precompute(harness.source(x, w_in, age), mask, age), mask, q


def test_din_starts_as_a_scaled_product():
    module, ctx, mask, q = din(10)
    h = ctx[0] @ ctx[1]
    scores = jnp.einsum("bcd,bld->bcl", q, h) / np.sqrt(harness.WIDTH)
    gates = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), axis=-1)
    assert_same(module.score(ctx, q, {}).tokens[:, :, 0], jnp.einsum("bcl,bld->bcd", gates, h))
    with pytest.raises(ValueError, match="hidden=1 must be at least 2"):
        din(10, hidden=1)


def test_din_gives_the_same_with_and_without_tokens(monkeypatch):
    module, ctx, _, q = din(10, hidden=5, tied=False)
    got = []
    for fold in (True, False):
        monkeypatch.setattr(type(module), "_fold", lambda *_, fold=fold: fold)
        got.append(module.score(ctx, q, {}).tokens)
    assert_same(*got)


@pytest.mark.parametrize("candidates", [1, 64])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [*((name, {}) for name in NAMES), ("laser", {"joined": "sum", "gsta_gate": "sigmoid", "fusion": "sum"})],
)
def test_macs_are_those_xla_counts(name, overrides, candidates, monkeypatch):
    # As matrix products: with sums that are written out XLA also counts what it computes once more inside them.
    monkeypatch.setattr(segment_products, "MOST_TERMS", 0)
    length, width_in, width = 1000, 160, 128
    # XLA books a Fourier transform by a formula of its own: MIRRN's is kept short here. It counts the body of a loop
    # once: SDIM's is over tables.
    config = encoder_config(name, **{"mirrn": dict(top=4), "sdim": dict(tables=1)}.get(name, overrides))
    if hasattr(config, "block"):  # the body of a loop again: a block a stage, all users together
        config = dataclasses.replace(config, block=length // (blockwise_attention.STAGES if name == "hstu" else 1))
        monkeypatch.setattr(blockwise_attention, "CACHED", 2**40)
    if hasattr(config, "pool"):
        config = dataclasses.replace(config, pool=False)  # comparisons, which XLA counts as operations
    module = nnx.eval_shape(
        lambda: config.build(width_in=width_in, width=width, history_length=length, rngs=nnx.Rngs(0))
    )
    once, each = module.macs(candidates, length)
    # Two batch sizes, so that what is done once a step (folding w_in into weights) drops out.
    sizes = candidates, length, width_in, width
    counted = counted_macs(module, 2, *sizes) - counted_macs(module, 1, *sizes)
    visited = 1 if name == "din" else candidates  # XLA counts the body of a loop once, DIN's is over candidates
    np.testing.assert_allclose(counted, once + visited * each, rtol=0.05)
