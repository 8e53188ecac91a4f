"""Ranking behind a real server: how long it takes, of what, and beside yesterday's store and a Transformer.

  python -m experiments.bench.serving

Three servers (`python -m laser_jax.serving.server`) on this machine, all with models of one shape that were not
trained, since that makes no difference to time:

  ours         laser_plus on a vault
  yesterday    the same model on RocksDB with a JSON array a user (serving_yesterday.py), read-only
  transformer  a Transformer encoder, its history work done once a request, on the vault

A client process sends gRPC requests of C candidates for users by Zipf(.9), histories of 1000 events (serving_load.py);
it shares the cores with the server it asks, the other servers lie idle. Load goes round from server to server. For each
C: what one request takes while nothing else is under way; how many a second are answered at most; then open loops at
half of that, latency from when a request should have been sent, yesterday's at half of ours too, and ours and the
Transformer's both at half of what the slower one of them can do. Each of these is measured in pieces, which take turns.
Stages are those of a batch, as the server counts them. Cold is a user's first request of a server's life, warm any
other; files are in the kernel's cache either way.

The last line is one JSON object.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data.xhs_synthetic import XhsSynthetic
from experiments.bench.vault_build import tell
from experiments.paper.study import read_config
from experiments.ranking_server import RankingServer, infer_request
from laser_jax import vault as seqvault
from laser_jax.config import Config, to_dict
from laser_jax.fingerprint import fingerprint
from laser_jax.serving.export import Run, export_model
from laser_jax.serving.files import MANIFEST
from laser_jax.serving.ranker import STAGES
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory

CANDIDATES = (1, 10, 100, 500)
EXPERIMENT = "experiments/xhs.py"
#: Requests that a client takes turns with.
REQUESTS = 500
#: Pieces that an open load is cut into.
TURNS = 4


def prepare(folder: str) -> dict[str, str]:
    """Models, vault and JSON store, made on first use; their paths. Those of another config or vault are not taken."""
    config = read_config(EXPERIMENT, "laser_plus")
    config.data.recipe.prepare(config.data.path)
    known = fingerprint(config.data)
    paths = {"vault": config.data.vault_path, "store": os.path.join(folder, f"json-{_digest(known)}")}
    for name in ("laser_plus", "transformer"):
        paths[name] = os.path.join(folder, f"{name}-{_digest([to_dict(untrained_config(name)), known])}")
        if not os.path.exists(os.path.join(paths[name], MANIFEST)):
            tell(f"exporting {name}")
            export_untrained(name, paths[name])
    if not os.path.exists(paths["store"]):
        tell("writing JSON")
        draft = paths["store"] + ".draft"
        shutil.rmtree(draft, ignore_errors=True)
        from experiments.bench.serving_yesterday import fill

        fill(paths["vault"], draft)
        os.rename(draft, paths["store"])
    return paths


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def untrained_config(encoder: str) -> Config:
    """Of a model that is timed."""
    config = read_config(EXPERIMENT, encoder)
    if encoder == "transformer":
        config.encoder.ffn = 1  # as in PAPER's comparison of costs
    return config


def export_untrained(encoder: str, out: str, seed: int = 0, version: str = "") -> None:
    """Writes a model with fresh parameters."""
    config = untrained_config(encoder)
    factory = StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig()))
    state = factory.create(seed)
    export_model(Run(config, state, factory, 0, config.features.dictionaries()), out, version=version)


class Requests:
    """Draws requests of users by Zipf(.9), for items that somebody has met."""

    def __init__(self, path: str, seed: int):
        self._rng = np.random.default_rng(seed)
        with seqvault.open(path) as vault:
            self.users = self._rng.permutation(vault.users())
            names = [field.name for field in read_config(EXPERIMENT, "laser_plus").features.item]
            met = [vault.get(user, fields=names).columns for user in self.users[:200].tolist()]
        self._items = {name: np.concatenate([columns[name] for columns in met]).astype(np.int64) for name in names}
        weights = np.arange(1, len(self.users) + 1) ** -0.9
        self._weights = weights / weights.sum()

    def draw_users(self) -> np.ndarray:
        """REQUESTS of them."""
        return self._rng.choice(self.users, REQUESTS, p=self._weights)

    def draw(self, model: str, candidates: int, users: np.ndarray | None = None) -> list[str]:
        """Requests as a job has them; of these users, one each, or of drawn ones."""
        users = self.draw_users() if users is None else users
        return [base64.b64encode(self.message(model, candidates, user)).decode() for user in users.tolist()]

    def message(self, model: str, candidates: int, user: int) -> bytes:
        """One request."""
        places = self._rng.integers(0, len(self._items["item"]), candidates)
        columns = {f"candidates.{name}": values[places] for name, values in self._items.items()}
        asked = {"user": np.array([user]), "context.scene": np.array([1]), **columns}
        return infer_request(model, asked).SerializeToString()


class Served(RankingServer):
    """A server that is compared.

    Attributes:
      name: of what is compared. model: that it serves.
    """

    def __init__(self, name: str, model: str, *arguments: str, **settings: str):
        super().__init__(*arguments, **settings)
        self.name, self.model = name, model

    def load(self, kind: str, requests: list[str], **settings: Any) -> dict[str, Any]:
        """What the load says, and `stages`: name -> (bounds, counts) of what the server counted meanwhile."""
        job = {"target": self.grpc, "requests": requests, "kind": kind, "settings": settings}
        before = self._stages()
        command = [sys.executable, "-m", "experiments.bench.serving_load"]
        done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        answer, after = json.loads(done.stdout), self._stages()
        if not answer["milliseconds"]:
            raise RuntimeError(f"{self.name} answered nothing: {answer['refused']}")
        answer["stages"] = {name: (bounds, now - before[name][1]) for name, (bounds, now) in after.items()}
        return answer

    def _stages(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Stage -> upper bounds in milliseconds, and how many batches were within each and none below."""
        with urllib.request.urlopen(f"{self.http}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in STAGES}
        for line in lines:
            if line.startswith("laser_stage_seconds_bucket"):
                labels, value = line.split("{")[1].split("} ")
                named = dict(pair.split("=") for pair in labels.replace('"', "").split(","))
                found[named["stage"]].append((float(named["le"]), float(value)))
        return {
            name: (1e3 * np.array([bound for bound, _ in pairs]), np.diff([count for _, count in pairs], prepend=0))
            for name, pairs in found.items()
        }


def stage_percentile(answer: dict[str, Any], stage: str, percent: float) -> float:
    """Of a stage's milliseconds a batch, interpolated within the bucket that it falls into."""
    bounds, counts = answer["stages"][stage]
    total = np.cumsum(counts)
    place = int(np.searchsorted(total, percent / 100 * total[-1]))
    low = 0.0 if place == 0 else bounds[place - 1]
    missing = percent / 100 * total[-1] - (0.0 if place == 0 else total[place - 1])
    return float(low + (bounds[place] - low) * missing / counts[place])


def percentile(answer: dict[str, Any], percent: float) -> float:
    return float(np.percentile(answer["milliseconds"], percent))


@contextlib.contextmanager
def servers(paths: dict[str, str], programs: str) -> Iterator[dict[str, Served]]:
    """The three of them."""
    common = [f"--vault={paths['vault']}", "--deadline-ms=60000", "--queue=10000"]
    kinds = {
        "ours": ("laser_plus", "laser_jax.serving.server", "--read-only"),
        "yesterday": ("laser_plus", "experiments.bench.serving_yesterday", f"--store={paths['store']}"),
        "transformer": ("transformer", "laser_jax.serving.server", "--read-only"),
    }
    found: dict[str, Served] = {}
    try:
        for name, (model, module, argument) in kinds.items():
            arguments = [f"--model={paths[model]}", *common, argument]
            found[name] = Served(name, model, *arguments, module=module, JAX_COMPILATION_CACHE_DIR=programs)
            tell(f"{name} is ready after {found[name].seconds:.0f} s")
        yield found
    finally:
        for server in found.values():
            server.close()


def measure(served: dict[str, Served], requests: Requests, seconds: float) -> dict[str, Any]:
    """Name -> C -> what was measured, and "cold" and "warm" of ours."""
    found: dict[str, Any] = {name: {} for name in served}
    # New users every time: nobody has asked for them yet.
    fresh = iter(np.array_split(requests.users[::-1][:600], 6))
    for name in ("ours", "yesterday"):
        some = requests.draw(served[name].model, 10, next(fresh))
        found[name]["cold"] = served[name].load("idle", some, seconds=60, most=len(some))
        found[name]["warm"] = served[name].load("idle", some, seconds=60, most=len(some))
    for candidates in CANDIDATES:
        draws = requests.draw("laser_plus", candidates), requests.draw("transformer", candidates)
        of = {name: draws[server.model == "transformer"] for name, server in served.items()}
        for name, server in served.items():  # warm
            server.load("saturation", of[name], seconds=2, in_flight=8)
        answered, spent = dict.fromkeys(served, 0), dict.fromkeys(served, 0.0)
        for _ in range(TURNS):
            for name, server in served.items():
                full = server.load("saturation", of[name], seconds=seconds / TURNS, in_flight=32)
                answered[name] += len(full["milliseconds"])
                spent[name] += full["seconds"]
        for name, server in served.items():
            idle = server.load("idle", of[name], seconds=seconds, most=300)
            found[name][candidates] = {"idle": idle, "rate": answered[name] / spent[name]}
        rates = {name: found[name][candidates]["rate"] / 2 for name in served}
        # The faster one of our model and the Transformer also at half of what the slower one can do.
        slower, faster = sorted(("ours", "transformer"), key=rates.get)
        loads = {(name, "half"): rates[name] for name in served}
        loads |= {("yesterday", "our load"): rates["ours"], (faster, "same load"): rates[slower]}
        for (name, load), answer in in_turns(loads, served, of, seconds, candidates).items():
            found[name][candidates][load] = answer
        found[slower][candidates]["same load"] = found[slower][candidates]["half"]
        told = [f"{name} {2 * rate:.1f}/s" for name, rate in rates.items()]
        tell(f"C={candidates}: {', '.join(told)}")
    return found


def in_turns(
    loads: dict[tuple[str, str], float], served: dict[str, Served], of: dict[str, list[str]], seconds: float, seed: int
) -> dict[tuple[str, str], dict[str, Any]]:
    """Open loads, a piece of each at a time: what else happens on the machine meanwhile happens to all of them.

    Args:
      loads: (server, name of the load) -> requests a second. of: server -> its requests.
      seconds: of each load, or more if it takes more for a 99th percentile, within reason.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for turn in range(TURNS):
        for key, rate in loads.items():
            long = min(max(seconds, 400 / rate), 4 * seconds) / TURNS
            piece = served[key[0]].load("open", of[key[0]], seconds=long, rate=rate, seed=TURNS * seed + turn)
            found[key] = joined(found[key], piece) if turn else piece
    return found


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """What two pieces of a load say together."""
    stages = {name: (bounds, counts + second["stages"][name][1]) for name, (bounds, counts) in first["stages"].items()}
    refused = dict(Counter(first["refused"]) + Counter(second["refused"]))
    return {"milliseconds": first["milliseconds"] + second["milliseconds"], "refused": refused, "stages": stages}


def report(found: dict[str, Any], served: dict[str, Served]) -> dict[str, Any]:
    """Prints the table; the figures of the last line."""
    print("\n| | C | idle p50 ms | requests/s | p50 ms at half | p99 ms | history p50 ms | p99 | scoring p50 | p99 |")
    print("|---" * 10 + "|")
    for candidates in CANDIDATES:
        for name in served:
            row = found[name][candidates]
            half = row["half"]
            cells = [percentile(row["idle"], 50), row["rate"], percentile(half, 50), percentile(half, 99)]
            cells += [stage_percentile(half, stage, at) for stage in ("history", "scoring") for at in (50, 99)]
            print(f"| {name} | {candidates} | {' | '.join(f'{cell:,.2f}' for cell in cells)} |")
    ours, yesterday, transformer = (found[name] for name in ("ours", "yesterday", "transformer"))
    idle = ours[10]["idle"]
    stages = sum(stage_percentile(idle, stage, 50) for stage in ("history", "scoring"))
    print("\nfirst requests of users and second ones, C=10, one at a time:\n")
    print("| | cold p50 ms | history | warm p50 ms | history |\n|---|---|---|---|---|")
    for name in ("ours", "yesterday"):
        cells = []
        for which in ("cold", "warm"):
            cells += [percentile(found[name][which], 50), stage_percentile(found[name][which], "history", 50)]
        print(f"| {name} | {' | '.join(f'{cell:,.2f}' for cell in cells)} |")

    def half(rows: dict[int, Any], candidates: int, percent: float) -> float:
        return percentile(rows[candidates]["half"], percent)

    their_load = yesterday[100]["our load"]
    return {
        **{f"p50_ms_c{c}": round(half(ours, c, 50), 2) for c in CANDIDATES},
        **{f"p99_ms_c{c}": round(half(ours, c, 99), 2) for c in CANDIDATES},
        **{f"requests_per_s_c{c}": round(ours[c]["rate"], 1) for c in CANDIDATES},
        "yesterday_history_p99_over_ours": round(
            stage_percentile(their_load, "history", 99) / stage_percentile(ours[100]["half"], "history", 99), 2
        ),
        **{
            f"yesterday_history_p99_over_ours_c{c}": round(
                stage_percentile(yesterday[c]["our load"], "history", 99)
                / stage_percentile(ours[c]["half"], "history", 99),
                2,
            )
            for c in CANDIDATES
        },
        "yesterday_p99_over_ours": round(percentile(their_load, 99) / half(ours, 100, 99), 2),
        "history_p99_over_request_p99": round(
            stage_percentile(ours[100]["half"], "history", 99) / half(ours, 100, 99), 4
        ),
        "server_overhead_ms_p50": round(percentile(idle, 50) - stages, 2),
        **{
            f"transformer_p99_over_ours_c{c}": round(half(transformer, c, 99) / half(ours, c, 99), 2)
            for c in CANDIDATES
        },
        **{
            f"transformer_p99_over_ours_same_load_c{c}": round(
                percentile(transformer[c]["same load"], 99) / percentile(ours[c]["same load"], 99), 2
            )
            for c in CANDIDATES
        },
        "cached_user_speedup": round(
            stage_percentile(ours["cold"], "history", 50) / stage_percentile(ours["warm"], "history", 50), 2
        ),
        "refused": sum(sum(found[name][c]["half"]["refused"].values()) for name in served for c in CANDIDATES),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="datasets/bench_serving", help="models and the JSON store, made on first use")
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = prepare(args.path)
    requests = Requests(paths["vault"], args.seed)
    with servers(paths, os.path.abspath(os.path.join(args.path, "programs"))) as served:
        found = measure(served, requests, args.seconds)
        print(f"\n{XhsSynthetic().users:,} users, histories of 1000 events, {os.cpu_count()} cores for all")
        print(json.dumps(report(found, served)))


if __name__ == "__main__":
    main()
