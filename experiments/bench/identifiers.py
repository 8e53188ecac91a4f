"""Ten million ids through a table of a million rows: what admission and eviction cost in AUC and in memory.

  python -m experiments.bench.identifiers

Items come and go: each has a life of its own, popular in it by Zipf's law, and a click rate of its own. A table of
embeddings learns them from a stream of impressions by row-sparse Adagrad; every impression is predicted before it is
learned. Contenders: a row for every id (unbounded), a growing dictionary that admits and evicts, and hashing into as
many rows (ids collide), with one hash and with two. Prints a table and, as the last line, one JSON object.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.timing import use_huge_pages
from laser_jax import metrics
from laser_jax.features import FieldConfig, rows_of
from laser_jax.id_dictionary import IdDictionary
from laser_jax.layers.embedding import Table, gather_rows, init_table, pool_rows, renew_rows, update_rows
from laser_jax.layers.row_optimizers import adagrad
from laser_jax.row_placement import Wanted, bucket_size, padded_rows, unique_keys

OPTIMIZER = adagrad(0.2, 1.0)
LEAST, WIDTH, STD = 4096, 16, 1e-3
COLD = 0.4  # of the impressions: any item that lives, however rare


def stream(num_ids: int, steps: int, batch: int):
    """Yields (ids, labels) of each step; in all some `num_ids` distinct ids, in a window that moves on."""
    rng = np.random.default_rng(0)
    window = num_ids // 5
    for step in range(steps):
        start = int((num_ids - window) * step / max(steps - 1, 1))
        rank = np.where(rng.random(batch) < COLD, rng.integers(0, window, batch), rng.zipf(1.3, batch) % window)
        # Popular ranks are scattered over the window and change hands while it moves.
        ids = (start + (rank * 7919 + step // 50 * 104_729) % window).astype(np.int64)
        rate = 1 / (1 + np.exp(-(1.5 * np.sin(ids * 12.9898) * np.cos(ids * 78.233) * 2 - 1)))
        yield ids * 1_000_003, (rng.random(batch) < rate).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=0)
def learn(table: Table, unique, fresh, bags, labels, step) -> tuple[Table, jax.Array]:
    """One step: logits before it, and the table after it."""
    table = renew_rows(table, unique, fresh, OPTIMIZER, STD, step)

    def loss(rows):
        logits = jnp.sum(pool_rows(rows, bags, mean=False), axis=1)
        return jnp.sum(jax.nn.softplus(logits) - labels * logits), logits

    gradients, logits = jax.grad(loss, has_aux=True)(gather_rows(table, unique))
    return update_rows(table, unique, gradients, OPTIMIZER, step), logits


class Contender:
    """A table, and how ids become rows [N, k] of it."""

    def __init__(self, num_rows: int, dictionary: IdDictionary | None = None, hashes: int = 0, num_ids: int = 0):
        self.num_rows, self.dictionary, self.num_ids = num_rows, dictionary, num_ids
        self.field = FieldConfig("id", WIDTH, num_rows, "hash", hashes=max(hashes, 1))
        self.table = init_table(jax.random.key(0), padded_rows(num_rows), WIDTH, STD, OPTIMIZER)
        self.logits, self.size, self.seconds = [], LEAST, 0.0

    def step(self, ids: np.ndarray, labels: np.ndarray, number: int) -> None:
        start = time.perf_counter()
        keys, (at,) = unique_keys([ids])
        fresh = np.zeros(len(keys), bool)
        if self.dictionary is not None:
            assigned = self.dictionary.assign(keys, number)
            rows, fresh = assigned.rows[:, None], assigned.fresh
        elif self.num_ids:
            rows = (1 + keys // 1_000_003)[:, None]
        else:
            rows = rows_of(self.field, keys, None).reshape(len(keys), -1)
        unique, (position,) = unique_keys([rows])
        renew = np.zeros(len(unique), bool)
        renew[position[:, 0]] = fresh
        wanted, rank = Wanted.of(unique, self.num_rows, 1)
        self.size = max(self.size, bucket_size(len(unique), padded_rows(self.num_rows), LEAST))
        local, slots = wanted.buckets(self.size, padded_rows(self.num_rows))
        flags = np.zeros(self.size, bool)
        flags[slots[rank]] = renew
        bags = slots[rank][position][at]
        if self.dictionary is not None:
            bags = np.where(rows[at] == 0, -1, bags)  # an id without a row says nothing
        self.table, logits = learn(self.table, local[0], flags, bags, labels, jnp.int32(number))
        self.logits.append(np.asarray(logits))
        self.seconds += time.perf_counter() - start

    def num_bytes(self) -> int:
        kept = self.dictionary.num_bytes if self.dictionary else 0
        return sum(x.nbytes for x in jax.tree.leaves(self.table)) + kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=13_000_000, help="that there are; three quarters of them are met")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32_768)
    parser.add_argument("--admit", type=int, default=2)
    parser.add_argument("--keep", type=int, default=150, help="steps")
    args = parser.parse_args()
    contenders = {
        "unbounded": Contender(args.ids + 1, num_ids=args.ids),
        f"dictionary, admit {args.admit}": Contender(args.rows, IdDictionary(args.rows, args.admit, args.keep)),
        "dictionary, admit 1": Contender(args.rows, IdDictionary(args.rows, 1, args.keep)),
        "hash": Contender(args.rows, hashes=1),
        "two hashes": Contender(args.rows, hashes=2),
    }
    met = np.zeros(args.ids, bool)
    labels, most, start, told = [], 0, time.monotonic(), 0.0
    for number, (ids, label) in enumerate(stream(args.ids, args.steps, args.batch), 1):
        met[ids // 1_000_003] = True
        labels.append(label)
        for contender in contenders.values():
            contender.step(ids, label, number)
        most = max(most, len(contenders[f"dictionary, admit {args.admit}"].dictionary))
        if time.monotonic() - told > 10:
            told = time.monotonic()
            eta = (told - start) / number * (args.steps - number)
            print(f"step {number}/{args.steps}, {met.sum():,} ids met, ETA {eta:.0f} s", flush=True)
    tail = args.steps // 5  # by then every table has long been full
    truth = np.concatenate(labels[-tail:])
    print(f"\n{met.sum():,} ids met; AUC of the last {tail} steps, each impression predicted before it is learned\n")
    print("| | AUC | - unbounded | MB | ids with a row | ms a step |\n|---|---|---|---|---|---|")
    aucs = {name: metrics.auc(truth, np.concatenate(c.logits[-tail:])) for name, c in contenders.items()}
    for name, c in contenders.items():
        held = f"{len(c.dictionary):,}" if c.dictionary else ""
        print(
            f"| {name} | {aucs[name]:.4f} | {aucs[name] - aucs['unbounded']:+.4f} | {c.num_bytes() / 1e6:.0f} | "
            f"{held} | {1e3 * c.seconds / args.steps:.1f} |"
        )
    print(
        json.dumps(
            {
                "ids_met": int(met.sum()),
                "rows": args.rows,
                "auc": {name: round(value, 4) for name, value in aucs.items()},
                "megabytes": {name: round(c.num_bytes() / 1e6, 1) for name, c in contenders.items()},
                "most_ids_with_a_row": most,
            }
        )
    )


if __name__ == "__main__":
    use_huge_pages("experiments.bench.identifiers")
    main()
