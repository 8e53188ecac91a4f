"""LASER's own promises: it contains exact target attention, tells how loud segments are, refuses nonsense."""

import jax
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers import segment_attention as sta
from laser_jax.layers.horizons import read_horizons
from laser_jax.layers.segment_sums import gates_and_mass
from laser_jax.layers.target_attention import attend_shared
from laser_jax.models import encoder_config, laser, laser_plus
from tests.models import harness


def build(config, history_length=harness.LONGEST):
    return config.build(width_in=harness.FEATURES, width=harness.WIDTH, history_length=history_length, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("length", [12, 10])
def test_laser_plus_contains_exact_target_attention(length):
    # Softmax inside segments, log-sum-exp across them: once GSTA asks nothing of its own and the feed-forwards and
    # recency are silent, the global token is one softmax over all events.
    module = build(laser_plus(segment=4, layers=1, gsta_ffn=0))
    module.gsta[0].attention.wq[...] = np.zeros_like(module.gsta[0].attention.wq[...])
    x, mask, age, q = harness.histories(length=length)
    x[0, 3] *= -1
    q *= 5  # sharp attention, so that an average would be noticed
    source = harness.source(x, harness.normal(np.random.default_rng(0), harness.FEATURES, harness.WIDTH))
    got = jax.jit(lambda x: module(source, mask, age, q, {}).tokens)(x)[:, :, 0]
    h = source.dense()
    want = attend_shared(q, h, mask, module.wq[...], module.wk[...], module.wv[...])[0].reshape(got.shape)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    assert np.abs(want - np.asarray(h)[:, -1:]).max() > 0.1


@pytest.mark.parametrize("segment", [1, 4, 200])
@pytest.mark.parametrize("horizons", [(4,), (2, 8, 5), (100,)])
def test_horizons_are_exact_target_attention_over_the_newest_events(horizons, segment):
    module = build(laser_plus(segment=segment, horizons=horizons), history_length=12)
    x, mask, age, q = harness.histories(length=12)
    mask[-1] = False
    q *= 5
    source = harness.source(x, harness.normal(np.random.default_rng(0), harness.FEATURES, harness.WIDTH))
    tokens = np.asarray(jax.jit(lambda x: module(source, mask, age, q, {}).tokens)(x))
    reaches = sorted({events for events in horizons if events < 12} | {12})
    assert tokens.shape[2] == len(reaches) + 1 == module.num_tokens  # and their mass
    for k, reach in enumerate(reaches):
        newest = mask & (np.arange(12) >= 12 - reach)
        want, _ = attend_shared(q, source.dense(), newest, module.wq[...], module.wk[...], module.wv[...])
        np.testing.assert_allclose(tokens[:, :, k], want.reshape(tokens[:, :, k].shape), rtol=2e-5, atol=2e-5)
    assert not tokens[-1][:, :-1].any()  # nothing to read; that of mass says so


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_mass_of_a_horizon_is_that_of_its_events(gate):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 3, 2, 5, 4)).astype(np.float32)  # [B, C, H, S, w]
    values = rng.normal(size=(2, 5, 4, 2, 3)).astype(np.float32)  # [B, S, w, H, dv]
    mask = np.arange(20).reshape(5, 4) >= np.array([0, 11])[:, None, None]
    gates, mass = jax.jit(gates_and_mass, static_argnums=(2, 3))(scores, mask[:, None, None], gate, -1)
    s = np.einsum("bchsw,bswhv->bcshv", gates, values).reshape(2, 3, 5, 6)
    means, got = jax.jit(read_horizons, static_argnums=(3, 4))(s, mass, mask.any(axis=-1), (1, 3, 9), gate)
    loud = np.exp(scores) if gate == "softmax" else 1 / (1 + np.exp(-scores))
    loud = np.where(mask[:, None, None], loud, 0.0)
    for k, reach in enumerate((1, 3, 5)):
        part = loud[..., -reach:, :]
        np.testing.assert_allclose(got[:, :, k], np.log(part.sum(axis=(-1, -2))), rtol=1e-5, atol=1e-5)
        want = np.einsum("bchsw,bswhv->bchv", part, values[:, -reach:]) / part.sum(axis=(-1, -2))[..., None]
        np.testing.assert_allclose(means[:, :, k], want.reshape(2, 3, 6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["laser", "laser_plus"])
def test_every_form_of_attention_gives_the_same(name, monkeypatch):
    x, mask, age, q = harness.histories(c=2)
    weights = harness.normal(np.random.default_rng(1), *harness.encoder(name)(x, mask, age, q).shape)
    found = []
    for fold in (False, True):
        monkeypatch.setattr(sta, "use_fold", lambda *sizes, fold=fold: fold)
        for form in (dict(chunk=0), dict(chunk=2), dict(kernel="pallas_interpret")):
            encoder = harness.Encoder(name, **form)
            found.append(encoder.gradient(encoder.params, x, mask, age, q, weights))
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5), other, found[0])


@pytest.mark.parametrize("name", ["laser", "laser_plus"])
def test_loudness_tells_which_segment_holds_what_is_asked_for(name):
    bias = 0.0 if name == "laser" else None
    module = build(encoder_config(name, segment=4, gate_bias=bias, key_width=harness.WIDTH, heads=1))
    x, mask, age, q = harness.histories(b=2, c=1, length=12)
    x *= 0.01 / np.abs(x).mean()
    w_in = np.eye(harness.FEATURES, harness.WIDTH, dtype=np.float32)
    x[0, 5] = [3, 0, 0, 0, 0, 0]  # in the middle segment; unit RMS is taken of each event, so others point elsewhere
    x[0, :, 0] = np.where(np.arange(12) == 5, 3, -np.abs(x[0, :, 0]))
    q = 4 * w_in[0][None, None].repeat(2, axis=0)
    module.wq[...] = np.eye(harness.WIDTH)[:, None]
    module.wk[...] = np.eye(harness.WIDTH)[:, None]
    loudness = jax.jit(lambda x: module(harness.source(x, w_in), mask, age, q, {}).diag["loudness"])(x)
    assert loudness.shape == (2, 1, 3) and loudness[0, 0].argmax() == 1
    assert (np.asarray(loudness)[1, 0] == 0).tolist() == [True, False, False]  # six events: the oldest segment is empty
    assert (loudness >= 0).all() and (loudness <= 1).all()
    if name == "laser_plus":
        events = np.array([[4, 4, 4], [0, 2, 4]])
        np.testing.assert_allclose((loudness * events[:, None]).sum(-1), 1, rtol=1e-5)


def test_loudness_is_even_where_nothing_is_asked_for_however_wide_segments_are():
    module = build(laser_plus(segment=200, horizons=(2, 5)), history_length=12)
    x, mask, age, q = harness.histories(length=12)
    source = harness.source(x, np.eye(harness.FEATURES, harness.WIDTH, dtype=np.float32))
    loudness = np.asarray(jax.jit(lambda q: module(source, mask, age, q, {}).diag["loudness"])(0 * q))
    alive = np.stack([mask[:, :7].any(axis=1), mask[:, 7:10].any(axis=1), mask[:, 10:].any(axis=1)], axis=1)
    even = alive / mask.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loudness, np.broadcast_to(even[:, None], loudness.shape), rtol=1e-5)


def test_an_event_that_is_said_to_come_after_the_request_counts_as_one_of_its_moment():
    encoder = harness.encoder("laser")
    x, mask, age, q = harness.histories()
    age[:, -1] = 0
    before = np.where(np.arange(age.shape[1]) == age.shape[1] - 1, -5, age)
    np.testing.assert_array_equal(encoder(x, mask, before, q), encoder(x, mask, age, q))


def test_the_gates_of_a_segment_sum_to_about_one_at_init():
    module = build(laser(segment=10))
    np.testing.assert_allclose(10 / (1 + np.exp(-module.gate_bias[...])), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(chunk=-1), "chunk=-1"),
        (dict(compute="float16"), "compute='float16' is not one of"),
        (dict(kernel="cuda"), "kernel='cuda' is not one of"),
        (dict(kernel="pallas", chunk=8), "set chunk=0"),
        ({"gate": "tanh"}, "gate='tanh' is not one of"),
        ({"norm": "both"}, "norm='both' is not 'pre', 'post' or 'none'"),
        ({"horizons": (20, 0)}, "give whole numbers of events, at least 1 each"),
        (dict(layers=0, pool=False, recent=0), "recent=0 and no horizons leave no token for the head"),
        ({"heads": 3}, "width=8 is not a multiple of heads=3"),
        ({"recent": 7}, "recent=7 is not within the 6 segments"),
        ({"recency": "time"}, "recency='time' is not one of"),
        ({"fusion": "mean"}, "fusion='mean' is not one of"),
        (dict(joined="sum", horizons=(2,)), r"joined='sum': horizons=\(2,\) read heads one by one"),
        (dict(layers=0, gsta_gate="sigmoid"), "gsta_gate='sigmoid' is of GSTA layers"),
        (dict(gate="softmax", gate_bias=-1.0), "gate_bias=-1.0: a softmax does not feel"),
        (dict(layers=0, pool=False, recent=0, horizons=(2,)), "segment_ffn=4 refines segment tokens, which nobody"),
        (
            dict(layers=0, pool=False, recent=0, horizons=(2,), segment_ffn=0),
            "recency='both' refines .*: set it to 'none'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(laser(**{"segment": 4, **overrides}))


def test_what_does_nothing_with_so_many_candidates_is_told():
    module = build(laser(segment=4, kernel="pallas"))
    assert module.unused(1) == [] and build(laser(segment=4)).unused(100) == []
    (told,) = module.unused(100)
    assert told.startswith("encoder.kernel='pallas' does nothing: of 100 candidates a request")
    (told,) = build(laser(segment=4, chunk=8)).unused(100)
    assert told.startswith("encoder.chunk=8 does nothing")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("laser_plus", dict(mass_logit=False)),
        ("laser_plus", dict(norm="post")),
        ("laser_plus", dict(norm="none")),
        ("laser_plus", dict(gsta_ffn=4)),
        ("laser_plus", dict(age_buckets=8)),
        ("laser", dict(recency="position", age_buckets=8)),
        ("mirrn", dict(blocks=8)),
    ],
)
def test_settings_that_do_nothing_are_told(name, settings):
    x, mask, age, q = harness.histories()
    want, changed = harness.encoder(name), harness.Encoder(name, **settings)
    if name != "laser":
        np.testing.assert_array_equal(changed(x, mask, age, q), want(x, mask, age, q))
    ((field, value),) = [(k, v) for k, v in settings.items() if k != "recency"]
    (told,) = changed.module.unused(1)
    assert told.startswith(f"encoder.{field}={value!r} does nothing: ")
    assert build(encoder_config(name)).unused(1) == []


def test_a_longer_history_than_built_for_is_refused():
    module = build(laser(segment=4, recent=1), history_length=8)
    x, mask, age, q = harness.histories(length=12)
    with pytest.raises(ValueError, match="3 segments but position embeddings for 2"):
        module(harness.source(x, np.eye(harness.FEATURES, harness.WIDTH)), mask, age, q, {})


def test_an_unknown_encoder_is_refused_by_name():
    with pytest.raises(ValueError, match="no encoder 'lazer'; choose one of laser, laser_plus, ta, din, mean"):
        encoder_config("lazer")
