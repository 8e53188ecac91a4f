"""Checksums: on host and devices alike, for any sharding, and other for any flipped bit or swapped element."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laser_jax import checksums as module
from laser_jax.checksums import checksums
from tests.compilation import with_devices


def arrays():
    rng = np.random.default_rng(0)
    return {
        "rows": jnp.asarray(rng.normal(size=(48, 5)).astype(np.float32)),
        "half": jnp.asarray(rng.normal(size=(16, 4)), jnp.bfloat16),
        "flags": jnp.asarray(rng.random(8) < 0.5).astype(jnp.uint8),
        "cube": jnp.asarray(rng.normal(size=(8, 12, 3)).astype(np.float32)),
        "step": jnp.int32(7),
        "empty": jnp.zeros((0, 3)),
    }


def test_host_and_devices_agree(monkeypatch):
    on_host = checksums(arrays())
    monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
    assert checksums(arrays()) == on_host
    assert len(set(on_host.values())) == len(on_host)


@pytest.mark.parametrize("name", ["rows", "half", "cube", "step"])
def test_a_flipped_bit_shows(name):
    given = arrays()
    before = checksums(given)
    host = np.array(given[name])
    bits = host.reshape(-1).view(np.uint8)
    for byte in range(0, len(bits), 7):
        bits[byte] ^= 16
        now = checksums(given | {name: jnp.asarray(host)})
        bits[byte] ^= 16
        assert [key for key in now if now[key] != before[key]] == [f"['{name}']"]


def test_swapped_rows_show():
    given = arrays()
    swapped = given["rows"][np.r_[1, 0, 2:48]]
    assert checksums({"rows": swapped}) != checksums({"rows": given["rows"]})


SHARDED = """
import json, jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from laser_jax.checksums import checksums
from tests.test_checksums import arrays
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
specs = {"rows": P(("data", "model")), "half": P(None, "model"), "flags": P("data"), "cube": P("model", "data")}
placed = {name: jax.device_put(x, NamedSharding(mesh, specs.get(name, P()))) for name, x in arrays().items()}
print(json.dumps(checksums(placed)))
"""


def test_any_sharding_gives_the_same():
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env={**os.environ, "XLA_FLAGS": with_devices(4)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == checksums(arrays()) and jax.device_count() == 1
