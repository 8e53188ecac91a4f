"""What is exported scores as the run did, without the model's code."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.config import from_dict, to_dict
from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.metrics import auc
from laser_jax.models import ENCODERS
from laser_jax.pipeline import BatchSource
from laser_jax.requests import Requests as StoredRequests
from laser_jax.requests import RequestsWriter
from laser_jax.schema import Field, Schema
from laser_jax.serving.export import Run, export_model, load_run, main, score_split
from laser_jax.serving.exported import PIECE, ExportedModel, Requests
from laser_jax.serving.files import ModelError
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory
from laser_jax.step import make_eval_step
from tests.conftest import USERS
from tests.small_config import get_config

LENGTH = 16


def untrained(config) -> Run:
    """As a run would be at its first step."""
    factory = StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig()))
    return Run(config, factory.create(0), factory, 0, config.features.dictionaries())


def scores_of(run: Run, split: str) -> np.ndarray:
    """Of all candidates of a split, by the model itself."""
    source = BatchSource(run.config.data, run.config.features, split)
    eval_step, found = make_eval_step(run.factory), []
    for batch in source.stream(0, source.num_batches):
        found.append(np.asarray(eval_step(run.state, batch.step)[0])[batch.step["mask"]])
    return np.concatenate(found)


def test_a_config_comes_back_from_its_json():
    for encoder in ENCODERS:
        config = get_config(encoder)
        again = from_dict(json.loads(json.dumps(to_dict(config))))
        assert again == config
    with pytest.raises(ValueError, match="no config called 'Foo'"):
        from_dict({"class": "Foo"})
    with pytest.raises(ValueError, match="MeshConfig has no field 'x'"):
        from_dict({"class": "MeshConfig", "x": 1})


def test_it_scores_as_the_run_did(workdir, trained, model):
    logits, labels = score_split(model, trained.config, "test")
    with np.load(workdir / "predictions.npz") as stored:
        np.testing.assert_array_equal(labels, stored["labels"])
        np.testing.assert_allclose(logits, stored["logits"], rtol=1e-5, atol=1e-5)
    assert np.std(logits) > 1e-3


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_exports_and_short_histories_may_have_programs_of_their_own(known_data, tmp_path, encoder):
    config = get_config(encoder)
    config.data.path, config.head.matches, config.head.mean = known_data.path, ("item", "category"), True
    fresh = untrained(config)
    export_model(fresh, str(tmp_path / "model"), lengths=(8,))
    model = ExportedModel(str(tmp_path / "model"))
    wanted = scores_of(fresh, "test")
    near = dict(rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(score_split(model, config, "test")[0], wanted, **near)
    # One request at a time, and of every other one a single candidate: every form and length has its turn.
    stored = StoredRequests.open(os.path.join(known_data.path, "requests", "test"))
    vault, at, shapes = seqvault.open(config.data.vault_path), 0, set()
    for number in range(24):
        found = stored.read(np.array([number]))
        count = len(found.label) if number % 2 else 1
        histories = vault.gather(found.user, found.time, LENGTH, fields=model.event_fields)
        candidates = {name: values[:count] for name, values in found.candidates.items()}
        logits = model.score(histories, Requests(found.time, np.array([0, count]), candidates, found.context))
        np.testing.assert_allclose(logits, wanted[at : at + count], **near)
        if number % 2:  # the same candidates so often that they are scored piece by piece
            wide = 2 * PIECE - number
            candidates = {name: np.resize(values, wide) for name, values in found.candidates.items()}
            logits = model.score(histories, Requests(found.time, np.array([0, wide]), candidates, found.context))
            np.testing.assert_allclose(logits, np.resize(wanted[at : at + count], wide), **near)
        at += len(found.label)
        shapes.add((count > 1, histories.num_events > 8))
    assert len(shapes) == 4


def test_it_loads_without_the_models_code(model, tmp_path):
    """Neither flax nor optax nor a model is imported by who only scores."""
    code = """
        import sys
        import numpy as np
        from laser_jax.serving.exported import ExportedModel, Requests
        from laser_jax.vault import Histories
        model = ExportedModel(sys.argv[1])
        columns = {name: np.zeros(3, np.int64) for name in ("time", *model.event_fields)}
        histories = Histories(columns, np.array([0, 3]), lambda name: None, 0, 3)
        two = {"item": np.array([1, 2]), "category": np.array([0, 1])}
        print(model.score(histories, Requests(np.array([9]), np.array([0, 2]), two, {"scene": np.array([1])})).shape)
        unwanted = [name for name in sys.modules if name.startswith(("laser_jax.models", "flax", "optax", "orbax"))]
        assert not unwanted, unwanted
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), model.path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == "(2,)", done.stderr


def test_a_model_that_was_trained_again_needs_no_compiling(trained, tmp_path):
    config = trained.config
    again = dataclasses.replace(trained, state=trained.factory.create(5))
    export_model(trained, str(tmp_path / "1"))
    export_model(again, str(tmp_path / "2"))
    told = []
    first = ExportedModel(str(tmp_path / "1"))
    first.compile(2, 8, lambda done, shapes: told.append(shapes))
    assert told and set(told) == {len(told)}
    count = len(told)
    second = ExportedModel(str(tmp_path / "2"), before=first)
    assert second.compile(2, 8, lambda done, shapes: told.append(shapes)) == count == len(told)
    found = [score_split(model, config, "test")[0] for model in (second, ExportedModel(str(tmp_path / "2")), first)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 0.01
    # What is not compiled yet still is.
    second.compile(4, 8, lambda done, shapes: told.append(shapes))
    assert len(told) > count


def test_what_training_never_met_is_told(model):
    known = np.load(os.path.join(model.path, "ids", "item.npy"))
    items = np.array([known[0], known[0] + 1, -5, known[-1]])
    candidates = {"item": items, "category": np.zeros(4, np.int32)}
    nothing = model.look_up({name: np.zeros(0, np.int64) for name in ("time", *model.event_fields)})
    asked = Requests(np.array([9]), np.array([0, 4]), candidates, {"scene": np.array([1])})
    unseen = model.assemble([nothing], asked).unseen
    np.testing.assert_array_equal(unseen, ~np.isin(items, known))
    assert unseen.any() and not unseen.all()


@pytest.fixture(scope="module")
def asked(known_data, trained, model):
    """Histories and requests that the model scores."""
    found = StoredRequests.open(os.path.join(known_data.path, "requests", "test")).read(np.arange(3))
    vault = seqvault.open(trained.config.data.vault_path)
    histories = vault.gather(found.user, found.time, LENGTH, fields=model.event_fields)
    return vault, histories, Requests(found.time, found.offsets, dict(found.candidates), dict(found.context))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: replace(r, candidates=without(r.candidates, "item")), "candidates has no 'item': .* item, category"),
        (lambda r: replace(r, candidates=r.candidates | {"colour": r.candidates["item"]}), "'colour', which is none"),
        (
            lambda r: replace(r, candidates=r.candidates | {"item": r.candidates["item"] / 1}),
            "'item' is of type float64",
        ),
        (lambda r: replace(r, candidates=r.candidates | {"item": r.candidates["item"].astype(str)}), "of type <U"),
        (lambda r: replace(r, candidates=r.candidates | {"item": r.candidates["item"].astype(object)}), "type object"),
        (
            lambda r: replace(r, candidates=r.candidates | {"item": r.candidates["item"][1:]}),
            r"'item' has shape .* by ",
        ),
        (lambda r: replace(r, candidates=r.candidates | {"item": r.candidates["item"].tolist()}), "'item' is a list"),
        (lambda r: replace(r, context={}), "context has no 'scene'"),
        (lambda r: replace(r, context=r.context | {"page": r.context["scene"]}), "'page', which is none of .*scene"),
        (lambda r: replace(r, context={"scene": r.context["scene"][:1]}), r"'scene' has shape \(1,\): .* needs \(3,\)"),
        (lambda r: replace(r, time=r.time[:2]), r"time has shape \(2,\): by the histories of 3 users it needs \(3,\)"),
        (lambda r: replace(r, time=r.time / 2), "time is of type float64"),
        (lambda r: replace(r, offsets=r.offsets[:-1]), r"offsets has shape \(3,\): by 3 requests it needs \(4,\)"),
        (lambda r: replace(r, offsets=r.offsets.tolist()), "offsets is a list: give a numpy array of integers"),
        (lambda r: replace(r, offsets=r.offsets[::-1].copy()), "offsets are .* begin with 0 and never fall"),
    ],
)
def test_requests_that_a_model_cannot_score_are_refused_by_column(model, asked, change, message):
    _, histories, requests = asked
    assert len(model.score(histories, requests)) == requests.offsets[-1]
    with pytest.raises(ValueError, match=message):
        model.score(histories, change(requests))


def test_histories_that_a_model_cannot_read_are_refused_by_column(model, asked):
    vault, histories, requests = asked
    one = vault.get(requests.time[0], LENGTH, fields=model.event_fields)
    with pytest.raises(ValueError, match="histories is a History, which is one user's: give what vault.gather"):
        model.score(one, requests)
    with pytest.raises(ValueError, match="histories have no column 'dwell', only time, item, category, action"):
        model.score(vault.gather(USERS[:3], None, LENGTH, fields=model.event_fields[:3]), requests)
    with pytest.raises(ValueError, match="histories are of no user"):
        model.score(histories.take([]), requests)
    decoded = seqvault.Histories(
        histories.columns | {"category": histories.columns["category"].astype(str)}, histories.offsets, None, 0, LENGTH
    )
    with pytest.raises(ValueError, match="histories' 'category' is of type <U"):
        model.score(decoded, requests)
    # What the model does not read may be there.
    everything = vault.gather(USERS[:3], requests.time, LENGTH)
    assert len(model.score(everything, requests)) == requests.offsets[-1]


def test_strings_may_be_any_array_of_texts_or_their_codes(tmp_path):
    brands = np.array(["ant", "bee", "cat", "ant"])
    with seqvault.create(tmp_path / "vault", Schema(fields=(Field("brand", "string"),))) as writer:
        writer.write({"user": [1, 1, 2, 2], "time": [1, 2, 3, 4], "brand": brands.tolist()})
    vault = seqvault.open(tmp_path / "vault")
    codes = vault.encode("brand", ["bee", "ant"])
    with RequestsWriter(tmp_path / "requests" / "train", candidates={"brand": "int32"}) as writer:
        writer.write(user=[1], time=[9], counts=[2], candidates={"brand": codes}, label=[0, 1])
    config = get_config("mean")
    config.data.path, config.features = str(tmp_path), FeatureConfig(item=(FieldConfig("brand", 4, 10),))
    model = ExportedModel(export_model(untrained(config), str(tmp_path / "model")).path)
    histories, moment, offsets = vault.gather(np.array([1]), 9, LENGTH), np.array([9]), np.array([0, 2])
    wanted = model.score(histories, Requests(moment, offsets, {"brand": codes}, {}))
    assert np.ptp(wanted) > 0
    for texts in (np.array(["bee", "ant"]), np.array(["bee", "ant"], object)):
        np.testing.assert_array_equal(model.score(histories, Requests(moment, offsets, {"brand": texts}, {})), wanted)
    with pytest.raises(ValueError, match="'brand' is of type float64: give strings, or their codes as integers"):
        model.score(histories, Requests(moment, offsets, {"brand": codes / 1}, {}))


def test_models_that_score_unlike_each_other_have_unlike_versions(tmp_path, known_data):
    config = get_config("mean")
    config.data.path = known_data.path
    run = untrained(config)
    other = dataclasses.replace(run, state=run.factory.create(1))
    made = [
        export_model(one, str(tmp_path / str(number)), quantize=quantize).version
        for number, (one, quantize) in enumerate([(run, "none"), (run, "none"), (run, "bf16"), (other, "none")])
    ]
    assert made[0] == made[1] and len(set(made)) == 3 and all(version.startswith("0-") for version in made)


def without(columns, name):
    return {key: values for key, values in columns.items() if key != name}


@pytest.mark.parametrize(("quantize", "tolerance"), [("bf16", 2e-2), ("int8", 3e-2)])
def test_tables_may_be_smaller(trained, model, tmp_path, quantize, tolerance):
    made = export_model(trained, str(tmp_path / "small"), quantize=quantize)
    small = ExportedModel(made.path)
    wanted, labels = score_split(model, trained.config, "test")
    logits, _ = score_split(small, trained.config, "test")
    assert 0 < np.abs(logits - wanted).max() < tolerance * np.abs(wanted).max()
    assert abs(auc(labels, logits) - auc(labels, wanted)) < 0.01
    sizes = [os.path.getsize(os.path.join(one.path, "tables", "0.npy")) for one in (model, small)]
    assert sizes[1] < 0.6 * sizes[0]


def test_every_damaged_file_is_named(model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model.path, copy)
    files = [os.path.join(folder, name) for folder, _, names in os.walk(copy) for name in names]
    assert len(files) > 8
    for path in files:
        with open(path, "rb") as file:
            data = file.read()
        for damaged in (
            data[:-1],
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :],
        ):
            with open(path, "wb") as file:
                file.write(damaged)
            with pytest.raises(ModelError, match=os.path.basename(path)):
                ExportedModel(str(copy))
        os.remove(path)
        with pytest.raises(ModelError, match=os.path.basename(path)):
            ExportedModel(str(copy))
        with open(path, "wb") as file:
            file.write(data)
    ExportedModel(str(copy))


def test_wrong_settings_are_told(trained, model, tmp_path):
    with pytest.raises(ModelError, match="is there already"):
        export_model(trained, model.path)
    with pytest.raises(ValueError, match="quantize='int4'"):
        export_model(trained, str(tmp_path / "x"), quantize="int4")
    with pytest.raises(ValueError, match=r"lengths=\(17,\): give numbers from 1 to the history's 16"):
        export_model(trained, str(tmp_path / "x"), lengths=(17,))
    with pytest.raises(ModelError, match="holds no run"):
        load_run(str(tmp_path))
    with pytest.raises(ModelError, match="holds no exported model"):
        ExportedModel(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_the_command_says_in_one_line_what_is_wrong(workdir, tmp_path, capsys):
    out = f"--out={tmp_path}/model"
    assert main([f"--workdir={workdir}", out, "--lengths=64,abc"]) == 1
    assert capsys.readouterr().err == "error: --lengths=64,abc: give numbers of events, such as 64,256\n"
    (tmp_path / "run").mkdir()
    shutil.copy(workdir / "config.json", tmp_path / "run")
    assert main([f"--workdir={tmp_path}/run", out]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/run has no checkpoint: train first, for 20 steps at least\n"
    assert os.listdir(tmp_path / "run") == ["config.json"]


def test_the_command_says_what_became_of_the_auc(workdir, tmp_path):
    command = [sys.executable, "-m", "laser_jax.serving.export", f"--workdir={workdir}", f"--out={tmp_path}/model"]
    done = subprocess.run([*command, "--quantize=int8", "--version=v7"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "version v7, 3 programs" in done.stdout and "test AUC 0." in done.stdout and "->" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "is there already" in done.stderr
