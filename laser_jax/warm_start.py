"""A fresh run that begins with parts of what another one learned: its tables, its dense parameters, or both.

Tables may have grown in between: rows keep their values. What does not fit is refused by name, never skipped.
"""

import dataclasses
import json
import logging
import os
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from laser_jax.checkpoint import CheckpointError, ids_checksums, reading
from laser_jax.checksums import checksums
from laser_jax.features import FeatureConfig, table_of
from laser_jax.fingerprint import changed_ids
from laser_jax.id_dictionary import IdDictionary
from laser_jax.layers.embedding import Table
from laser_jax.layers.row_optimizers import RowOptimizer
from laser_jax.pipeline import DataConfig
from laser_jax.row_placement import places
from laser_jax.state import StateFactory, TrainState

logger = logging.getLogger(__name__)

PARTS = ("dense", "tables")


class WarmStartError(ValueError):
    """Another run whose parts do not fit this one; the message names run, part and reason."""


def check_parts(parts: tuple[str, ...]) -> None:
    """Raises ValueError for parts that there are not."""
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"train.warm_parts={parts}: give some of {PARTS}")


def warm_start(
    state: TrainState,
    factory: StateFactory,
    features: FeatureConfig,
    ids: dict[str, IdDictionary],
    data: DataConfig,
    workdir: str,
    parts: tuple[str, ...] = PARTS,
) -> TrainState:
    """`state` with parts of the newest checkpoint of another run; step and the dense optimizer's state stay fresh.

    So does the optimizer's state of tables, unless it means the same here: see _Run.slots_fit.

    Args:
      state: a fresh one of `factory`. ids: the dictionaries of its tables, into which the other run's are loaded.
      data: of this run.
      workdir: of the other run.

    Raises:
      WarmStartError: there is no run, or a part of it does not fit.
      CheckpointError: its checkpoint is damaged.
    """
    check_parts(parts)
    other = _Run(workdir)
    restored: dict[str, Any] = {}
    if "dense" in parts:
        restored["params"] = other.restore({"params": _fitting_params(factory, other)})["params"]
    if "tables" in parts:
        tables = other.restore({"tables": _fitting_tables(factory, features, data, other)})["tables"]
        restored["tables"] = {name: Table(found["rows"], found.get("slots", {})) for name, found in tables.items()}
    other.verify(restored)
    if "tables" in parts:
        tables = dict(state.tables)
        for name, found in restored["tables"].items():
            tables[name] = _grown(found, state.tables[name], factory.row_optimizer)
        if restored["tables"] and not other.slots_fit(factory):
            logger.warning("tables begin with the rows of %s and a fresh optimizer state", workdir)
        for name in sorted(tables.keys() - restored["tables"].keys()):
            logger.warning("table %r starts fresh: %s has none of that name", name, workdir)
        restored["tables"] = tables
        other.load_ids(ids)
    logger.info("began with %s of step %d of %s", " and ".join(parts), other.step, workdir)
    return dataclasses.replace(state, **restored)


class _Run:
    """The newest checkpoint of another run, read by parts."""

    def __init__(self, workdir: str):
        self.workdir = os.path.abspath(workdir)
        folder = os.path.join(self.workdir, "checkpoints")
        try:
            with open(os.path.join(self.workdir, "config.json"), encoding="utf-8") as file:
                self.config = json.load(file)
            steps = [int(name) for name in os.listdir(folder) if name.isdigit()]
        except FileNotFoundError as error:
            raise WarmStartError(f"{workdir} is no run to begin with: {error.filename} is missing") from error
        if not steps:
            raise WarmStartError(f"{folder} holds no checkpoint to begin with")
        self.step = max(steps)
        self._path = os.path.join(folder, str(self.step))
        with reading(self._path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            self.shapes = checkpointer.metadata(os.path.join(self._path, "state")).item_metadata.tree

    def fields(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Table -> field -> its config."""
        features, tables = self.config["features"], {}
        for field in (*features["item"], *features["event"], *features["context"]):
            tables.setdefault(field["table"] or field["name"], {})[field["name"]] = field
        return tables

    def slots_fit(self, factory: StateFactory) -> bool:
        """Whether the optimizer's state of a row means here what it meant there.

        Adam's does not, since it has an age. FTRL's holds the row itself, in terms of these settings.
        """
        now, before = factory.optim, self.config["optim"]
        names = ("table_learning_rate", "table_l1", "table_l2") if now.table_optimizer == "ftrl" else ()
        alike = all(getattr(now, name) == before[name] for name in ("table_optimizer", *names))
        return alike and now.table_optimizer != "adam"

    def restore(self, abstract: Any, item: str = "state") -> Any:
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        with reading(self._path), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(os.path.join(self._path, item), args=args)

    def verify(self, restored: dict[str, Any]) -> None:
        """Raises CheckpointError if these parts of the state are not what was saved."""
        for part, arrays in restored.items():
            self._compare(checksums(arrays), f".{part}")

    def _compare(self, found: dict[str, int], prefix: str) -> None:
        with reading(self._path), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            saved = checkpointer.restore(os.path.join(self._path, "checksums"))
        for name, value in found.items():
            if saved.get(f"{prefix}{name}") != value:
                raise CheckpointError(f"{self._path} is damaged: {prefix}{name} is not what was saved")

    def load_ids(self, ids: dict[str, IdDictionary]) -> None:
        """The other run's dictionaries, into those of the same tables."""
        there = {name: next(iter(fields.values())) for name, fields in self.fields().items() if name in ids}
        if not there:
            return
        found = self.restore({name: IdDictionary(field["rows"]).state() for name, field in there.items()}, "ids")
        self._compare(ids_checksums(found), "")
        for name, arrays in found.items():
            ids[name].load(arrays)
            ids[name].restart(self.step)


def _fitting_params(factory: StateFactory, other: _Run) -> Any:
    """Dense parameters to restore.

    Raises:
      WarmStartError: the other run's have other names or shapes.
    """
    abstract = factory.abstract().params
    wanted = {_name(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(abstract)}
    found = jax.tree_util.tree_leaves_with_path(other.shapes["params"], is_leaf=_is_array)
    there = {_name(path): tuple(x.shape) for path, x in found}
    wrong = [
        f"{name}: {there.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name)
    ]
    if wrong:
        raise WarmStartError(
            f"the dense parameters of {other.workdir} do not fit ({'; '.join(wrong[:5])}): give the same encoder, head "
            "and widths, or train.warm_parts=('tables',)"
        )
    return abstract


def _fitting_tables(
    factory: StateFactory, features: FeatureConfig, data: DataConfig, other: _Run
) -> dict[str, dict[str, Any]]:
    """Tables to restore, of the size they have there.

    Raises:
      WarmStartError: a table cannot become one of this run.
    """
    fields, changed = other.fields(), changed_ids(other.config, data, features)
    abstract = factory.abstract().tables
    found = {}
    for field in (*features.item, *features.event, *features.context):
        name = table_of(field)
        if name not in abstract or name not in other.shapes["tables"]:
            continue
        if name in found:  # a further field of the same table
            if field.name in changed and field.name in fields[name]:
                raise WarmStartError(
                    f"table {name!r} of {other.workdir} does not fit {field.name!r}: {changed[field.name]}"
                )
            continue
        shapes = other.shapes["tables"][name]
        before = fields[name].get(field.name, next(iter(fields[name].values())))
        problem = None
        if before["ids"] != field.ids or before["hashes"] != field.hashes:
            there, here = f"{before['ids']!r} ({before['hashes']})", f"{field.ids!r} ({field.hashes})"
            problem = f"its ids (and hashes) are {there} there, {here} here"
        elif before["width"] != field.width:
            problem = f"it is {before['width']} wide there, {field.width} here"
        elif before["rows"] > field.rows:
            problem = f"it has {before['rows']} rows there, {field.rows} here: a table can grow, not shrink"
        elif before["rows"] != field.rows and field.ids == "hash":
            problem = f"{before['rows']} rows there, {field.rows} here would move hashed ids: use ids='dictionary'"
        elif field.name in changed:
            problem = changed[field.name]
        if problem:
            raise WarmStartError(f"table {name!r} of {other.workdir} does not fit: {problem}")
        sharding = abstract[name].rows.sharding

        def of(x: Any, sharding: jax.sharding.Sharding = sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        found[name] = {"rows": of(shapes["rows"])}
        if other.slots_fit(factory):
            found[name]["slots"] = {slot: of(x) for slot, x in shapes["slots"].items()}
    return found


def _grown(found: Table, fresh: Table, optimizer: RowOptimizer) -> Table:
    """`found` at the size and type of `fresh`; rows that it does not have stay fresh."""
    before, after = found.rows.shape[0], fresh.rows.shape[0]
    rows = np.arange(before)
    source, target = places(rows, before), places(rows, after)

    def moved(x, into):
        if before == after:
            return x.astype(into.dtype)
        move = jax.jit(
            lambda x, into, source, target: into.at[target].set(x[source].astype(into.dtype)),
            out_shardings=into.sharding,
        )
        return move(x, into, source, target)

    values = moved(found.rows, fresh.rows)
    if not found.slots:
        where = {name: slot.sharding for name, slot in fresh.slots.items()}
        return Table(values, jax.jit(optimizer.init, out_shardings=where)(values))
    return Table(values, {name: moved(slot, fresh.slots[name]) for name, slot in found.slots.items()})


def _name(path: tuple) -> str:
    """A path's keys, without how each is written: GetAttrKey, DictKey and so on."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return ".".join(keys)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape")
