"""A whole run in this process: it learns, says what it did, and refuses what makes no sense."""

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from laser_jax import hosts, runlog, train
from laser_jax import vault as seqvault
from laser_jax.checkpoint import CheckpointError, Checkpoints
from laser_jax.features import FieldConfig
from laser_jax.fingerprint import fingerprint
from laser_jax.pipeline import BatchSource
from laser_jax.requests import Requests, RequestsWriter
from laser_jax.runlog import RunLog
from laser_jax.sharding import device_share, make_mesh, place_batch
from laser_jax.state import StateFactory
from laser_jax.step import make_eval_step, make_train_step
from laser_jax.vault import VaultError
from tests import dictionary_config
from tests.conftest import LENGTHS, SPAN, USERS
from tests.small_config import get_config


def config_for(data, encoder="laser_plus", **changes):
    config = get_config(encoder)
    config.data.path = data.path
    for name, value in changes.items():
        *parents, last = name.split("__")
        part = config
        for parent in parents:
            part = getattr(part, parent)
        assert hasattr(part, last)
        setattr(part, last, value)
    return config


@pytest.fixture(scope="module")
def finished(known_data, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("run"))
    predictions = train.run(config_for(known_data), workdir)
    return workdir, predictions


def results(workdir):
    with open(os.path.join(workdir, "results.json"), encoding="utf-8") as file:
        return json.load(file)


def test_it_learns_what_the_data_holds(finished):
    workdir, predictions = finished
    test = results(workdir)["test"]
    assert test["laser_plus"]["auc"] > 0.85  # mean pooling of the same model stays near .5 .. .7
    assert test["laser_plus"]["auc"] == predictions.figures().auc
    assert test["oracle"]["auc"] > 0.9 and test["laser_plus"]["logloss"] < 0.5


def test_predictions_are_stored_in_the_order_of_the_requests(finished, known_data):
    workdir, predictions = finished
    rows = known_data.requests["test"]
    with np.load(os.path.join(workdir, "predictions.npz")) as stored:
        counts = [len(r["item"]) for r in rows]
        np.testing.assert_array_equal(stored["users"], np.repeat([r["user"] for r in rows], counts))
        np.testing.assert_array_equal(stored["labels"], np.concatenate([r["label"] for r in rows]))
        np.testing.assert_array_equal(stored["reference_oracle"], np.concatenate([r["oracle"] for r in rows]))
        lengths = [len(known_data.history(r["user"], r["time"], 16)["time"]) for r in rows]
        np.testing.assert_array_equal(stored["lengths"], np.repeat(lengths, counts))
        np.testing.assert_array_equal(stored["logits"], predictions.logits)


def test_a_user_without_a_history_is_scored(finished):
    _, predictions = finished
    unknown = predictions.users == USERS[0]
    assert unknown.any() and (predictions.lengths[unknown] == 0).all()
    assert np.isfinite(predictions.logits).all() and np.ptp(predictions.logits[unknown]) > 0


def test_it_leaves_a_report_with_its_pictures(finished):
    workdir, _ = finished
    report = os.path.join(workdir, "report")
    with open(os.path.join(report, "index.html"), encoding="utf-8") as file:
        page = file.read()
    pictures = [name for name in os.listdir(report) if name.endswith(".png")]
    assert {"loss.png", "roc.png", "calibration.png", "auc_by_length.png", "gates_0.png", "gates_by_age.png"} <= set(
        pictures
    )
    assert all(f'src="{name}"' in page and os.path.getsize(os.path.join(report, name)) > 1000 for name in pictures)
    assert "silent segments" in page and results(workdir)["gates"]["segments"] > 0
    assert "oracle" in page and os.listdir(os.path.join(workdir, "tensorboard"))


def test_it_logs_every_line_and_keeps_the_newest_and_the_best(finished, known_data):
    workdir, _ = finished
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    total = max(line["step"] for line in lines)
    assert [line["step"] for line in lines if "loss" in line] == [*range(10, total, 10), total]
    valid = {line["step"]: line["valid_auc"] for line in lines if "valid_auc" in line}
    assert list(valid) == [*range(60, total, 60), total]
    best = max(valid, key=valid.get)
    assert results(workdir)["step"] == best
    kept = sorted(int(name) for name in os.listdir(os.path.join(workdir, "checkpoints")) if name.isdigit())
    assert kept == sorted({best, total, 140})  # the newest two and the best
    assert lines[-2]["loss"] < 0.8 * lines[0]["loss"]


def test_a_finished_run_is_not_trained_again(finished, known_data):
    workdir, first = finished
    before = results(workdir)
    again = train.run(config_for(known_data), workdir)
    np.testing.assert_array_equal(again.logits, first.logits)
    assert results(workdir)["test"] == before["test"] and results(workdir)["step"] == before["step"]


def test_another_config_in_the_same_workdir_is_refused_by_name(finished, known_data):
    workdir, _ = finished
    before = sorted(os.listdir(workdir))
    for change in ({"width": 32}, {"encoder__key_width": 8}, {"train__seed": 1}):
        name = next(iter(change)).replace("__", ".")
        with pytest.raises(ValueError, match=rf"another config \({name}: \d+ -> \d+\)"):
            train.run(config_for(known_data, **change), workdir)
    with pytest.raises(ValueError, match="encoder.class: 'LaserConfig' -> 'TaConfig'"):
        train.run(config_for(known_data, "ta"), workdir)
    assert sorted(os.listdir(workdir)) == before


def test_a_run_of_a_version_without_a_field_goes_on_where_the_field_has_its_default(finished, known_data, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    del told["encoder"]["fusion"], told["train"]["gate_maps"]
    path.write_text(json.dumps(told), encoding="utf-8")
    again = train.run(config_for(known_data), str(tmp_path / "run"))
    np.testing.assert_array_equal(again.logits, finished[1].logits)
    with pytest.raises(ValueError, match="another config \\(encoder.fusion: 'absent' -> 'sum'\\)"):
        train.run(config_for(known_data, encoder__fusion="sum"), str(tmp_path / "run"))


class Interrupted:
    """Sends this process SIGTERM after a given step, or during the validation of one."""

    def __init__(self, monkeypatch):
        self.after = self.during = None
        stepped, moved = RunLog.stepped, train.Run.moved

        def and_now(run, what):
            moved(run, what)
            if what.startswith(f"validation at step {self.during},"):
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(train.Run, "moved", and_now)

        def and_then(log, step, *args, **kwargs):
            stepped(log, step, *args, **kwargs)
            if step == self.after:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(RunLog, "stepped", and_then)


@pytest.mark.parametrize("make", [get_config, dictionary_config.get_config])
def test_sigterm_at_any_step_changes_nothing_in_the_end(known_data, tmp_path, monkeypatch, make):
    monkeypatch.setattr("tests.test_train.get_config", make)
    changes = dict(encoder="ta", data__epochs=3, train__eval_every=20, train__save_every=7)
    straight, cut = str(tmp_path / "straight"), str(tmp_path / "cut")
    want = train.run(config_for(known_data, **changes), straight)
    interrupted = Interrupted(monkeypatch)
    for step in (3, 20, 33):  # right after a start, at an evaluation, in between
        interrupted.after = step
        with pytest.raises(hosts.Stopped, match=f"SIGTERM .* step {step}.* goes on from step {step}$"):
            train.run(config_for(known_data, **changes), cut)
    # Again, during the evaluation with which a run goes on; and during the last one.
    last = train_batches(straight)
    for step, during in ((40, 40), (None, 40), (last, last)):
        interrupted.after, interrupted.during = step, during
        with pytest.raises(hosts.Stopped, match=f"SIGTERM during validation at step {during}.*on from step {during}$"):
            train.run(config_for(known_data, **changes), cut)
    interrupted.after = interrupted.during = None
    unjudged = os.path.join(cut, "checkpoints", str(last), "state")
    before = os.stat(unjudged).st_ino
    got = train.run(config_for(known_data, **changes), cut)
    assert os.stat(unjudged).st_ino == before, "what was saved stays until something newer is"
    np.testing.assert_array_equal(got.logits, want.logits)
    final = [newest_sums(workdir) for workdir in (straight, cut)]
    assert final[0] == final[1] and len(final[0]) > 20
    judged = []
    for workdir in (straight, cut):
        with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
            lines = map(json.loads, file)
            judged.append([(line["step"], line["valid_auc"]) for line in lines if "valid_auc" in line])
    assert judged[0] == judged[1] and len(judged[0]) == 3


def train_batches(workdir: str) -> int:
    """Steps of a finished run."""
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
        return max(json.loads(line)["step"] for line in file)


def newest_sums(workdir):
    """Checksums of everything in the newest checkpoint."""
    newest = max(int(name) for name in os.listdir(os.path.join(workdir, "checkpoints")) if name.isdigit())
    with open(os.path.join(workdir, "checkpoints", str(newest), "checksums", "metadata"), encoding="utf-8") as file:
        return json.load(file)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(known_data, tmp_path, caplog):
    changes = dict(data__epochs=2, train__save_every=10, encoder="mean")
    straight, damaged = str(tmp_path / "straight"), str(tmp_path / "damaged")
    train.run(config_for(known_data, **changes), straight)
    shutil.copytree(straight, damaged)
    os.remove(os.path.join(damaged, "results.json"))
    steps = sorted(int(name) for name in os.listdir(os.path.join(damaged, "checkpoints")) if name.isdigit())
    flip_a_bit_of_the_largest_chunk(os.path.join(damaged, "checkpoints", str(steps[-1])))
    train.run(config_for(known_data, **changes), damaged)
    assert "DAMAGED CHECKPOINT" in caplog.text and f"{steps[-1]}" in caplog.text
    assert [name.split("-")[0] for name in os.listdir(f"{damaged}/checkpoints-damaged")] == [str(steps[-1])]
    assert newest_sums(damaged) == newest_sums(straight)
    for step in os.listdir(os.path.join(damaged, "checkpoints")):
        if step.isdigit():
            flip_a_bit_of_the_largest_chunk(os.path.join(damaged, "checkpoints", step))
    with pytest.raises(CheckpointError, match="no checkpoint of .* can be read"):
        train.run(config_for(known_data, **changes), damaged)


def test_a_save_that_failed_is_no_damage_of_the_others(known_data, tmp_path, monkeypatch):
    config, workdir = config_for(known_data, encoder="mean", train__save_every=10), str(tmp_path / "run")
    want = train.run(config, workdir)
    os.remove(os.path.join(workdir, "results.json"))
    steps = sorted(os.listdir(os.path.join(workdir, "checkpoints")))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.CheckpointManager, "wait_until_finished", full)
        with pytest.raises(OSError, match="No space left"):
            train.run(config, workdir)
    assert sorted(os.listdir(os.path.join(workdir, "checkpoints"))) == steps
    assert not os.path.exists(f"{workdir}/checkpoints-damaged")
    np.testing.assert_array_equal(train.run(config, workdir).logits, want.logits)


def test_a_run_waits_for_another_one_in_its_workdir(known_data, tmp_path, caplog):
    config, workdir = config_for(known_data, encoder="mean"), tmp_path / "run"
    os.mkdir(workdir)
    with open(workdir / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def once_it_waits(times, call, *arguments):
            def run():
                while caplog.text.count("held by another run in this workdir: waiting") < times:
                    time.sleep(0.05)
                call(*arguments)

            threading.Thread(target=run, daemon=True).start()

        once_it_waits(1, os.kill, os.getpid(), signal.SIGTERM)
        with pytest.raises(hosts.Stopped, match="SIGTERM while another run held .*run/lock"):
            train.run(config, str(workdir))
        assert os.listdir(workdir) == ["lock"]
        once_it_waits(2, other.close)
        train.run(config, str(workdir))
    assert (workdir / "results.json").exists()


def flip_a_bit_of_the_largest_chunk(folder, part=0.5):
    """Behind this part of it, wherever it lies: orbax leaves stretches in its files that nothing reads any more."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/state/"}).result()
    chunk = max((store[key] for key in store.list().result()), key=len)
    files = [os.path.join(where, name) for where, _, names in os.walk(f"{folder}/state") for name in names]
    flipped = 0
    for path in files:
        with open(path, "r+b") as file:
            start = file.read().find(chunk)
            if start >= 0:
                place = start + int(part * len(chunk))
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 4]))
                flipped += 1
    assert flipped


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__path": "/nowhere"}, "/nowhere is no data set"),
        ({"optim__microbatches": 5}, "optim.microbatches=5 does not divide the 12 requests"),
        ({"optim__table_optimizer": "sgd"}, "table_optimizer='sgd' is not one of"),
        ({"train__warm_parts": ("head",)}, "warm_parts"),
        ({"mesh__data": 7}, "mesh data=7 x model=1 does not use the 1 devices"),
        ({"features__event": (FieldConfig("actoin", 2, 4),)}, "'actoin'"),
    ],
)
def test_a_start_that_fails_does_not_occupy_the_workdir(known_data, tmp_path, change, message):
    workdir = str(tmp_path / "run")
    with pytest.raises((ValueError, FileNotFoundError, VaultError), match=message):
        train.run(config_for(known_data, **change), workdir)
    assert not os.path.exists(os.path.join(workdir, "config.json"))  # the corrected command must not be refused


def with_other_requests(data, path, change):
    """A config for requests that `change` makes of the known ones, with the vault where it is."""
    shutil.copytree(os.path.join(data.path, "vocab"), path / "vocab")
    for split in data.requests:
        stored = Requests.open(os.path.join(data.path, "requests", split))
        found = change(stored.read(np.arange(len(stored))))
        with RequestsWriter(
            path / "requests" / split, context=stored.context_columns, candidates=stored.columns
        ) as writer:
            counts = np.diff(found.offsets)
            keys = dict(user=found.user, time=found.time, counts=counts, label=found.label)
            writer.write(**keys, context=found.context, candidates=found.candidates)
    config = config_for(data, "mean", data__epochs=1)
    config.data.path, config.data.vault = str(path), config.data.vault_path
    return config


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda found: replace(found, time=found.time // 10**6), r"time \d+, its request 0; .* schema, which is 's'"),
        (lambda found: replace(found, user=found.user + 1000), "it knows none of their users, such as"),
    ],
)
def test_requests_that_find_no_event_at_all_are_refused_before_the_start(known_data, tmp_path, change, reason):
    config, workdir = with_other_requests(known_data, tmp_path / "data", change), tmp_path / "run"
    with pytest.raises(ValueError, match=f"data/requests/train: none of 150 requests .* {known_data.path}.*{reason}"):
        train.run(config, str(workdir))
    assert not workdir.exists()


def test_requests_of_which_one_finds_an_event_or_of_an_empty_vault_may_train(known_data, tmp_path):
    stranger, known = 1000, USERS[np.argmax(LENGTHS)]

    def mostly_strangers(found):
        user, time = np.full(len(found), stranger), found.time.copy()
        user[7], time[7] = known, SPAN
        return replace(found, user=user, time=time)

    config = with_other_requests(known_data, tmp_path / "data", mostly_strangers)
    BatchSource(config.data, config.features, "train").check_histories()
    with seqvault.open(config.data.vault) as vault, seqvault.create(tmp_path / "empty", vault.schema):
        pass
    config = with_other_requests(known_data, tmp_path / "cold", lambda found: replace(found, user=found.user + 1000))
    config.data.vault = str(tmp_path / "empty")
    assert train.run(config, str(tmp_path / "run")).lengths.max() == 0


def test_labels_that_are_all_alike_are_told_once(known_data, tmp_path, caplog):
    config = with_other_requests(known_data, tmp_path / "data", lambda found: replace(found, label=0 * found.label))
    config.train.eval_every = 10
    caplog.set_level("INFO", "laser_jax")
    train.run(config, str(tmp_path / "run"))
    for name in ("results.json", "metrics.jsonl"):
        with open(tmp_path / "run" / name, encoding="utf-8") as file:
            assert "NaN" not in file.read(), "JSON has no such word"
    told = [record.getMessage() for record in caplog.records if "alike" in record.getMessage()]
    assert [text.partition(" are all alike")[0] for text in told] == [
        "the labels of steps 1 to 10",
        "the labels of valid",
        "the labels of test",
    ]


def test_dead_gates_are_told_at_every_validation_where_there_are_segments_to_compare(
    known_data, tmp_path, caplog, monkeypatch
):
    changes = dict(data__epochs=1, train__eval_every=10)
    train.run(config_for(known_data, "laser", **changes), str(tmp_path / "alive"))
    assert results(tmp_path / "alive")["gate_contrast"] > runlog.DEAD_GATES and "dead gates" not in caplog.text
    # Gates that read nothing of an event.
    dead = config_for(known_data, "laser", **changes, encoder__tied=False, encoder__kernel="pallas")
    build = dead.encoder.build

    def without_keys(**sizes):
        encoder = build(**sizes)
        encoder.wk[...] *= 0
        return encoder

    monkeypatch.setattr(type(dead.encoder), "build", lambda _, **sizes: without_keys(**sizes))
    train.run(dead, str(tmp_path / "dead"))
    told = [record.getMessage() for record in caplog.records if "dead gates" in record.getMessage()]
    assert told and told[0].startswith("dead gates at step 10: loudness varies by only 0.0")
    assert "training: encoder.kernel='pallas' does nothing: of 4 candidates" in caplog.text
    # A history of one segment has nothing to compare it with.
    caplog.clear()
    short = config_for(known_data, "laser", **changes, data__history_length=4, encoder__tied=False)
    train.run(short, str(tmp_path / "short"))
    assert results(tmp_path / "short")["gate_contrast"] is None and "dead gates" not in caplog.text


def test_gate_contrast_is_the_spread_of_loudness_over_its_mean(known_data):
    config = config_for(known_data, "laser")
    mesh = make_mesh(config.mesh, config.data.batch_size)
    factory = StateFactory(config.build_model, config.features, config.optim, mesh)
    state = factory.create(seed=0)
    batch = BatchSource(config.data, config.features, "train", device_share(mesh)).batch(0)
    with jax.set_mesh(mesh):
        placed = place_batch(batch.step, mesh)
        loudness = np.asarray(make_eval_step(factory)(state, placed)[1]["loudness"], np.float64)
        _, counts = make_train_step(factory)(state, placed)
    width, spreads = config.encoder.segment, []
    for request, candidate in zip(*np.nonzero(batch.step["mask"]), strict=True):
        segments = -(-batch.step["length"][request] // width)
        if segments > 1:
            held = loudness[request, candidate, loudness.shape[2] - segments :]
            spreads.append(np.sqrt(np.mean((held - held.mean()) ** 2)) / held.mean())
    assert 0 < len(spreads) == counts.compared
    np.testing.assert_allclose(counts.contrast, sum(spreads), rtol=1e-5)


def test_a_run_on_a_vault_that_changes_says_so_and_how_to_pin_it(known_data, tmp_path):
    shutil.copytree(known_data.path, tmp_path / "data")
    config, workdir = config_for(known_data, "mean", data__epochs=1), str(tmp_path / "run")
    config.data.path = str(tmp_path / "data")
    train.run(config, workdir)
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as file:
        told = json.load(file)["fingerprint"]
    # Of a vault that was never appended to, the manifest says all.
    assert [name for name in told if "vault" in name] == ["vault/manifest.json"]
    event = {name: values[:1] for name, values in known_data.events.items()}
    changed = r"run on a vault that has changed since, .*vault/{}.*another --workdir.* data.snapshot"
    with seqvault.open(config.data.vault_path) as vault:
        vault.append(event)
        before = fingerprint(config.data)
        with pytest.raises(ValueError, match=changed.format("appended: 'absent'")):
            train.run(config, workdir)
        vault.append(event | {"time": event["time"] + 1})
        assert fingerprint(config.data) != before
        vault.merge()
        with pytest.raises(ValueError, match=changed.format("manifest.json")):
            train.run(config, workdir)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(known_data, tmp_path):
    config = config_for(known_data, "mean", optim__table_learning_rate=1e38, train__save_every=7, train__log_every=1000)
    with pytest.raises(FloatingPointError, match="step"):
        train.run(config, str(tmp_path))
    checkpoints = Checkpoints(str(tmp_path))
    assert checkpoints.newest() is None
    checkpoints.close()
