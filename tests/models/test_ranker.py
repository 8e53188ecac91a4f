"""The ranker around an encoder: request-level scoring is scoring each pair alone, and all inputs reach the logit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.layers.recency import age_bucket
from laser_jax.layers.tokens import unit_rms
from laser_jax.losses import bce_sum
from laser_jax.models import encoder_config
from laser_jax.models.base import HeadConfig, Ranker, TokenLayout, TokenSource
from tests.models.harness import NAMES, SMALL

LAYOUT = TokenLayout(
    history=(("item", "item", 4), ("brand", "brand", 2), ("action", "action", 2)),
    candidate=(("item", "item", 4), ("brand", "brand", 2)),
    context=(("scene", "scene", 3),),
)
ROWS = {"item": (20, 4), "brand": (5, 2), "action": (4, 2), "scene": (3, 3)}
B, C, L = 3, 4, 10


def ranker(name="laser_plus", **changes):
    arguments = dict(width=8, history_length=L, age_width=2, age_buckets=8, embedding_std=0.1, rngs=nnx.Rngs(0))
    of_head = dict(mean=changes.pop("mean", True), matches=changes.pop("matches", ()))
    head = HeadConfig(tokens=4, width=8, blocks=1, **of_head)
    return Ranker(changes.pop("layout", LAYOUT), encoder_config(name, **SMALL[name]), head, **{**arguments, **changes})


def draw(seed=0, b=B):
    rng = np.random.default_rng(seed)
    rows = {table: rng.normal(size=size).astype(np.float32) for table, size in ROWS.items()}
    length = np.resize(np.array([L, 5, 0], np.int32), b)
    age = np.where(np.arange(L) >= L - length[:, None], rng.integers(0, 10**7, (b, L)), 0).astype(np.int32)
    batch = {
        "history": {name: rng.integers(0, ROWS[table][0], (b, L)) for name, table, _ in LAYOUT.history},
        "candidates": {name: rng.integers(0, ROWS[table][0], (b, C)) for name, table, _ in LAYOUT.candidate},
        "context": {"scene": np.resize([0, 1, 2], b)},
        "length": length,
        "age": age,
        "label": (rng.random((b, C)) < 0.5).astype(np.float32),
        "mask": np.resize(np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], bool), (b, C)),
    }
    batch["side"] = batch["candidates"]  # all of them known
    return rows, jax.tree.map(lambda a: a.astype(np.int32) if a.dtype == np.int64 else a, batch)


def as_pairs(batch):
    """Every (request, candidate) pair as a request of its own."""
    spread = {
        key: jax.tree.map(lambda a: np.repeat(a, C, axis=0), batch[key])
        for key in ("history", "context", "length", "age")
    }
    of_candidates = ("candidates", "side", "label", "mask")
    flat = {key: jax.tree.map(lambda a: a.reshape(B * C, 1), batch[key]) for key in of_candidates}
    return spread | flat


@functools.cache
def compiled(name):
    graph, params = nnx.split(ranker(name), nnx.Param)

    def loss(params, rows, batch):
        logits, out = nnx.merge(graph, params)(rows, batch)
        total, number = bce_sum(logits, batch["label"], batch["mask"])
        return total / number, logits

    return params, jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_request_is_scored_as_its_pairs_alone(name):
    params, step = compiled(name)
    rows, batch = draw()
    (whole, logits), gradients = step(params, rows, batch)
    (alone, pair_logits), pair_gradients = step(params, rows, as_pairs(batch))
    np.testing.assert_allclose(whole, alone, rtol=1e-5)
    np.testing.assert_allclose(logits, pair_logits.reshape(B, C), rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gradients, pair_gradients)
    assert np.isfinite(logits).all()  # the last user has no history
    assert all(np.abs(gradients[1][table]).max() > 1e-6 for table in rows)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_has_nearly_the_gradients_of_float32(name):
    """Of rows above all, which some thousand events share: sums of so many in bfloat16 would be far too small."""
    graph, params = nnx.split(ranker(name), nnx.Param)
    rows, batch = draw(b=600)
    batch["label"] = np.ones_like(batch["label"])  # so that gradients of a row do not cancel out

    def loss(params, rows, compute):
        params, rows = jax.tree.map(lambda x: x.astype(compute), (params, rows))
        logits, _ = nnx.merge(graph, params)(rows, batch)
        assert logits.dtype == jnp.float32
        return bce_sum(logits, batch["label"], batch["mask"])[0]

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    (dense, of_rows), (half_dense, half) = (gradient(params, rows, type_) for type_ in ("float32", "bfloat16"))
    of_rows["age"], half["age"] = dense["age_rows"][...], half_dense["age_rows"][...]
    errors = {t: np.linalg.norm(half[t] - of_rows[t]) / np.linalg.norm(of_rows[t]) for t in half}
    assert 1e-4 < max(errors.values()) < 0.05, errors


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_the_model_learns(name):
    params, step = compiled(name)
    rng = np.random.default_rng(0)  # off their initial values, some of which are zeros that hide others
    moved = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)
    _, (gradients, _) = step(moved, *draw())
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    assert not [path for path, leaf in leaves.items() if np.abs(leaf).max() < 1e-6]


@pytest.mark.parametrize("name", ["laser_plus", "twin", "transformer"])
def test_gradients_of_events_go_to_their_rows_once_whoever_reads_them(name):
    rows, batch = draw()

    def scatters(**head):
        graph, params = nnx.split(ranker(name, **head), nnx.Param)

        def loss(rows):
            return jnp.sum(nnx.merge(graph, params)(rows, batch)[0])

        lowered = jax.jit(jax.grad(loss)).lower(rows)
        return lowered.as_text().count("stablehlo.scatter")

    assert scatters(mean=True) == scatters(mean=False) > 0
    # Matches read them, and have no rows of their own.
    assert scatters(mean=True, matches=("item",)) == scatters(mean=False)


def test_what_is_masked_counts_for_nothing():
    params, step = compiled("laser_plus")
    rows, batch = draw()
    (want, _), gradients = step(params, rows, batch)
    off = ~batch["mask"]
    other = {**batch, "label": np.where(off, 1 - batch["label"], batch["label"])}
    for side in ("candidates", "side"):
        other[side] = {k: np.where(off, 1, v).astype(np.int32) for k, v in batch[side].items()}
    (got, _), other_gradients = step(params, rows, other)
    assert got == want
    jax.tree.map(np.testing.assert_array_equal, gradients, other_gradients)


def test_each_input_reaches_the_logit():
    params, step = compiled("laser_plus")
    rows, batch = draw()
    (_, want), _ = step(params, rows, batch)
    for side, name in (("history", "action"), ("candidates", "brand"), ("context", "scene")):
        changed = {**batch, side: {**batch[side], name: (batch[side][name] + 1) % 3}}
        (_, got), _ = step(params, rows, changed)
        assert np.abs(got - want)[0].max() > 1e-6, (side, name)
    (_, got), _ = step(params, rows, {**batch, "age": batch["age"] * 100})
    assert np.abs(got - want)[0].max() > 1e-6


def test_the_head_sees_the_mean_of_all_events_whatever_the_encoder_says():
    model, plain = ranker("ta"), ranker("ta", mean=False)
    rows, batch = draw()
    for other in (model, plain):
        other.head = lambda tokens: tokens  # what the head is given
    given, without = model(rows, batch)[0], plain(rows, batch)[0]
    fields = [rows[table][batch["history"][name]] for name, table, _ in LAYOUT.history]
    ages = model.age_rows[...][age_bucket(batch["age"], 8)]
    events = np.asarray(unit_rms(np.concatenate([*fields, ages], axis=-1))) @ np.asarray(model.w_in[...])
    want = np.stack([events[0].mean(axis=0), events[1, -5:].mean(axis=0), np.zeros(8)])  # the last has no history
    q, of_encoder, mean, products = given[..., :8], given[..., 8:16], given[..., 16:24], given[..., 24:40]
    np.testing.assert_allclose(mean, np.broadcast_to(want[:, None], mean.shape), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(products, jnp.concatenate([of_encoder * q, mean * q], axis=-1), rtol=1e-5)
    np.testing.assert_allclose(jnp.delete(given, np.r_[16:24, 32:40], axis=-1), without, rtol=1e-5, atol=1e-6)


def test_macs_cover_the_whole_history():
    model, width_in = ranker("laser"), 10
    for candidates in (1, 50):
        once, each = model.encoder.macs(candidates, L)
        want = {"encoder_request": once, "encoder_candidate": each, "head_request": L * width_in + width_in * 8}
        assert ranker("laser", mean=False).macs(candidates)["head_request"] == 0
        assert model.macs(candidates) == want | {"head_candidate": model.head.macs()}


def test_candidate_fields_must_lead_the_history_fields():
    with pytest.raises(ValueError, match=r"candidate fields \['brand'\] must come first.*\['item', 'brand'"):
        TokenLayout(history=LAYOUT.history, candidate=LAYOUT.history[1:2], context=())


def test_tokens_enter_at_unit_rms_whatever_the_scale_of_the_tables():
    rng = np.random.default_rng(0)
    for scale in (0.1, 100.0):
        rows = scale * rng.normal(size=(5, 8)).astype(np.float32)
        source = TokenSource((rows,), (jnp.array([[0, 1, 4]]),), np.eye(8, dtype=np.float32))
        np.testing.assert_allclose((np.asarray(source.dense()) ** 2).mean(-1), 1, rtol=1e-3)
    assert (unit_rms(jnp.zeros((2, 3))) == 0).all()


def test_the_loss_is_the_textbook_one_and_finite_for_huge_logits():
    logits = np.array([[0.3, -2.0, 80.0], [-90.0, 5.0, 1.0]], np.float32)
    labels = np.array([[1, 0, 0], [1, 1, 0]], np.float32)
    mask = np.array([[1, 1, 1], [1, 0, 0]], bool)
    total, number = bce_sum(logits, labels, mask)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    want = -np.log(p[0, 0]) - np.log(1 - p[0, 1]) + 80 + 90
    np.testing.assert_allclose([total, number], [want, 4], rtol=1e-6)
