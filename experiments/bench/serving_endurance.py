"""A server under load for minutes, while everything happens that may: nothing wrong, nothing lost, nothing that grows.

  python -m experiments.bench.serving_endurance --minutes=10

Requests at 80 % of what the server can answer (measured first), and events appended all the while, each batch sent
again until it is acknowledged. After a quarter of the time a newer model takes over, at half of it the server is killed
by SIGKILL and started anew; it writes with little memory for new events, so that they become parts, and users are
merged, again and again. Afterwards every answer is scored anew by evaluation's way from (user, time, sequence number),
and every acknowledged event is looked for. Models are untrained; the vault is a copy of xhs_synthetic's.

The last line is one JSON object; the exit status is 1 if an answer was wrong or an event lost.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from typing import Any

import grpc
import numpy as np

from data.xhs_synthetic import HORIZON_DAYS, ORIGIN_S
from experiments.bench.serving import EXPERIMENT, Requests, export_untrained
from experiments.bench.vault_build import tell
from experiments.paper.study import read_config
from experiments.ranking_server import INFER, RankingServer, infer_request, outputs_of
from laser_jax import vault as seqvault
from laser_jax.serving import server as serving
from laser_jax.serving.exported import BATCHES, ExportedModel
from laser_jax.serving.exported import Requests as Asked
from laser_jax.serving.messages import MESSAGES

CANDIDATES, APPENDED, APPENDS_PER_S = 10, 20, 10
LOAD, MOST_IN_FLIGHT = 0.8, 256
TOLERANCE = 1e-5
USER_CACHE_MB = 64
#: Little memory for new events, and users are merged as soon as they live in three parts.
WRITING = seqvault.WriterOptions(tail_bytes=1 << 20, merge_parts=2)
SERVE = "--serve"


class Events:
    """What is appended: events of a time that no other one has, so that each can be found again."""

    def __init__(self, vault: Any, rng: np.random.Generator):
        self._users, self._rng = vault.users()[:500], rng
        met = [vault.get(int(user), 50, fields=vault.schema.names).columns for user in self._users[:100]]
        self._pool = {name: np.concatenate([columns[name] for columns in met]) for name in vault.schema.names}
        self._next = ORIGIN_S + (HORIZON_DAYS + 1) * 86_400  # behind all that is in the vault

    def draw(self) -> dict[str, np.ndarray]:
        rows = self._rng.integers(0, len(self._pool["item"]), APPENDED)
        self._next += APPENDED
        times = np.arange(self._next - APPENDED, self._next)
        users = self._rng.choice(self._users, APPENDED)
        return {"user": users, "time": times, **{name: values[rows] for name, values in self._pool.items()}}


class Clients:
    """Rankers and an appender against a server that may be another one in a moment.

    Attributes:
      answers: (request, response) of what was ranked. acknowledged: batches of events. refused: by gRPC's code.
      milliseconds: of the answered, from when they should have been sent.
    """

    def __init__(self, requests: list[bytes], events: Events):
        self._requests, self._events = requests, events
        self.target = ""
        self.answers: list[tuple[int, bytes]] = []
        self.acknowledged: list[dict[str, np.ndarray]] = []
        self.refused: Counter[str] = Counter()
        self.milliseconds: list[float] = []
        self.again = 0
        self._channels: dict[str, Any] = {}

    def _call(self, request: bytes) -> Any:
        if self.target not in self._channels:
            self._channels[self.target] = grpc.aio.insecure_channel(self.target)
        return self._channels[self.target].unary_unary(INFER)(request, timeout=10)

    async def rank(self, number: int, due: float) -> None:
        number %= len(self._requests)
        try:
            response = await self._call(self._requests[number])
            self.milliseconds.append(1e3 * (time.perf_counter() - due))
            self.answers.append((number, response))
        except grpc.RpcError as error:
            self.refused[error.code().name] += 1

    async def saturate(self, seconds: float) -> float:
        """Answers a second, with 16 requests under way."""
        start, number = time.perf_counter(), 0

        async def worker() -> None:
            nonlocal number
            while time.perf_counter() - start < seconds:
                number += 1
                await self.rank(number, time.perf_counter())

        before = len(self.answers)
        await asyncio.gather(*(worker() for _ in range(16)))
        return (len(self.answers) - before) / (time.perf_counter() - start)

    async def append(self, until: float) -> None:
        number = 0
        while time.perf_counter() < until:
            events, number = self._events.draw(), number + 1
            origin = {"client": np.array(["endurance"], object), "number": np.array([number])}
            request = infer_request("append", events | origin).SerializeToString()
            while True:
                try:
                    await self._call(request)
                    break
                except grpc.RpcError:
                    self.again += 1
                    await asyncio.sleep(0.2)
            self.acknowledged.append(events)
            await asyncio.sleep(1 / APPENDS_PER_S)

    async def open_loop(self, rate: float, until: float) -> None:
        rng, due, number = np.random.default_rng(1), time.perf_counter(), 0
        under_way: set[asyncio.Task] = set()
        while due < until:
            due += rng.exponential(1 / rate)
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if len(under_way) >= MOST_IN_FLIGHT:
                self.refused["not sent: too many under way"] += 1
                continue
            number += 1
            task = asyncio.create_task(self.rank(number, due))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close()


class Subject:
    """The server that all this happens to.

    Attributes:
      resident: of each process, its memory in bytes as it was looked at. down_s: seconds without a server.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self.resident: list[list[int]] = []
        self.down_s = 0.0
        self._server: RankingServer | None = None

    def start(self) -> str:
        arguments = (SERVE, f"--model={self._folder}/models", f"--vault={self._folder}/vault", "--max-batch=8")
        limits = ("--max-candidates=16", f"--user-cache={USER_CACHE_MB}", f"--request-log={self._folder}/log")
        programs = os.path.abspath(f"{self._folder}/programs")
        module = "experiments.bench.serving_endurance"
        self._server = RankingServer(*arguments, *limits, module=module, JAX_COMPILATION_CACHE_DIR=programs)
        self.resident.append([])
        return self._server.grpc

    async def watch(self, until: float) -> None:
        while time.perf_counter() < until:
            if self._server is not None:
                self.resident[-1].append(self._server.resident_bytes)
            await asyncio.sleep(1)

    async def restart(self, clients: Clients) -> None:
        server, self._server = self._server, None
        start = time.perf_counter()
        server.close(signal.SIGKILL)
        clients.target = await asyncio.get_running_loop().run_in_executor(None, self.start)
        self.down_s = time.perf_counter() - start

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


async def run(folder: str, clients: Clients, subject: Subject, minutes: float) -> dict[str, float]:
    """The whole course; "saturation" and "rate" in requests a second."""
    clients.target = await asyncio.get_running_loop().run_in_executor(None, subject.start)
    await clients.saturate(5)
    saturation = await clients.saturate(10)
    clients.milliseconds.clear()
    rate = LOAD * saturation
    start = time.perf_counter()
    until = start + 60 * minutes
    tell(f"{saturation:.0f} requests a second are possible: {rate:.0f} for {minutes:g} minutes")

    async def happenings() -> None:
        await asyncio.sleep(15 * minutes)
        os.rename(f"{folder}/later", f"{folder}/models/2")
        tell("a newer model")
        await asyncio.sleep(15 * minutes)
        tell("SIGKILL")
        await subject.restart(clients)
        tell(f"back after {subject.down_s:.1f} s")

    async def progress() -> None:
        while time.perf_counter() < until:
            await asyncio.sleep(30)
            tell(f"{time.perf_counter() - start:.0f} s: {len(clients.answers):,} answers, {dict(clients.refused)}")

    tasks = [clients.open_loop(rate, until), clients.append(until), subject.watch(until), happenings(), progress()]
    await asyncio.gather(*tasks)
    await clients.close()
    subject.close()
    return {"saturation": saturation, "rate": rate}


@dataclasses.dataclass(frozen=True)
class Answered:
    """Some answers of one version of the model, and what was asked.

    Attributes:
      users, times, seen: of each answer: whose, at what time, and the sequence number behind what it saw.
    """

    users: np.ndarray
    times: np.ndarray
    seen: np.ndarray
    ask: Asked
    logits: np.ndarray

    @classmethod
    def of(cls, model: ExportedModel, part: list[tuple[int, dict[str, np.ndarray]]], asked: list[dict]) -> "Answered":
        """`part` is pairs of an answer's number in `asked`, and what it said."""
        columns = {
            side: {
                field.name: np.concatenate([asked[number][f"{side}.{field.name}"] for number, _ in part])
                for field in fields
            }
            for side, fields in (("candidates", model.features.item), ("context", model.features.context))
        }
        times = np.array([found["time"][0] for _, found in part])
        return cls(
            np.array([asked[number]["user"][0] for number, _ in part]),
            times,
            np.array([found["as_of"][0] for _, found in part]),
            Asked(times, np.arange(len(part) + 1) * CANDIDATES, columns["candidates"], columns["context"]),
            np.concatenate([found["logit"] for _, found in part]),
        )

    def far(self, model: ExportedModel, vault: Any, before: np.ndarray) -> tuple[np.ndarray, float]:
        """Which answers are not the score by the events before these times, and the largest difference."""
        histories = vault.gather(self.users, before, model.history_length, as_of=self.seen, fields=model.event_fields)
        wanted = model.score(histories, self.ask)
        difference = np.abs(wanted - self.logits)
        far = difference > TOLERANCE * (1 + np.abs(wanted))
        return far.reshape(-1, CANDIDATES).any(axis=1), float(difference.max())

    def noticed(self, model: ExportedModel, vault: Any) -> list[bool]:
        """Of each answer of a user with events: whether it would be far off if the newest event had been missed."""
        newest = vault.gather(self.users, self.times, 1, as_of=self.seen, fields=())
        has = np.diff(newest.offsets) > 0
        before = self.times.copy()
        before[has] = newest.columns["time"]
        return self.far(model, vault, before)[0][has].tolist()


def wrong_answers(clients: Clients, requests: list[bytes], vault: Any, models: list[str]) -> dict[str, Any]:
    """Every answer scored anew: how many differ, the largest difference, and how many each version gave.

    And, of every tenth batch: the share of the answers that would be found wrong if their newest event had been missed.
    """
    by_version: dict[str, list[tuple[int, dict[str, np.ndarray]]]] = {}
    for number, response in clients.answers:
        version = MESSAGES["ModelInferResponse"].FromString(response).model_version
        by_version.setdefault(version, []).append((number, outputs_of(response)))
    asked = [_columns(request) for request in requests]
    wrong, farthest, noticed = 0, 0.0, []
    for path in models:
        model = ExportedModel(path)
        answers = by_version.get(model.version, [])
        for start in range(0, len(answers), BATCHES[-1]):
            some = Answered.of(model, answers[start : start + BATCHES[-1]], asked)
            far, difference = some.far(model, vault, some.times)
            wrong, farthest = wrong + int(far.sum()), max(farthest, difference)
            if start // BATCHES[-1] % 10 == 0:
                noticed += some.noticed(model, vault)
            if start // BATCHES[-1] % 100 == 0:
                tell(f"version {model.version}: {start:,} of {len(answers):,} scored anew, {wrong} wrong")
    return {
        "wrong": wrong,
        "farthest": farthest,
        "noticed": float(np.mean(noticed)),
        "versions": {name: len(some) for name, some in by_version.items()},
    }


def _columns(request: bytes) -> dict[str, np.ndarray]:
    asked = MESSAGES["ModelInferRequest"].FromString(request)
    pairs = zip(asked.inputs, asked.raw_input_contents, strict=True)
    return {tensor.name: np.frombuffer(data, np.int64) for tensor, data in pairs}


def lost_events(clients: Clients, vault: Any) -> tuple[int, int]:
    """How many acknowledged events are not in the vault, and how many are there more than once."""
    wanted: dict[int, list[int]] = {}
    for events in clients.acknowledged:
        for user, moment in zip(events["user"].tolist(), events["time"].tolist(), strict=True):
            wanted.setdefault(user, []).append(moment)
    lost = twice = 0
    for user, times in wanted.items():
        counts = Counter(vault.get(user, 1_000_000, fields=()).columns["time"].tolist())
        lost += sum(counts[moment] == 0 for moment in times)
        twice += sum(counts[moment] > 1 for moment in times)
    return lost, twice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="datasets/bench_endurance", help="models, the vault's copy and logs")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder, config = args.path, read_config(EXPERIMENT, "laser_plus")
    config.data.recipe.prepare(config.data.path)
    for name in ("models", "later", "vault", "log"):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    os.makedirs(os.path.join(folder, "models"))
    shutil.copytree(config.data.vault_path, os.path.join(folder, "vault"))
    for seed, path in enumerate((f"{folder}/models/1", f"{folder}/later")):
        export_untrained("laser_plus", path, seed, str(seed + 1))
    drawn = Requests(config.data.vault_path, args.seed)
    requests = [drawn.message("laser_plus", CANDIDATES, user) for user in drawn.draw_users().tolist()]
    with seqvault.open(f"{folder}/vault") as vault:
        clients = Clients(requests, Events(vault, np.random.default_rng(args.seed)))
        before = vault.stats()
    subject = Subject(folder)
    try:
        rates = asyncio.run(run(folder, clients, subject, args.minutes))
    finally:
        subject.close()
    with seqvault.open(f"{folder}/vault") as vault:
        damages, after = vault.verify(), vault.stats()
        lost, twice = lost_events(clients, vault)
        answers = wrong_answers(clients, requests, vault, [f"{folder}/models/1", f"{folder}/models/2"])
    resident = [sizes for sizes in subject.resident if sizes]
    early = [np.median(sizes[20:40] or sizes) for sizes in resident]
    growth = [(np.median(sizes[-20:]) - base) / 2**20 for sizes, base in zip(resident, early, strict=True)]
    peak = [(max(sizes) - base) / 2**20 for sizes, base in zip(resident, early, strict=True)]
    appended = sum(len(events["time"]) for events in clients.acknowledged)
    print(f"\n{len(clients.answers):,} answers at {rates['rate']:.0f} a second of {rates['saturation']:.0f} possible")
    print(f"by version {answers['versions']}; not answered: {dict(clients.refused)}")
    print(f"{subject.down_s:.1f} s without a server")
    print(f"{answers['wrong']} wrong, logits differ by {answers['farthest']:.1e} at most")
    print(f"{appended:,} events acknowledged, {clients.again} batches sent again, {lost} lost, {twice} there twice")
    print(f"vault: {before} -> {after}, damages: {damages or 'none'}")
    print(f"{answers['noticed']:.1%} would have been found wrong without their newest event")
    print("memory of each process, its last 20 s above those after 20 s, and its most above them (two models), MiB:")
    print(", ".join(f"{last:.0f} and {most:.0f}" for last, most in zip(growth, peak, strict=True)))
    result = {
        "answers": len(clients.answers),
        "wrong": answers["wrong"],
        "farthest": answers["farthest"],
        "acknowledged": appended,
        "lost": lost,
        "twice": twice,
        "refused": sum(clients.refused.values()),
        "down_s": round(subject.down_s, 1),
        "p50_ms": round(float(np.percentile(clients.milliseconds, 50)), 2),
        "p99_ms": round(float(np.percentile(clients.milliseconds, 99)), 2),
        "missing_event_noticed": round(answers["noticed"], 4),
        "memory_growth_mb": round(max(growth), 1),
        "memory_peak_mb": round(max(peak), 1),
        "budget_mb": USER_CACHE_MB + (seqvault.CACHE_BYTES >> 20) + (WRITING.tail_bytes >> 20),
    }
    print(json.dumps(result))
    return int(bool(answers["wrong"] or lost or twice or damages))


if __name__ == "__main__":
    if SERVE in sys.argv:
        arguments = [argument for argument in sys.argv[1:] if argument != SERVE]
        sys.exit(serving.main(arguments, lambda path, **_: seqvault.open(path, writing=WRITING)))
    sys.exit(main())
