"""Promises of the models that attend within the history: who sees whom, what they contain, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.models import encoder_config
from tests.models import harness, naive, naive_attention
from tests.models.harness import FEATURES, LONGEST, SEGMENT, WIDTH, histories
from tests.models.test_encoders import any_mask, assert_same

FORMS = [
    ("transformer", dict(causal=True)),
    ("transformer", dict(layers=0)),
    ("hstu", dict(layers=1)),
    ("stca", dict(layers=1)),
    ("longer", dict(inner=False)),
    ("longer", dict(layers=1)),
    ("longer", dict(newest=100)),
]


@pytest.mark.parametrize(("name", "overrides"), FORMS)
def test_other_forms_equal_a_naive_loop(name, overrides):
    encoder = harness.Encoder(name, **overrides)
    for length in (10, 3):
        x, newest, age, q = histories(length=length)
        for mask in (newest, any_mask(newest.shape), np.zeros_like(newest)):
            assert_same(encoder(x, mask, age, q), naive.encode(encoder, x, mask, age, q), 2e-5)


@pytest.mark.parametrize("name", ["transformer", "hstu"])
def test_the_block_size_changes_nothing(name):
    x, mask, age, q = histories(length=23)
    weights = harness.normal(np.random.default_rng(0), 3, 4, 1, WIDTH)
    (_, want), gradients = run(name, x, mask, age, q, weights, block=LONGEST)
    for block in (1, 5):
        (_, out), blockwise = run(name, x, mask, age, q, weights, block=block)
        assert_same(out, want)
        for a, b in zip(jax.tree.leaves(blockwise), jax.tree.leaves(gradients), strict=True):
            assert_same(a, b, 2e-5)


def run(name, *args, block):
    encoder = harness.Encoder(name, block=block)
    return encoder.gradient(encoder.params, *args)


def build(name, **overrides):
    config = encoder_config(name, **{**harness.SMALL[name], **overrides})
    return config.build(width_in=FEATURES, width=WIDTH, history_length=LONGEST, rngs=nnx.Rngs(0))


def tokens(x, seed=1):
    return harness.source(jnp.asarray(x), harness.normal(np.random.default_rng(seed), FEATURES, WIDTH))


def kept(module, x, mask, age):
    """What precompute, which never sees a candidate, keeps of a request."""
    return jax.jit(lambda x: module.precompute(tokens(x), mask, age))(x)


def rows_that_change(before, after, axis=1):
    """Places along `axis` where two arrays differ."""
    differ = np.asarray(before) != np.asarray(after)
    return np.flatnonzero(differ.any(axis=tuple(i for i in range(differ.ndim) if i != axis)))


# --- Transformer


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_transformer_does_not_look_ahead(causal):
    module = build("transformer", causal=causal)
    x, mask, age, _ = histories(b=1)
    changed = x.copy()
    changed[:, 6] *= -1
    before, after = (kept(module, a, mask, age)[0] for a in (x, changed))
    assert rows_that_change(before, after).tolist() == list(range(6 if causal else 0, 10))


def test_a_transformer_without_layers_is_target_attention():
    module, plain = build("transformer", layers=0), build("ta")
    module.position[...] = np.zeros_like(module.position[...])
    module.attention = plain.attention
    x, mask, age, q = histories()
    # Tokens that the final LayerNorm leaves as they are.
    half = harness.normal(np.random.default_rng(2), FEATURES, WIDTH // 2)
    h = np.sign(x @ half)
    h = np.concatenate([h, -h], axis=-1)
    source = harness.source(jnp.asarray(h), np.eye(WIDTH, dtype=np.float32))
    want = plain(source, mask, age, q, {}).tokens
    assert_same(module(source, mask, age, q, {}).tokens, want)
    assert np.abs(want).max() > 0.1


# --- HSTU


def test_hstu_events_see_only_the_past():
    module = build("hstu")
    x, mask, age, _ = histories(b=1)
    changed = x.copy()
    changed[:, 6] *= -1
    before, after = (kept(module, a, mask, age)[0] for a in (x, changed))
    for layer, ((k, v), (changed_k, changed_v)) in enumerate(zip(before, after, strict=True)):
        want = [6] if layer == 0 else list(range(6, 10))
        assert rows_that_change(k, changed_k).tolist() == rows_that_change(v, changed_v).tolist() == want


def test_hstu_bias_of_pairs_equals_a_loop():
    # With keys and queries at zero only the bias is left, for events and for candidates.
    encoder = harness.Encoder("hstu", layers=2)
    for layer in encoder.module.layers:
        layer.wq[...] = np.zeros_like(layer.wq[...])
    x, mask, age, q = histories()
    h = tokens(x)
    got = encoder.module(h, mask, age, q, {}).tokens
    want = naive_attention.hstu(encoder.module, np.asarray(h.dense(), np.float64), mask, age, q.astype(np.float64))
    assert_same(got, want, 2e-5)
    other = encoder.module(h, mask, np.where(mask, age // 3, 0).astype(np.int32), q, {}).tokens
    assert np.abs(other - got).max() > 1e-3  # ages count


@pytest.mark.parametrize("name", ["hstu", "longer"])
def test_a_candidate_is_not_drowned_by_itself_at_init(name):
    # Of what its row becomes, most is from the history: with another one the row is another.
    module = build(name)
    x, _, age, q = histories(length=16)
    mask = np.ones(x.shape[:2], bool)
    first, second = (module(tokens(a), mask, age, q, {}).tokens[:, :, 0] for a in (x, x[::-1]))
    assert np.corrcoef(np.ravel(first[0]), np.ravel(second[0]))[0, 1] < 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_kept_from_hearing_themselves_only_where_scores_are_similarities(tied):
    distances = [layer.by_distance[...] for layer in build("hstu", tied=tied).layers]
    for own in (distances[0][:1], build("longer", tied=tied).own_bias[...]):
        assert (own < -5).all() if tied else (np.abs(own) < 0.1).all()
    assert (np.abs(distances[0][1:]) < 0.1).all()  # the others start as they would


@pytest.mark.parametrize("name", ["hstu", "longer"])
def test_a_candidate_that_was_met_before_is_told_from_a_new_one_at_init(name):
    # By the plain sum of the products with the candidate that the head is given, before anything is learned.
    width = 64
    module = encoder_config(name).build(width_in=width, width=width, history_length=16, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(8, 16, width)).astype(np.float32)
    mask, age = np.ones((8, 16), bool), np.zeros((8, 16), np.int32)
    h = harness.source(jnp.asarray(x), np.eye(width, dtype=np.float32))
    met, new = ((module(h, mask, age, q, {}).tokens[:, :, 0] * q).sum(axis=-1) for q in (x, x[::-1]))
    assert np.mean(np.asarray(met) > np.asarray(new)) > 0.8


# --- STCA


class Same(nnx.Module):
    def __call__(self, x):
        return x


def test_stca_without_its_transforms_is_target_attention():
    module, plain = build("stca", layers=1), build("ta")
    module.history[0] = module.history_norm[0] = module.query[0] = module.query_norm[0] = module.last = Same()
    module.fuse_last[...] = np.eye(2 * WIDTH, WIDTH)  # of [o_1; q], o_1
    module.attention[0] = plain.attention
    x, mask, age, q = histories()
    want = plain(tokens(x), mask, age, q, {}).tokens
    assert_same(module(tokens(x), mask, age, q, {}).tokens, want)


def test_stca_folds_for_few_candidates_only_and_the_result_is_the_same():
    module = build("stca")
    x, mask, age, q = histories(c=40)
    few, many = (module.attention[0].macs(c, 10, WIDTH)[0] for c in (1, 40))
    assert few == 0 and many > 0
    ctx = module.precompute(tokens(x), mask, age)
    alone = np.concatenate([module.score(ctx, q[:, c : c + 1], {}).tokens for c in range(3)], axis=1)
    assert_same(module.score(ctx, q, {}).tokens[:, :3], alone)


def test_stca_does_not_normalise_its_result():
    module = build("stca")
    x, mask, age, q = histories()
    want = 3 * module(tokens(x), mask, age, q, {}).tokens
    module.last.wo[...] = 3 * module.last.wo[...]
    assert_same(module(tokens(x), mask, age, q, {}).tokens, want)


@pytest.mark.parametrize("tied", [True, False])
def test_stca_compares_the_same_function_of_event_and_candidate_at_init(tied):
    module = build("stca", tied=tied)
    for name in ("wu", "wv", "wo"):
        assert (getattr(module.query[0], name)[...] == getattr(module.history[0], name)[...]).all() == tied
    module.query[0].wo[...] = 0 * module.query[0].wo[...]
    assert np.abs(module.history[0].wo[...]).max() > 0  # a copy, not the same weights


def test_stca_transforms_keep_coordinates_apart_at_init():
    module = build("stca", tied=True)
    x = np.random.default_rng(0).normal(size=(50, WIDTH)).astype(np.float32)
    for swiglu in (*module.history, *module.query, module.last):
        assert_same(swiglu(x), x**2 * np.tanh(x / 2))


# --- LONGER


def test_longer_groups_see_the_past_and_themselves():
    module = build("longer", newest=100, layers=2)
    x, mask, age, _ = histories(b=1, length=12)
    changed = x.copy()
    changed[:, 5] *= -1  # in the second of three groups
    before, after = (kept(module, a, mask, age) for a in (x, changed))
    for layer, ((k, v, _), (changed_k, changed_v, _)) in enumerate(zip(before, after, strict=True)):
        want = [1] if layer == 0 else [1, 2]
        assert rows_that_change(k, changed_k).tolist() == rows_that_change(v, changed_v).tolist() == want


@pytest.mark.parametrize("length", [10, 12])
def test_longer_cuts_groups_from_the_newest_event(length):
    module = build("longer")
    x, _, age, _ = histories(length=length)
    held = np.array([length, 5, 4])  # the newest group is full from Kg = 4 events on
    mask = np.arange(length) >= length - held[:, None]
    groups, alive = module.groups(tokens(x), mask)
    assert alive.tolist() == [[True] * 3, [False, True, True], [False, False, True]]
    events = np.asarray(groups).reshape(3, 3, 4, 6)
    assert (np.abs(events[:, -1]).max(axis=-1) > 0).all()
    assert (np.abs(events[1, 1]).max(axis=-1) > 0).tolist() == [False, False, False, True]


def test_a_group_of_new_events_shifts_the_groups_by_one():
    module = build("longer")
    module.position[...] = np.zeros_like(module.position[...])
    x, _, age, _ = histories(length=12)
    before, _ = module.groups(tokens(x[:, :8]), np.ones((3, 8), bool))
    after, _ = module.groups(tokens(x), np.ones((3, 12), bool))
    assert_same(after[:, :-1], before)


def test_longer_reads_no_more_than_the_newest_groups_after_its_first_layer():
    module = build("longer", newest=2, layers=3)
    x, mask, age, _ = histories(length=20)
    assert [k.shape[1] for k, _, _ in kept(module, x, mask, age)] == [5, 2, 2]


def test_longer_starts_as_attention_over_the_events_at_the_same_place_of_their_groups():
    module = build("longer", width_token=None, heads=SEGMENT, layers=1)
    assert module.w_event.shape == (WIDTH, WIDTH)
    x, mask, age, _ = histories()
    h = tokens(x)
    groups, _ = module.groups(h, mask)
    assert_same(groups.reshape(3, -1, WIDTH)[:, 2:][mask] - positions(module, mask), jax.nn.gelu(h.dense())[mask])
    for layer in module.layers:
        by_place = np.asarray(layer.wq[...]).reshape(SEGMENT, WIDTH, SEGMENT, WIDTH)
        for place in range(SEGMENT):
            assert (by_place[place, :, place] == by_place[0, :, 0]).all()
            assert not np.delete(by_place[place], place, axis=1).any()
        assert (layer.wk[...] == layer.wq[...]).all()


def positions(module, mask):
    """The position embedding of each real event."""
    places = np.asarray(module.position[...])[: mask.shape[1]][::-1]
    return np.broadcast_to(places, (len(mask), *places.shape))[mask]


# --- all


@pytest.mark.parametrize("name", ["transformer", "hstu", "longer"])
def test_a_longer_history_than_built_for_is_refused(name):
    module = build(name)
    x, mask, age, q = histories(length=LONGEST + 1)
    with pytest.raises(ValueError, match=f"{LONGEST + 1} events but positions for {LONGEST}"):
        module(tokens(x), mask, age, q, {})


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("transformer", dict(heads=3), "width=8 is not a multiple of heads=3"),
        ("hstu", dict(heads=3), "width=8 is not a multiple of heads=3"),
        (
            "longer",
            dict(width_token=3),
            r"width_token=3 is not a multiple of heads=2 \(a token's width is width_token=3,",
        ),
        ("longer", dict(width_token=0), "width_token=0 must be at least 1"),
        ("longer", dict(heads=5, inner=False, width_token=None), r"group \* width_token=32 .* makes the model's, 8\)"),
        ("stca", dict(hidden=1), "hidden=1 must be at least 2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(name, **overrides)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["transformer", "hstu", "stca"])
def test_tied_keys_start_as_queries(name, tied):
    module = build(name, tied=tied)
    for part in module.layers if name == "hstu" else [module.attention] if name == "transformer" else module.attention:
        assert (part.wq[...] == part.wk[...]).all() == tied
