"""What the writer does to a vault as a whole: snapshots, forgetting users, schemas, retention."""

from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault import set_aside
from laser_jax.vault.appender import Appender
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError
from laser_jax.vault.evolution import check_evolution
from laser_jax.vault.hashing import hash_strings
from laser_jax.vault.manifest import HeldManifest, checked_name, drop_snapshot, read_manifest, snapshots, write_snapshot
from laser_jax.vault.part import Part
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tasks import MergeTask


def snapshot(appender: Appender, name: str | None, replace: bool) -> str:
    """See Vault.snapshot."""
    maintenance = appender.maintenance
    if name is not None:
        checked_name(name)
    storage = LocalStorage(maintenance.root)
    with maintenance.locked():
        maintenance.flush()
        manifest = read_manifest(storage)

        def is_of_another_state(name: str) -> bool:
            # Who calls again after an error pins the same once more: that moves nothing.
            return name in snapshots(storage) and HeldManifest(storage, name).content != manifest

        if name is None:
            name = f"{maintenance.state.parts_end:012d}"
            if is_of_another_state(name):  # of the same events, before they were merged, or some were dropped
                name += f"-{manifest['number']}"
        elif not replace and is_of_another_state(name):
            raise VaultError(
                f"{maintenance.root} has a snapshot {name!r} already, of another state: give another name, or move "
                "that one with replace=True (--replace)"
            )
        try:
            write_snapshot(maintenance.root, name, maintenance.state.manifest)
        except OSError as error:
            raise UnavailableError(f"{maintenance.root}: snapshot {name!r} cannot be written: {error}") from error
    return name


def unpin(appender: Appender, name: str) -> None:
    """See Vault.drop_snapshot."""
    maintenance = appender.maintenance
    with maintenance.locked():
        try:
            drop_snapshot(maintenance.root, name)
        except OSError as error:
            raise UnavailableError(f"{maintenance.root}: snapshot {name!r} cannot be dropped: {error}") from error
        maintenance.collect(force=False)


def evolve(appender: Appender, schema: Schema, dictionaries: dict[str, Dictionary]) -> None:
    """See Vault.evolve."""
    if not isinstance(schema, Schema):
        raise SchemaError(f"schema must be a laser_jax.schema.Schema, got {schema!r}")
    maintenance = appender.maintenance
    with maintenance.locked():
        check_evolution(maintenance.state.schema, schema)
        maintenance.flush()
        with appender.commit_lock:
            maintenance.flush()  # what came in between
            new = [field for field in schema.fields if field.type == "string" and field.name not in dictionaries]
            for field in new:
                dictionaries[field.name] = Dictionary([field.default or ""])
            try:
                log = maintenance.state.manifest["log"]
                maintenance.commit(
                    # Of a file that was begun, and in which no event could be written, the schema is the old one.
                    log={"first": appender.begin_file(), "kept": log["kept"]},
                    schema=schema.to_json(),
                    schemas=[*maintenance.state.manifest["schemas"], schema.to_json()],
                    dictionaries=maintenance.dictionary_pieces(schema),
                )
            except (VaultError, OSError):
                for field in new:
                    del dictionaries[field.name]
                raise
            try:
                appender.begin_schema(schema)
            except BaseException as error:
                appender.refuse(f"changing its schema was broken off ({error!r})")
                raise


def retain(appender: Appender, events: int | None, age: int | None) -> None:
    """See Vault.retain."""
    for name, value in (("events", events), ("age", age)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise VaultError(f"retention: {name}={value!r}: need an integer >= 1, or None to keep everything")
    kept = {name: value for name, value in (("events", events), ("age", age)) if value is not None}
    appender.maintenance.commit(retention=kept)


def forget(appender: Appender, users: list[Any]) -> int:
    """See Vault.forget: rewrites every part, of snapshots too, in which one of the users lives.

    The new parts are written first, then snapshots and manifest are changed to them, then the old ones go: whoever
    kills it in between leaves a whole vault, and calls it again. The log files that were kept for finding repeated
    events go too: a later writer does not know the events in them. So does what `repair` set aside: whose events these
    are cannot be told.
    """
    maintenance = appender.maintenance
    storage = LocalStorage(maintenance.root)
    with maintenance.locked():
        maintenance.flush()
        pinned = {name: HeldManifest(storage, name).content for name in snapshots(storage)}
        replaced: dict[str, dict[str, Any] | None] = {}
        removed = 0
        for manifest in (maintenance.state.manifest, *pinned.values()):
            for entry in manifest["parts"]:
                if entry["name"] not in replaced:
                    replaced[entry["name"]] = _without(appender, storage, manifest, entry, users)
                    new = replaced[entry["name"]]
                    removed += entry["events"] - (0 if new is None else new["events"])
        if removed:
            maintenance.sync_parts()
            for name, manifest in pinned.items():
                write_snapshot(maintenance.root, name, manifest | {"parts": _changed(manifest, replaced)})
            parts = _changed(maintenance.state.manifest, replaced)
            log = maintenance.state.manifest["log"]
            maintenance.commit(parts=parts, log={"first": log["first"], "kept": log["first"]})
        elif maintenance.state.manifest["log"]["kept"] < maintenance.state.manifest["log"]["first"]:
            log = maintenance.state.manifest["log"]
            maintenance.commit(log={"first": log["first"], "kept": log["first"]})
        appender.forget_keys(users)
        maintenance.collect(force=True)
        try:
            set_aside.drop_all(maintenance.root)
        except OSError as error:
            raise UnavailableError(f"{maintenance.root}: {error}; forget these users once more") from error
    return removed


def _changed(manifest: dict[str, Any], replaced: dict[str, Any]) -> list[dict[str, Any]]:
    return [new for entry in manifest["parts"] if (new := replaced[entry["name"]]) is not None]


def _without(
    appender: Appender, storage: LocalStorage, manifest: dict[str, Any], entry: dict[str, Any], users: list[Any]
) -> dict[str, Any] | None:
    """The entry of a part that holds what `entry` holds but these users; itself if they are not there."""
    maintenance = appender.maintenance
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]][: entry["schema"] + 1]
    part = Part(storage, entry, schemas)
    directory = part.users
    if part.schema.user == "int64":
        there = np.isin(directory.keys, np.array(users, np.int64))
    else:
        there = np.isin(directory.keys, hash_strings(users))
        for position in np.flatnonzero(there).tolist():
            there[position] = directory.key(position) in users
    if not there.any():
        return entry
    kept = np.flatnonzero(~there)
    if not len(kept):
        return None
    # In the schema that the part was written with: nothing else about it changes.
    task = MergeTask(
        maintenance.root,
        maintenance.new_part_name(part.number),
        [schema.to_json() for schema in schemas],
        dict.fromkeys(part.schema.names, 0),  # no field is missing: nothing is filled in
        [entry],
        np.zeros(len(kept), np.int64),
        directory.first_page[kept],
        directory.first_page[kept + 1],
        np.arange(len(kept)),
        [directory.key(position) for position in kept.tolist()],
        directory.covers[kept].astype(np.int64) if entry["covers"] else None,
    )
    new = maintenance.run_task(task)
    return {"name": task.name, "schema": entry["schema"], **new}
