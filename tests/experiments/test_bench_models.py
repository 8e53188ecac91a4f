"""The models' benchmark at sizes that prove nothing but that it runs and says what it skipped."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest

from experiments.bench import models_measure as bench
from laser_jax.optim import OptimConfig

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
NAMES = ("laser_plus", "transformer", "ta")


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """What the benchmark printed, and the folder it wrote."""
    out = str(tmp_path_factory.mktemp("bench") / "out")
    command = [sys.executable, "-m", "experiments.bench.models", f"--models={','.join(NAMES)}", "--lengths=40,80"]
    command += ["--candidates=1,2", "--d=16", "--rounds=1", "--events=160", f"--out={out}"]
    environment = {**os.environ, "GLIBC_TUNABLES": ""}  # no second start
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return done, out


def test_last_line_is_json_with_figures_or_reasons(door):
    result = json.loads(door[0].stdout.splitlines()[-1])
    assert result["at"] == {"length": 80, "candidates": 1}
    for kind in bench.KINDS:
        assert result[f"transformer_over_laser_plus_{kind}"] > 0
        assert result[f"laser_plus_over_ta_{kind}"] > 0
        for missing in (f"hstu_over_laser_plus_{kind}", f"transformer_over_laser_plus_{kind}_c100"):
            assert result[missing] is None and "not asked for" in result["reasons"][missing]
    assert math.isfinite(result["laser_plus_length_exponent"])
    assert math.isfinite(result["laser_plus_length_exponent_forward"])
    assert set(result["length_exponents"]) == set(NAMES)
    assert result["length_exponents"]["ta"]["train_lengths"] == [40, 80]
    assert {"device", "cpus", "glibc_tunables"} <= set(result)


def test_a_table_for_each_size(door):
    done, out = door
    with open(os.path.join(out, "models.md"), encoding="utf-8") as file:
        written = file.read()
    for text in (done.stdout, written):
        for size in ("L=40, C=1, B=4", "L=80, C=1, B=2", "L=40, C=2, B=4", "L=80, C=2, B=2"):
            (block,) = (part for part in text.split("\n\nL=") if part.removeprefix("L=").startswith(size[2:]))
            cells = [[c.strip() for c in line.strip("|").split("|")] for line in block.splitlines() if "|" in line]
            head, _, *lines = cells[:5]
            assert [line[0] for line in lines] == list(NAMES)
            for line in lines:
                found = dict(zip(head, line, strict=True))
                assert all(
                    float(found[f"us a {per}, {kind}"]) > 0 for per in ("sample", "request") for kind in bench.KINDS
                )
    assert "size 4 of 4" in done.stderr and "min gone" in done.stderr


def test_every_model_and_size_is_in_the_csv(door):
    with open(os.path.join(door[1], "models.csv"), encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    sizes = {(line["model"], line["length"], line["candidates"]) for line in lines}
    assert len(lines) == len(sizes) == len(NAMES) * 2 * 2
    for line in lines:
        assert float(line["train_us_a_sample"]) > 0 and int(line["train_rounds"]) == 1 and not line["train_skipped"]
        assert int(line["train_temporaries_bytes"]) > 0 and int(line["parameters"]) > 0
        assert int(line["macs_request"]) + int(line["macs_candidate"]) > 0


def limits(**changed) -> bench.Limits:
    return bench.Limits(**{**dict(seconds=20.0, temporaries=1e10, rounds=1, deadline=math.inf), **changed})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (dict(seconds=1e-12), "s a step"),
        (dict(temporaries=1.0), "GB of temporaries"),
        (dict(deadline=-math.inf), "no time left"),
        (dict(pace={("mean", kind): 0.0 for kind in bench.KINDS}, seconds=0.0), "s a step"),  # known by running only
    ],
)
def test_what_is_skipped_says_why(changed, reason):
    told, size, optim = [], bench.Size(2, 8, 1, 4), OptimConfig()
    (row,) = bench.measure(["mean"], size, "zipf", optim, limits(**changed), 0.0, lambda what, share: told.append(what))
    for kind in bench.KINDS:
        assert row.timings[kind].seconds is None and row.sample_us(kind) is None
        assert reason in row.timings[kind].skipped
    assert reason in " ".join(told)


def test_slow_contenders_get_fewer_rounds_spread_over_the_turns():
    counts = bench.plan_rounds({"slow": 5.0, "fast": 0.1, "too slow": 100.0}, seconds=30.0, most=10)
    assert counts == {"fast": 10, "slow": 2, "too slow": 1}
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in counts}
    times = bench.interleave_unevenly(calls, counts, lambda turn, turns: None)
    assert {name: order.count(name) for name in counts} == counts and set(times) == set(counts)
    assert 3 <= order.index("slow") <= 6
