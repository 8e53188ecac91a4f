"""What was asked live becomes requests to train on; scored anew they have the scores that were answered."""

import glob
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.requests import Requests as StoredRequests
from laser_jax.requests import RequestsError
from laser_jax.serving.ranker import Ranker
from laser_jax.serving.replay import main, replay
from laser_jax.serving.request_log import RequestLog, read_log
from tests.serving.test_ranker import WRITING, events_of, request_of


@pytest.fixture(scope="module")
def logged(model, known_data, tmp_path_factory):
    """(log, vault, requests, answers) of forty requests, after each of which some candidates are clicked or seen."""
    folder = tmp_path_factory.mktemp("logged")
    shutil.copytree(os.path.join(known_data.path, "vault"), folder / "vault")
    rng, rows, answers = np.random.default_rng(0), known_data.requests["test"][:40], []
    log = RequestLog(str(folder / "log"))
    with seqvault.open(folder / "vault", writing=WRITING) as vault:
        ranker = Ranker(model, vault)
        for row in rows:
            request = ranker.check(request_of(row))
            answers.append(ranker.rank([request])[0])
            log.add(request, answers[-1], model.name, model.version)
            chosen = rng.permutation(len(row["item"]))[:3]
            times = row["time"] + rng.integers(0, 100, len(chosen))
            vault.append(events_of(row["user"], times, row["item"][chosen], row["category"][chosen]))
        vault.merge()
        log.close()
        assert (log.written, log.lost) == (40, 0)
        yield str(folder / "log"), vault, rows, answers


def test_it_is_what_was_asked_and_what_became_of_it(logged, model, tmp_path):
    log, vault, rows, answers = logged
    report = replay(log, vault, model, str(tmp_path / "requests"), "item", 50, {"action": [1, 2]}, compare=1.0)
    assert report.requests == report.compared == 40 and report.others == 0 and report.difference < 1e-5
    stored = StoredRequests.open(str(tmp_path / "requests")).read(np.arange(40))
    np.testing.assert_array_equal(stored.user, [row["user"] for row in rows])
    np.testing.assert_array_equal(stored.time, [row["time"] for row in rows])
    np.testing.assert_array_equal(stored.sequence, [answer.as_of for answer in answers])
    np.testing.assert_array_equal(stored.candidates["item"], np.concatenate([row["item"] for row in rows]))
    np.testing.assert_array_equal(stored.context["scene"], [row["scene"] for row in rows])
    live = np.concatenate([answer.logits for answer in answers])
    np.testing.assert_array_equal(stored.references["live"], live)
    labels = []
    for row in rows:
        history = vault.get(row["user"], 10**6)
        after = (history["time"] >= row["time"]) & (history["time"] < row["time"] + 50) & (history["action"] > 0)
        labels.append(np.isin(row["item"], history["item"][after]))
    np.testing.assert_array_equal(stored.label, np.concatenate(labels))
    assert 0 < report.positives == stored.label.sum() < report.candidates == len(live)


def test_a_score_that_is_not_what_was_answered_is_noticed(logged, model, tmp_path):
    log, vault, _, _ = logged
    lines = list(read_log(log))
    lines[7]["logits"][0] += 0.25
    lines[8]["version"] = "another"
    os.mkdir(tmp_path / "log")
    (tmp_path / "log" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = replay(str(tmp_path / "log"), vault, model, str(tmp_path / "requests"), "item", 50, compare=1.0)
    assert (report.compared, report.others) == (39, 1) and report.difference == pytest.approx(0.25, abs=1e-4)
    half = replay(log, vault, model, str(tmp_path / "half"), "item", 50, compare=0.5)
    assert half.compared == 20 and half.difference < 1e-5
    none = replay(log, vault, model, str(tmp_path / "none"), "item", 50, compare=0.0)
    assert none.compared == 0 and none.difference is None


def test_scores_that_are_no_numbers_are_left_out_or_noticed(logged, model, tmp_path, monkeypatch):
    """One of them among the logged ones must not keep the others from being trained on, nor hide a difference."""
    log, vault, _, _ = logged
    lines = list(read_log(log))
    lines[3]["logits"][1] = float("nan")
    os.mkdir(tmp_path / "log")
    (tmp_path / "log" / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = replay(str(tmp_path / "log"), vault, model, str(tmp_path / "requests"), "item", 50, compare=1.0)
    assert (report.requests, report.unscored) == (39, 1) and report.difference < 1e-5
    monkeypatch.setattr(model, "score", lambda histories, asked, _: np.full(asked.offsets[-1], np.nan, np.float32))
    assert replay(log, vault, model, str(tmp_path / "all"), "item", 50, compare=1.0).difference == np.inf


def test_what_a_crash_left_is_read_and_damage_is_named(logged, model, tmp_path):
    log, vault, _, _ = logged
    (name,) = glob.glob(f"{log}/*.jsonl")
    with open(name, encoding="utf-8") as file:
        text = file.read()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "a.jsonl").write_text(text[:-5])
    assert len(list(read_log(str(cut)))) == 39
    (cut / "a.jsonl").write_text("x" + text[1:])
    with pytest.raises(ValueError, match="a.jsonl, line 1 is damaged"):
        list(read_log(str(cut)))
    with pytest.raises(ValueError, match="holds no request log"):
        list(read_log(str(tmp_path)))
    with pytest.raises(ValueError, match="item 'x' is none of the candidates' fields item, category"):
        replay(log, vault, model, str(tmp_path / "out"), "x", 5)
    (tmp_path / "there").mkdir()
    with pytest.raises(RequestsError, match="exists"):
        replay(log, vault, model, str(tmp_path / "there"), "item", 5)


def test_a_click_of_the_same_second_is_an_answer(model, known_data, tmp_path):
    """A request without a time sees what happened up to now, and a click may come before the second is over."""
    shutil.copytree(os.path.join(known_data.path, "vault"), tmp_path / "vault")
    row, log = known_data.requests["test"][0], RequestLog(str(tmp_path / "log"))
    with seqvault.open(tmp_path / "vault", writing=WRITING) as vault:
        now = row["time"]
        ranker = Ranker(model, vault, clock=lambda: now)
        vault.append(events_of(row["user"], [now], row["item"][:1], row["category"][:1]))
        request = ranker.check(replace(request_of(row), time=None))
        answer = ranker.rank([request])[0]
        log.add(request, answer, model.name, model.version)
        vault.append(events_of(row["user"], [now, now - 1], row["item"][1:3], row["category"][1:3]))
        log.close()
        report = replay(str(tmp_path / "log"), vault, model, str(tmp_path / "requests"), "item", 50, compare=1.0)
        assert answer.time == now + 1 and report.difference < 1e-5
    # The first one it saw; the third happened before it, and came late.
    label = StoredRequests.open(str(tmp_path / "requests")).read(np.arange(1)).label
    np.testing.assert_array_equal(label, np.arange(len(row["item"])) == 1)


def test_arguments_and_lines_that_make_no_sense_are_told(logged, model, tmp_path):
    log, vault, _, _ = logged

    def refused(message, folder=log, window=50, **options):
        with pytest.raises(ValueError, match=message):
            replay(folder, vault, model, str(tmp_path / "out"), "item", window, **options)
        assert not (tmp_path / "out").exists()

    for window in (0, -5, 2**63 - 1, 10**20):
        refused(f"window={window}: need 1 to", window=window)
    for share in (-1.0, 2.0, float("nan")):
        refused(f"compare={share}", compare=share)
    refused("where 'time': events have the fields", where={"time": 5})
    (tmp_path / "log").mkdir()
    first, second = list(read_log(log))[:2]
    missing = {**second, "candidates": {"item": second["candidates"]["item"]}}
    for wrong, message in (
        ("[]", "a.jsonl, line 2 is damaged: '\\[\\]' is no JSON object"),
        ('{"user": 1}', "a.jsonl, line 2 is damaged: its 'time' is None"),
        (json.dumps({**second, "time": None}), "line 2 is damaged: its 'time' is None"),
        ("\xff", "a.jsonl, line 2 is damaged: 'utf-8' codec"),
        (json.dumps(missing), "has the candidates item; the model has item, category"),
        (json.dumps({**second, "logits": [0.0]}), "candidates 'item' and logits are of unlike lengths"),
    ):
        (tmp_path / "log" / "a.jsonl").write_bytes(f"{json.dumps(first)}\n{wrong}\n".encode("latin-1"))
        refused(message, folder=str(tmp_path / "log"))


def test_what_may_yet_be_clicked_is_left_out(logged, model, tmp_path, capsys):
    log, vault, rows, _ = logged
    until = sorted(row["time"] for row in rows)[20] + 50
    over = [row for row in rows if row["time"] + 50 <= until]
    report = replay(log, vault, model, str(tmp_path / "some"), "item", 50, until=until)
    assert (report.requests, report.unfinished) == (len(over), 40 - len(over)) and 0 < len(over) < 40
    stored = StoredRequests.open(str(tmp_path / "some")).read(np.arange(len(over)))
    np.testing.assert_array_equal(stored.time, [row["time"] for row in over])
    soon = [json.dumps({**line, "time": int(time.time()) - 10}) + "\n" for line in read_log(log)]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "a.jsonl").write_text("".join(soon))
    arguments = [f"--log={tmp_path}/log", f"--vault={vault.path}", f"--model={model.path}", "--window=3600"]
    assert main([*arguments, f"--out={tmp_path}/none"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["unfinished"] == 40
    assert f"no score was compared: {tmp_path}/log has no request whose window is over" in said.err
    assert main([*arguments, f"--out={tmp_path}/all", f"--until={int(time.time()) + 3600}", "--compare=0"]) == 0


def test_a_log_of_another_version_is_not_taken_for_one_that_was_compared(logged, model, tmp_path, capsys):
    log, vault, _, _ = logged
    (tmp_path / "log").mkdir()
    lines = [json.dumps({**line, "version": "0"}) + "\n" for line in read_log(log)]
    (tmp_path / "log" / "a.jsonl").write_text("".join(lines))
    arguments = [f"--log={tmp_path}/log", f"--vault={vault.path}", f"--model={model.path}", "--compare"]
    assert main([*arguments, "1", f"--out={tmp_path}/all"]) == 1
    assert "the 40 requests that were to be scored anew are of other versions" in capsys.readouterr().err
    assert main([*arguments, "0", f"--out={tmp_path}/none"]) == 0


def test_a_log_that_cannot_keep_up_loses_lines_and_says_so(logged, model, tmp_path, monkeypatch):
    _, _, rows, answers = logged
    from laser_jax.serving import request_log

    monkeypatch.setattr(request_log, "_FILE_BYTES", 500)
    log = RequestLog(str(tmp_path / "log"))
    request = Ranker(model, logged[1]).check(request_of(rows[0]))
    for _ in range(50):
        log.add(request, answers[0], "m", "1")
    log.close()
    assert log.written == 50 and len(os.listdir(tmp_path / "log")) > 5, "files are changed when they are full"
    assert len(list(read_log(str(tmp_path / "log")))) == 50
    log.add(request, answers[0], "m", "1")  # nobody writes any more
    monkeypatch.setattr(log._queue, "maxsize", 1)
    log.add(request, answers[0], "m", "1")
    assert log.lost == 1


FILLED = """
import os, resource, shutil, sys, time
import numpy as np
from laser_jax.serving.ranker import CheckedRequest, Ranking
from laser_jax.serving.request_log import RequestLog

folder = sys.argv[1]
log = RequestLog(folder)

def add(user):
    before = log.written + log.lost
    answer = Ranking(np.zeros(20, np.float32), np.zeros(20, bool), 3, 4, 5)
    log.add(CheckedRequest(user, {"item": np.arange(20)}), answer, "m", "1")
    while log.written + log.lost == before:
        time.sleep(0.001)

add(0)
size = sum(os.path.getsize(os.path.join(folder, name)) for name in os.listdir(folder))
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))  # as a disk with 50 bytes left
add(1)
add(2)
assert (log.written, log.lost) == (1, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
add(3)
os.rename(folder, folder + ".old")  # somebody tidies up
shutil.copytree(folder + ".old", folder + ".seen")
shutil.rmtree(folder + ".old")
add(4)
open(folder + ".blocked", "w").close()
shutil.rmtree(folder)
os.rename(folder + ".blocked", folder)  # a file where the folder was
add(5)
os.remove(folder)
add(6)
log.close()
assert (log.written, log.lost) == (4, 3), (log.written, log.lost)
"""


def test_a_full_disk_or_a_folder_that_goes_costs_no_more_than_its_lines(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILLED, str(tmp_path / "log")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line["user"] for line in read_log(str(tmp_path / "log.seen"))] == [0, 3]
    assert [line["user"] for line in read_log(str(tmp_path / "log"))] == [6]
