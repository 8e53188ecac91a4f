"""Many runs of one protocol: each a process, resumed if it was killed, never run twice.

A run lies in ROOT/DATA/ENCODER-DIGEST/SEED, the digest being that of its config but for the seeds: tables share the
runs they have in common. Beside what `laser_jax.main` writes (config.json with the data's checksums, predictions.npz,
results.json) lies run.json: encoder, settings, seed and git revision. What tables need of a finished run may be kept in
KEPT/DATA, which is under version control (see keep.py): such a run counts as finished everywhere.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from laser_jax.config import FREE_TO_CHANGE, Config, flatten, set_values, to_dict
from laser_jax.fingerprint import fingerprint
from laser_jax.models import ENCODERS
from laser_jax.whole_files import replacing

KEPT = os.path.join(os.path.dirname(__file__), "kept")
GBDT = "gbdt"  # the outsider, which is no encoder: see outsider.py

#: Per data set: the experiment file, and how the standard run differs from it (one pass, d=64, L=1000, for all models).
STANDARD: dict[str, tuple[str, dict[str, Any]]] = {
    "completejourney": ("experiments/completejourney.py", {}),
    "xhs_synthetic": (
        "experiments/xhs.py",
        {"width": 64, "head.tokens": 8, "head.width": 64, "head.products": False, "optim.b2": 0.999},
    ),
    # Users of up to 10 000 events, half of them with more than 7000.
    "xhs_long": (
        "experiments/xhs.py",
        {
            "data.path": "datasets/xhs_long",
            "data.recipe.users": 800,
            "data.recipe.mean_length": 9_000,
            "data.recipe.train_requests": 8_000,
            "data.recipe.valid_requests": 600,
            "data.recipe.test_requests": 2_000,
            "train.length_edges": (0, 1000, 2000, 5000, 10_000),
            "width": 64,
            "head.tokens": 8,
            "head.width": 64,
            "head.products": False,
            "optim.b2": 0.999,
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of a table.

    Attributes:
      label: what the table calls it. encoder: a name of laser_jax.models.ENCODERS, or "gbdt".
      settings: config field -> value, what differs from the standard run.
    """

    label: str
    encoder: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.encoder not in ENCODERS and self.encoder != GBDT:
            raise ValueError(f"there is no model {self.encoder!r}; choose of {', '.join([*ENCODERS, GBDT])}")

    def but(self, label: str, **settings: Any) -> "Model":
        """The same with other settings; double underscores stand for dots."""
        changed = {name.replace("__", "."): value for name, value in settings.items()}
        return Model(label, self.encoder, {**self.settings, **changed})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one finished run left."""

    model: Model
    seed: int
    folder: str
    results: dict[str, Any]

    @property
    def test(self) -> dict[str, Any]:
        """Its figures on test; references (oracle, popularity) come after the model's."""
        return next(iter(self.results["test"].values()))

    @property
    def predictions(self) -> str:
        return os.path.join(self.folder, "predictions.npz")


class Study:
    """Runs models by one protocol.

    Args:
      experiment: path of the experiment file. settings: config field -> value for all runs.
      folder: where the runs lie. jobs: runs at a time; each gets its share of the cores.
      flags: further flags for every run, as they are.
      kept: where finished runs of these settings are kept, without their checkpoints; None for nowhere.
    """

    def __init__(
        self,
        experiment: str,
        settings: dict[str, Any],
        folder: str,
        jobs: int = 1,
        flags: tuple[str, ...] = (),
        kept: str | None = None,
    ):
        self.experiment, self.settings, self.folder, self.flags, self.kept = experiment, settings, folder, flags, kept
        self._flagged = {flag.removeprefix("--config.").partition("=")[0] for flag in flags}
        self._data: dict[str, str] | None = None
        if jobs == 1:
            self._cores: list[set[int] | None] = [None]  # all there are
            return
        if not hasattr(os, "sched_setaffinity"):
            raise ValueError(f"jobs={jobs}: cores can be shared out on Linux only, use jobs=1 here")
        cores = sorted(os.sched_getaffinity(0))
        if not 1 <= jobs <= len(cores):
            raise ValueError(f"jobs={jobs} is not within the {len(cores)} cores there are")
        share = len(cores) // jobs
        self._cores = [set(cores[k * share : (k + 1) * share]) for k in range(jobs)]

    def name(self, model: Model, seed: int) -> str:
        """Of the run's folder, within that of the study."""
        return os.path.join(f"{model.encoder}-{self.digest(model)}", str(seed))

    def path(self, model: Model, seed: int) -> str:
        return os.path.join(self.folder, self.name(model, seed))

    def digest(self, model: Model) -> str:
        """Of what the config sets and of further flags; a new field at its default does not make new runs.

        Raises:
          ValueError: a further flag would undo what makes the model, or its seeds, what they are.
        """
        if undone := sorted(self._flagged & {"train.seed", "data.seed", *model.settings}):
            raise ValueError(f"--config.{undone[0]} is set by the study itself, for {model.label}: leave the flag out")
        values = {name: value for name, value in flatten(set_values(self._config(model, 0))).items() if _counts(name)}
        if model.encoder == GBDT:  # whatever encoder the experiment has by default
            values = {name: value for name, value in values.items() if not name.startswith("encoder.")}
        text = json.dumps([values, list(self.flags)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def outcome(self, model: Model, seed: int) -> Outcome | None:
        """What the run left; None if it is not finished."""
        path = self.left(model, seed, "results.json")
        if path is None:
            return None
        self._check(model, os.path.dirname(path))
        with open(path, encoding="utf-8") as file:
            return Outcome(model, seed, os.path.dirname(path), json.load(file))

    def left(self, model: Model, seed: int, name: str) -> str | None:
        """Path of the file NAME that the run left, in its folder or where runs are kept; None where there is none."""
        folders = [os.path.join(root, self.name(model, seed)) for root in (self.folder, self.kept) if root]
        return next((path for folder in folders if os.path.exists(path := os.path.join(folder, name))), None)

    def _check(self, model: Model, folder: str) -> None:
        """Raises ValueError if the finished run in `folder` had other data, or another config.

        Another config it can have by a default that has changed since. Its requests and vocabularies are those of the
        data set, where that is at hand, else those of the study's other runs; a vault's manifest has names in it that
        are drawn anew whenever it is built.
        """
        path = os.path.join(folder, "config.json")
        if not os.path.exists(path):
            return
        with open(path, encoding="utf-8") as file:
            told = json.load(file)
        if self._data is None:
            data = self._config(model, 0).data
            at_hand = os.path.isdir(data.path) and not any(name.startswith("data.") for name in self._flagged)
            self._data = fingerprint(data) if at_hand else told["fingerprint"]
        noted = told["fingerprint"]
        lasting = [name for name in self._data if not name.startswith("vault/")]
        lasting = [name for name in lasting if name in noted or not name.endswith("/columns")]  # as config.remember
        if other := [name for name in lasting if noted.get(name) != self._data[name]]:
            raise ValueError(f"{folder} is a run of other data ({', '.join(other)}): delete it to run it anew")
        before = flatten(_by_place(told))
        now = flatten(_by_place(json.loads(json.dumps(to_dict(self._config(model, 0))))))
        # The flags say what these are; and the outsider has no encoder, whatever the experiment has by default.
        excused = tuple(f"{name}." for name in (*self._flagged, *(["encoder"] if model.encoder == GBDT else [])))
        changed = [
            f"{name}: {before[name]!r} -> {now[name]!r}"
            for name in sorted(before.keys() & now.keys())
            if _counts(name) and before[name] != now[name]
            if not f"{name}.".startswith(excused)
        ]
        if changed:
            raise ValueError(f"{folder} is a run of another config ({'; '.join(changed)}): delete it to run it anew")

    def finished(self, model: Model, seeds: int) -> list[Outcome]:
        """The finished runs among the first `seeds`."""
        found = [self.outcome(model, seed) for seed in range(seeds)]
        return [outcome for outcome in found if outcome is not None]

    def run(self, runs: list[tuple[Model, int]]) -> None:
        """Runs what is not finished, in this order.

        Raises:
          RuntimeError: a run failed; names its log. The others are finished first.
        """
        distinct = {self.path(model, seed): (model, seed) for model, seed in runs}
        wanted = [run for run in distinct.values() if self.outcome(*run) is None]
        free: queue.Queue[set[int] | None] = queue.Queue()
        for cores in self._cores:
            free.put(cores)
        start, done, failed = time.monotonic(), 0, []

        def one(run: tuple[Model, int]) -> str | None:
            cores = free.get()
            try:
                if cores is not None:
                    os.sched_setaffinity(0, cores)  # of this thread, and so of the process it starts
                return self._execute(*run)
            finally:
                free.put(cores)

        with concurrent.futures.ThreadPoolExecutor(len(self._cores)) as pool:
            futures = {pool.submit(one, run): run for run in wanted}
            for future in concurrent.futures.as_completed(futures):
                model, seed = futures[future]
                name = f"{model.label} seed {seed}"
                done += 1
                if (log := future.result()) is not None:
                    failed.append(log)
                    print(f"{done}/{len(wanted)} {name} FAILED: see {log}", flush=True)
                    continue
                seconds = time.monotonic() - start
                auc = self.outcome(model, seed).test["auc"]
                eta = seconds / done * (len(wanted) - done)
                print(f"{done}/{len(wanted)} {name}: test AUC {auc:.4f}  ETA {eta:.0f} s", flush=True)
        if failed:
            raise RuntimeError(
                f"{len(failed)} of {len(wanted)} runs failed: see {', '.join(failed)}; "
                "--only-report tabulates the others"
            )

    def _execute(self, model: Model, seed: int) -> str | None:
        """One run; the path of its log if it failed."""
        folder = self.path(model, seed)
        os.makedirs(folder, exist_ok=True)
        told = {"label": model.label, "encoder": model.encoder, "settings": {**self.settings, **model.settings}}
        _note(os.path.join(folder, "run.json"), {**told, "flags": self.flags, "seed": seed, "revision": revision()})
        if model.encoder == GBDT:
            command = [sys.executable, "-m", "experiments.paper.outsider", f"--config={self.experiment}"]
        else:
            command = [sys.executable, "-m", "laser_jax.main", f"--config={self.experiment}:{model.encoder}"]
        command += [f"--workdir={folder}", f"--config.train.seed={seed}", f"--config.data.seed={seed}"]
        command += [f"--config.{name}={value}" for name, value in told["settings"].items()]
        command += self.flags
        log = os.path.join(folder, "log")
        print(f"{model.label} seed {seed} runs; follow it in {log}", flush=True)
        with open(log, "a", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
        return log if code else None

    def config(self, model: Model, seed: int) -> Config:
        """The config that `laser_jax.main` runs for this model and seed (but for further flags)."""
        if self.flags:
            raise ValueError(f"configs are not built from flags: {' '.join(self.flags)}")
        return self._config(model, seed)

    def _config(self, model: Model, seed: int) -> Config:
        # The outsider reads what an encoder's config says of the data.
        config = read_config(self.experiment, *([] if model.encoder == GBDT else [model.encoder]))
        change(config, {**self.settings, **model.settings, "train.seed": seed, "data.seed": seed})
        return config


def _note(path: str, told: dict[str, Any]) -> None:
    """Writes run.json; of a run that goes on with other code all revisions are told, in order."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            before = json.load(file)["revision"].split(", ")
        told = told | {"revision": ", ".join(dict.fromkeys([*before, told["revision"]]))}
    with replacing(path) as file:
        file.write(json.dumps(told, indent=1).encode())


def read_config(path: str, *arguments: str) -> Config:
    """What the experiment file at `path` gives for these arguments of its get_config."""
    spec = importlib.util.spec_from_file_location("experiment", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


def _counts(name: str) -> bool:
    """Whether a config field, by its dotted name, makes another run and not another seed of one."""
    return not f"{name}.".startswith(tuple(f"{free}." for free in (*FREE_TO_CHANGE, "train.seed", "data.seed")))


def _by_place(value: Any) -> Any:
    """Lists as dicts by place, so that an attribute that entries did not have then is no difference."""
    if isinstance(value, list):
        return {"entries": len(value)} | {str(place): _by_place(entry) for place, entry in enumerate(value)}
    if isinstance(value, dict):
        return {name: _by_place(entry) for name, entry in value.items()}
    return value


def change(config: Config, settings: dict[str, Any]) -> None:
    """Sets fields of a config by their dotted names.

    Raises:
      ValueError: there is no such field.
    """
    for name, value in settings.items():
        *parts, last = name.split(".")
        owner: Any = config
        for part in parts:
            owner = getattr(owner, part)
        if not hasattr(owner, last):
            raise ValueError(f"the config has no field {name!r}")
        setattr(owner, last, value)


def revision() -> str:
    """The git revision of the code, with a mark if the tree has changes; empty outside a repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip()


def parse(description: str, add: Callable[[argparse.ArgumentParser], None]) -> tuple[argparse.Namespace, Study]:
    """The arguments that all tables share, and the study they ask for.

    Args:
      add: takes the parser and adds a table's own arguments.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="completejourney", choices=sorted(STANDARD))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--root", default="runs/paper", help="where runs and tables go")
    parser.add_argument("--only-report", action="store_true", help="run nothing: tabulate what is finished")
    parser.add_argument(
        "--kept",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether runs whose results come with the code count as finished; --no-kept runs them anew",
    )
    add(parser)
    args, flags = parser.parse_known_args()
    unknown = [flag for flag in flags if not flag.startswith("--config.")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    experiment, settings = STANDARD[args.data]
    kept = os.path.join(KEPT, args.data) if args.kept else None
    return args, Study(experiment, settings, os.path.join(args.root, args.data), args.jobs, tuple(flags), kept)
