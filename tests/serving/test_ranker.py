"""Live requests are scored as training and evaluation would, before and after events come in."""

import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.features import FieldConfig
from laser_jax.pipeline import BatchSource
from laser_jax.requests import RequestsWriter
from laser_jax.schema import Field, Schema
from laser_jax.serving.ranker import Ranker, RankRequest, RequestError
from laser_jax.step import make_eval_step
from laser_jax.vault.partitioning import partition_paths
from laser_jax.vault.service import VaultService

WRITING = seqvault.WriterOptions(background=False)
NEAR = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture
def ranker(model, known_data, tmp_path):
    """With a vault of its own, which may be written."""
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        yield Ranker(model, vault, clock=lambda: 500.25)


def request_of(row: dict, **changes) -> RankRequest:
    candidates = {"item": row["item"].tolist(), "category": row["category"].tolist()}
    asked = {"user": int(row["user"]), "candidates": candidates, "context": {"scene": row["scene"]}}
    return RankRequest(**asked | {"time": row["time"]} | changes)


def events_of(user: int, times, items, categories) -> dict:
    count = len(items)
    events = {"user": np.full(count, user), "time": times, "item": items, "category": np.asarray(categories, np.int32)}
    events |= {"action": np.arange(count).astype(np.uint8) % 3, "dwell": np.arange(count).astype(np.uint16) * 100}
    return events | {"embedding": np.zeros((count, 2), np.float16)}


def test_scores_are_those_of_the_run(ranker, known_data, workdir):
    rows = known_data.requests["test"][:70]
    answers = ranker.rank([request_of(row) for row in rows])
    with np.load(workdir / "predictions.npz") as stored:
        wanted = stored["logits"]
    found = np.concatenate([answer.logits for answer in answers])
    np.testing.assert_allclose(found, wanted[: len(found)], **NEAR)
    for row, answer in zip(rows[:20], answers, strict=False):
        alone = ranker.rank([request_of(row)])[0]
        np.testing.assert_allclose(alone.logits, answer.logits, **NEAR)
        assert answer.events == len(known_data.history(row["user"], row["time"], 16)["time"])
        assert answer.time == row["time"] and answer.as_of == ranker.vault.next_sequence


def test_what_was_answered_live_is_what_evaluation_says_later(ranker, known_data, trained, tmp_path):
    """Events come in between; (user, time, sequence number) is all that is kept of a request."""
    rng = np.random.default_rng(0)
    rows, answers = known_data.requests["test"][:40], []
    for number, row in enumerate(rows):
        answers.append(ranker.rank([request_of(row, time=None if number % 2 else row["time"])])[0])
        items = rng.choice(known_data.events["item"], 5)
        ranker.vault.append(events_of(row["user"], rng.integers(0, 501, 5), items, rng.integers(0, 4, 5)))
        if number == 20:
            ranker.vault.merge()
    assert all(answer.time == 501 for answer in answers[1::2]), "behind everything of the running second"
    shutil.copytree(os.path.join(known_data.path, "vocab"), tmp_path / "vocab")
    types = dict(context={"scene": "uint8"}, candidates={"item": "int64", "category": "int32"})
    for split in ("train", "valid", "test"):
        with RequestsWriter(tmp_path / "requests" / split, sequence=True, **types) as writer:
            writer.write(
                user=[row["user"] for row in rows],
                time=[answer.time for answer in answers],
                sequence=[answer.as_of for answer in answers],
                counts=[len(row["item"]) for row in rows],
                context={"scene": np.array([row["scene"] for row in rows], np.uint8)},
                candidates={name: np.concatenate([row[name] for row in rows]) for name in ("item", "category")},
                label=np.concatenate([row["label"] for row in rows]),
            )
    data = type(trained.config.data)(**{**vars(trained.config.data), "path": str(tmp_path)})
    source = BatchSource(data, trained.config.features, "test")
    eval_step, wanted = make_eval_step(trained.factory), []
    for batch in source.stream(0, source.num_batches):
        wanted.append(np.asarray(eval_step(trained.state, batch.step)[0])[batch.step["mask"]])
    found = np.concatenate([answer.logits for answer in answers])
    np.testing.assert_allclose(found, np.concatenate(wanted), **NEAR)


def test_a_click_changes_the_next_ranking(ranker, known_data):
    row = known_data.requests["test"][0]
    asked = request_of(row, user=10**12, time=None)
    before = ranker.rank([asked])[0]
    assert before.events == 0, "nobody knows this user"
    ranker.vault.append(events_of(10**12, [500], row["item"][:1], row["category"][:1]))
    after = ranker.rank([asked])[0]
    assert after.events == 1 and after.as_of == before.as_of + 1
    assert np.abs(after.logits - before.logits).max() > 1e-4


def test_many_candidates_are_scored_in_pieces(ranker, known_data):
    row = known_data.requests["test"][1]
    many = {name: np.resize(row[name], 1300) for name in ("item", "category")}
    few, answer = ranker.rank([request_of(row), request_of(row, candidates=many)])
    np.testing.assert_allclose(answer.logits, np.resize(few.logits, 1300), **NEAR)
    assert answer.unseen.shape == (1300,)


def test_requests_may_come_in_any_mixture(ranker, known_data):
    rows = known_data.requests["valid"][:50]
    order = np.random.default_rng(1).permutation(len(rows))
    together = ranker.rank([request_of(rows[place]) for place in order])
    for place, answer in zip(order, together, strict=True):
        np.testing.assert_allclose(ranker.rank([request_of(rows[place])])[0].logits, answer.logits, **NEAR)


def test_a_history_that_cannot_be_read_costs_nobody_else_an_answer(ranker, known_data, monkeypatch):
    rows = known_data.requests["valid"][:6]
    wanted = ranker.rank([request_of(row) for row in rows])
    get, damaged = ranker.vault.get, int(rows[2]["user"])

    def reads(user, *arguments, **options):
        if user == damaged:
            raise seqvault.CorruptionError("page 3")
        return get(user, *arguments, **options)

    monkeypatch.setattr(ranker.vault, "get", reads)
    answers = ranker.rank_each([request_of(row) for row in rows])
    for row, answer, before in zip(rows, answers, wanted, strict=True):
        if row["user"] == damaged:
            assert isinstance(answer, seqvault.CorruptionError)
        else:
            np.testing.assert_allclose(answer.logits, before.logits, **NEAR)
    with pytest.raises(seqvault.CorruptionError):
        ranker.rank([request_of(row) for row in rows])


def test_scores_that_are_no_numbers_are_no_answer_and_cost_nobody_else_theirs(ranker, known_data, monkeypatch):
    requests = [request_of(row) for row in known_data.requests["valid"][:6]]
    wanted, run = ranker.rank(requests), ranker.model.run

    def overflows(assembled):
        scores = run(assembled).copy()
        scores[0] = np.nan
        return scores

    monkeypatch.setattr(ranker.model, "run", overflows)
    answers = ranker.rank_each(requests)
    failed = [isinstance(answer, RequestError) for answer in answers]
    assert any(failed) and not all(failed) and "not finite" in str(answers[failed.index(True)])
    for answer, before, lost in zip(answers, wanted, failed, strict=True):
        if not lost:
            np.testing.assert_allclose(answer.logits, before.logits, **NEAR)
    with pytest.raises(RequestError, match="not finite"):
        ranker.rank(requests)


def test_numbers_of_a_vector_are_finite_as_the_model_reads_them(ranker, monkeypatch):
    field = FieldConfig("numbers", 2, ids="vector")
    monkeypatch.setattr(ranker.model, "width_of", lambda field: 2)
    assert ranker._numbers(0, "candidates 'numbers'", field, [[1, -3e38]]).tolist() == [[1, -3e38]]
    for wrong, told in (([[1, 1e300]], "1e.300 is beyond float32"), ([[np.inf, 0]], "inf is not finite")):
        with pytest.raises(RequestError, match=told):
            ranker._numbers(0, "candidates 'numbers'", field, wrong)


def test_a_lost_partition_costs_its_own_users_their_answers_only(ranker, model, known_data, tmp_path):
    rows = known_data.requests["valid"][:30]
    requests = [request_of(row) for row in rows]
    wanted = ranker.rank(requests)
    with seqvault.create(tmp_path / "parted", ranker.vault.schema, partitions=2) as writer:
        users = ranker.vault.users()
        found = ranker.vault.gather(users, fields=ranker.vault.schema.names)
        writer.write({"user": np.repeat(users, np.diff(found.offsets)), **found.columns})
    services = [VaultService(path) for path in partition_paths(str(tmp_path / "parted"))]
    try:
        vault = seqvault.open(",".join(f"grpc://127.0.0.1:{service.port}" for service in services), timeout_s=30)
        served = Ranker(model, vault)
        owners = vault.partition_of(np.array([row["user"] for row in rows]))
        assert set(owners.tolist()) == {0, 1}
        for answer, before in zip(served.rank(requests), wanted, strict=True):
            np.testing.assert_allclose(answer.logits, before.logits, **NEAR)
        services[1].close()
        for owner, answer, before in zip(owners, served.rank_each(requests), wanted, strict=True):
            if owner:
                assert isinstance(answer, seqvault.UnavailableError)
            else:
                np.testing.assert_allclose(answer.logits, before.logits, **NEAR)
        services[0].close()
        assert all(isinstance(answer, seqvault.UnavailableError) for answer in served.rank_each(requests))
    finally:
        for service in services:
            service.close()


def test_numbers_of_all_requests_are_of_one_type(ranker, known_data):
    """Concatenated, int64 and uint64 would become floats, and large ids others."""
    row = known_data.requests["test"][0]
    for kind in (np.uint64, np.int64, np.int32, np.uint8):
        candidates = {"item": row["item"].astype(kind), "category": row["category"].astype(kind)}
        found = ranker.check(request_of(row, candidates=candidates, context={"scene": kind(row["scene"])}))
        assert {values.dtype for values in (*found.candidates.values(), *found.context.values())} == {np.dtype("int64")}


def test_programs_are_compiled_beforehand(model, known_data):
    ranker = Ranker(model, seqvault.open(os.path.join(known_data.path, "vault")))
    # Histories of up to 4 and 16 events, a request or two, 1 candidate or up to 4, 8, 16, 32 or 64 of them.
    assert ranker.compile(requests=2, candidates=40) == 2 * 2 * 6
    assert ranker.rank([]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "x"}, "user 'x': this vault's users are int64"),
        ({"user": True}, "user True"),
        ({"user": 2**63}, "beyond int64"),
        ({"time": -1}, "time -1: need an integer, 0 <= time"),
        ({"time": 1.5}, "time 1.5"),
        ({"time": 2**40}, "time 1099511627776"),
        ({"candidates": {"item": [1]}}, "candidates 'category' is missing; need item, category"),
        ({"candidates": {"item": [1], "category": [1], "x": [1]}}, "candidates 'x' is none of the model's"),
        ({"candidates": {"item": [1, 2], "category": [1]}}, "of unlike lengths: .*'item': 2"),
        ({"candidates": {"item": [], "category": []}}, "no candidates"),
        ({"candidates": {"item": [1.5], "category": [1]}}, "candidates 'item' is of type float64: need integers"),
        ({"candidates": {"item": ["a"], "category": [1]}}, "candidates 'item' is of type"),
        ({"candidates": {"item": [[1]], "category": [1]}}, r"candidates 'item' has shape \(1, 1\)"),
        ({"candidates": {"item": [[1], [1, 2]], "category": [1, 1]}}, "candidates 'item'"),
        ({"candidates": {"item": 5, "category": 5}}, "candidates 'item' has shape"),
        ({"candidates": {"item": [2**63], "category": [1]}}, "beyond int64"),
        ({"context": {}}, "context 'scene' is missing"),
        ({"context": {"scene": [1]}}, "context 'scene' has shape"),
        ({"context": {"scene": float("nan")}}, "context 'scene' is of type float64"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_so(ranker, known_data, changes, message):
    row = known_data.requests["test"][0]
    with pytest.raises(RequestError, match=message) as caught:
        ranker.rank([request_of(row), request_of(row, **changes)])
    assert caught.value.position == 1


def test_another_vault_is_refused(model, tmp_path, known_data):
    right = seqvault.open(os.path.join(known_data.path, "vault")).schema
    wrong = {
        "its user is 'string'": Schema("string", fields=right.fields),
        "its time_unit is 'ms'": Schema(time_unit="ms", fields=right.fields),
        "has no field 'dwell'": Schema(fields=[field for field in right.fields if field.name != "dwell"]),
        "field 'item' is int32": Schema(fields=[Field("item", "int32"), *right.fields[1:]]),
    }
    for number, (message, schema) in enumerate(wrong.items()):
        with seqvault.create(tmp_path / str(number), schema):
            pass
        with pytest.raises(ValueError, match=message):
            Ranker(model, seqvault.open(tmp_path / str(number)))
