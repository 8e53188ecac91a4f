"""The study: intervals against plain recounting, and one table through its door on a small data set."""

import csv
import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from experiments.bench.models import write as write_timings
from experiments.bench.models_measure import Row, Size, Timing
from experiments.paper import keep, lengths, models, open_points, pareto, search, study, table2, table3, table4
from experiments.paper.intervals import over_seeds, paired, resampled_aucs, weighted_auc
from experiments.paper.outsider import WINDOWS, match_counts
from laser_jax import metrics
from laser_jax.batch import Batch
from laser_jax.models.base import GatheredSource
from laser_jax.row_placement import places


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_a_weighted_auc_is_that_of_repeated_samples(n, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(0, 6, n) / 2.0  # ties
    positive = np.r_[True, False, rng.random(n - 2) < 0.5]
    weight = np.r_[1, 1, rng.integers(0, 4, n - 2)]
    order = np.argsort(logits, kind="stable")
    ends = np.flatnonzero(np.r_[logits[order][1:] != logits[order][:-1], True])
    want = metrics.auc(np.repeat(positive, weight), np.repeat(logits, weight))
    assert weighted_auc(order, ends, positive, weight.astype(float)) == pytest.approx(want)


def test_resamples_are_of_users_and_the_same_for_all_models():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 25)
    labels = (rng.random(1000) < 0.3).astype(np.float32)
    good, bad = labels + rng.normal(size=1000), 0.2 * labels + rng.normal(size=1000)
    ours, theirs = (resampled_aucs(users, labels, logits, 200) for logits in (good, bad))
    assert ours[0] == pytest.approx(metrics.auc(labels, good))
    difference, low, high = paired(ours[None], theirs[None])
    assert 0 < low < difference < high
    assert paired(ours[None], ours[None]) == (0, 0, 0)
    assert over_seeds(ours[None], theirs[None]) is None  # of one seed nothing is known of others
    # One user alone is the same in every resample; forty are not.
    assert np.ptp(resampled_aucs(np.zeros(1000), labels, good, 20)) == 0 < np.ptp(ours[1:])


@pytest.mark.parametrize("seeds", [(3, 3), (2, 2), (3, 5)])
def test_intervals_over_seeds_hold_what_is_true_in_95_of_100(seeds):
    """Whether seeds differ more than users, as much, or less."""
    rng = np.random.default_rng(0)
    for of_users, of_seeds in ((0.0002, 0.001), (0.0006, 0.001), (0.001, 0.0002)):
        held, trials = 0, 1000
        for _ in range(trials):
            # What the users at hand, and each resample of them, add to the difference between the models.
            users = rng.normal(0, of_users) + np.r_[0, rng.normal(0, of_users, 200)]
            ours, theirs = (rng.normal(0.8, of_seeds, (count, 1)) + np.zeros(201) for count in seeds)
            low, high = over_seeds(ours + users, theirs)
            held += low <= 0 <= high
        assert 0.93 < held / trials < 0.985
    apart = 0.8 + np.array([[0.001], [-0.001], [0.0]]) + np.zeros((3, 401))
    low, high = over_seeds(apart, apart - 0.0005)
    assert low < 0 < high and paired(apart, apart - 0.0005)[1] > 0


def test_match_counts_are_those_of_the_events():
    rng = np.random.default_rng(0)
    b, c, length = 2, 3, 60

    def wanted(rows):
        return places(np.array(rows), 10).astype(np.int32)[None, None]  # of one device

    items = rng.integers(0, 4, (b, c))
    batch = Batch(
        step={
            "age": np.sort(rng.integers(0, 1000, (b, length)), axis=1)[:, ::-1].astype(np.int32),
            "length": np.array([60, 17], np.int32),
            "mask": np.array([[True, True, False], [True, True, True]]),
            "history": {"item": rng.integers(0, 4, (b, length)), "action": rng.integers(0, 3, (b, length))},
            "candidates": {"item": items},
            "side": {"item": np.where(items == 0, -1, items)},
            "unique": {"item": wanted([0, 2, 4, 9]), "action": wanted([0, 1, 2])},
        },
        users=np.arange(b), lengths=np.array([60, 17]), references={}, num_unique={},
        tables={"item": ("item", 10), "action": ("action", 3)},
    )  # fmt: skip
    got = match_counts(batch, ["item"], {"action": 3})
    windows = [w for w in WINDOWS if w <= length]
    assert windows == [20, 50]
    for row, (i, j) in enumerate(zip(*np.nonzero(batch.step["mask"]), strict=True)):
        candidate = batch.step["candidates"]["item"][i, j]
        hits = [
            k
            for k in range(length - batch.step["length"][i], length)
            if batch.step["history"]["item"][i, k] == candidate
        ]
        hits = hits if candidate != 0 else []
        want = [min(batch.step["length"][i], w) for w in windows]
        want += [sum(k >= length - w for k in hits) for w in windows]
        want.append(batch.step["age"][i, hits[-1]] if hits else np.nan)
        for action in (1, 2):
            want += [
                sum(k >= length - w and batch.step["history"]["action"][i, k] == action for k in hits) for w in windows
            ]
        np.testing.assert_array_equal(got[row], want)


def tokens_of(encoder) -> tuple[int, ...]:
    """The shape of what an encoder of the study's sizes says of 2 requests of 10 candidates; nothing is computed."""
    graph, params = nnx.split(encoder)
    x, q = (jax.ShapeDtypeStruct(size, np.float32) for size in ((2, 1000, encoder.width_in), (2, 10, 64)))
    mask, age = (jax.ShapeDtypeStruct((2, 1000), kind) for kind in (np.bool_, np.int32))
    w_in = jax.ShapeDtypeStruct((encoder.width_in, 64), np.float32)

    def tokens(params, x, w_in, mask, age, q):
        return nnx.merge(graph, params)(GatheredSource((x,), w_in, {}), mask, age, q, {}).tokens

    return jax.eval_shape(tokens, params, x, w_in, mask, age, q).shape


def test_every_model_is_given_as_many_trials_and_known_fields():
    assert set(models.ORDER) == {*table2.models.ENCODERS, study.GBDT}
    for name in models.ORDER:
        if name != study.GBDT:
            assert len(models.trials(name)) == 4
            for column in models.COLUMNS:
                run = study.Study("experiments/completejourney.py", {}, "unused")
                for trial in models.trials(name):
                    run.config(
                        models.model(name, column).but(name, **{k.replace(".", "__"): v for k, v in trial.items()}), 0
                    )
    laser, plus = (models.model(base, "tricks") for base in ("laser", "laser_plus"))
    searched = plus.but("laser_plus", **{k.replace(".", "__"): v for k, v in models.KNOBS["laser_plus"].items()})
    for base, also in ((laser, ()), (plus, (pareto.forms,)), (searched, (pareto.forms,))):
        for rows in (table3.ablations, table4.widths, open_points.choices, *also):
            if base is searched and rows is not pareto.forms:  # of the model's own form, see search.chosen_rates
                continue
            found = rows(base)
            assert len({run.digest(row) for row in found}) == len(found) > 3
            for row in found:
                build_model = run.config(row, 0).build_model
                ranker = nnx.eval_shape(lambda build_model=build_model: build_model(nnx.Rngs(0)))
                assert tokens_of(ranker.encoder) == (2, 10, ranker.encoder.num_tokens, 64)
    with pytest.raises(ValueError, match="there is no model 'lasre'"):
        models.names("ta,lasre")
    with pytest.raises(ValueError, match="has no field 'encoder.widht'"):
        run.config(models.model("ta", "plain").but("ta", encoder__widht=3), 0)


class Rehearsal:
    """A study whose runs cost nothing: `score` says what validation finds of settings, with seed 0 or another one."""

    def __init__(self, score, most=100):
        self.score, self.left, self.done = score, most, {}

    def run(self, runs):
        for model, seed in runs:
            key = json.dumps([model.settings, seed])
            if key not in self.done and self.left:
                self.left -= 1
                self.done[key] = self.score(model.settings, seed)

    def outcome(self, model, seed):
        found = self.done.get(json.dumps([model.settings, seed]))
        return None if found is None else types.SimpleNamespace(results={"valid_auc": found})

    def finished(self, model, seeds):
        return [outcome for seed in range(seeds) if (outcome := self.outcome(model, seed)) is not None]


def test_each_setting_is_tried_on_the_best_so_far_by_three_seeds_unless_it_is_far_behind_with_one():
    own = models.model("ta", "tricks").settings
    gains = {"optim.learning_rate": 0.01, "optim.table_learning_rate": -0.01, "encoder.mass": 0.01}
    ran = Rehearsal(lambda settings, _: 0.5 + sum(gain for name, gain in gains.items() if name in settings))
    chosen = search.choose(ran, "tricks", ["ta", "gbdt"], trials=4, run=True)
    low, mass = {"optim.learning_rate": 1e-3}, {"encoder.mass": True}
    tried = [({}, range(3)), (low, range(3)), (low | {"optim.table_learning_rate": 0.2}, [0]), (low | mass, range(3))]
    runs = [json.dumps([own | change, seed]) for change, seeds in tried for seed in seeds]
    assert [key for key in ran.done if "head.products" in key] == runs
    assert chosen["ta"].settings == own | low | mass
    without = {"head.matches": (), "head.match_horizons": (), "head.mean": False}
    assert chosen["gbdt"].settings == without
    assert search.chosen(ran, "ta", run=True) == chosen["ta"] and search.unfinished(ran, "ta", 4) == ""
    searched = list(ran.done)
    plain = search.choose(ran, "plain", ["ta"], trials=4, run=True)["ta"].settings
    assert plain == chosen["ta"].settings | without | {"head.products": False, "encoder.tied": False}
    assert list(ran.done) == searched  # one search for both columns
    assert search.choose(ran, "tricks", ["ta"], trials=1, run=True)["ta"].settings == own
    worse = Rehearsal(lambda settings, _: 0.5 - 0.01 * len(settings))
    assert search.choose(worse, "tricks", ["ta"], trials=4, run=True)["ta"].settings == own
    assert len(worse.done) == 3 + 3
    one = Rehearsal(lambda settings, _: 0.5)
    search.choose(one, "tricks", ["ta"], trials=1, run=True)
    assert len(one.done) == 1 and search.unfinished(one, "ta", 1) == ""


def test_one_seed_neither_makes_nor_breaks_a_setting():
    own, mass = models.model("ta", "tricks").settings, {"encoder.mass": True}

    def found(first, others):
        ran = Rehearsal(lambda settings, seed: 0.5 + ("encoder.mass" in settings) * (others if seed else first))
        return search.choose(ran, "tricks", ["ta"], trials=4, run=True)["ta"].settings, len(ran.done)

    assert found(0.01, -0.006) == (own, 4 * 3)
    assert found(-0.0015, 0.001) == (own | mass, 4 * 3)
    assert found(-0.0025, 0.01) == (own, 3 * 3 + 1)  # far behind: not pursued


def test_a_search_that_is_under_way_is_not_taken_for_a_finished_one():
    own = models.model("ta", "tricks")
    assert search.chosen(Rehearsal(None), "ta", run=True) == own  # nothing is searched: the defaults
    some = "1 of 4 trials", "2 of 4 trials", "3 of 4 trials"
    for done, missing in enumerate(["0 of 4 trials"] * 3 + [what for what in some for _ in range(3)] + [""]):
        ran = Rehearsal(lambda settings, _: 0.5, most=done)
        search.choose(ran, "tricks", ["ta"], trials=4, run=True)
        assert len(ran.done) == done and search.unfinished(ran, "ta", 4) == missing
        if 3 < done < 12:
            with pytest.raises(ValueError, match=f"the search for ta has come to {missing}: finish table2"):
                search.chosen(ran, "ta", run=True)
        else:  # the first runs are those of the defaults, which other tables have too
            assert search.chosen(ran, "ta", run=True) == own
        assert search.chosen(ran, "ta", run=False) == own  # a report says what there is


def test_variants_have_the_learning_rates_that_were_found_and_their_own_form():
    def best(**settings):
        ran = Rehearsal(lambda found, _: 0.7 if settings.items() <= found.items() else 0.6)
        search.choose(ran, "tricks", ["laser"], trials=4, run=True)
        return search.chosen_rates(ran, "laser", run=True).settings

    own = models.model("laser", "tricks").settings
    assert best(**{"encoder.norm": "pre"}) == own
    assert best(**{"optim.learning_rate": 1e-3}) == own | {"optim.learning_rate": 1e-3}


@pytest.fixture
def small(monkeypatch, tmp_path, known_data):
    monkeypatch.setitem(
        study.STANDARD, "small", ("tests/small_config.py", {"data.path": known_data.path, "data.epochs": 2})
    )
    return str(tmp_path / "root")


def call(monkeypatch, module, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, "--data=small", *flags])
    module.main()


def test_table_2_runs_resumes_and_reports(small, monkeypatch, capsys, tmp_path):
    flags = (f"--root={small}", "--models=mean,gbdt,laser_plus", "--seeds=1", "--trials=1", "--columns=tricks")
    call(monkeypatch, table2, *flags)
    said = capsys.readouterr().out
    folder = os.path.join(small, "small")
    with open(os.path.join(folder, "table2-tricks.csv"), encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"mean", "gbdt", "laser_plus"}
    aucs = [float(row["AUC"]) for row in rows.values()]
    assert aucs == sorted(aucs, reverse=True)
    assert os.path.getsize(os.path.join(folder, "table2-tricks.png")) > 1000
    assert "oracle: AUC" in said and "3 models, 1 seeds" in said and "3/3" in said
    assert f"Runs by git revision: {study.revision()} (3)." in said
    run = study.Study(*study.STANDARD["small"], folder)
    outcome = run.outcome(models.model("laser_plus", "tricks"), 0)
    assert f"{outcome.test['auc']:.4f}" == rows["laser_plus"]["AUC"]
    with open(os.path.join(outcome.folder, "run.json"), encoding="utf-8") as file:
        told = json.load(file)
    assert told["settings"]["head.products"] and told["seed"] == 0 and told["revision"]
    # A gap is a difference of AUCs of the same users, in the direction that the head says.
    gap = float(rows["mean"]["AUC - laser_plus"])
    assert gap == pytest.approx(float(rows["mean"]["AUC"]) - float(rows["laser_plus"]["AUC"]), abs=1.5e-4)

    # Nothing is run again.
    monkeypatch.setattr(study.Study, "_execute", None)
    call(monkeypatch, table2, *flags)
    assert "3/3" not in capsys.readouterr().out
    # What is kept is all that the table needs, elsewhere; and it is kept once.
    kept = os.path.join(small, "..", "kept")
    assert len(keep.keep(small, kept)) == 3 and keep.keep(small, kept) == []
    with open(os.path.join(outcome.folder, "results.json"), "a", encoding="utf-8") as file:
        file.write("\n")  # as if it had been run anew
    assert [os.path.basename(os.path.dirname(path)) for path in keep.keep(small, kept)] == [
        os.path.basename(os.path.dirname(outcome.folder))
    ]
    monkeypatch.setattr(study, "KEPT", kept)
    elsewhere = os.path.join(small, "..", "elsewhere")
    call(monkeypatch, table2, f"--root={elsewhere}", *flags[1:])
    with open(os.path.join(elsewhere, "small", "table2-tricks.csv"), encoding="utf-8", newline="") as file:
        assert {row["model"]: row for row in csv.DictReader(file)} == rows
    # A run is one of a config and of data; what has changed since is named.
    path = os.path.join(outcome.folder, "config.json")
    with open(path, encoding="utf-8") as file:
        held = json.load(file)
    longer = held["encoder"] | {"horizons": [*held["encoder"]["horizons"], 9]}
    for changed, message in (
        ({"fingerprint": held["fingerprint"] | {"vocab/item": "0"}}, r"a run of other data \(vocab/item\)"),
        ({"encoder": longer}, r"of another config \(encoder.horizons.entries: 5 -> 4"),
    ):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(held | changed, file)
        with pytest.raises(ValueError, match=message):
            run.outcome(outcome.model, 0)
    # Flags of the command line excuse what they name, and nothing else.
    with open(path, "w", encoding="utf-8") as file:
        json.dump(held | {"encoder": longer}, file)
    flagged = study.Study(*study.STANDARD["small"], run.folder, flags=("--config.encoder.horizons=(1,9)",))
    flagged.name = run.name  # a run with flags lies elsewhere
    assert flagged.outcome(outcome.model, 0)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(held | {"fingerprint": held["fingerprint"] | {"requests/test/columns": "0"}}, file)
    with pytest.raises(ValueError, match=r"a run of other data \(requests/test/columns\)"):
        flagged.outcome(outcome.model, 0)
    older = {name: value for name, value in held["fingerprint"].items() if not name.endswith("/columns")}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(held | {"fingerprint": older}, file)
    assert len(older) < len(held["fingerprint"]) and run.outcome(outcome.model, 0)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(held, file)
    for flag in ("train.seed=7", "head.products=False"):
        with pytest.raises(ValueError, match=f"--config.{flag.partition('=')[0]} is set by the study itself"):
            study.Study(*study.STANDARD["small"], folder, flags=(f"--config.{flag}",)).run([(outcome.model, 0)])
    # The outsider has no encoder, whatever the experiment's is by default.
    other = study.Study(study.STANDARD["small"][0], run.settings | {"encoder.heads": 8}, folder)
    assert other.outcome(models.model("gbdt", "tricks"), 0)
    # What may change between a run and its continuation makes no other run.
    other = study.Study(study.STANDARD["small"][0], run.settings | {"train.length_edges": (0, 3, 5)}, folder)
    assert other.outcome(outcome.model, 0)
    # Served as it was trained it says what it said; at another length it is another ranker.
    assert lengths.served(run, outcome.model, 0, 16) is None
    for length in (4, 16):
        lengths.serve(run, outcome, length)
    assert lengths.served(run, outcome.model, 0, 16) == pytest.approx(outcome.test["auc"])
    assert lengths.served(run, outcome.model, 0, 4) != pytest.approx(outcome.test["auc"])
    # That is kept too, of runs that are kept already.
    assert [os.path.basename(os.path.dirname(path)) for path in keep.keep(small, kept)] == [
        os.path.basename(os.path.dirname(outcome.folder))
    ]
    assert keep.keep(small, kept) == []
    there = study.Study(*study.STANDARD["small"], elsewhere, kept=os.path.join(kept, "small"))
    for length in (4, 16):
        assert lengths.served(there, outcome.model, 0, length) == lengths.served(run, outcome.model, 0, length)
    # Unless what is kept does not count.
    call(monkeypatch, table2, f"--root={elsewhere}", *flags[1:], "--only-report", "--no-kept")
    with open(os.path.join(elsewhere, "small", "table2-tricks.csv"), encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == []

    # Quality over cost, with times as the models' benchmark writes them: at the study's length, of what was measured.
    times = {("mean", 1000, 1): 2e-4, ("laser_plus", 1000, 1): 5e-4, ("mean", 200, 1): 1e-5, ("mean", 1000, 100): None}
    timed = [
        Row(name, Size(1, length, count, 8), (0, 0), 0, dict(forward=Timing(value), train=Timing()))
        for (name, length, count), value in times.items()
    ]
    write_timings(str(tmp_path), timed, "full")
    call(monkeypatch, pareto, flags[0], "--only-report", "--seeds=1", f"--times={tmp_path}/models.csv")
    with open(os.path.join(folder, "pareto.csv"), encoding="utf-8", newline="") as file:
        drawn = {row["model"]: row for row in csv.DictReader(file)}
    assert {"mean", "laser_plus"} <= drawn.keys() and "gbdt" not in drawn  # the outsider has no encoder
    columns = [name for name in drawn["mean"] if name.startswith("microseconds")]
    cells = [[drawn[name][column] for column in columns] for name in ("mean", "laser_plus")]
    assert cells == [["200", ""], ["500", ""]]
    assert os.path.getsize(os.path.join(folder, "pareto.png")) > 1000


def test_a_run_that_fails_names_its_log(small, monkeypatch):
    flags = (f"--root={small}", "--models=mean", "--seeds=1", "--trials=1", "--columns=plain", "--config.width=0")
    with pytest.raises(RuntimeError, match="1 of 1 runs failed: see .*log"):
        call(monkeypatch, table2, *flags)


@pytest.mark.parametrize(
    ("name", "own"), [("laser_plus", {"encoder__horizons": (2, 9)}), ("ta", {"encoder__mass": True})]
)
def test_what_was_trained_on_short_histories_reads_all_of_longer_ones(name, own, small):
    run = study.Study(*study.STANDARD["small"], small)
    fields = dict(own, data__epochs=1, head__matches=("item",), head__match_horizons=(2, 9))
    model = models.model(name, "plain").but("short", data__history_length=4, **fields)
    run.run([(model, 0)])
    (outcome,) = run.finished(model, 1)
    logits = {}
    for length in (4, 16):
        lengths.serve(run, outcome, length)
        with np.load(os.path.join(outcome.folder, f"served-at-{length}.npz")) as stored:
            logits[length], held = stored["logits"], stored["lengths"]
    with np.load(outcome.predictions) as stored:
        np.testing.assert_allclose(logits[4], stored["logits"], rtol=1e-5, atol=1e-6)
        short = stored["lengths"] < 4  # who has no older events; the last one's 4 may be of more
    assert short.any() and (held[~short] > 4).any()
    np.testing.assert_allclose(logits[16][short], logits[4][short], rtol=1e-4, atol=1e-5)
    assert (np.abs(logits[16] - logits[4])[held > 8] > 1e-4).mean() > 0.9
