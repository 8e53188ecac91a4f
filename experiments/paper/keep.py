"""Keeps what tables need of finished runs, under version control.

  python -m experiments.paper.keep --root=runs/paper

Copies of every finished run its config, results, settings and revision, its AUC under resampled users (which
intervals are made of) and its AUCs when it was served at other lengths into experiments/paper/kept: some 10 kB a run,
against some MB of checkpoint and predictions. Tables then take the run from there, on any machine.
"""

import argparse
import filecmp
import glob
import os
import shutil

from experiments.paper.intervals import aucs_of
from experiments.paper.study import KEPT

FILES = ("run.json", "config.json", "results.json", "predictions.aucs.npy")
SERVED = "served-at-*.json"  # see lengths.py


def keep(root: str, kept: str = KEPT) -> list[str]:
    """Copies what is not kept yet, or was run anew since; returns the folders written.

    Args:
      root: holds DATA/ENCODER-DIGEST/SEED.
    """
    written = []
    for results in sorted(glob.glob(os.path.join(root, "*", "*", "*", "results.json"))):
        folder = os.path.dirname(results)
        target = os.path.join(kept, os.path.relpath(folder, root))
        names = [os.path.basename(path) for path in sorted(glob.glob(os.path.join(folder, SERVED)))]
        if os.path.exists(old := os.path.join(target, "results.json")) and filecmp.cmp(old, results, shallow=False):
            names = [name for name in names if not os.path.exists(os.path.join(target, name))]
            if not names:
                continue
        else:
            aucs_of(os.path.join(folder, "predictions.npz"))
            shutil.rmtree(target, ignore_errors=True)
            os.makedirs(target)
            names = [*names, *FILES]
        for name in sorted(names, key="results.json".__eq__):  # last, for it says that the run is finished
            if os.path.exists(os.path.join(folder, name)):  # older runs of the outsider have no config
                shutil.copyfile(os.path.join(folder, name), os.path.join(target, name))
        written.append(target)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/paper", help="where the runs lie")
    written = keep(parser.parse_args().root)
    print("\n".join(written))
    print(f"kept {len(written)} runs in {KEPT}")


if __name__ == "__main__":
    main()
