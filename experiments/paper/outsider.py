"""The outsider: gradient boosting on match counts, which knows nothing of embeddings or attention.

  python -m experiments.paper.outsider --config=experiments/completejourney.py --workdir=runs/outsider

How often each field of the candidate occurs among the newest 20, 50, 200 and 1000 events, how long ago it last did,
and, for event fields of few values (action, scene), the counts by value. It reads the batches that the models read and
leaves what they leave: predictions.npz and results.json. Its settings are chosen on validation.
"""

import argparse
import ast
import json
import os
import time

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from experiments.paper.study import change, read_config
from laser_jax.batch import Batch
from laser_jax.config import Config, remember
from laser_jax.evaluate import Predictions, table
from laser_jax.fingerprint import fingerprint, strings
from laser_jax.metrics import auc
from laser_jax.pipeline import BatchSource, prepare
from laser_jax.whole_files import replacing

WINDOWS = (20, 50, 200, 1000)
FEW_VALUES = 8  # rows of a table whose values are counted apart
TRIALS = (
    {"learning_rate": 0.1, "max_leaf_nodes": 31},
    {"learning_rate": 0.05, "max_leaf_nodes": 31, "max_iter": 300},
    {"learning_rate": 0.05, "max_leaf_nodes": 63, "max_iter": 300, "l2_regularization": 1.0},
    {"learning_rate": 0.03, "max_leaf_nodes": 15, "max_iter": 600},
)


def match_counts(batch: Batch, fields: list[str], apart: dict[str, int]) -> np.ndarray:
    """What a candidate has in common with the history before its request.

    Args:
      fields: of candidates and events alike. apart: event field -> number of its table's rows, counted by value.

    Returns:
      float32 [N, features], a row for every real candidate of the batch, in order.
    """
    step, windows = batch.step, [w for w in WINDOWS if w <= batch.step["age"].shape[1]]
    rows, columns = np.nonzero(step["mask"])
    length = step["age"].shape[1]
    real = (np.arange(length) >= length - step["length"][:, None])[rows]
    age = np.where(real, step["age"][rows], -1).astype(np.float32)
    features = [np.minimum(step["length"][rows], window) for window in windows]
    for field in fields:
        candidate = step["side"][field][rows, columns]
        match = real & (step["history"][field][rows] == candidate[:, None])
        features += [match[:, -window:].sum(axis=1) for window in windows]
        newest = length - 1 - np.argmax(match[:, ::-1], axis=1)
        features.append(np.where(match.any(axis=1), age[np.arange(len(rows)), newest], np.nan))
        for event_field, num_rows in apart.items():
            value = batch.rows("history", event_field)[rows]
            for row in range(1, num_rows):
                hit = match & (value == row)
                features += [hit[:, -window:].sum(axis=1) for window in windows]
    return np.stack(features, axis=1).astype(np.float32)


def read_split(source: BatchSource, config: Config) -> tuple[np.ndarray, Predictions]:
    """Features of every candidate of a split, and its users, labels and lengths (logits are zeros)."""
    features = config.features
    fields = [field.name for field in features.item]
    apart = {field.name: field.rows for field in features.event if field.rows <= FEW_VALUES}
    found, users, labels, lengths = [], [], [], []
    references: dict[str, list[np.ndarray]] = {name: [] for name in source.requests.references}
    start = time.monotonic()
    for k, batch in enumerate(source.stream(0, source.batches_per_epoch)):
        real = batch.step["mask"]
        per_row = real[: len(batch.users)].sum(axis=1)
        found.append(match_counts(batch, fields, apart))
        users.append(np.repeat(batch.users, per_row))
        lengths.append(np.repeat(batch.lengths, per_row))
        labels.append(batch.step["label"][real])
        for name, values in references.items():
            values.append(batch.references[name][real])
        if k % 100 == 99:
            rate = (k + 1) / (time.monotonic() - start)
            print(f"{k + 1}/{source.batches_per_epoch} batches, ETA {(source.batches_per_epoch - k - 1) / rate:.0f} s")
    labels = np.concatenate(labels)
    columns = Predictions(
        users=np.concatenate(users),
        labels=labels,
        logits=np.zeros_like(labels),
        lengths=np.concatenate(lengths),
        references={name: np.concatenate(values) for name, values in references.items()},
    )
    return np.concatenate(found), columns


def run(config: Config, workdir: str, seed: int) -> Predictions:
    """Fits every trial, keeps the one with the best validation AUC, and scores the test split."""
    prepare(config.data)
    remember(config, workdir, fingerprint(config.data), strings(config.data, config.features))
    sources = {split: BatchSource(config.data, config.features, split) for split in ("train", "valid", "test")}
    (x, train), (x_valid, valid), (x_test, test) = (read_split(source, config) for source in sources.values())
    best = None
    for settings in TRIALS:
        start = time.monotonic()
        model = HistGradientBoostingClassifier(early_stopping=False, random_state=seed, **settings)
        model.fit(x, train.labels > 0.5)
        seconds = time.monotonic() - start
        found = auc(valid.labels, model.decision_function(x_valid))
        print(f"{settings}: valid AUC {found:.4f}, {seconds:.0f} s", flush=True)
        if best is None or found > best[0]:
            best = (found, settings, model, seconds)
    found, settings, model, seconds = best
    predictions = Predictions(test.users, test.labels, model.decision_function(x_test), test.lengths, test.references)
    predictions.save(os.path.join(workdir, "predictions.npz"))
    rows = {"gbdt": predictions.figures(), **predictions.reference_figures()}
    results = {
        "test": {name: scores.to_json() for name, scores in rows.items()},
        "test_by_length": {
            name: scores.to_json() for name, scores in predictions.figures_by_length(config.train.length_edges).items()
        },
        "valid_auc": found,
        "settings": settings,
        "gate_contrast": None,
        "samples_per_second": len(x) / seconds,
        "device": "cpu",
    }
    path = os.path.join(workdir, "results.json")
    with replacing(path) as file:  # last and at once: it says that the run is finished
        file.write(json.dumps(results, indent=1).encode())
    print(f"\n{table(rows)}\n\ngbdt ({settings}): test AUC {rows['gbdt'].auc:.4f}; predictions: {workdir}")
    return predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="an experiment file; further flags as of laser_jax.main")
    parser.add_argument("--workdir", required=True)
    args, flags = parser.parse_known_args()
    settings = {}
    for flag in flags:
        name, found, value = flag.removeprefix("--config.").partition("=")
        if not flag.startswith("--config.") or not found:
            parser.error(f"unknown argument: {flag}")
        settings[name] = _value(value)
    config = read_config(args.config)
    change(config, settings)
    run(config, args.workdir, config.train.seed)


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a word
        return text


if __name__ == "__main__":
    main()
