"""Through the real door: python -m laser_jax.main as a process, killed, resumed, misused."""

import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from laser_jax.checkpoint import Checkpoints
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from tests.small_config import get_config

ENCODER = "laser_plus"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiled programs are shared by the processes of this file: the same program twice, compiled once."""
    cache = str(tmp_path_factory.mktemp("programs"))
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(environment, workdir, *flags, config=f"tests/small_config.py:{ENCODER}"):
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    command = [sys.executable, "-m", "laser_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    with open(f"{workdir}.out", "a", encoding="utf-8") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)


def read(path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def said(workdir) -> str:
    return read(f"{workdir}.out")


def finish(process, workdir):
    assert process.wait(timeout=400) == 0, said(workdir)[-4000:]


def steps_saved(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def final_state(workdir, data):
    config = get_config(ENCODER)
    factory = StateFactory(config.build_model, config.features.tables(), config.optim, make_mesh(MeshConfig(), 12))
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(checkpoints.newest(), factory.abstract())
    checkpoints.close()
    return jax.device_get(state)


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(known_data, environment, tmp_path):
    flags = (f"--config.data.path={known_data.path}", "--config.data.epochs=12")
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    finish(start(environment, straight, *flags), straight)
    total = steps_saved(straight)[-1]

    process = start(environment, killed, *flags)
    deadline = time.monotonic() + 200
    while not steps_saved(killed) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    saved = steps_saved(killed)
    assert saved and saved[-1] < total, f"killed with {saved} of {total} steps saved:\n{said(killed)[-2000:]}"
    assert not os.path.exists(os.path.join(killed, "results.json"))
    finish(start(environment, killed, *flags), killed)
    assert "going on from step" in said(killed)

    states = [final_state(workdir, known_data) for workdir in (straight, killed)]
    assert int(states[0].step) == total
    jax.tree.map(np.testing.assert_array_equal, *states)
    with np.load(f"{straight}/predictions.npz") as want, np.load(f"{killed}/predictions.npz") as got:
        assert sorted(want) == sorted(got) and len(want["logits"]) > 0
        for name in want:
            np.testing.assert_array_equal(got[name], want[name])
    results = [json.loads(read(f"{workdir}/results.json")) for workdir in (straight, killed)]
    for part in ("test", "test_by_length", "step"):
        assert results[0][part] == results[1][part]
    steps = [json.loads(line)["step"] for line in read(f"{killed}/metrics.jsonl").splitlines()]
    assert steps == sorted(steps)  # what was logged after the last checkpoint is gone, not doubled


def test_a_misspelt_field_and_an_unknown_encoder_stop_the_process_and_write_nothing(known_data, environment, tmp_path):
    path = f"--config.data.path={known_data.path}"
    attempts = {
        "field": start(environment, str(tmp_path / "field"), path, "--config.optim.learning_rat=.1"),
        "type": start(environment, str(tmp_path / "type"), path, "--config.data.epochs=many"),
        "argument": start(environment, str(tmp_path / "argument"), path, "width=32"),
        "encoder": start(environment, str(tmp_path / "encoder"), path, config="tests/small_config.py:lazer"),
    }
    named = {"field": "learning_rat", "type": "many", "argument": "width=32", "encoder": "lazer"}
    for name, process in attempts.items():
        assert process.wait(timeout=200) != 0, name
        assert named[name] in said(str(tmp_path / name)), said(str(tmp_path / name))
        assert not os.path.exists(tmp_path / name)


def test_the_tiny_experiment_ends_with_a_table_and_a_report(environment, tmp_path):
    workdir = str(tmp_path / "run")
    finish(start(environment, workdir, f"--config.data.path={tmp_path}/data", config="experiments/tiny.py"), workdir)
    test = json.loads(read(f"{workdir}/results.json"))["test"]
    model = next(iter(test))
    assert test[model]["auc"] > 0.53, test  # .549 when written; 4000 candidates, standard error .013
    assert test["oracle"]["auc"] > 0.75 and test["popularity"]["auc"] > 0.5
    out = said(workdir)
    assert "oracle" in out and "samples/s" in out and f"{test[model]['auc']:.4f}" in out
    pictures = [name for name in os.listdir(f"{workdir}/report") if name.endswith(".png")]
    page = read(f"{workdir}/report/index.html")
    assert len(pictures) >= 4 and all(f'src="{name}"' in page for name in pictures)
