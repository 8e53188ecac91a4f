"""The online experiment: the synthetic teacher plays the users against live servers, and clicks decide.

  python -m experiments.paper.online

A vault holds everything before the test period. From then on time goes by request by request: what users do on their
own arrives as events, a ranking server orders the candidates of each request, the first SHOWN are shown, and the
teacher's click probabilities, which know everything the user has done, decide what is clicked; clicks arrive as events
like any others, so each ranking has consequences. Users are split by hash between two servers with one vault behind
them (python -m laser_jax.vault serve). The comparisons:

  a/a      laser_plus against itself, which must show no difference
  model    mean against laser_plus
  length   laser_plus over 100 against 1000 events
  hour     laser_plus with events that arrive an hour late, against at once
  day      with events that arrive a day late, against at once

CTR is clicks by impressions; "expected" takes the teacher's probabilities for the draws, which is the same but for less
noise; reward is expected clicks a request. Intervals are by bootstrap over users, 95 %. The users of the first arm are
the same ones in every comparison, with the same luck: what becomes of them differs from a/a by what ranks for them
alone, and the row "same users" says by how much. Models are trained on first use by the standard run of
experiments/paper (one pass, d=64). Writes ROOT/online.md and ROOT/online.csv; the same command again goes on where it
stopped.
"""

import argparse
import csv
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from typing import Any

import grpc
import numpy as np

from data.xhs_synthetic import HORIZON_DAYS, ORIGIN_S, REQUEST_DAYS, XhsSynthetic
from data.xhs_synthetic_teacher import DAY_S, Teacher
from experiments.paper import models
from experiments.paper.study import STANDARD, Study
from experiments.ranking_server import INFER, RankingServer, infer_request, outputs_of
from laser_jax import vault as seqvault
from laser_jax.requests import Requests
from laser_jax.serving.export import export_model, load_run
from laser_jax.serving.files import MANIFEST
from laser_jax.vault.hashing import splitmix64
from laser_jax.whole_files import replacing

SHOWN = 3
CLICK = 1  # of the actions
BEGIN_S = ORIGIN_S + REQUEST_DAYS["test"][0] * DAY_S
#: Requests of so many users are under way at once.
AT_ONCE = 16
RESAMPLES = 2000
TEACHER_READS = ("item", "category", "author", "action", "scene", "time")


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a half of the users gets.

    Attributes:
      label: in the table. model: which one ranks. delay_s: seconds that their events take to arrive.
    """

    label: str
    model: str
    delay_s: int = 0


PLUS = Arm("laser_plus", "laser_plus")
COMPARISONS: dict[str, tuple[Arm, Arm]] = {
    "a/a": (PLUS, PLUS),
    "model": (Arm("mean", "mean"), PLUS),
    "length": (Arm("laser_plus, L=100", "laser_plus-100"), Arm("laser_plus, L=1000", "laser_plus")),
    "hour": (Arm("an hour late", "laser_plus", 3600), Arm("at once", "laser_plus")),
    "day": (Arm("a day late", "laser_plus", 86_400), Arm("at once", "laser_plus")),
}


@dataclasses.dataclass
class Played:
    """What a comparison left, an entry a request.

    Attributes:
      users, arms: [R]. clicks, expected: [R], of SHOWN impressions.
    """

    users: np.ndarray
    arms: np.ndarray
    clicks: np.ndarray
    expected: np.ndarray

    def rate(self, arm: int, of: str, without: "Played | None" = None) -> np.ndarray:
        """A mean by impressions, and the same under resamples of users: [1 + RESAMPLES].

        Args:
          of: "clicks" or "expected". without: what is taken away, request by request, of the same ones.
        """
        mine = self.arms == arm
        _, group = np.unique(self.users[mine], return_inverse=True)
        values = getattr(self, of)[mine] - (0 if without is None else getattr(without, of)[mine])
        total = np.bincount(group, values)
        requests = np.bincount(group)
        rng = np.random.default_rng(arm)
        draws = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), RESAMPLES)
        times = np.concatenate([np.ones((1, len(total)), np.int64), draws])
        return times @ total / (times @ requests) / SHOWN


def train(root: str, data: str, recipe: XhsSynthetic) -> dict[str, str]:
    """Trains and exports what is not there yet; model -> directory, which is called after model and config."""
    experiment, settings = STANDARD["xhs_synthetic"]
    settings = settings | {"data.path": data, "data.recipe.test_requests": recipe.test_requests}
    study = Study(experiment, settings, os.path.join(root, "runs"))
    plus = models.model("laser_plus", "tricks")
    wanted = {
        "laser_plus": plus,
        "laser_plus-100": plus.but("laser_plus-100", data__history_length=100),
        "mean": models.model("mean", "tricks"),
    }
    study.run([(model, 0) for model in wanted.values()])
    paths = {}
    for name, model in wanted.items():
        paths[name] = os.path.join(root, "models", f"{name}-{study.digest(model)}")
        if not os.path.exists(os.path.join(paths[name], MANIFEST)):
            export_model(load_run(study.path(model, 0)), paths[name])
    return paths


class World:
    """The users: what they have done and will do, and what they click."""

    def __init__(self, data: str):
        vault = seqvault.open(os.path.join(data, "vault"))
        self.schema = vault.schema
        self.life = {}
        for user in vault.users().tolist():
            self.life[user] = vault.get(user, 1_000_000, fields=self.schema.names).columns
        stored = Requests.open(os.path.join(data, "requests", "test"))
        found = stored.read(np.arange(len(stored)))
        self.requests = []
        for place in np.argsort(found.time, kind="stable").tolist():
            rows = slice(*found.offsets[place : place + 2])
            candidates = {name: values[rows] for name, values in found.candidates.items()}
            moment, scene = int(found.time[place]), int(found.context["scene"][place])
            self.requests.append((int(found.user[place]), moment, scene, candidates))
        self._teacher = Teacher()

    def probabilities(self, user: int, clicked: list[dict], request: tuple) -> np.ndarray:
        """Of a click on each candidate, given the user's own events and what was clicked so far."""
        _, moment, scene, candidates = request
        life = self.life[user]
        end = int(np.searchsorted(life["time"], moment))
        past = [event for event in clicked if event["time"] < moment]
        history = {}
        for name in TEACHER_READS:
            more = np.array([event[name] for event in past], life[name].dtype)
            history[name] = np.concatenate([life[name][:end], more])
        order = np.argsort(history["time"], kind="stable")
        history = {name: values[order] for name, values in history.items()}
        return self._teacher.probabilities(history, moment, scene, candidates)

    def event(self, moment: int, scene: int, candidates: dict, place: int) -> dict[str, Any]:
        """A click on a candidate as an event."""
        found = {name: values[place] for name, values in candidates.items()}
        content = np.zeros(self.schema.field("content").size, np.float16)  # which no model here reads
        return {**found, "time": moment, "scene": scene, "action": CLICK, "dwell": 25, "content": content}


def before_the_test(world: World, path: str) -> None:
    """Writes the vault as it is when the test period begins."""
    draft = path + ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    with seqvault.create(draft, world.schema) as writer:
        for user, life in world.life.items():
            end = int(np.searchsorted(life["time"], BEGIN_S))
            if end:
                writer.write({"user": np.full(end, user), **{name: values[:end] for name, values in life.items()}})
    os.rename(draft, path)


class Arrivals:
    """Events on their way to the vault, by user."""

    def __init__(self, world: World, delay_s: dict[int, int]):
        """`delay_s`: user -> seconds that an event takes."""
        self._world, self._delay_s = world, delay_s
        self._next = {user: int(np.searchsorted(life["time"], BEGIN_S)) for user, life in world.life.items()}
        self._clicked: dict[int, list[dict]] = {user: [] for user in world.life}

    def clicked(self, user: int, event: dict) -> None:
        self._clicked[user].append(event)

    def by(self, user: int, moment: int) -> list[dict[str, Any]]:
        """What arrives of a user until then, and did not before."""
        life, bound = self._world.life[user], moment - self._delay_s[user]
        first, self._next[user] = self._next[user], max(int(np.searchsorted(life["time"], bound)), self._next[user])
        own = [{name: values[at] for name, values in life.items()} for at in range(first, self._next[user])]
        waiting = self._clicked[user]
        arrived = [event for event in waiting if event["time"] < bound]
        self._clicked[user] = waiting[len(arrived) :]
        return [{"user": user, **event} for event in (*own, *arrived)]


def play(world: World, servers: list[RankingServer], arms: tuple[Arm, Arm], seed: int) -> Played:
    """Plays all requests in the order of time."""
    half = {user: int(splitmix64(np.array([user + 1_000_003 * seed]))[0] >> np.uint64(40)) & 1 for user in world.life}
    arrivals = Arrivals(world, {user: arms[arm].delay_s for user, arm in half.items()})
    clicked: dict[int, list[dict]] = {user: [] for user in world.life}
    channels = [grpc.insecure_channel(server.grpc) for server in servers]
    calls = [channel.unary_unary(INFER) for channel in channels]
    names = [arm.model.partition("-")[0] for arm in arms]
    schema, left = world.schema, []
    start = told = time.monotonic()
    for done, chunk in enumerate(_chunks(world.requests)):
        new = [event for user, moment, _, _ in chunk for event in arrivals.by(user, moment)]
        if new:
            columns = {"user": np.array([event["user"] for event in new], np.int64)}
            columns["time"] = np.array([event["time"] for event in new], np.int64)
            for field in schema.fields:
                columns[field.name] = np.array([event[field.name] for event in new], field.dtype)
            calls[0](infer_request("append", columns).SerializeToString(), timeout=60)
        asked = []
        for user, moment, scene, candidates in chunk:
            columns = {f"candidates.{name}": values.astype(np.int64) for name, values in candidates.items()}
            columns |= {"user": np.array([user]), "time": np.array([moment]), "context.scene": np.array([scene])}
            request = infer_request(names[half[user]], columns).SerializeToString()
            asked.append(calls[half[user]].future(request, timeout=60))
        for place, (request, answer) in enumerate(zip(chunk, asked, strict=True)):
            user, moment, scene, candidates = request
            order = np.argsort(-outputs_of(answer.result())["logit"], kind="stable")[:SHOWN]
            chance = world.probabilities(user, clicked[user], request)[order]
            # The same luck in every comparison.
            luck = np.random.default_rng([seed, done, place]).random(SHOWN) < chance
            left.append((user, half[user], luck.sum(), chance.sum()))
            for candidate in order[luck].tolist():
                event = world.event(moment, scene, candidates, candidate)
                clicked[user].append(event)
                arrivals.clicked(user, event)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            rate = len(left) / (told - start)
            rest = (len(world.requests) - len(left)) / rate
            print(f"  {len(left):,} of {len(world.requests):,} requests, {rate:.0f}/s, ETA {rest:.0f} s", flush=True)
    for channel in channels:
        channel.close()
    users, of, clicks, expected = (np.array(column) for column in zip(*left, strict=True))
    return Played(users, of, clicks, expected)


def _chunks(requests: list[tuple]) -> Any:
    """Requests in order, some at a time, no user twice in a chunk."""
    chunk: list[tuple] = []
    for request in requests:
        if len(chunk) == AT_ONCE or request[0] in [other[0] for other in chunk]:
            yield chunk
            chunk = []
        chunk.append(request)
    if chunk:
        yield chunk


def compare(world: World, arms: tuple[Arm, Arm], paths: dict[str, str], base: str, seed: int) -> Played:
    """Starts vault and servers anew, and plays."""
    path = base + ".played"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(base, path)
    command = [sys.executable, "-m", "laser_jax.vault", "serve", path, "--port=0"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    servers = []
    try:
        url = service.stdout.readline().split(" at ")[1].strip()
        programs = os.path.abspath(os.path.join(os.path.dirname(base), "programs"))
        for arm in arms:
            few = ("--max-batch=8", "--max-candidates=16", "--deadline-ms=60000")
            arguments = (f"--model={paths[arm.model]}", f"--vault={url}", *few)
            servers.append(RankingServer(*arguments, JAX_COMPILATION_CACHE_DIR=programs))
        return play(world, servers, arms, seed)
    finally:
        for server in servers:
            server.close()
        service.terminate()
        service.wait()
        shutil.rmtree(path, ignore_errors=True)


def rows_of(name: str, arms: tuple[Arm, Arm], played: Played, same: Played | None = None) -> list[list[str]]:
    """Of the table: both arms, their difference and, given what became of the same users in a/a, theirs from that."""
    rows, rates = [], {}
    for number, arm in enumerate(arms):
        mine = played.arms == number
        cells = [name, arm.label, f"{len(np.unique(played.users[mine])):,}", f"{mine.sum():,}"]
        for of in ("clicks", "expected"):
            rates[of, number] = 100 * played.rate(number, of)
            cells += _with_interval(rates[of, number])
        rows.append([*cells, f"{SHOWN * rates['expected', number][0] / 100:.4f}"])
    cells = [name, f"{arms[1].label} - {arms[0].label}", "", ""]
    for of in ("clicks", "expected"):
        cells += _with_interval(rates[of, 1] - rates[of, 0])
    reward = SHOWN * (rates["expected", 1] - rates["expected", 0])[0] / 100
    rows.append([*cells, f"{reward:+.4f}"])
    if same is not None:
        found = {of: 100 * played.rate(0, of, same) for of in ("clicks", "expected")}
        cells = [name, f"same users: {arms[0].label} - laser_plus", "", ""]
        cells += [cell for values in found.values() for cell in _with_interval(values)]
        rows.append([*cells, f"{SHOWN * found['expected'][0] / 100:+.4f}"])
    return rows


def _with_interval(values: np.ndarray) -> list[str]:
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return [f"{values[0]:.2f}", f"{low:.2f} .. {high:.2f}"]


HEAD = ["comparison", "arm", "users", "requests", "CTR %", "95 %", "expected CTR %", "95 %", "reward a request"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/online", help="where models and tables go")
    parser.add_argument("--data", default="datasets/xhs_online", help="the data set, built on first use")
    parser.add_argument("--requests", type=int, default=12_000, help="of the test period")
    parser.add_argument("--comparisons", default=",".join(COMPARISONS), help="of these")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the users, and of their luck")
    args = parser.parse_args()
    names = args.comparisons.split(",")
    if unknown := [name for name in names if name not in COMPARISONS]:
        parser.error(f"there is no comparison {unknown[0]!r}; choose of {', '.join(COMPARISONS)}")
    recipe, start = XhsSynthetic(test_requests=args.requests), time.monotonic()
    recipe.prepare(args.data)
    paths = train(args.root, args.data, recipe)
    world, base = World(args.data), os.path.join(args.root, "vault")
    if not os.path.exists(base):
        before_the_test(world, base)
    rows: list[list[str]] = []
    first: Played | None = None
    for name in names:
        print(f"{name}: {' against '.join(arm.label for arm in COMPARISONS[name])}", flush=True)
        played_by = "-".join(os.path.basename(paths[arm.model]) for arm in COMPARISONS[name])
        stored = os.path.join(args.root, f"{name.replace('/', '')}-{played_by}-{args.requests}-{args.seed}.npz")
        if os.path.exists(stored):
            with np.load(stored) as file:
                played = Played(**file)
        else:
            played = compare(world, COMPARISONS[name], paths, base, args.seed)
            with replacing(stored) as file:
                np.savez(file, **vars(played))
        rows += rows_of(name, COMPARISONS[name], played, first)
        first = played if name == "a/a" else first
        lines = [" | ".join(HEAD), "|".join(["---"] * len(HEAD)), *(" | ".join(row) for row in rows)]
        text = "\n".join(f"| {line} |" if "---" not in line else f"|{line}|" for line in lines)
        with open(os.path.join(args.root, "online.md"), "w", encoding="utf-8") as file:
            file.write(text + "\n")
        with open(os.path.join(args.root, "online.csv"), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([HEAD, *rows])
    print("\n" + text)
    days = HORIZON_DAYS - REQUEST_DAYS["test"][0]
    seconds = time.monotonic() - start
    print(f"\n{days} days, {args.requests:,} requests a comparison, {seconds:,.0f} s; tables in {args.root}")


if __name__ == "__main__":
    main()
