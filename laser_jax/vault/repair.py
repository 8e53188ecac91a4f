"""Makes a damaged vault readable again, and keeps everything that is whole."""

import dataclasses
import os
import secrets
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, MissingError, NotAVaultError, UnavailableError, VaultError
from laser_jax.vault.files import Folder, inventory, sync_tree, write_strings, writer_lock
from laser_jax.vault.follower import Follower
from laser_jax.vault.format import DICTIONARIES, LOG, MANIFEST, MANIFEST_COPY, PARTS
from laser_jax.vault.log import Batch, decode_body, log_numbers, log_path, scan_records
from laser_jax.vault.lookup import LocalPages
from laser_jax.vault.manifest import (
    HeldManifest,
    collect_garbage,
    commit_manifest,
    parse_manifest,
    snapshots,
    write_snapshot,
)
from laser_jax.vault.part import Part, part_number
from laser_jax.vault.partitioning import is_partitioned, partition_paths
from laser_jax.vault.state import read_strings
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tasks import read_entries, write_rows
from laser_jax.vault.unpacking import SEQUENCE


@dataclasses.dataclass
class RepairReport:
    """What a repair found and did.

    Attributes:
      path: of the vault.
      events_lost: of parts and log, as far as it can be known.
      actions: what was done, in words; empty if the vault was whole.
    """

    path: str
    events_lost: int = 0
    actions: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        if not self.actions:
            return f"whole: {self.path}"
        lines = "\n".join(self.actions)
        return f"{lines}\nrepaired, {self.events_lost:,} events lost: {self.path}"


def repair(path: str | os.PathLike) -> RepairReport:
    """Repairs the vault at `path`: damaged pages, log records and dictionaries are given up, the rest is kept.

    A part with damaged pages is written anew without them; one whose directory is damaged is given up as a whole. Log
    records are kept wherever they are whole. A lost dictionary value becomes "<lost CODE>".

    Raises:
      LockedError: somebody is writing.
      CorruptionError: the manifest and its copy are damaged; take a snapshot's file in its place.
      UnavailableError: the storage refused.
    """
    path = os.fspath(path)
    if is_partitioned(path):
        found = [repair(inner) for inner in partition_paths(path)]
        actions = [action for one in found for action in one.actions]
        return RepairReport(path, sum(one.events_lost for one in found), actions)
    storage = LocalStorage(path)
    root = storage.root
    report = RepairReport(root)
    if not os.path.isdir(root):
        raise NotAVaultError(f"{root} is not a vault: no such directory")
    try:
        with writer_lock(root):
            manifest = _manifest(storage, report)
            dictionaries = _dictionaries(storage, manifest, report)
            _log(storage, manifest, dictionaries, report)
            for name in snapshots(storage):
                _snapshot(storage, name, report)
            manifest["parts"] = _parts(storage, manifest, report)
            if report.actions:
                manifest["number"] += 1
                commit_manifest(root, manifest)
                collect_garbage(root, force=True)
    except OSError as error:
        raise UnavailableError(f"{root} cannot be repaired: {error}") from error
    return report


def _manifest(storage: LocalStorage, report: RepairReport) -> dict[str, Any]:
    try:
        manifest = HeldManifest(storage).content
    except (CorruptionError, NotAVaultError):
        data = storage.read(MANIFEST_COPY)
        if data is None:
            raise
        manifest = parse_manifest(data, storage.path(MANIFEST_COPY), storage.root)
        report.actions.append(f"{MANIFEST} was damaged or missing: restored from {MANIFEST_COPY}")
    return manifest


def _dictionaries(storage: LocalStorage, manifest: dict[str, Any], report: RepairReport) -> dict[str, Dictionary]:
    found = {}
    for field, pieces in manifest["dictionaries"].items():
        values: list[str] = []
        for position, piece in enumerate(pieces):
            folder = Folder(storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
            try:
                values += read_strings(folder, piece["values"])
            except (CorruptionError, UnicodeDecodeError) as error:
                lost = [f"<lost {code}>" for code in range(len(values), len(values) + piece["values"])]
                values += lost
                name = f"{field}-{position:06d}-{secrets.token_hex(4)}"
                target = os.path.join(storage.root, DICTIONARIES, name)
                write_strings(target, "", lost)
                sync_tree(target)
                pieces[position] = {"name": name, "values": piece["values"], "files": inventory(target, [])}
                report.actions.append(f"{len(lost)} values of {field!r} are lost, and called {lost[0]!r} ...: {error}")
        found[field] = Dictionary(values)
    return found


def _parts(storage: LocalStorage, manifest: dict[str, Any], report: RepairReport) -> list[dict[str, Any]]:
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    kept = []
    for entry in manifest["parts"]:
        try:
            part = Part(storage, entry, schemas)
        except CorruptionError as error:
            report.events_lost += entry["events"]
            report.actions.append(f"part {entry['name']} with {entry['events']:,} events is given up: {error}")
            continue
        new = _whole_pages(storage, part, entry, report)
        if new is not None:
            kept.append(new)
    return kept


def _whole_pages(storage: LocalStorage, part: Part, entry: dict[str, Any], report: RepairReport) -> Any:
    """The part's entry if it is whole; else that of a new part with what can be read of it."""
    pages = LocalPages()
    fills = dict.fromkeys(part.schema.names, 0)
    users: list[Any] = []
    covers: dict[Any, int] = {}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *part.schema.names)}
    damaged = []
    directory = part.users
    for position in range(part.num_users):
        first, end = directory.first_page[position : position + 2].tolist()
        key = directory.key(position)
        covers[key] = int(directory.covers[position])
        try:
            runs = [(first, end, read_entries(part, pages, part.schema, fills, np.array([first]), np.array([end])))]
        except (CorruptionError, MissingError):
            runs = []
            for page in range(first, end):
                try:
                    one = read_entries(part, pages, part.schema, fills, np.array([page]), np.array([page + 1]))
                    runs.append((page, page + 1, one))
                except CorruptionError as error:
                    damaged.append(str(error))
                    report.events_lost += int(part.page_count[page])
        for _, _, (rows, lengths) in runs:
            users.extend([key] * int(lengths.sum()))
            for name, column in rows.items():
                columns[name].append(column)
    if not damaged:
        return entry
    report.actions.extend(damaged)
    if not users:
        report.actions.append(f"part {part.name}: nothing of it can be read")
        return None
    name = f"part-{part.number:06d}-{secrets.token_hex(4)}"
    rows = {column: np.concatenate(found) for column, found in columns.items()}
    new = write_rows(storage.root, name, part.schema, users, rows, covers if entry["covers"] else None)
    report.actions.append(f"part {part.name}: {new['events']:,} of {entry['events']:,} events are kept, in {name}")
    return {"name": name, "schema": entry["schema"], **new}


def _snapshot(storage: LocalStorage, name: str, report: RepairReport) -> None:
    try:
        manifest = HeldManifest(storage, name).content
    except CorruptionError as error:
        os.remove(storage.path(f"snapshots/{name}.json"))
        report.actions.append(f"snapshot {name!r} is given up: {error}")
        return
    inner = RepairReport(storage.root)
    _dictionaries(storage, manifest, inner)
    manifest["parts"] = _parts(storage, manifest, inner)
    if inner.actions:
        report.actions.extend(f"snapshot {name!r}: {action}" for action in inner.actions)
        write_snapshot(storage.root, name, manifest)


def _log(
    storage: LocalStorage, manifest: dict[str, Any], dictionaries: dict[str, Dictionary], report: RepairReport
) -> None:
    """If the log is damaged, makes a part of its whole records and begins a new log."""
    root = storage.root
    schema = Schema.from_json(manifest["schemas"][-1])
    first = manifest["log"]["first"]
    numbers = [number for number in log_numbers(root) if number >= first]
    if not numbers or _log_is_whole(storage, manifest, schema, report):
        return
    batches: list[Batch] = []
    for number in numbers:
        for rows, sequence, body in scan_records(log_path(root, number)):
            if sequence >= manifest["next_sequence"]:
                batches.append(decode_body(schema, body, rows, sequence))
    batches.sort(key=lambda batch: batch.first_sequence)
    users: list[Any] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *schema.names)}
    end = manifest["next_sequence"]
    for batch in batches:
        for field, (code, values) in batch.new.items():
            dictionary = dictionaries[field]
            if code > len(dictionary):
                dictionary.extend(len(dictionary), [f"<lost {lost}>" for lost in range(len(dictionary), code)])
            dictionary.extend(code, values)
        users.extend(batch.users)
        columns[SEQUENCE].append(np.arange(batch.first_sequence, batch.first_sequence + len(batch)))
        for name, column in batch.columns.items():
            columns[name].append(column)
        report.events_lost += max(0, batch.first_sequence - end)
        end = max(end, batch.first_sequence + len(batch))
    for field in schema.fields:
        # Codes that no record defines any more.
        if field.type == "string" and columns[field.name]:
            size, top = len(dictionaries[field.name]), int(max(column.max() for column in columns[field.name])) + 1
            if top > size:
                dictionaries[field.name].extend(size, [f"<lost {code}>" for code in range(size, top)])
    if users:
        number = max([manifest["next_part"] - 1, *(part_number(entry["name"]) for entry in manifest["parts"])]) + 1
        name = f"part-{number:06d}-{secrets.token_hex(4)}"
        rows = {column: np.concatenate(found) for column, found in columns.items()}
        new = write_rows(root, name, schema, users, rows)
        manifest["parts"] = [*manifest["parts"], {"name": name, "schema": len(manifest["schemas"]) - 1, **new}]
        manifest["next_part"] = number + 1
    for field, dictionary in dictionaries.items():
        pieces = manifest["dictionaries"][field]
        values = dictionary.since(sum(piece["values"] for piece in pieces))
        if values:
            name = f"{field}-{len(pieces):06d}-{secrets.token_hex(4)}"
            target = os.path.join(root, DICTIONARIES, name)
            write_strings(target, "", values)
            sync_tree(target)
            pieces.append({"name": name, "values": len(values), "files": inventory(target, [])})
    sync_tree(os.path.join(root, PARTS))
    manifest["next_sequence"] = end
    manifest["log"] = {"first": numbers[-1] + 1, "kept": numbers[-1] + 1}
    mark = os.path.join(root, LOG, "acknowledged")
    if os.path.exists(mark):
        os.remove(mark)
    report.actions.append(f"the log was damaged: {len(users):,} events of its whole records are kept")


def _log_is_whole(storage: LocalStorage, manifest: dict[str, Any], schema: Schema, report: RepairReport) -> bool:
    """Whether the next writer could take up the log as it is."""
    known = {field: Dictionary() for field in manifest["dictionaries"]}
    for field, pieces in manifest["dictionaries"].items():
        size = sum(piece["values"] for piece in pieces)
        known[field] = Dictionary([f"code {code}" for code in range(size)])
    follower = Follower(storage, manifest, schema, known)
    try:
        whole = follower.follow()
        follower.replay([number for number in log_numbers(storage.root) if number >= manifest["log"]["first"]])
    except (VaultError, FileNotFoundError, ValueError) as error:
        report.actions.append(f"log: {error}")
        return False
    if not whole:
        report.actions.append(f"log: {log_path(storage.root, follower.file)} is missing")
    return whole
