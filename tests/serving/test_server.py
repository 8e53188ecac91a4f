"""The server as a process: over HTTP and gRPC, right answers, and a reason for everything that has none."""

import asyncio
import concurrent.futures
import contextlib
import gc
import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import grpc
import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.serving.catalog import meaning
from laser_jax.serving.export import export_model
from laser_jax.serving.messages import MESSAGES, METHODS, SERVICE
from laser_jax.serving.request_log import read_log
from laser_jax.serving.server import Server, Settings, main
from laser_jax.serving.tensors import datatype_of
from tests.compilation import AS_USERS_DO
from tests.serving.test_ranker import events_of

NEAR = dict(rtol=1e-5, atol=1e-5)
FEW = ("--port=0", "--grpc-port=0", "--max-batch=2", "--max-candidates=40")


class Process:
    """A server; its log is read as it comes.

    Attributes:
      log: its lines so far. http, grpc: where it listens.
    """

    def __init__(self, *arguments: str, module: str = "laser_jax.serving.server", **environment: str):
        command = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        self.log: list[str] = []
        self._lines: queue.Queue = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stderr:
            for line in self.process.stderr:
                self.log.append(line)
                self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, message: str, begin: bool = False) -> dict:
        """The next record with this message, or one that begins so."""
        deadline = time.monotonic() + 300
        while (line := self._lines.get(timeout=deadline - time.monotonic())) is not None:
            said = json.loads(line)["message"] if line.startswith("{") else ""
            if said == message or begin and said.startswith(message):
                return json.loads(line)
        raise AssertionError(f"no {message!r} in {''.join(self.log)}")

    def start(self) -> "Process":
        ready = self.wait_for("ready")
        self.http, self.grpc = ready["http"].removeprefix("http://"), ready["grpc"]
        return self

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        self._reader.join(10)
        return status


def call(server: Process, path: str, body: bytes | dict | None = None, **headers: str):
    """(status, headers, body) of one request."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, names)
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def tensor(name: str, datatype: str, data) -> dict:
    return {"name": name, "datatype": datatype, "shape": list(np.shape(data)), "data": data}


def asked(row: dict, **changes) -> dict:
    """The JSON of a request of known_data."""
    inputs = {
        "user": tensor("user", "INT64", [int(row["user"])]),
        "time": tensor("time", "INT64", [row["time"]]),
        "candidates.item": tensor("candidates.item", "INT64", row["item"].tolist()),
        "candidates.category": tensor("candidates.category", "INT64", row["category"].tolist()),
        "context.scene": tensor("context.scene", "INT64", [row["scene"]]),
    }
    inputs |= {name.replace("__", "."): value for name, value in changes.items()}
    return {"inputs": [value for value in inputs.values() if value is not None]}


def outputs(body: bytes) -> dict[str, list]:
    return {output["name"]: output["data"] for output in json.loads(body)["outputs"]}


@pytest.fixture(scope="module")
def vault_path(known_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "vault"
    shutil.copytree(os.path.join(known_data.path, "vault"), path)
    return path


@pytest.fixture(scope="module")
def server(model, vault_path):
    arguments = (f"--model={model.path}", f"--vault={vault_path}", *FEW, "--deadline-ms=60000", "--max-bytes=20000")
    # Optimised, its programs must still score as the run did.
    process = Process(*arguments, **AS_USERS_DO)
    try:
        yield process.start()
    finally:
        assert process.stop() == 0, process.log
        assert "every call that was taken has its answer" in process.log[-1]


@pytest.fixture(scope="module")
def wanted(workdir):
    with np.load(workdir / "predictions.npz") as stored:
        return stored["logits"]


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc) as made:
        yield made


def rpc(channel, method: str, request=None, timeout: float = 60, metadata=()):
    """One call over gRPC; `request` may be bytes."""
    data = request if isinstance(request, bytes) else (request or MESSAGES[f"{method}Request"]()).SerializeToString()
    answer = channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=timeout, metadata=metadata)
    return MESSAGES[f"{method}Response"].FromString(answer)


def test_health_and_metadata(server, channel, model):
    assert call(server, "/v2/health/live")[0] == call(server, "/v2/health/ready")[0] == 200
    assert call(server, f"/v2/models/{model.name}/ready")[0] == 200
    assert json.loads(call(server, "/v2")[2])["extensions"] == ["binary_tensor_data"]
    told = json.loads(call(server, f"/v2/models/{model.name}/versions/{model.version}")[2])
    assert {"name": "candidates.item", "datatype": "INT64", "shape": [-1]} in told["inputs"]
    assert {"name": "logit", "datatype": "FP32", "shape": [-1]} in told["outputs"]
    assert json.loads(call(server, "/v2/models/append")[2])["versions"] == ["1"]
    assert rpc(channel, "ServerLive").live and rpc(channel, "ServerReady").ready
    assert rpc(channel, "ServerMetadata").name == "laser_jax"
    assert rpc(channel, "ModelReady", MESSAGES["ModelReadyRequest"](name="append")).ready
    same = rpc(channel, "ModelMetadata", MESSAGES["ModelMetadataRequest"](name=model.name))
    assert [(one.name, one.datatype, list(one.shape)) for one in same.inputs] == [
        (one["name"], one["datatype"], one["shape"]) for one in told["inputs"]
    ]


def test_scores_over_http_are_those_of_the_run(server, model, known_data, wanted):
    at = 0
    for row in known_data.requests["test"][:20]:
        status, _, body = call(server, f"/v2/models/{model.name}/infer", asked(row) | {"id": "me"})
        assert status == 200, body
        found, count = outputs(body), len(row["item"])
        np.testing.assert_allclose(found["logit"], wanted[at : at + count], **NEAR)
        assert json.loads(body)["id"] == "me" and len(found["unseen"]) == count
        at += count


def test_scores_over_grpc_are_those_of_the_run(channel, model, known_data, wanted):
    at = 0
    for number, row in enumerate(known_data.requests["test"][:20]):
        request = MESSAGES["ModelInferRequest"](model_name=model.name, id="me")
        for entry in asked(row)["inputs"]:
            made = request.inputs.add(name=entry["name"], datatype="INT64", shape=entry["shape"])
            if number % 2:
                request.raw_input_contents.append(np.array(entry["data"], np.int64).tobytes())
            else:
                made.contents.int64_contents.extend(entry["data"])
        if number % 3 == 0:
            request.outputs.add(name="logit")
        answer = rpc(channel, "ModelInfer", request)
        names = [output.name for output in answer.outputs]
        assert names == (["logit"] if number % 3 == 0 else ["logit", "unseen", "events", "time", "as_of"])
        logits = np.frombuffer(answer.raw_output_contents[0], np.float32)
        np.testing.assert_allclose(logits, wanted[at : at + len(row["item"])], **NEAR)
        assert answer.id == "me" and answer.model_version == model.version
        at += len(row["item"])


def test_binary_data_over_http(server, model, known_data, wanted):
    row = known_data.requests["test"][0]
    body = asked(row) | {"outputs": [{"name": "logit", "parameters": {"binary_data": True}}, {"name": "events"}]}
    rest = b""
    for entry in body["inputs"]:
        data = np.array(entry.pop("data"), np.int64).tobytes()
        entry["parameters"] = {"binary_data_size": len(data)}
        rest += data
    text = json.dumps(body).encode()
    header = {"Inference_Header_Content_Length": str(len(text))}
    status, headers, answer = call(server, f"/v2/models/{model.name}/infer", text + rest, **header)
    assert status == 200, answer
    length = int(headers["Inference-Header-Content-Length"])
    told = json.loads(answer[:length])["outputs"]
    assert told[0]["parameters"] == {"binary_data_size": 4 * len(row["item"])} and len(told[1]["data"]) == 1
    np.testing.assert_allclose(np.frombuffer(answer[length:], np.float32), wanted[: len(row["item"])], **NEAR)


def test_a_client_that_knows_nothing_of_us(server, model, known_data, wanted, tmp_path):
    """NVIDIA's tritonclient, beside its own protobuf and not ours."""
    library = tmp_path / "library"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(library), "tritonclient[http,grpc]>=2.50"]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if "No matching distribution" in installed.stderr or "Connection" in installed.stderr:
        pytest.skip(f"tritonclient cannot be installed here: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    row = known_data.requests["test"][0]
    (tmp_path / "request.json").write_text(json.dumps(asked(row)))
    script = os.path.join(os.path.dirname(__file__), "triton_client.py")
    command = [sys.executable, script, server.http, server.grpc, model.name, str(tmp_path / "request.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(library)}
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"http", "grpc"}
    for found in told.values():
        np.testing.assert_allclose(found["logit"], wanted[: len(row["item"])], **NEAR)
        assert found["name"] == model.name and "there is no model 'none'" in found["refused"]


def test_a_click_is_seen_by_the_next_ranking(server, channel, model, known_data):
    row = known_data.requests["test"][3]
    request = asked(row, user=tensor("user", "INT64", [77_000]), time=None)
    before = outputs(call(server, f"/v2/models/{model.name}/infer", request)[2])
    assert before["events"] == [0]
    event = events_of(77_000, [500], row["item"][:1], row["category"][:1])
    types = {
        "time": "INT64",
        "user": "INT64",
        "item": "INT64",
        "category": "INT32",
        "action": "UINT8",
        "dwell": "UINT16",
    }
    inputs = [tensor(name, kind, np.asarray(event[name]).tolist()) for name, kind in types.items()]
    embedding = MESSAGES["ModelInferRequest"](model_name="append")
    for entry in inputs:
        embedding.inputs.add(name=entry["name"], datatype=entry["datatype"], shape=entry["shape"])
        dtype = {"INT64": "<i8", "INT32": "<i4", "UINT8": "u1", "UINT16": "<u2"}[entry["datatype"]]
        embedding.raw_input_contents.append(np.array(entry["data"], dtype).tobytes())
    embedding.inputs.add(name="embedding", datatype="FP16", shape=[1, 2])
    embedding.raw_input_contents.append(np.zeros(2, "<f2").tobytes())
    embedding.inputs.add(name="client", datatype="BYTES", shape=[1])
    embedding.raw_input_contents.append(b"\2\0\0\0me")
    embedding.inputs.add(name="number", datatype="INT64", shape=[1])
    embedding.raw_input_contents.append(np.array([1]).tobytes())
    sequences = {rpc(channel, "ModelInfer", embedding).raw_output_contents[0] for _ in range(3)}
    assert len(sequences) == 1, "sent again, written once"
    after = outputs(call(server, f"/v2/models/{model.name}/infer", request)[2])
    assert after["events"] == [1] and after["as_of"] == [before["as_of"][0] + 1]
    assert np.abs(np.subtract(after["logit"], before["logit"])).max() > 1e-4


def test_unknown_users_and_items_are_scored_and_told(server, model, known_data):
    row = known_data.requests["test"][3]
    items = tensor("candidates.item", "INT64", [-9] * len(row["item"]))
    request = asked(row, user=tensor("user", "INT64", [987_654_321]), candidates__item=items)
    status, _, body = call(server, f"/v2/models/{model.name}/infer", request)
    found = outputs(body)
    assert status == 200 and found["events"] == [0] and all(found["unseen"]) and np.isfinite(found["logit"]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": None}, "input 'user' is missing"),
        ({"user": tensor("user", "BYTES", ["a"])}, "user 'a'"),
        ({"user": tensor("user", "INT64", [1, 2])}, "input 'user' has shape \\[2\\]"),
        ({"user": tensor("user", "INT65", [1])}, "datatype 'INT65'"),
        ({"user": tensor("user", "INT64", [1.5])}, "1.5 is not a value of type INT64"),
        ({"user": tensor("user", "INT8", [300])}, "300 does not fit INT8"),
        ({"user": {"name": "user", "datatype": "INT64", "shape": [1]}}, 'neither "data" nor'),
        ({"user": {"name": "user", "datatype": "INT64", "shape": [2], "data": [1]}}, "1 values for shape \\[2\\]"),
        ({"user": {"name": "user", "datatype": "INT64", "shape": [-1], "data": [1]}}, "shape"),
        ({"user": {"name": "user", "datatype": "INT64", "shape": "x", "data": [1]}}, "shape"),
        ({"candidates__item": {**tensor("candidates.item", "INT64", []), "shape": [0, *[2**31 - 1] * 3]}}, "too large"),
        ({"user": tensor("user", "BYTES", ["\ud800"])}, "is not UTF-8"),
        ({"context__scene": tensor("context.scene", "FP32", [1e300])}, "1e\\+300 does not fit FP32"),
        ({"context__scene": tensor("context.scene", "FP16", [70000])}, "70000 does not fit FP16"),
        ({"n" * 20: tensor("n" * 10_000, "INT64", [1])}, "^input 'n{400,}[^ ]* \\.\\.\\. \\(10[0-9]+ characters\\)$"),
        ({"x": tensor("x", "INT64", [1])}, "input 'x' is none of user, time"),
        ({"candidates__item": None}, "candidates 'item' is missing"),
        ({"candidates__item": tensor("candidates.item", "FP32", [1.0])}, "of type float32: need integers"),
        ({"candidates__item": tensor("candidates.item", "INT64", [1] * 41)}, "has 41 candidates; at most 40"),
        ({"context__scene": tensor("context.scene", "FP32", [float("nan")])}, "of type float|not finite"),
        ({"time": tensor("time", "INT64", [-5])}, "time -5"),
    ],
)
def test_a_wrong_call_is_told_what_is_wrong(server, channel, model, known_data, changes, message):
    status, _, body = call(server, f"/v2/models/{model.name}/infer", asked(known_data.requests["test"][0], **changes))
    assert status == 400
    assert re.search(message, json.loads(body)["error"]), body


def test_other_wrong_calls(server, channel, model, known_data):
    right = asked(known_data.requests["test"][0])
    infer = f"/v2/models/{model.name}/infer"
    without_axis = {**tensor("time", "INT64", [1]), "shape": []}
    wrong = [
        (404, call(server, "/v2/models/none/infer", right), "there is no model 'none'"),
        (404, call(server, f"/v2/models/{model.name}/versions/9x/infer", right), "not '9x'"),
        (404, call(server, "/v3"), ""),
        (405, call(server, infer), ""),
        (400, call(server, infer, b"{"), "not JSON"),
        (400, call(server, infer, b"[" * 15000), "not JSON"),
        (400, call(server, infer, b"[]"), "inputs"),
        (400, call(server, infer, right | {"outputs": [{"name": "x"}]}), "output 'x' is none of logit"),
        (400, call(server, infer, right | {"id": 5}), "must be a string"),
        (400, call(server, infer, right, Inference_Header_Content_Length="99999"), "Inference-Header"),
        (400, call(server, infer, right, Inference_Header_Content_Length="\u00b2"), "Inference-Header"),
        (400, call(server, infer, right, Inference_Header_Content_Length="9" * 5000), "Inference-Header"),
        (400, call(server, infer, right, Timeout_Ms="soon"), "Timeout-Ms"),
        (413, call(server, infer, b" " * 20001), "at most 20000"),
        (504, call(server, infer, right, Timeout_Ms="0.0001"), "time was up"),
        (400, call(server, "/v2/models/append/infer", {"inputs": [tensor("time", "INT64", [1])]}), "missing"),
        (400, call(server, "/v2/models/append/infer", {"inputs": []}), "no events"),
        (400, call(server, "/v2/models/append/infer", {"inputs": [tensor("time", "INT64", 1)]}), "data"),
        (400, call(server, "/v2/models/append/infer", {"inputs": [without_axis]}), "input 'time' has shape []"),
    ]
    for status, (found, _, body), message in wrong:
        assert found == status and message in body.decode(), (status, found, body)
    codes = grpc.StatusCode
    infer_request = MESSAGES["ModelInferRequest"]
    for code, request, timeout in (
        (codes.INVALID_ARGUMENT, b"\xff\xff\xff", 60),
        (codes.INVALID_ARGUMENT, infer_request(model_name=model.name), 60),
        (codes.INVALID_ARGUMENT, infer_request(model_name=model.name, raw_input_contents=[b"x"]), 60),
        (codes.NOT_FOUND, infer_request(model_name="none"), 60),
        (codes.RESOURCE_EXHAUSTED, infer_request(model_name=model.name, id="x" * 20_001), 60),
        (codes.NOT_FOUND, infer_request(model_name="\u20ac" * 5000), 60),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            rpc(channel, "ModelInfer", request, timeout)
        assert caught.value.code() == code, caught.value
    assert set(METHODS) == {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"}


def test_a_damaged_history_is_no_mistake_of_the_server():
    assert meaning(seqvault.CorruptionError("page 3")) == (503, grpc.StatusCode.UNAVAILABLE, "page 3")


def test_no_body_whatever_brings_it_down(server, channel, model, known_data):
    rng = np.random.default_rng(0)
    right = json.dumps(asked(known_data.requests["test"][0])).encode()
    request = MESSAGES["ModelInferRequest"](model_name=model.name)
    for entry in asked(known_data.requests["test"][0])["inputs"]:
        request.inputs.add(name=entry["name"], datatype="INT64", shape=entry["shape"])
        request.raw_input_contents.append(np.array(entry["data"], np.int64).tobytes())
    message = request.SerializeToString()
    connection = http.client.HTTPConnection(server.http, timeout=60)
    for _ in range(int(os.environ.get("LASER_FUZZED_BODIES", 300))):
        for data, send in ((right, True), (message, False)):
            broken = bytearray(data)
            for _ in range(rng.integers(1, 6)):
                broken[rng.integers(len(broken))] = rng.integers(256)
            broken = bytes(broken[: rng.integers(1, len(broken) + 1)])
            if send:
                connection.request("POST", f"/v2/models/{model.name}/infer", broken)
                answer = connection.getresponse()
                body = answer.read()
                assert answer.status == 200 or 400 <= answer.status < 500 and json.loads(body)["error"], (broken, body)
                continue
            try:
                rpc(channel, "ModelInfer", broken)
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (broken, error)
    connection.close()
    assert call(server, "/v2/health/ready")[0] == 200 and not [line for line in server.log if "a mistake" in line]


def test_the_example_shows_a_ranking_that_follows_the_clicks(server, model, vault_path):
    command = [sys.executable, "-m", "experiments.live", f"--server=http://{server.http}", f"--vault={vault_path}"]
    done = subprocess.run([*command, f"--model={model.name}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if "(#" in line]
    assert len(rows) == 8 and all(len(row) == 5 for row in rows)
    assert "after 3 clicks" in done.stdout and any(row[1] != row[4] for row in rows)


def test_metrics(server, model, known_data):
    assert call(server, f"/v2/models/{model.name}/infer", asked(known_data.requests["test"][0]))[0] == 200
    text = call(server, "/metrics")[2].decode()
    for name in (
        "laser_call_seconds_count",
        'laser_stage_seconds_count{stage="lookup"}',
        'stage="scoring"',
        "laser_events ",
    ):
        assert name in text
    assert f'laser_answers_total{{model="{model.name}",status="200"}}' in text


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="nice values of threads are Linux's")
def test_threads_that_compute_give_way_to_those_that_hear_calls(server):
    folder = f"/proc/{server.process.pid}/task"
    computing, others = set(), set()
    for thread in os.listdir(folder):
        with open(os.path.join(folder, thread, "stat")) as file:
            name, rest = re.fullmatch(r"\d+ \((.*)\) (.*)\n", file.read()).groups()
        (computing if name == "tf_XLAEigen" else others).add(int(rest.split()[16]))
    assert computing and others
    assert min(computing) > max(others)


def test_a_newer_model_takes_over_and_no_call_is_lost(trained, known_data, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    export_model(trained, str(models / "a"), version="1")
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    options = (*FEW, "--deadline-ms=60000", f"--request-log={tmp_path}/log")
    process = Process(f"--model={models}", f"--vault={tmp_path}/vault", *options, LASER_TOKEN="secret")
    statuses, versions, done = [], [], threading.Event()
    token = {"Authorization": "Bearer secret"}
    request = asked(known_data.requests["test"][0])

    def ask() -> None:
        while not done.is_set():
            status, _, body = call(process, f"/v2/models/{trained.config.name}/infer", request, **token)
            statuses.append(status)
            versions.append(json.loads(body).get("model_version"))

    try:
        process.start()
        assert call(process, f"/v2/models/{trained.config.name}/infer", request)[0] == 401
        with grpc.insecure_channel(process.grpc) as channel:
            # Whoever watches servers needs no token, over HTTP neither.
            assert rpc(channel, "ServerLive").live and rpc(channel, "ServerReady").ready
            assert call(process, "/v2/health/ready")[0] == call(process, "/metrics")[0] == 200
            with pytest.raises(grpc.RpcError) as caught:
                rpc(channel, "ServerMetadata", metadata=(("authorization", "Bearer Secret"),))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        export_model(trained, str(models / "b"), version="2")
        process.wait_for("loaded")
        deadline = time.monotonic() + 60
        while "2" not in versions:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done.set()
        for thread in threads:
            thread.join()
        assert set(statuses) == {200} and versions[0] == "1" and set(versions) == {"1", "2"}
    finally:
        done.set()
        status = process.stop()
    assert status == 0
    # Everything that was answered is in the log, and scored anew it is the same.
    assert len(list(read_log(f"{tmp_path}/log"))) == len(statuses)
    command = [sys.executable, "-m", "laser_jax.serving.replay", f"--log={tmp_path}/log", f"--vault={tmp_path}/vault"]
    command += [f"--model={models}/b", f"--out={tmp_path}/requests", "--compare=1"]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert replayed.returncode == 0, replayed.stderr
    report = json.loads(replayed.stdout)
    assert report["requests"] == len(statuses) and report["compared"] == versions.count("2")
    assert report["others"] == versions.count("1") and report["difference"] < 1e-5
    # What was appended is durable, and the lock is free.
    with seqvault.open(tmp_path / "vault") as vault:
        vault.append(events_of(1, [1], [1], [1]))


def test_a_reader_sees_what_another_process_appends(model, known_data, tmp_path):
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    row, server = (
        known_data.requests["test"][3],
        Process(f"--model={model.path}", f"--vault={tmp_path}/vault", *FEW, "--read-only"),
    )
    try:
        server.start()
        request = asked(row, user=tensor("user", "INT64", [66_000]), time=None)
        path = f"/v2/models/{model.name}/infer"
        assert outputs(call(server, path, request)[2])["events"] == [0]
        with seqvault.open(tmp_path / "vault") as writer:
            writer.append(events_of(66_000, [500], row["item"][:1], row["category"][:1]))
            deadline = time.monotonic() + 20
            while outputs(call(server, path, request)[2])["events"] != [1]:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert call(server, "/v2/models/append/infer", {"inputs": []})[0] == 404
    finally:
        assert server.stop() == 0


def test_it_can_be_stopped_while_programs_are_compiled(model, vault_path):
    process = Process(f"--model={model.path}", f"--vault={vault_path}", "--read-only", "--port=0", "--grpc-port=0")
    process.wait_for("compiling")
    assert process.stop() == 0
    assert not [line for line in process.log if '"ready"' in line]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=/none", "--vault=/none"], "/none"),
        (["--model={model}", "--vault=/none"], "/none is not a vault"),
        (["--model={model}", "--vault={vault}", "--max-batch=64"], "max_batch=64"),
        (["--model={model}", "--vault={vault}", "--tls-key=x"], "TLS needs both"),
        (["--model={model}", "--vault={vault}", "--deadline-ms=nan"], "deadline_s=nan"),
        (["--model={model}", "--vault={vault}", "--queue=0"], "queue=0"),
        (["--model={model}", "--vault={vault}", "--port=70000"], "port=70000: need 0 to 65535"),
        (["--model={model}", "--vault={vault}", "--tls-key=/none", "--tls-certificate=/none"], "/none cannot be read"),
        (
            ["--model={model}", "--vault={vault}", f"--tls-key={__file__}", f"--tls-certificate={__file__}"],
            "are no certificate and its key",
        ),
    ],
)
def test_what_cannot_be_served_is_told(model, vault_path, known_data, arguments, message):
    filled = [text.format(model=model.path, vault=os.path.join(known_data.path, "vault")) for text in arguments]
    command = [sys.executable, "-m", "laser_jax.serving.server", "--port=0", "--grpc-port=0", *filled]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("token", ["", "two words", "schl\u00fcssel"])
def test_a_token_that_nobody_can_send_is_refused(token, monkeypatch, capsys):
    monkeypatch.setenv("LASER_TOKEN", token)
    assert main(["--model=/none", "--vault=/none"]) == 1
    assert "LASER_TOKEN" in capsys.readouterr().err


def test_a_vault_elsewhere_may_halt_or_die(model, known_data, tmp_path):
    """Who asks for metrics or health does not wait for it, and who ranks is told."""
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    command = [sys.executable, "-m", "laser_jax.vault", "serve", str(tmp_path / "vault"), "--port=0"]
    vault = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with vault, vault.stdout:
        where = vault.stdout.readline().split()[-1]
        server = Process(f"--model={model.path}", f"--vault={where}", *FEW, "--deadline-ms=20000")
        try:
            server.start()
            request = asked(known_data.requests["test"][3], time=None)
            path = f"/v2/models/{model.name}/infer"
            assert call(server, path, request)[0] == 200
            wait_until(lambda: events_seen(server) > 0)
            vault.send_signal(signal.SIGSTOP)
            os.waitpid(vault.pid, os.WUNTRACED)  # until all of its threads have stopped
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                ranking = pool.submit(call, server, path, request)
                for path_of_all in ("/metrics", "/v2/health/live", "/v2/health/ready") * 5:
                    assert call(server, path_of_all)[0] == 200
                assert not ranking.done(), "they were answered while it waits"
                vault.kill()
                vault.wait()
                assert ranking.result(60)[0] == 503
            assert call(server, path, request)[0] == 503
            wait_until(lambda: np.isnan(events_seen(server)))
            assert call(server, "/v2/health/live")[0] == 200
        finally:
            vault.kill()
            assert server.stop() == 0
    assert not [line for line in server.log if "Traceback" in line]


def test_it_can_be_stopped_while_a_vault_elsewhere_does_not_answer(model):
    process = Process(f"--model={model.path}", "--vault=http://127.0.0.1:9/vault", "--read-only", *FEW)
    process.wait_for("opening")
    assert process.stop() == 0


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_appends_of_one_client_may_be_under_way_together(server, channel, known_data):
    user = int(known_data.requests["test"][1]["user"])

    def events(number):
        columns = dict(events_of(user, np.array([600 + number]), np.array([number]), np.array([1])))
        message = MESSAGES["ModelInferRequest"](model_name="append")
        for name, values in (columns | {"client": None, "number": np.array([number])}).items():
            if values is None:
                message.inputs.add(name=name, datatype="BYTES", shape=[1])
                message.raw_input_contents.append(b"\7\0\0\0streams")
                continue
            message.inputs.add(name=name, datatype=datatype_of(values.dtype), shape=values.shape)
            message.raw_input_contents.append(values.tobytes())
        return message.SerializeToString()

    infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    before = events_seen(server)
    sent = [infer.future(events(number), timeout=60) for number in [*range(60), *range(60)]]
    for answer in sent:
        answer.result()
    infer(events(70), timeout=60)
    infer(events(65), timeout=60)  # never sent, though the client has been at 70
    assert events_seen(server) - before == 62


def events_seen(server) -> float:
    """In the vault, as the server says."""
    text = call(server, "/metrics")[2].decode()
    return float(re.search(r"^laser_events (\S+)$", text, re.MULTILINE).group(1))


def test_who_says_nothing_or_does_not_listen_holds_nobody_up(model, vault_path):
    arguments = (f"--model={model.path}", f"--vault={vault_path}", "--read-only", *FEW)
    process = Process(*arguments, PYTHONPATH=os.getcwd(), HEAD_S="1", module="tests.serving.impatient_server").start()
    host, port = process.http.split(":")
    silent = socket.create_connection((host, int(port)))
    half = socket.create_connection((host, int(port)))
    half.sendall(b"GET /v2/health/live HTT")
    with silent, half:
        silent.settimeout(20)
        half.settimeout(20)
        assert [ended(silent), ended(half)] == [True, True]
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.settimeout(1)
        with contextlib.suppress(TimeoutError):
            for _ in range(100_000):
                deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert call(process, "/v2/health/live")[0] == 200
        began = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - began < 20


def ended(connection: socket.socket) -> bool:
    """Whether the other side hangs up before the time is up."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_model_that_is_still_being_copied_is_taken_when_it_is_whole(trained, known_data, tmp_path):
    models, vault = tmp_path / "models", os.path.join(known_data.path, "vault")
    models.mkdir()
    export_model(trained, str(models / "a"), version="1")
    (models / "b").mkdir()
    (models / "b" / "model.json").write_text('{"format": "laser_jax.model"}')
    process = Process(f"--model={models}", f"--vault={vault}", "--read-only", *FEW).start()
    try:
        assert json.loads(call(process, f"/v2/models/{trained.config.name}")[2])["versions"] == ["1"]
        said = process.wait_for(
            f"a newer model cannot be loaded: {models}/b/model.json is damaged: version=None", begin=True
        )
        assert said["model"] == str(models / "b")
        export_model(trained, str(tmp_path / "whole"), version="2")
        shutil.copy(tmp_path / "whole" / "model.json", models / "b" / "model.json")
        process.wait_for(f"a newer model cannot be loaded: {models}/b/", begin=True)
        shutil.copytree(tmp_path / "whole", models / "b", dirs_exist_ok=True)
        process.wait_for("loaded")
        deadline = time.monotonic() + 60
        while json.loads(call(process, f"/v2/models/{trained.config.name}")[2])["versions"] != ["2"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        assert process.stop() == 0


def test_a_vault_in_partitions_has_one_writer_from_the_start(model, tmp_path):
    path = tmp_path / "vault"
    with seqvault.create(path, model.schema, partitions=2):
        pass
    with seqvault.open(path) as vault:
        vault.begin_writing()
        command = [sys.executable, "-m", "laser_jax.serving.server", f"--model={model.path}", f"--vault={path}", *FEW]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"error: {path} is being written by another writer" in done.stderr


def test_nothing_of_a_model_stays_when_a_newer_one_has_taken_over(trained, known_data, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    export_model(trained, str(models / "a"), version="1")
    vault = os.path.join(known_data.path, "vault")
    small = dict(port=0, grpc_port=0, max_batch=1, max_candidates=1, read_only=True, poll_s=0.05)
    server, name = Server(Settings(str(models), vault, **small)), trained.config.name

    async def until(condition):
        deadline = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < deadline and not running.done()
            await asyncio.sleep(0.05)

    async def swap():
        nonlocal running
        running = asyncio.create_task(server.run())
        await until(lambda: name in server.catalog.names())
        held = [server.catalog.find(name)]  # as by a call that has yet to send its answer
        old = weakref.ref(held[0].ranker.model)
        assert old().version == "1"
        export_model(trained, str(models / "b"), version="2")
        await until(lambda: server.catalog.find(name).version == "2")
        asyncio.get_running_loop().call_later(1, held.clear)
        await until(lambda: old() is None)
        server.stop()
        await running

    running = None
    asyncio.run(swap())
    gc.unfreeze()  # what the server froze of the tests'


def test_who_finds_the_server_ready_finds_all_that_it_serves(model, known_data, tmp_path):
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    small = dict(port=0, grpc_port=0, max_batch=1, max_candidates=1)
    server = Server(Settings(model.path, str(tmp_path / "vault"), **small))

    async def first_found():
        running = asyncio.create_task(server.run())
        deadline = time.monotonic() + 300
        while not server.catalog.ready:
            assert time.monotonic() < deadline and not running.done()
            await asyncio.sleep(0.005)
        found = server.catalog.names()
        server.stop()
        await running
        return found

    assert set(asyncio.run(first_found())) == {model.name, "append"}
    gc.unfreeze()  # what the server froze of the tests'
