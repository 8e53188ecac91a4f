"""Runs of `python -m laser_jax.main` as processes, alone or several together."""

import os
import socket
import subprocess
import sys
import time

import jax

from laser_jax.checkpoint import Checkpoints
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from tests.compilation import with_devices
from tests.small_config import get_config

ENCODER = "laser_plus"


def environment(cache: str, devices: int = 1) -> dict[str, str]:
    """Compiled programs are shared by all processes with one `cache`: the same program twice, compiled once."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": with_devices(devices),
        "NPROC": "16",  # threads enough for the collectives of all devices
    }


def start(env, workdir, *flags, config=f"tests/small_config.py:{ENCODER}", out=None):
    """A process whose output goes to WORKDIR.out, or to `out`."""
    os.makedirs(os.path.dirname(workdir), exist_ok=True)
    command = [sys.executable, "-m", "laser_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
    with open(out or f"{workdir}.out", "a", encoding="utf-8") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def start_together(env, workdir, number, *flags, config):
    """`number` processes that train together; their outputs go to WORKDIR.0.out, WORKDIR.1.out, ..."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = (f"--coordinator={address}", f"--num_processes={number}", "--heartbeat_s=15")
    return [
        start(env, workdir, *together, f"--process_id={i}", *flags, config=config, out=f"{workdir}.{i}.out")
        for i in range(number)
    ]


def read(path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def said(workdir) -> str:
    return read(f"{workdir}.out")


def finish(process, workdir):
    assert process.wait(timeout=400) == 0, said(workdir)[-4000:]


def finish_together(processes, workdir):
    """Waits for all; none outlives a failure."""
    try:
        for i, process in enumerate(processes):
            assert process.wait(timeout=300) == 0, said(f"{workdir}.{i}")[-4000:]
    finally:
        for process in processes:
            process.kill()


def steps_saved(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if os.path.isdir(folder) else []


def wait_for_a_checkpoint(workdir, process):
    """Until the first one is there, or the process ends."""
    deadline = time.monotonic() + 200
    while not steps_saved(workdir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def final_state(workdir):
    """What the newest checkpoint holds, on one device."""
    config = get_config(ENCODER)
    factory = StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig(), 12))
    checkpoints = Checkpoints(workdir)
    state = checkpoints.restore(checkpoints.newest(), factory.abstract())
    checkpoints.close()
    return jax.device_get(state)
