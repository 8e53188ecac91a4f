"""Match readouts: the gates of the events that share a value with the candidate, added up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.layers.matches import MatchReadout
from laser_jax.models import encoder_config
from laser_jax.models.base import HeadConfig, Ranker
from tests.models.harness import SMALL
from tests.models.test_ranker import LAYOUT, B, C, L, as_pairs, draw
from tests.small_config import get_config

FIELDS = ("item", "brand")


def ranker(encoder="laser_plus", fields=FIELDS, horizons=()):
    head = HeadConfig(tokens=4, width=8, blocks=1, matches=fields, match_gates=3, match_horizons=horizons)
    sizes = dict(width=8, history_length=L, age_width=2, age_buckets=8, embedding_std=0.1)
    return Ranker(LAYOUT, encoder_config(encoder, **SMALL[encoder]), head, **sizes, rngs=nnx.Rngs(0))


def one_by_one(layer, x, mask, history, side):
    """The token of each candidate, event by event."""
    out = []
    for b in range(mask.shape[0]):
        for c in range(side[0].shape[1]):
            masses = []
            for mine, theirs in zip(history, side, strict=True):
                for reach in layer.reaches or (mask.shape[1],):
                    total = jnp.zeros(layer.b_gate.shape)
                    for k in list(range(mask.shape[1]))[-reach:]:
                        if mask[b, k] and mine[b, k] == theirs[b, c]:
                            total += 1 / (1 + jnp.exp(-(layer.w_gate[...].T @ x[b, k] + layer.b_gate[...])))
                    masses.append(jnp.log(1 + total))
            out.append(layer.w_mass[...].T @ jnp.concatenate(masses))
    return jnp.stack(out).reshape(*side[0].shape, -1)


# A history as long as the last reach, longer and shorter.
@pytest.mark.parametrize("reaches", [(), (1, 3, L), (2, L - 1), (2, L + 1, L + 4)])
def test_values_and_gradients_are_those_of_a_loop(reaches):
    rng = np.random.default_rng(0)
    graph, params = nnx.split(MatchReadout(5, 6, FIELDS, 3, reaches, rngs=nnx.Rngs(1)), nnx.Param)
    x = rng.normal(size=(B, L, 5)).astype(np.float32)
    mask = np.arange(L) >= L - np.array([L, 4, 0])[:, None]
    history = [rng.integers(0, 4, (B, L)) for _ in FIELDS]
    side = [rng.integers(0, 5, (B, C)) for _ in FIELDS]
    weights = rng.normal(size=(B, C, 6))

    def loss(call):
        return jax.value_and_grad(
            lambda params, x: (
                ((out := call(nnx.merge(graph, params), x, mask, history, side)) * weights).sum() + out.max()
            ),
            argnums=(0, 1),
        )

    def fast(layer, x, mask, *values):
        return layer(layer.gates(x, mask), *values)

    got, want = loss(fast)(params, x), loss(one_by_one)(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))


def test_matches_are_added_up_over_each_horizon_within_the_history():
    assert ranker("ta", horizons=(2, L + 4, 1)).matches.reaches == (1, 2, L)
    assert ranker("laser_plus").matches.reaches == ()
    with pytest.raises(ValueError, match=r"match_horizons=\(0,\)"):
        ranker("ta", horizons=(0,))
    with pytest.raises(ValueError, match=r"head.match_horizons=\(2.0,\): give whole numbers of events"):
        ranker("ta", horizons=(2.0,))
    with pytest.raises(ValueError, match="compare events with candidates by 'nope', which these do not have"):
        ranker("ta", fields=("nope",))


@pytest.mark.parametrize("encoder", ["laser_plus", "sim_hard", "mean"])
def test_a_ranker_scores_each_pair_alone_and_says_what_it_compares(encoder):
    model = ranker(encoder)
    assert set(model.compares) == {*FIELDS, *model.encoder.compares}
    rows, batch = draw()
    whole, _ = nnx.jit(model)(rows, batch)
    alone, _ = nnx.jit(model)(rows, as_pairs(batch))
    np.testing.assert_allclose(whole, alone.reshape(B, C), rtol=1e-5, atol=1e-5)


def test_a_match_is_felt_where_embeddings_say_nothing():
    rows, batch = draw()
    rows = {table: np.ones_like(values) for table, values in rows.items()}
    apart = {name: values + 100 for name, values in batch["candidates"].items()}
    rows |= {table: np.ones((200, rows[table].shape[1]), np.float32) for table in FIELDS}
    for fields, differs in ((("item",), True), ((), False)):
        model = ranker(fields=fields)
        without, _ = model(rows, {**batch, "candidates": apart, "side": apart})
        same = {**apart, "item": np.repeat(batch["history"]["item"][:, -1:], C, axis=1)}
        with_one, _ = model(rows, {**batch, "candidates": same, "side": same})
        assert (np.abs(with_one - without)[:2] > 1e-6).all() == differs
        np.testing.assert_array_equal(with_one[2], without[2])  # no event, no match
        never_met = {**apart, "item": np.full((B, C), -1)}
        unlike, _ = model(rows, {**batch, "candidates": same, "side": never_met})
        np.testing.assert_allclose(unlike, without, rtol=1e-6)


def test_operations_are_counted():
    plain, model = ranker(fields=()), ranker(horizons=(2,))
    counts, before = model.macs(C), plain.macs(C)
    width_in = model.w_in.shape[0]
    assert counts["head_request"] == L * width_in * 3 and before["head_request"] == 0
    token = model.head.macs() - plain.head.macs()
    masses = len(FIELDS) * 2 * 3
    assert counts["head_candidate"] - before["head_candidate"] == token + L * len(FIELDS) * 3 + masses * 8
    assert counts["encoder_candidate"] == before["encoder_candidate"]


@pytest.mark.parametrize("field", ["action", "brnd", "tags", "content"])
def test_only_what_has_one_value_is_compared(field):
    item = (FieldConfig("item", 4, 100), FieldConfig("tags", 4, 10, pool="mean"))
    item += (FieldConfig("content", 4, ids="vector"),)
    event = (FieldConfig("action", 2, 4),)
    config = dataclasses.replace(get_config(), features=FeatureConfig(item=item, event=event, context=(), age_width=2))
    config.head.matches = ("item", field)
    with pytest.raises(ValueError, match=rf"head.matches=.*'{field}' is no field .* which are item$"):
        config.build_model(nnx.Rngs(0))


def test_it_needs_a_gate():
    with pytest.raises(ValueError, match="match_gates=0"):
        MatchReadout(5, 6, FIELDS, 0, rngs=nnx.Rngs(0))
