"""What gates listen to, against loops over events."""

import types

import numpy as np

from laser_jax import gate_figures as gf
from laser_jax.batch import Batch
from laser_jax.gate_figures import AGE_NAMES, OTHER, SILENT, gate_figures, segment_facts
from laser_jax.layers.segment_runs import segment_runs
from laser_jax.row_placement import places

B, C, L, W = 3, 4, 10, 4
FIELDS = ["item", "category"]


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array([10, 5, 0])
    step = {
        "age": np.sort(rng.integers(0, 10**7, (B, L)), axis=1)[:, ::-1].astype(np.int32),
        "length": lengths.astype(np.int32),
        "mask": rng.random((B, C)) < 0.8,
        "history": {name: rng.integers(0, 4, (B, L)) for name in FIELDS},
        "candidates": {name: rng.integers(0, 4, (B, C)) for name in FIELDS},
        "unique": {name: places(np.array([0, 3, 5, 8]), 10).astype(np.int32)[None, None] for name in FIELDS},
    }
    # 0 is the position of row 0: what was never seen.
    step["side"] = {name: np.where(index == 0, -1, index) for name, index in step["candidates"].items()}
    return Batch(
        step,
        np.arange(B),
        lengths,
        references={},
        num_unique={},
        tables={name: (name, 10) for name in FIELDS},
    )


def naive_facts(batch, b, c, n):
    """(match, age) of a segment, None where it is empty."""
    step = batch.step
    first = L - (-(-L // W) - n) * W
    places = [i for i in range(first, first + W) if i >= L - step["length"][b] and i >= 0]
    if not places:
        return None
    match = len(FIELDS)
    for place, name in reversed(list(enumerate(FIELDS))):
        candidate = step["candidates"][name][b, c]
        if candidate != 0 and any(step["history"][name][b, i] == candidate for i in places):
            match = place
    return match, min(step["age"][b, i] for i in places)


def test_segment_facts_are_those_of_the_events():
    batch = make_batch()
    match, age, alive = segment_facts(batch, FIELDS, segment_runs((L,), W))
    seen = set()
    for b in range(B):
        for c in range(C):
            for n in range(3):
                want = naive_facts(batch, b, c, n)
                assert alive[b, n] == (want is not None)
                if want is not None:
                    assert (match[b, c, n], age[b, n]) == want
                    seen.add(want[0])
    assert seen == {0, 1, 2}


def test_figures_are_means_over_what_was_seen(monkeypatch):
    batches = [make_batch(0), make_batch(1)]
    rng = np.random.default_rng(2)
    loudness = [rng.random((B, C, 3)) ** 6 for _ in batches]
    source = types.SimpleNamespace(
        features=types.SimpleNamespace(item=[types.SimpleNamespace(name=name) for name in FIELDS]),
        num_batches=2,
        stream=lambda start, stop, agree: batches[start:stop],
    )
    monkeypatch.setattr(gf, "place_batch", lambda step, mesh: step)

    def eval_step(state, step):
        k = next(k for k, batch in enumerate(batches) if batch.step is step)
        return None, {"loudness": loudness[k]}

    got = gate_figures(
        eval_step, None, source, None, types.SimpleNamespace(runs=lambda length: segment_runs((length,), W))
    )
    relative, by_match, by_age = [], {}, {}
    for batch, loud in zip(batches, loudness, strict=True):
        for b, c in zip(*np.nonzero(batch.step["mask"]), strict=True):
            facts = {n: naive_facts(batch, b, c, n) for n in range(3)}
            facts = {n: fact for n, fact in facts.items() if fact is not None}
            mean = np.mean([loud[b, c, n] for n in facts]) if facts else None
            for n, (match, age) in facts.items():
                value, name = loud[b, c, n] / mean, [*FIELDS, OTHER][match]
                relative.append(value)
                by_match.setdefault(name, []).append(value)
                by_age.setdefault((name, sum(age >= edge for edge in gf.AGE_EDGES_S[1:])), []).append(value)
    assert got.segments == len(relative)
    assert 0 < got.silent < 1
    np.testing.assert_allclose(got.silent, np.mean(np.array(relative) < SILENT))
    assert got.by_match.keys() == by_match.keys() == got.shares.keys()
    for name, values in by_match.items():
        np.testing.assert_allclose(got.by_match[name], np.mean(values))
        np.testing.assert_allclose(got.shares[name], len(values) / len(relative))
        for bucket in range(len(AGE_NAMES)):
            found = by_age.get((name, bucket))
            assert (got.by_age[name][bucket] is None) == (found is None)
            if found is not None:
                np.testing.assert_allclose(got.by_age[name][bucket], np.mean(found))


def test_an_encoder_without_segments_has_none(monkeypatch):
    monkeypatch.setattr(gf, "place_batch", lambda step, mesh: step)
    source = types.SimpleNamespace(
        features=types.SimpleNamespace(item=[types.SimpleNamespace(name="item")]),
        num_batches=1,
        stream=lambda start, stop, agree: [make_batch()],
    )
    assert gate_figures(lambda state, step: (None, {}), None, source, None, object()) is None
