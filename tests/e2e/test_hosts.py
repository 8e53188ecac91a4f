"""Two real processes with two devices each: the same run as one process, and what is left when one of them dies.

With a growing dictionary, on whose rows all processes must agree.
"""

import json
import shutil
import signal
import time

import numpy as np
import pytest

from tests.e2e import processes
from tests.e2e.processes import finish, finish_together, read, said, start, start_together, steps_saved

EPOCHS, SAVE_EVERY = 3, 10
CONFIG = "tests/dictionary_config.py:laser_plus"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def flags(known_data):
    return (
        f"--config.data.path={known_data.path}",
        "--config.data.batch_size=16",
        "--config.data.eval_batch_size=16",
        f"--config.data.epochs={EPOCHS}",
        f"--config.train.save_every={SAVE_EVERY}",
        "--config.train.log_every=1",
        "--config.train.eval_every=1000",
    )


@pytest.fixture(scope="module")
def alone(programs, flags, tmp_path_factory):
    """One process, one device."""
    workdir = str(tmp_path_factory.mktemp("alone") / "run")
    finish(start(processes.environment(programs), workdir, *flags, config=CONFIG), workdir)
    return workdir


@pytest.fixture(scope="module")
def together(programs, flags, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("together") / "run")
    finish_together(start_together(processes.environment(programs, 2), workdir, 2, *flags, config=CONFIG), workdir)
    return workdir


def losses(workdir) -> dict[int, float]:
    lines = map(json.loads, read(f"{workdir}/metrics.jsonl").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def predictions(workdir) -> dict[str, np.ndarray]:
    with np.load(f"{workdir}/predictions.npz") as stored:
        return dict(stored)


def test_two_processes_learn_what_one_learns(alone, together):
    one, two = losses(alone), losses(together)
    assert one.keys() == two.keys() and len(one) == steps_saved(alone)[-1] > 2 * SAVE_EVERY
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    want, got = predictions(alone), predictions(together)
    for name in want.keys() - {"logits"}:
        np.testing.assert_array_equal(got[name], want[name])
    np.testing.assert_allclose(got["logits"], want["logits"], atol=1e-3)


def test_only_the_first_process_speaks_and_writes(together):
    first, second = (said(f"{together}.{i}") for i in range(2))
    assert "test AUC" in first and "samples/s" in first
    assert "samples/s" not in second and "valid AUC" not in second and "test AUC" not in second


@pytest.fixture(scope="module")
def killed(programs, flags, tmp_path_factory):
    """A run of two whose second process was killed after the first checkpoint: its workdir, and the seconds that the
    first went on."""
    workdir = str(tmp_path_factory.mktemp("killed") / "run")
    first, second = start_together(processes.environment(programs, 2), workdir, 2, *flags, config=CONFIG)
    try:
        processes.wait_for_a_checkpoint(workdir, first)
        second.kill()
        since = time.monotonic()
        assert first.wait(timeout=60) != 0
        seconds = time.monotonic() - since
    finally:
        first.kill()
        second.kill()
    assert steps_saved(workdir)
    return workdir, seconds


def test_the_death_of_a_process_ends_the_other_with_a_reason(killed):
    workdir, seconds = killed
    assert seconds < 60
    deadline = time.monotonic() + 10  # the last words are spoken by a process of their own
    while "another process is gone" not in said(f"{workdir}.0") and time.monotonic() < deadline:
        time.sleep(0.1)
    text = said(f"{workdir}.0")
    assert "another process is gone; start all processes again with the same commands" in text.replace("\n", " ") or (
        "another process is gone (" in text
    ), text[-3000:]
    assert "test AUC" not in text


def test_after_a_death_the_same_commands_end_with_the_same_bits(killed, together, programs, flags, tmp_path):
    workdir = str(tmp_path / "run")
    shutil.copytree(killed[0], workdir)
    finish_together(start_together(processes.environment(programs, 2), workdir, 2, *flags, config=CONFIG), workdir)
    assert "going on from step" in said(f"{workdir}.0")
    want, got = predictions(together), predictions(workdir)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_one_process_goes_on_where_two_stopped(killed, alone, programs, flags, tmp_path):
    """On another mesh: the same examples in the same order, or the losses would not be those of a run never stopped."""
    workdir = str(tmp_path / "run")
    shutil.copytree(killed[0], workdir)
    finish(start(processes.environment(programs, 4), workdir, *flags, "--config.mesh.model=4", config=CONFIG), workdir)
    assert "going on from step" in said(workdir)
    one, other = losses(alone), losses(workdir)
    assert one.keys() == other.keys()
    np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-5)


def test_sigterm_to_one_process_saves_and_ends_both(programs, flags, tmp_path):
    workdir = str(tmp_path / "run")
    both = start_together(
        processes.environment(programs, 2), workdir, 2, *flags, "--config.data.epochs=300", config=CONFIG
    )
    processes.wait_for_a_checkpoint(workdir, both[0])
    both[1].send_signal(signal.SIGTERM)
    finish_together(both, workdir)
    stopped = steps_saved(workdir)[-1]
    for i in range(2):
        assert f"stopped: SIGTERM at step {stopped}" in said(f"{workdir}.{i}")
