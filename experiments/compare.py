"""Several encoders, several seeds, one table.

  python -m experiments.compare --config=experiments/completejourney.py --workdir=runs/compare --seeds=3

Every run is a process of `python -m laser_jax.main` in WORKDIR/ENCODER-SEED; finished ones are not run again, a killed
one goes on. Differences to `--against` are paired: the same users are resampled for both, and averaged over seeds.
Further flags (--config.head.products=True ...) are handed to every run.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time

import numpy as np

from laser_jax.models import ENCODERS

RESAMPLES = 500


def weighted_auc(order: np.ndarray, tie_ends: np.ndarray, positive: np.ndarray, weight: np.ndarray) -> float:
    """AUC where sample i counts weight[i] times; `order` sorts the scores, `tie_ends` are the ends of equal runs."""
    w, y = weight[order], positive[order]
    negative, gained = np.cumsum(w * ~y), np.cumsum(w * y)
    negative, gained = np.r_[0, negative[tie_ends]], np.r_[0, gained[tie_ends]]
    return float(np.sum(np.diff(gained) * (negative[1:] + negative[:-1]) / 2) / (negative[-1] * gained[-1]))


class Resampled:
    """AUCs of one run's predictions under the same resamples of users."""

    def __init__(self, path: str):
        with np.load(path) as stored:
            self.users, self.labels, self.logits = stored["users"], stored["labels"] > 0.5, stored["logits"]
        self.order = np.argsort(self.logits, kind="stable")
        ordered = self.logits[self.order]
        self.tie_ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])

    def aucs(self, resamples: int) -> np.ndarray:
        """[1 + resamples]: the plain AUC first."""
        _, group = np.unique(self.users, return_inverse=True)
        rng = np.random.default_rng(0)
        num_users = group.max() + 1
        values = [weighted_auc(self.order, self.tie_ends, self.labels, np.ones(len(group)))]
        for _ in range(resamples):
            times = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
            values.append(weighted_auc(self.order, self.tie_ends, self.labels, times[group].astype(float)))
        return np.array(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--encoders", default="laser,laser_plus,ta,din,mean", help=f"of {', '.join(ENCODERS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--against", default="ta")
    args, handed_on = parser.parse_known_args()
    encoders = args.encoders.split(",")
    runs = [(encoder, seed) for seed in range(args.seeds) for encoder in encoders]
    start = time.monotonic()
    for done, (encoder, seed) in enumerate(runs):
        workdir = os.path.join(args.workdir, f"{encoder}-{seed}")
        if os.path.exists(os.path.join(workdir, "results.json")):
            continue
        os.makedirs(workdir, exist_ok=True)
        print(f"{encoder} seed {seed} ({done + 1}/{len(runs)}, {time.monotonic() - start:.0f} s so far)", flush=True)
        command = [sys.executable, "-m", "laser_jax.main", f"--config={args.config}:{encoder}", f"--workdir={workdir}"]
        command += [f"--config.train.seed={seed}", f"--config.data.seed={seed}", *handed_on]
        with open(os.path.join(workdir, "log"), "w", encoding="utf-8") as log:
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit(f"{encoder} seed {seed} failed: see {workdir}/log")
    tabulate(args.workdir, encoders, args.seeds, args.against)


def tabulate(workdir: str, encoders: list[str], seeds: int, against: str) -> None:
    """Prints the table and writes it as markdown and CSV into the workdir."""
    results, samples = {}, {}
    for encoder in encoders:
        folders = [os.path.join(workdir, f"{encoder}-{seed}") for seed in range(seeds)]
        results[encoder] = []
        for folder in folders:
            with open(os.path.join(folder, "results.json"), encoding="utf-8") as file:
                results[encoder].append(json.load(file))
        samples[encoder] = np.mean(
            [Resampled(os.path.join(folder, "predictions.npz")).aucs(RESAMPLES) for folder in folders], axis=0
        )
    head = ["encoder", "AUC", "sd", "GAUC", "logloss", "NE", f"AUC - {against}", "95 % interval"]
    head += ["gate contrast", "samples/s"]
    rows = []
    for encoder in sorted(encoders, key=lambda e: -samples[e][0]):
        tests = [r["test"][encoder] for r in results[encoder]]
        aucs = [t["auc"] for t in tests]
        difference = samples[encoder] - samples[against] if against in samples else None
        low, high = np.percentile(difference[1:], [2.5, 97.5]) if difference is not None else (np.nan, np.nan)
        contrast = results[encoder][0]["gate_contrast"]
        rows.append(
            [
                encoder,
                f"{np.mean(aucs):.4f}",
                f"{np.std(aucs, ddof=1) if seeds > 1 else float('nan'):.4f}",
                *(f"{np.mean([t[name] for t in tests]):.4f}" for name in ("gauc", "logloss", "ne")),
                f"{difference[0]:+.4f}" if difference is not None else "",
                f"[{low:+.4f}, {high:+.4f}]" if difference is not None and encoder != against else "",
                "" if contrast is None else f"{contrast:.3f}",
                f"{np.mean([r['samples_per_second'] for r in results[encoder]]):.0f}",
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])
    with open(os.path.join(workdir, "table.md"), "w", encoding="utf-8") as file:
        file.write(table + "\n")
    with open(os.path.join(workdir, "table.csv"), "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    print(f"\n{table}\n\n{len(encoders) * seeds} runs, {seeds} seeds; also in {workdir}/table.md and table.csv")


if __name__ == "__main__":
    main()
