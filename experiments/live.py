"""A user clicks, and the next ranking knows: against a running server, with nothing but HTTP and JSON.

  python -m laser_jax.serving.export --workdir=runs/xhs --out=models/xhs
  python -m laser_jax.serving.server --model=models/xhs --vault=datasets/xhs_synthetic/vault &
  python -m experiments.live --vault=datasets/xhs_synthetic/vault

Some items are ranked for a user, the user clicks the last of them a few times (events are appended through the server),
and after every click the same items are ranked again. The vault is only read, for a user and for items to show.
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np

from laser_jax import vault as seqvault


class Client:
    """Calls a server's models."""

    def __init__(self, url: str):
        self._url = url

    def metadata(self, model: str) -> dict[str, Any]:
        """Of a model: its inputs and outputs."""
        with urllib.request.urlopen(f"{self._url}/v2/models/{model}") as answer:
            return json.load(answer)

    def infer(self, model: str, columns: dict[str, Any], types: dict[str, str]) -> dict[str, list]:
        """Outputs by name."""
        inputs = [
            {"name": name, "datatype": types[name], "shape": list(np.shape(values)), "data": np.ravel(values).tolist()}
            for name, values in columns.items()
        ]
        body = json.dumps({"inputs": inputs}).encode()
        try:
            with urllib.request.urlopen(f"{self._url}/v2/models/{model}/infer", body) as answer:
                return {output["name"]: output["data"] for output in json.load(answer)["outputs"]}
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{model}: {json.load(error)['error']}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="laser_plus", help="name of the model that ranks")
    parser.add_argument("--vault", required=True, help="directory of the server's vault, or its service")
    parser.add_argument("--items", type=int, default=8, help="that are ranked")
    parser.add_argument("--clicks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    client, vault = Client(args.server), seqvault.open(args.vault)
    rng = np.random.default_rng(args.seed)
    users = rng.permutation(vault.users())[:200].tolist()
    # Items that somebody has met, each with the fields of an event.
    events = [vault.get(user, 1, fields=vault.schema.names) for user in users]
    events = [event for event in events if len(event)]
    user = users[0]
    shown = [events[place] for place in rng.permutation(len(events))[: args.items]]
    told = {model: client.metadata(model) for model in (args.model, "append")}
    types = {model: {one["name"]: one["datatype"] for one in found["inputs"]} for model, found in told.items()}
    asked: dict[str, Any] = {"user": [user]}
    for name in types[args.model]:
        side, _, field = name.partition(".")
        if side == "candidates":
            asked[name] = np.concatenate([event[field] for event in shown])
        elif side == "context":
            unknown = "" if types[args.model][name] == "BYTES" else 0
            asked[name] = shown[0][field][:1] if field in vault.schema.names else [unknown]
    answer = client.infer(args.model, asked, types[args.model])
    before = answer["logit"]
    clicked = int(np.argmin(before))
    print(f"user {user}, {answer['events'][0]} events; item {clicked} is last, and is clicked\n")
    history = [before]
    for _ in range(args.clicks):
        event = {name: shown[clicked][name] for name in vault.schema.names}
        now = int(time.time() * (1000 if vault.schema.time_unit == "ms" else 1))
        client.infer("append", {"user": [user], "time": [now], **event}, types["append"])
        history.append(client.infer(args.model, asked, types[args.model])["logit"])
    print(f"| item | before |{''.join(f' {number} clicks |' for number in range(1, len(history)))}")
    print("|---" * (len(history) + 1) + "|")
    for item in range(len(before)):
        cells = [f"{logits[item]:+.3f} (#{1 + sum(other > logits[item] for other in logits)})" for logits in history]
        print(f"| {item}{' (clicked)' if item == clicked else ''} | {' | '.join(cells)} |")
    first, last = (1 + sum(other > logits[clicked] for other in logits) for logits in (history[0], history[-1]))
    print(f"\nafter {args.clicks} clicks, {time.strftime('%H:%M:%S')}: item {clicked} went from #{first} to #{last}")


if __name__ == "__main__":
    main()
