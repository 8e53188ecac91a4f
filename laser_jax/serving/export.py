"""Writes a trained model so that it runs without its code: python -m laser_jax.serving.export --workdir=W --out=DIR

Three programs for each of some history lengths, for a single candidate, for many, and for so many that they are scored
piece by piece, as StableHLO for CPU, CUDA and TPU, with the number of requests and candidates left open; tables,
dictionaries and settings beside them. The best state of the run is taken, or the newest one of a run that was never
evaluated.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import export
from jax.errors import InconclusiveDimensionOperation

from laser_jax import metrics
from laser_jax import vault as seqvault
from laser_jax.checkpoint import Checkpoints
from laser_jax.config import BESIDE, Config, from_dict, to_dict
from laser_jax.features import line_source
from laser_jax.fingerprint import changed_ids
from laser_jax.id_dictionary import IdDictionary
from laser_jax.pipeline import read_vocabularies
from laser_jax.requests import Requests as StoredRequests
from laser_jax.requests import split_type
from laser_jax.row_placement import places
from laser_jax.serving.exported import BATCHES, PIECE, ExportedModel, Requests
from laser_jax.serving.files import ModelError, begin, commit, describe
from laser_jax.sharding import MeshConfig, make_mesh
from laser_jax.state import StateFactory, TrainState
from laser_jax.step import apply_gathered

PLATFORMS = ("cpu", "cuda", "tpu")
QUANTIZATIONS = ("none", "bf16", "int8")
#: From one of these numbers of candidates on the form for many is taken: the first from which the encoder chooses one
#: order of its sums.
MANY = (4, 8, 16, 32, 64, 128)
#: Form of a program -> how many candidates it takes.
_CANDIDATES = {"one": "1", "many": "c", "pieces": f"{PIECE}*c"}
#: Of an int8 that is as far from 0 on both sides.
_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has learned.

    Attributes:
      config: of the run. state: of its parameters and tables, which `factory` describes. step: of the state.
      dictionaries: table -> its dictionary.
    """

    config: Config
    state: TrainState
    factory: StateFactory
    step: int
    dictionaries: dict[str, IdDictionary]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
      path: of the model. version: of it. bytes: of all its files. programs: how many.
    """

    path: str
    version: str
    bytes: int
    programs: int


def export_model(
    run: Run, out: str, lengths: tuple[int, ...] = (), quantize: str = "none", version: str = ""
) -> Exported:
    """Writes the model of a run into a new directory.

    Args:
      run: see load_run.
      out: directory to make.
      lengths: of histories that get programs of their own, for requests with short ones; the full length always does.
      quantize: of tables, one of QUANTIZATIONS.
      version: that the model is to bear; if empty the step of the state and a checksum of all that is written, so
        that two models which score unlike each other have unlike versions.

    Raises:
      ModelError: `out` is there already.
      ValueError: another setting makes no sense.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"quantize={quantize!r} is not one of {QUANTIZATIONS}")
    config, state, ids = run.config, run.state, run.dictionaries
    full = config.data.history_length
    if any(not 0 < length <= full for length in lengths):
        raise ValueError(f"lengths={lengths}: give numbers from 1 to the history's {full}")
    lengths = tuple(sorted({*lengths, full}))
    vault = seqvault.open(config.data.vault_path, at=config.data.snapshot or None)
    many = _many(run)
    draft = begin(out)
    content: dict[str, Any] = {
        "name": config.name or type(config.encoder).__name__,
        "config": to_dict(config),
        "schema": vault.schema.to_json(),
        "features": dataclasses.asdict(config.features),
        "history_length": full,
        "lengths": lengths,
        "many": many,
        "lines": _line_widths(config, vault),
        "compared": _compared(run),
        **_write_ids(draft, config, vault, ids),
        **_write_weights(draft, state),
        "tables": _write_tables(draft, config, state, quantize),
        "programs": {},
    }
    os.makedirs(os.path.join(draft, "programs"))
    for form in _CANDIDATES:
        for length in lengths:
            name = f"{form}-{length}"
            with _no_locations():
                program = export.export(jax.jit(_scoring(run, form)), platforms=PLATFORMS)(
                    *_arguments(run, form, many, length)
                )
            with open(os.path.join(draft, "programs", f"{name}.bin"), "wb") as file:
                file.write(program.serialize())
            content["programs"][name] = {"form": form, "length": length}
    files = describe(draft)
    whole = google_crc32c.value(json.dumps(files, sort_keys=True).encode())
    content["model_version"] = version or f"{run.step}-{whole:08x}"
    commit(draft, out, content, files)
    size = sum(os.path.getsize(os.path.join(f, n)) for f, _, names in os.walk(out) for n in names)
    return Exported(out, content["model_version"], size, len(content["programs"]))


def load_run(workdir: str) -> Run:
    """The best state of a run, or its newest where none was evaluated. The run may be training meanwhile.

    Raises:
      ModelError: there is no run, or it has no state.
    """
    name = os.path.join(workdir, "config.json")
    if not os.path.exists(name):
        raise ModelError(f"{workdir} holds no run: it has no config.json")
    with open(name, encoding="utf-8") as file:
        told = json.load(file)
    config = from_dict({key: value for key, value in told.items() if key not in BESIDE})
    for field, why in changed_ids(told, config.data, config.features).items():
        raise ModelError(f"{workdir} was trained on other ids of {field!r} than {config.data.path} has now: {why}")
    saved = os.path.join(workdir, "checkpoints")
    if not os.path.isdir(saved) or not any(step.isdigit() for step in os.listdir(saved)):
        raise ModelError(f"{workdir} has no checkpoint: train first, for {config.train.save_every} steps at least")
    if hasattr(config.encoder, "kernel"):
        config.encoder.kernel = "xla"  # what is exported must run anywhere
    if hasattr(config.encoder, "chunk"):
        config.encoder.chunk = 0
    factory = StateFactory(config.build_model, config.features, config.optim, make_mesh(MeshConfig()))
    ids = config.features.dictionaries()
    checkpoints = Checkpoints(workdir, ids, factory.largest_bytes, read_only=True)
    try:
        if checkpoints.newest() is None:
            raise ModelError(f"{workdir} has no checkpoint: train first")
        if checkpoints.best() is not None:
            state, step = checkpoints.restore_best(factory.abstract())
        else:
            state, step = checkpoints.restore_newest(factory.abstract())
    finally:
        checkpoints.close()
    return Run(config, state, factory, step, ids)


def score_split(model: ExportedModel, config: Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of all candidates of a split, scored by an exported model from the vault."""
    vault = seqvault.open(config.data.vault_path, config.data.cache_bytes, at=config.data.snapshot or None)
    stored = StoredRequests.open(os.path.join(config.data.path, "requests", split))
    translations = model.translations(vault)
    logits, labels = [], []
    for start in range(0, len(stored), BATCHES[-1]):
        found = stored.read(np.arange(start, min(start + BATCHES[-1], len(stored))))
        histories = vault.gather(
            found.user, found.time, model.history_length, as_of=found.sequence, fields=model.event_fields
        )
        requests = Requests(found.time, found.offsets, found.candidates, found.context)
        logits.append(model.score(histories, requests, translations))
        labels.append(found.label)
    return np.concatenate(logits), np.concatenate(labels)


def _scoring(run: Run, form: str) -> Callable[[list[Any], dict[str, Any]], jax.Array]:
    structure = jax.tree.structure(run.state.params)
    piece = PIECE if form == "pieces" else 0

    def score(weights: list[Any], requests: dict[str, Any]) -> jax.Array:
        return apply_gathered(run.factory, jax.tree.unflatten(structure, weights), requests, piece)

    return score


def _arguments(run: Run, form: str, many: int, length: int) -> tuple[list[Any], dict[str, Any]]:
    """Of a program: weights and requests, their number and that of candidates left open."""
    features, compared = run.config.features, _compared(run)
    constraints = (f"c >= {many}",) if form == "many" else ()
    b, c = export.symbolic_shape(f"b, {_CANDIDATES[form]}", constraints=constraints)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(fields, *shape):
        return jax.ShapeDtypeStruct((*shape, sum(field.width for field in fields)), jnp.float32)

    weights = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(run.state.params)]
    return weights, {
        "events": floats((*features.item, *features.event), b, length),
        "age": ints(b, length),
        "length": ints(b),
        "candidates": floats(features.item, b, c),
        "context": floats(features.context, b),
        "compared": {name: ints(b, length) for name in compared},
        "side": {name: ints(b, c) for name in compared},
    }


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Programs do not tell where in whose code they were made: the same model makes the same program everywhere."""
    before = jax.config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def _many(run: Run) -> int:
    """The number of candidates from which the form for many is taken, one of MANY."""
    for many in MANY:
        # A comparison of C that holds for some C and not for others cannot be decided.
        with contextlib.suppress(InconclusiveDimensionOperation):
            jax.eval_shape(_scoring(run, "many"), *_arguments(run, "many", many, run.config.data.history_length))
            return many
    raise ModelError(
        f"{type(run.config.encoder).__name__} chooses between forms at more than {MANY[-1]} candidates: there is no "
        "program for all numbers of them"
    )


def _compared(run: Run) -> list[str]:
    """Fields whose values the model compares.

    Raises:
      ModelError: one is made of several rows, or is no row of a table.
    """
    names = list(run.factory.model(run.state.params).compares)
    for field in run.config.features.item:
        if field.name in names and (field.bagged or field.ids == "vector"):
            raise ModelError(f"the model compares {field.name!r}, which is no single row of a table")
    return names


def _line_widths(config: Config, vault: Any) -> dict[str, int]:
    """Source of a field of several values -> how many they are."""
    features = config.features
    requests = StoredRequests.open(os.path.join(config.data.path, "requests", "train"))
    found = {}
    for field in (*features.item, *features.event, *features.context):
        if field.ids == "vector":
            found[line_source(field.name)] = field.width
        elif field.hashes > 1:
            found[line_source(field.name)] = field.hashes
        elif field.pool:
            known = field.name in vault.schema.names and vault.schema.field(field.name).size
            asked = {**requests.columns, **requests.context_columns}
            found[line_source(field.name)] = known or split_type(asked[field.name])[1]
    return found


def _write_ids(draft: str, config: Config, vault: Any, ids: dict[str, Any]) -> dict[str, Any]:
    os.makedirs(os.path.join(draft, "ids"))
    os.makedirs(os.path.join(draft, "strings"))
    vocabularies, dictionaries, strings = {}, {}, {}
    for name, known in read_vocabularies(config.data, config.features).items():
        vocabularies[name] = f"ids/{name}.npy"
        np.save(os.path.join(draft, vocabularies[name]), known)
    for number, (name, dictionary) in enumerate(ids.items()):
        dictionaries[name] = f"ids/table-{number}.npz"
        np.savez(os.path.join(draft, dictionaries[name]), **dictionary.state())
    used = {field.name for field in (*config.features.item, *config.features.event, *config.features.context)}
    for field in vault.schema.fields:
        if field.type == "string" and field.name in used:
            strings[field.name] = f"strings/{field.name}.json"
            with open(os.path.join(draft, strings[field.name]), "w", encoding="utf-8") as file:
                json.dump(vault.dictionary(field.name).tolist(), file)
    return {"vocabularies": vocabularies, "dictionaries": dictionaries, "strings": strings}


def _write_weights(draft: str, state: TrainState) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    np.savez(
        os.path.join(draft, "weights.npz"), **dict(zip(names, jax.device_get([x for _, x in leaves]), strict=True))
    )
    return {"weights": names}


def _write_tables(draft: str, config: Config, state: TrainState, quantize: str) -> dict[str, Any]:
    os.makedirs(os.path.join(draft, "tables"))
    entries = {}
    for number, (name, (rows, _)) in enumerate(config.features.tables().items()):
        values = np.asarray(state.tables[name].rows)[places(np.arange(rows), rows)]
        entry: dict[str, Any] = {"file": f"tables/{number}.npy", "dtype": "float32", "scale": None}
        if quantize == "int8":
            values = values.astype(np.float32)
            scale = np.maximum(np.abs(values).max(axis=1), 1e-20) / _LARGEST
            values = np.round(values / scale[:, None]).astype(np.int8)
            entry |= {"dtype": "int8", "scale": f"tables/{number}.scale.npy"}
            np.save(os.path.join(draft, entry["scale"]), scale.astype(np.float32))
        elif quantize == "bf16" or values.dtype == ml_dtypes.bfloat16:
            values = values.astype(ml_dtypes.bfloat16).view(np.uint16)
            entry["dtype"] = "bfloat16"
        np.save(os.path.join(draft, entry["file"]), values)
        entries[name] = entry
    return entries


def main(arguments: list[str] | None = None) -> int:
    """Exports, scores the test split by what was written, and says what became of the AUC."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--out", required=True, help="directory to make")
    parser.add_argument("--lengths", default="", help="history lengths with programs of their own, such as 64,256")
    parser.add_argument("--quantize", default="none", choices=QUANTIZATIONS, help="of embedding tables")
    parser.add_argument("--version", default="", help="of the model; by default the step of its state and a checksum")
    parser.add_argument("--no-check", action="store_true", help="do not score the test requests")
    args = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        lengths = _numbers(args.lengths)
        run = load_run(args.workdir)
        made = export_model(run, args.out, lengths, args.quantize, args.version)
        said = f"version {made.version}, {made.programs} programs, {made.bytes:,} bytes"
        if not args.no_check:
            said += f"; {check(made.path, run.config, args.workdir)}"
    except (ModelError, ValueError, seqvault.VaultError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{said} in {time.monotonic() - started:.1f} s: {made.path}")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    """What --lengths says."""
    try:
        return tuple(int(length) for length in text.split(",") if length)
    except ValueError as error:
        raise ValueError(f"--lengths={text}: give numbers of events, such as 64,256") from error


def check(path: str, config: Config, workdir: str) -> str:
    """The test AUC of what was exported, beside the run's own."""
    model = ExportedModel(path)
    logits, labels = score_split(model, config, "test")
    auc = metrics.auc(labels, logits)
    stored = os.path.join(workdir, "predictions.npz")
    if not os.path.exists(stored):
        return f"test AUC {auc:.4f}"
    with np.load(stored) as run:
        before, farthest = metrics.auc(run["labels"], run["logits"]), float(np.abs(run["logits"] - logits).max())
    return f"test AUC {before:.4f} -> {auc:.4f}, logits differ by {farthest:.1e} at most"


if __name__ == "__main__":
    sys.exit(main())
