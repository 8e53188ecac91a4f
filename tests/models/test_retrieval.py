"""What the two-stage rivals promise beyond the tests of every model: what is found, and what it counts."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers.target_attention import TargetAttention
from laser_jax.models import encoder_config
from laser_jax.models.eta import hamming, hash_codes, nearest
from laser_jax.models.retrieval import hyperplanes, newest, search
from laser_jax.models.sdim import bucket_ids, sum_by_matches, sum_by_tables
from tests.models import harness, naive
from tests.models.harness import histories
from tests.models.test_encoders import any_mask, assert_same

RIVALS = ("sim_soft", "sim_hard", "eta", "sdim", "twin", "twin_v2", "mirrn")
OTHER_FORMS = [
    ("eta", dict(bits=40)),  # two words
    ("twin", dict(topk_per_head=False)),
    ("twin_v2", dict(size_coef=-0.5)),
    ("sdim", dict(normalise="sum")),
    ("sdim", dict(normalise="mean")),
    ("sdim", dict(normalise="sum", bits=7)),  # too many buckets for tables
    ("mirrn", dict(filter="block")),
    ("mirrn", dict(top=6)),  # an even number of rows has a frequency that no imaginary part turns
]


@pytest.mark.parametrize(("name", "overrides"), OTHER_FORMS)
def test_other_forms_equal_a_naive_loop(name, overrides):
    encoder = harness.Encoder(name, **overrides)
    x, newest, age, q = histories()
    for mask in (newest, any_mask(newest.shape)):
        assert_same(encoder(x, mask, age, q), naive.encode(encoder, x, mask, age, q), 2e-5)


@pytest.mark.parametrize("number", [3, 8, 20])
def test_search_is_a_stable_sort_of_what_is_real(number):
    rng = np.random.default_rng(0)
    scores = -np.abs(rng.integers(0, 6, (5, 8)).astype(np.float32))  # all below the zero that masking leaves
    mask = rng.random((5, 8)) < 0.5
    mask[0] = False
    index, found = search(scores, mask, number)
    assert index.shape == found.shape == (5, min(number, 8))
    for row in range(5):
        real = np.flatnonzero(mask[row])
        want = real[np.argsort(-scores[row, real], kind="stable")][:number]
        np.testing.assert_array_equal(np.asarray(index[row])[np.asarray(found[row])], want)
        assert found[row].sum() == len(want)


def test_the_newest_events_are_the_newest_real_ones():
    index, found = newest(np.array([[True, False, True, True, False], [False] * 5]), 2)
    np.testing.assert_array_equal(index[0], [3, 2])
    np.testing.assert_array_equal(found, [[True, True], [False, False]])


def dense(encoder, x):
    return harness.source(jnp.asarray(x), encoder.params["w_in"]).dense()


@pytest.mark.parametrize("name", ["sim_soft", "sim_hard", "eta", "twin", "twin_v2"])
def test_a_search_that_keeps_all_is_target_attention(name):
    encoder = harness.Encoder(name, top=10, **(dict(segment=1) if name == "twin_v2" else {}))
    x, newest, age, q = histories()
    for mask in (newest, any_mask(newest.shape)):
        want = np.asarray(encoder.module.long(q, dense(encoder, x), mask))
        if name == "sim_hard":  # one value for all
            age, q = age // harness.BRANDS * harness.BRANDS, -np.abs(q)
            want = np.asarray(encoder.module.long(q, dense(encoder, x), mask))
        assert_same(encoder(x, mask, age, q)[:, :, 0], want)


@pytest.mark.parametrize("name", RIVALS)
def test_the_short_branch_is_target_attention_over_the_newest(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    recent = mask & (np.arange(10) >= 6)
    want = np.asarray(encoder.module.short(q, dense(encoder, x), recent))
    assert_same(encoder(x, mask, age, q)[:, :, -1], want)


@pytest.mark.parametrize(
    ("name", "overrides"), [("sim_soft", {}), ("eta", dict(bits=2048)), ("sdim", {}), ("twin", {})]
)
def test_the_long_branch_is_order_free(name, overrides):
    encoder = harness.Encoder(name, **overrides)
    x, mask, age, q = histories()
    order = np.random.default_rng(0).permutation(x.shape[1])
    got = encoder(x[:, order], mask[:, order], age[:, order], q)
    assert_same(got[:, :, :-1], encoder(x, mask, age, q)[:, :, :-1])


@pytest.mark.parametrize("name", ["sim_hard", "mirrn"])
def test_the_long_branch_knows_the_order(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    got = encoder(x[:, ::-1], mask[:, ::-1], age[:, ::-1], q)
    assert np.abs(got - encoder(x, mask, age, q))[0, :, 0].max() > 1e-2


@pytest.mark.parametrize("name", RIVALS)
def test_every_parameter_learns(name):
    encoder = harness.encoder(name)
    x, mask, age, q = histories()
    weights = harness.normal(np.random.default_rng(1), *encoder(x, mask, age, q).shape)
    _, (gradients, history, candidates) = encoder.gradient(encoder.params, x, mask, age, q, weights)
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(gradients))
    assert np.abs(candidates).max() > 1e-3


@pytest.mark.parametrize("name", RIVALS)
def test_no_array_holds_every_event_of_every_candidate(name):
    encoder = harness.encoder(name)
    b, c, length = 3, 8, 23
    arguments = histories(b, c, length)
    weights = np.ones((b, c, encoder.module.num_tokens, harness.WIDTH), np.float32)
    text = encoder.gradient.lower(encoder.params, *arguments, weights).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\b[a-z]+\d*\[(\d+(?:,\d+)*)\]", text)]
    assert max(sizes) < b * c * length * harness.FEATURES


# SIM


def test_only_the_pooled_token_trains_the_soft_search():
    encoder = harness.encoder("sim_soft")
    x, mask, age, q = histories()
    for token, learns in ((0, False), (1, True), (2, False)):
        weights = np.zeros((3, 4, 3, harness.WIDTH), np.float32)
        weights[:, :, token] = 1
        _, (gradients, *_) = encoder.gradient(encoder.params, x, mask, age, q, weights)
        for name in ("wa", "wb"):
            assert (np.abs(gradients["encoder"][name][...]).max() > 1e-3) == learns


def test_a_hard_search_that_finds_nothing_says_nothing():
    encoder = harness.encoder("sim_hard")
    x, mask, age, q = histories()
    got = encoder(x, mask, np.zeros_like(age), np.abs(q))  # values 0 and 2
    assert (got[:, :, 0] == 0).all() and (got[:, :, 1] != 0).all()


def test_a_hard_search_names_the_field_it_lacks():
    build = dict(width_in=harness.FEATURES, width=harness.WIDTH, history_length=10, rngs=nnx.Rngs(0))
    x, mask, age, q = histories()
    history = harness.source(x, np.eye(harness.FEATURES, harness.WIDTH))
    with pytest.raises(ValueError, match=r"no field 'category' in the history, which has \['event', 'brand'\]"):
        encoder_config("sim_hard").build(**build)(history, mask, age, q, harness.side(q))
    with pytest.raises(ValueError, match=r"'event' needs it on the candidates, which have \['brand'\]"):
        encoder_config("sim_hard", field="event").build(**build)(history, mask, age, q, harness.side(q))


# ETA


@pytest.mark.parametrize("bits", [5, 32, 40])
def test_packed_codes_differ_in_as_many_bits_as_unpacked_ones(bits):
    rng = np.random.default_rng(0)
    a, b = harness.normal(rng, 20, 6), harness.normal(rng, 20, 6)
    planes = hyperplanes(3, 6, bits)
    got = hamming(hash_codes(a, planes), hash_codes(b, planes))
    np.testing.assert_array_equal(got, ((a @ planes > 0) != (b @ planes > 0)).sum(-1))
    assert hash_codes(a, planes).dtype == jnp.uint32


def test_ties_go_to_the_newest():
    codes = np.zeros((1, 9, 1), np.uint32)
    codes[0, 2] = 7
    mask = np.arange(9) != 7
    index, found = nearest(np.full((1, 1, 1), 7, np.uint32), codes, mask[None], 4)
    np.testing.assert_array_equal(index[0, 0], [2, 8, 6, 5])
    assert found.all()


def test_the_seed_makes_the_hash():
    x, mask, age, q = histories()
    one, same, other = (harness.Encoder("eta", seed=seed)(x, mask, age, q) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-2


# SDIM


def drawn_buckets(tables, bits):
    rng = np.random.default_rng(0)
    x, q = harness.normal(rng, 2, 12, 6), harness.normal(rng, 2, 3, 6)
    planes = hyperplanes(0, 6, tables * bits)
    return x, q, bucket_ids(x, planes, tables), bucket_ids(q, planes, tables)


def test_sdim_adds_up_many_bfloat16_events():
    """Sums in bfloat16 stall where a further event is less than half of their last place."""
    rng = np.random.default_rng(0)
    x = (1 + 0.1 * rng.normal(size=(1, 1000, 4))).astype(np.float32)
    buckets = jnp.zeros((1, 1000, 1), jnp.int32)  # all of them in one
    got = sum_by_tables(jnp.asarray(x, jnp.bfloat16), buckets, buckets[:, :1], 2)
    np.testing.assert_allclose(np.asarray(got, np.float32)[0], x.sum(axis=1), rtol=1e-2)


def test_sums_by_matches_and_by_tables_are_the_same():
    x, _, buckets, query_buckets = drawn_buckets(tables=7, bits=2)
    weights = harness.normal(np.random.default_rng(1), 2, 3, 6)

    def total(x, order, *arguments):
        out = order(x, buckets, query_buckets, *arguments)
        return jnp.sum(out * weights), out

    (_, want), want_gradient = jax.value_and_grad(total, has_aux=True)(x, sum_by_matches)
    (_, got), gradient = jax.value_and_grad(total, has_aux=True)(x, sum_by_tables, 2)
    assert_same(got, want)
    assert_same(gradient, want_gradient)
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("candidates", [1, 40])
def test_the_encoder_picks_either_order(candidates):
    encoder = harness.Encoder("sdim")
    x, mask, age, q = histories()
    q = np.repeat(q, 10, axis=1)[:, :candidates]
    assert encoder.module._use_tables(candidates) == (candidates == 40)
    assert_same(encoder(x, mask, age, q), naive.encode(encoder, x, mask, age, q), 2e-5)


@pytest.mark.parametrize("bits", [1, 3])
def test_many_tables_weigh_events_by_their_angle(bits):
    x, q, buckets, query_buckets = drawn_buckets(tables=10_000, bits=bits)
    share = sum_by_matches(np.broadcast_to(np.eye(12, dtype=np.float32), (2, 12, 12)), buckets, query_buckets)
    cosine = np.einsum("bcf,blf->bcl", q, x) / np.linalg.norm(q, axis=-1)[..., None]
    cosine = cosine / np.linalg.norm(x, axis=-1)[:, None]
    np.testing.assert_allclose(share, (1 - np.arccos(cosine) / np.pi) ** bits, atol=0.02)


# TWIN and TWIN-V2


def test_gathering_equals_a_threshold():
    encoder = harness.encoder("twin")
    x, _, age, q = histories()
    mask = any_mask(x.shape[:2])
    weights = harness.normal(np.random.default_rng(1), 3, 4, harness.WIDTH)
    module = encoder.module

    def by_threshold(x):
        attention: TargetAttention = module.long
        h = harness.source(x, encoder.params["w_in"]).dense()
        scores = jnp.einsum("bcd,dhk,blf,fhk->bchl", q, attention.wq[...], h, attention.wk[...]) / 2  # sqrt(4)
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
        enough = jax.lax.top_k(scores, 3)[0][..., -1:]
        a = jnp.where(mask[:, None, None] & (scores >= enough), jnp.exp(scores), 0.0)
        a = a / jnp.maximum(a.sum(-1, keepdims=True), 1e-20)
        out = jnp.einsum("bchl,bld,dhv->bchv", a, h, attention.wv[...]).reshape(3, 4, -1) @ attention.wo[...]
        return jnp.sum(out * weights), out

    padded = np.stack([weights, np.zeros_like(weights)], axis=2)
    (_, got), (_, gradient, _) = encoder.gradient(encoder.params, x, mask, age, q, padded)
    (_, want), want_gradient = jax.value_and_grad(by_threshold, has_aux=True)(jnp.asarray(x))
    assert_same(got[:, :, 0], want)
    assert_same(gradient, want_gradient, 1e-4)


@pytest.mark.parametrize("name", ["twin", "twin_v2", "mirrn"])
def test_what_is_built_once_for_many_candidates_gives_the_same(name):
    encoder = harness.Encoder(name)
    x, mask, age, q = histories()
    many = np.tile(q, (1, 40, 1))
    folds = [encoder.module._fold(count) for count in (1, many.shape[1])]
    assert folds == [True, False]
    alone = np.concatenate([encoder(x, mask, age, q[:, c : c + 1]) for c in range(q.shape[1])], axis=1)
    assert_same(encoder(x, mask, age, many), np.tile(alone, (1, 40, 1, 1)), 2e-5)


def test_clusters_of_one_event_are_twin():
    x, newest, age, q = histories()
    for mask in (newest, any_mask(newest.shape)):
        want = harness.encoder("twin")(x, mask, age, q)
        assert_same(harness.Encoder("twin_v2", segment=1, top=3)(x, mask, age, q), want)


def test_a_cluster_of_equal_events_counts_as_its_events():
    x, mask, age, q = histories()
    x, mask, age = (np.repeat(a, 3, axis=1) for a in (x, mask, age))
    want = harness.Encoder("twin", top=30)(x, mask, age, q)
    assert_same(harness.Encoder("twin_v2", segment=3, top=10)(x, mask, age, q), want, 1e-6)
    fewer = harness.Encoder("twin_v2", segment=3, top=10)
    mask = mask & (np.arange(30) % 3 != 1)  # two of each three, in all clusters alike
    assert_same(fewer(x, mask, age, q)[:, :, 0], want[:, :, 0], 1e-6)


def test_the_order_of_clusters_does_not_count():
    encoder = harness.Encoder("twin_v2", segment=3)
    x, mask, age, q = histories(length=12)
    order = np.array([2, 0, 3, 1])[:, None] * 3 + np.arange(3)
    moved = (a[:, order.ravel()] for a in (x, mask, age))
    assert_same(encoder(*moved, q)[:, :, 0], encoder(x, mask, age, q)[:, :, 0])


# MIRRN


def test_a_filter_of_real_numbers_scales_channels():
    encoder = harness.encoder("mirrn")
    mixer = nnx.clone(encoder.module.mixers[0])
    rng = np.random.default_rng(0)
    x, found = harness.normal(rng, 2, 5, harness.WIDTH), np.ones((2, 5), bool)
    mixer.imaginary[...] = jnp.zeros(harness.WIDTH)
    want = mixer.norm(x * (1 + mixer.real[...])).mean(axis=1)
    assert_same(mixer(x, found), want)


def test_a_history_beyond_the_positions_is_refused():
    x, mask, age, q = histories(length=harness.LONGEST + 1)
    with pytest.raises(ValueError, match="25 events but position embeddings for 24: set history_length"):
        harness.encoder("mirrn")(x, mask, age, q)


@pytest.mark.parametrize(
    ("name", "overrides", "match"),
    [
        ("sdim", dict(normalise="max"), "normalise='max' is not one of"),
        ("mirrn", dict(filter="dense"), "filter='dense' is not one of"),
        ("mirrn", dict(filter="block", blocks=3), "width=8 is not a multiple of blocks=3"),
    ],
)
def test_settings_that_do_not_exist(name, overrides, match):
    with pytest.raises(ValueError, match=match):
        harness.Encoder(name, **overrides)
