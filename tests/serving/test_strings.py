"""Strings have codes of their own in every vault: what is scored, logged and learned does not depend on them."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.requests import Requests as StoredRequests
from laser_jax.requests import RequestsWriter
from laser_jax.schema import Field, Schema
from laser_jax.serving.catalog import Catalog, Metrics
from laser_jax.serving.endpoints import RankEndpoint
from laser_jax.serving.export import Run, export_model
from laser_jax.serving.exported import ExportedModel
from laser_jax.serving.ranker import Ranker, RankRequest
from laser_jax.serving.replay import replay
from laser_jax.serving.request_log import RequestLog, read_log
from laser_jax.serving.server import Server, Settings
from laser_jax.serving.tensors import InferRequest
from laser_jax.vault.errors import UnavailableError
from tests.serving.test_export import untrained
from tests.serving.test_ranker import WRITING
from tests.small_config import get_config

SCHEMA = Schema(fields=(Field("brand", "string"),))
BRANDS = ["ant", "bee", "cat", "dog"]  # that the model knows, by code


def vault_of(path, brands: list[str]) -> str:
    """A vault that has met these strings in this order; another user's events brought them."""
    with seqvault.create(path, SCHEMA) as writer:
        if brands:
            writer.write({"user": [2] * len(brands), "time": list(range(len(brands))), "brand": brands})
    return str(path)


@pytest.fixture(scope="module")
def brand_run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("brands")
    vault_of(folder / "vault", BRANDS)
    with RequestsWriter(folder / "requests" / "train", candidates={"brand": "int32"}) as writer:
        writer.write(user=[2], time=[9], counts=[2], candidates={"brand": [0, 1]}, label=[0, 1])
    config = get_config("mean")
    config.data.path, config.features = str(folder), FeatureConfig(item=(FieldConfig("brand", 4, 10),))
    return untrained(config)


@pytest.fixture(scope="module")
def brand_model(brand_run, tmp_path_factory) -> ExportedModel:
    return ExportedModel(export_model(brand_run, str(tmp_path_factory.mktemp("model") / "v1")).path)


class Elsewhere:
    """A vault as if it were on another machine.

    Attributes:
      lost: calls for strings that get no answer. asked: set when somebody asks. answers: while it is set.
    """

    local = False

    def __init__(self, vault):
        self._vault = vault
        self.lost, self.asked, self.answers = 0, threading.Event(), threading.Event()
        self.answers.set()

    def __getattr__(self, name):
        return getattr(self._vault, name)

    def dictionary(self, field):
        if self.lost:
            self.lost -= 1
            raise UnavailableError("it did not answer in time")
        return self._vault.dictionary(field)

    def encode(self, field, values):
        self.asked.set()
        assert self.answers.wait(60)
        return self._vault.encode(field, values)


def append(vault, times: list[int], brands: list[str]) -> None:
    vault.append({"user": [1] * len(times), "time": times, "brand": brands})


def ask(*brands: str) -> RankRequest:
    return RankRequest(1, {"brand": list(brands)}, {}, 100)


@pytest.mark.parametrize("met", [[], ["ant"], ["ant", "bee", "cat"], ["dog", "cat"], BRANDS[::-1], [*BRANDS, "elk"]])
def test_scores_are_the_same_whatever_strings_a_vault_has_met_first(brand_model, tmp_path, met):
    wanted = []
    for name, strings in (("own", BRANDS), ("other", met)):
        with seqvault.open(vault_of(tmp_path / name, strings), writing=WRITING) as vault:
            live = Ranker(brand_model, vault)
            scores = [live.rank([ask(*BRANDS)])[0].logits]
            for times, brands in (([50, 51], ["dog", "cat"]), ([52], ["bee"]), ([53], ["ant"])):
                append(vault, times, brands)
                scores.append(live.rank([ask(*BRANDS)])[0].logits)
            scores.append(Ranker(brand_model, vault).rank([ask(*BRANDS)])[0].logits)  # as a server that begins anew
            wanted.append(np.stack(scores))
    assert (np.ptp(wanted[0], axis=1) > 1e-4).all() and np.ptp(wanted[0][:4], axis=0).max() > 1e-4
    np.testing.assert_allclose(wanted[1], wanted[0], atol=1e-6)


@pytest.mark.parametrize("met", [BRANDS, BRANDS[::-1], []])
def test_labels_and_columns_of_a_replay_are_those_of_the_strings(brand_model, tmp_path, met):
    """elk comes to be known by the click on it: what is learned from must not show that."""
    with seqvault.open(vault_of(tmp_path / "vault", met), writing=WRITING) as vault:
        append(vault, [50, 51], ["dog", "cat"])
        ranker, log = Ranker(brand_model, vault), RequestLog(str(tmp_path / "log"))
        shown = ["ant", "cat", "elk", "fox"]
        known = [brand in vault.dictionary("brand").tolist() for brand in shown]
        request = ranker.check(ask(*shown))
        log.add(request, ranker.rank([request])[0], brand_model.name, brand_model.version)
        log.close()
        append(vault, [110, 111], ["elk", "ant"])
        report = replay(str(tmp_path / "log"), vault, brand_model, str(tmp_path / "out"), "brand", 50, compare=1.0)
        assert (report.compared, report.difference) == (1, pytest.approx(0, abs=1e-6))
        stored = StoredRequests.open(str(tmp_path / "out")).read(np.arange(1))
        np.testing.assert_array_equal(stored.label, [1, 0, 1, 0])
        codes = np.where(known, vault.encode("brand", shown), -1)
        np.testing.assert_array_equal(stored.candidates["brand"], codes)
        assert codes[2] == codes[3] == -1 < codes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {"brand": [0, 1]}}, "candidates 'brand' holds 0; .* has strings there"),
        ({"unknown": {"candidates.brand": [2]}}, "candidates 'brand' has no place 2, which it calls unknown"),
    ],
)
def test_a_log_that_is_none_of_strings_is_refused(brand_model, tmp_path, change, message):
    with seqvault.open(vault_of(tmp_path / "vault", BRANDS), writing=WRITING) as vault:
        ranker, log = Ranker(brand_model, vault), RequestLog(str(tmp_path / "log"))
        request = ranker.check(ask("ant", "bee"))
        log.add(request, ranker.rank([request])[0], brand_model.name, brand_model.version)
        log.close()
        (line,) = read_log(str(tmp_path / "log"))
        (tmp_path / "changed").mkdir()
        (tmp_path / "changed" / "a.jsonl").write_text(json.dumps(line | change) + "\n")
        with pytest.raises(ValueError, match=f"the request of user 1 at 100: {message}"):
            replay(str(tmp_path / "changed"), vault, brand_model, str(tmp_path / "out"), "brand", 50)


def test_a_call_that_asks_a_vault_elsewhere_is_not_lost_when_another_model_takes_over(brand_model, tmp_path):
    async def swap():
        vault = Elsewhere(seqvault.open(vault_of(tmp_path / "vault", BRANDS)))
        catalog, ranker = Catalog(Metrics(), 60.0), Ranker(brand_model, vault)
        old, new = RankEndpoint(ranker, 256, 100), RankEndpoint(ranker, 256, 100)
        catalog.put(old)
        vault.answers.clear()
        inputs = {"user": np.array([1]), "candidates.brand": np.array(["ant", "bee"], object)}
        call = asyncio.create_task(catalog.infer("mean", "", InferRequest(inputs), None))
        loop = asyncio.get_running_loop()
        assert await loop.run_in_executor(None, vault.asked.wait, 60)
        assert catalog.put(new) is old
        closing = loop.run_in_executor(None, old.close)
        await asyncio.sleep(0.05)
        vault.answers.set()
        endpoint, outputs = await call
        assert endpoint is old and len(outputs["logit"]) == 2
        await closing
        await loop.run_in_executor(None, new.close)

    asyncio.run(swap())


def test_a_newer_model_is_tried_again_when_the_vault_did_not_answer(brand_run, tmp_path):
    (tmp_path / "models").mkdir()
    export_model(brand_run, str(tmp_path / "models" / "a"), version="1")
    vault = Elsewhere(seqvault.open(vault_of(tmp_path / "vault", BRANDS)))
    settings = dict(port=0, grpc_port=0, max_batch=1, max_candidates=1, read_only=True, poll_s=0.05)
    server = Server(Settings(str(tmp_path / "models"), "elsewhere", **settings), lambda path, timeout_s: vault)

    async def until(condition, running):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline and not running.done()
            await asyncio.sleep(0.02)

    async def swap():
        running = asyncio.create_task(server.run())
        await until(lambda: "mean" in server.catalog.names(), running)
        vault.lost = 3
        export_model(brand_run, str(tmp_path / "models" / "b"), version="2")
        await until(lambda: server.catalog.find("mean").version == "2", running)
        assert vault.lost == 0
        server.stop()
        await running

    asyncio.run(swap())
