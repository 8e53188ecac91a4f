"""Through the real door: python -m laser_jax.main as a process, killed, resumed, misused."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from tests.e2e import processes
from tests.e2e.processes import final_state, finish, read, said, start, steps_saved, wait_for_a_checkpoint
from tests.test_train import flip_a_bit_of_the_largest_chunk


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return processes.environment(str(tmp_path_factory.mktemp("programs")))


def test_a_killed_run_ends_with_the_same_bits_as_one_never_killed(known_data, environment, tmp_path):
    flags = (f"--config.data.path={known_data.path}", "--config.data.epochs=12")
    straight, killed = str(tmp_path / "straight"), str(tmp_path / "killed")
    finish(start(environment, straight, *flags), straight)
    total = steps_saved(straight)[-1]

    process = start(environment, killed, *flags)
    wait_for_a_checkpoint(killed, process)
    process.kill()
    process.wait()
    saved = steps_saved(killed)
    assert saved and saved[-1] < total, f"killed with {saved} of {total} steps saved:\n{said(killed)[-2000:]}"
    assert not os.path.exists(os.path.join(killed, "results.json"))
    finish(start(environment, killed, *flags), killed)
    assert "going on from step" in said(killed)

    states = [final_state(workdir) for workdir in (straight, killed)]
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


def test_sigterm_saves_where_it_stands_and_ends_well(known_data, environment, tmp_path):
    flags = (f"--config.data.path={known_data.path}", "--config.data.epochs=200", "--config.train.eval_every=10000")
    workdir = str(tmp_path / "run")
    process = start(environment, workdir, *flags)
    wait_for_a_checkpoint(workdir, process)
    process.send_signal(signal.SIGTERM)
    finish(process, workdir)
    stopped = steps_saved(workdir)[-1]
    assert f"stopped: SIGTERM at step {stopped}; the same command goes on from step {stopped}" in said(workdir)
    assert not os.path.exists(os.path.join(workdir, "results.json"))

    for step in steps_saved(workdir):
        flip_a_bit_of_the_largest_chunk(f"{workdir}/checkpoints/{step}", part=0)  # it does not even decode
    process = start(environment, workdir, *flags)
    assert process.wait(300) == 2
    assert "no checkpoint of" in said(workdir) and "give another --workdir" in said(workdir)


def test_a_wrong_command_ends_with_one_line_and_writes_nothing(known_data, environment, tmp_path):
    path = f"--config.data.path={known_data.path}"
    attempts = {
        "field": ([path, "--config.optim.learning_rat=.1"], {}, "OptimConfig has no field 'learning_rat'; did you"),
        "part": ([path, "--config.optm.clip=1"], {}, "did you mean 'optim'?"),
        "value of a value": ([path, "--config.optim.clip.x=1"], {}, "a float has no field 'x'"),
        "path": ([path, "--config.features.item[0=1"], {}, "features.item[0"),
        "type": ([path, "--config.data.epochs=many"], {}, "--config.data.epochs=many"),
        "argument": ([path, "width=32"], {}, "unexpected arguments width=32"),
        "encoder": ([path], {"config": "tests/small_config.py:lazer"}, "no encoder 'lazer'; choose one of laser"),
        "file": ([path], {"config": "tests/no_config.py:laser"}, "tests/no_config.py"),
        "data": ([f"--config.data.path={tmp_path}"], {}, f"{tmp_path} is no data set"),
        "snapshot": ([path, "--config.data.snapshot=monday"], {}, "monday"),
        "value": ([path, "--config.optim.learning_rate=0"], {}, "optim.learning_rate=0.0"),
    }
    started = {
        name: start(environment, str(tmp_path / name), *flags, **config)
        for name, (flags, config, _) in attempts.items()
    }
    for name, process in started.items():
        told = [line for line in said_after(process, str(tmp_path / name)).splitlines() if "WARNING" not in line]
        assert process.returncode == 2, (name, told)
        assert len(told) == 1 and told[0].startswith("error: ") and attempts[name][2] in told[0], told
        assert not os.path.exists(tmp_path / name)


def said_after(process, workdir):
    process.wait(timeout=200)
    return said(workdir)


def test_the_tiny_experiment_ends_with_a_table_and_a_report(environment, tmp_path):
    workdir = str(tmp_path / "run")
    finish(start(environment, workdir, f"--config.data.path={tmp_path}/data", config="experiments/tiny.py"), workdir)
    test = json.loads(read(f"{workdir}/results.json"))["test"]
    model = next(iter(test))
    assert test[model]["auc"] > 0.58, test  # .628 when written, by another seed .610; standard error .013
    assert test["oracle"]["auc"] > 0.75 and test["popularity"]["auc"] > 0.5
    out = said(workdir)
    assert "oracle" in out and "samples/s" in out and f"{test[model]['auc']:.4f}" in out
    pictures = [name for name in os.listdir(f"{workdir}/report") if name.endswith(".png")]
    page = read(f"{workdir}/report/index.html")
    assert len(pictures) >= 4 and all(f'src="{name}"' in page for name in pictures)
