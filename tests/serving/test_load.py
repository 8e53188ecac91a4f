"""What experiments measure servers with: load from a process of its own, stages, and yesterday's store."""

import base64
import os

import numpy as np
import pytest

from experiments.bench.serving import Served, percentile, stage_percentile
from experiments.bench.serving_yesterday import JsonHistories, fill
from experiments.ranking_server import infer_request
from laser_jax import vault as seqvault

FEW = ("--read-only", "--max-batch=2", "--max-candidates=8", "--deadline-ms=60000")


@pytest.fixture(scope="module")
def served(model, known_data):
    vault = os.path.join(known_data.path, "vault")
    server = Served("ours", model.name, f"--model={model.path}", f"--vault={vault}", *FEW)
    yield server
    server.close()


@pytest.fixture(scope="module")
def requests(model, known_data):
    found = []
    for row in known_data.requests["test"][:20]:
        columns = {f"candidates.{name}": row[name].astype(np.int64) for name in ("item", "category")}
        asked = {"user": np.array([row["user"]]), "context.scene": np.array([row["scene"]]), **columns}
        found.append(base64.b64encode(infer_request(model.name, asked).SerializeToString()).decode())
    return found


def test_load_is_counted_by_client_and_server_alike(served, requests):
    idle = served.load("idle", requests, seconds=60, most=30)
    assert len(idle["milliseconds"]) == 30 and not idle["refused"]
    for stage, (bounds, counts) in idle["stages"].items():
        assert counts.sum() == 30, f"one batch a request: {stage}"
        assert np.isfinite(bounds[:-1]).all() and (counts >= 0).all()
        assert 0 < stage_percentile(idle, stage, 50) <= stage_percentile(idle, stage, 99)
    assert stage_percentile(idle, "scoring", 50) < percentile(idle, 50)
    full = served.load("saturation", requests, seconds=1, in_flight=4)
    rate = len(full["milliseconds"]) / full["seconds"]
    assert rate > 0 and 1 <= full["stages"]["scoring"][1].sum() <= len(full["milliseconds"])
    half = served.load("open", requests, seconds=2, rate=20, seed=3)
    assert 15 <= len(half["milliseconds"]) <= 70, "about 40 of them"


def test_what_is_refused_is_counted(served, requests):
    wrong = base64.b64encode(infer_request("none", {"user": np.array([1])}).SerializeToString()).decode()
    found = served.load("idle", [requests[0], wrong], seconds=60, most=4)
    assert found["refused"] == {"NOT_FOUND": 2} and len(found["milliseconds"]) == 2


def test_the_percentile_of_a_stage_lies_within_its_bucket():
    answer = {"stages": {"scoring": (np.array([1.0, 2.0, 4.0]), np.array([50.0, 0.0, 50.0]))}}
    assert stage_percentile(answer, "scoring", 25) == pytest.approx(0.5)
    assert stage_percentile(answer, "scoring", 75) == pytest.approx(3.0)
    assert stage_percentile(answer, "scoring", 100) == pytest.approx(4.0)


def test_yesterdays_store_holds_the_same_histories(known_data, tmp_path):
    path, store = os.path.join(known_data.path, "vault"), str(tmp_path / "json")
    fill(path, store)
    theirs = JsonHistories(path, store)
    fields = ("item", "category", "action", "dwell")
    with seqvault.open(path) as vault:
        for user in [*vault.users()[:20].tolist(), 10**12]:
            for before in (150, 10**6):
                wanted = vault.get(user, 16, before, fields=fields).columns
                found = theirs.get(user, 16, before, fields).columns
                assert set(found) == set(wanted)
                for name, values in wanted.items():
                    np.testing.assert_array_equal(found[name], values)
                    assert found[name].dtype == values.dtype
    theirs.close()
