"""The benchmark of whole steps, on a small data set: that it takes what the study compares, and says what it timed."""

import json

import pytest

from experiments.bench import steps

NAMES = ("laser_plus", "mean", "transformer")


@pytest.fixture
def small(known_data, monkeypatch):
    monkeypatch.setitem(steps.STANDARD, "small", ("tests/small_config.py", {"data.path": known_data.path}))


def test_the_last_line_has_every_model(small, capsys):
    steps.main(["--data=small", f"--models={','.join(NAMES)}", "--batches=2", "--rounds=1"])
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    for what in ("train", "score"):
        assert set(told[f"{what}_ms"]) == set(told[f"{what}_over_laser_plus"]) == set(NAMES)
        assert told[f"{what}_over_laser_plus"]["laser_plus"] == 1 and min(told[f"{what}_ms"].values()) > 0
        assert sum(f"{what} compiled" in line for line in err.splitlines()) == len(NAMES)
    lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert sorted(lines[1:]) == sorted(NAMES)
    assert "1 rounds of 2 and 2 batches" in out


def test_what_is_timed_takes_its_steps(small, known_data):
    """A step that changed nothing would be timed as well."""
    config = steps.study_configs("small", ["ta"])["ta"]
    mesh = steps.make_mesh(config.mesh, config.data.batch_size, config.data.eval_batch_size)
    batches = steps.real_batches(config, mesh, 2)
    assert [len(found) for found in batches.values()] == [2, 2]
    factory = steps.StateFactory(config.build_model, config.features, config.optim, mesh, steps=10)
    with steps.jax.set_mesh(mesh):
        run = steps.training(factory, batches["train"])
        assert int(run().step) == 2 and int(run().step) == 4
        logits = [scores for scores, _ in steps.scoring(factory, batches["score"])()]
    assert [scores.shape for scores in logits] == [batch["mask"].shape for batch in batches["score"]]


def test_models_have_what_the_search_found():
    """The kept runs of completejourney say so."""
    found = steps.study_configs("completejourney", ["ta", "transformer"])
    assert found["ta"].encoder.mass and found["transformer"].encoder.ffn == 4
    assert {config.optim.learning_rate for config in found.values()} == {0.001}


@pytest.mark.parametrize("wrong", ["--models=laser_plus,lazer", "--batches=0", "--models=gbdt"])
def test_what_makes_no_sense_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stopped:
        steps.main([wrong])
    assert stopped.value.code == 2
    assert wrong.split("=")[1].split(",")[-1] in capsys.readouterr().err
