"""The log of a damaged vault: what is whole of it becomes a part, and no sequence number is ever given again."""

import os
import secrets
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import set_aside
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, VaultError
from laser_jax.vault.files import inventory, sync_tree, write_strings
from laser_jax.vault.follower import Follower
from laser_jax.vault.format import DICTIONARIES, LOG, PARTS
from laser_jax.vault.log import (
    FILE_HEADER,
    Batch,
    LogFile,
    decode_body,
    log_numbers,
    log_path,
    read_acknowledged,
    scan_records,
)
from laser_jax.vault.origins import Written, newest, origins_of, to_manifest
from laser_jax.vault.part import part_number
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tasks import write_rows
from laser_jax.vault.unpacking import SEQUENCE

#: Of an event in a record: the length of a user's name, and the time.
_LEAST_BYTES = 12


def repair_log(
    storage: LocalStorage, manifest: dict[str, Any], dictionaries: dict[str, Dictionary], report: Any
) -> bool:
    """If the log is damaged, makes a part of its whole records and begins a new log.

    Args:
      storage: of the vault.
      manifest: is changed.
      dictionaries: of the string fields; take in the strings of the log.
      report: of the repair.

    Returns:
      Whether events were lost, or may have been. The files of the log are still there.
    """
    root = storage.root
    schema = Schema.from_json(manifest["schemas"][-1])
    first = manifest["log"]["first"]
    _give_up_kept(storage, manifest, report)
    numbers = [number for number in log_numbers(root) if number >= first]
    # Behind the events that anybody was told of, by the damaged records themselves or by the word of the writer.
    acknowledged = read_acknowledged(root)
    lacking = acknowledged is not None and acknowledged.next_sequence > manifest["next_sequence"]
    if not (numbers or lacking) or _is_whole(storage, manifest, schema, dictionaries, report):
        return False
    batches: list[Batch] = []
    given = manifest["next_sequence"] if acknowledged is None else acknowledged.next_sequence
    for number in numbers:
        for rows, sequence, body in scan_records(log_path(root, number)):
            given = max(given, sequence + rows)
            if body is not None and sequence >= manifest["next_sequence"]:
                batches.append(decode_body(schema, body, rows, sequence))
    batches.sort(key=lambda batch: batch.first_sequence)
    users: list[Any] = []
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *schema.names)}
    end, lost = manifest["next_sequence"], 0
    origins = origins_of(manifest)
    for batch in batches:
        for field, (code, values) in batch.new.items():
            dictionary = dictionaries[field]
            size = len(dictionary)
            if code > size:
                dictionary.extend(size, [f"<lost {gone}>" for gone in range(size, code)])
            # Those that have a code already may have been lost with a piece of the dictionary.
            dictionary.extend(max(code, size), values[max(0, size - code) :])
        if batch.origin is not None:  # whoever sends this batch again: it is here
            client, number = batch.origin
            behind = batch.first_sequence + len(batch)
            origins[client] = origins.get(client, Written()).adding([(number, number)], behind).trimmed()
        users.extend(batch.users)
        columns[SEQUENCE].append(np.arange(batch.first_sequence, batch.first_sequence + len(batch)))
        for name, column in batch.columns.items():
            columns[name].append(column)
        lost += max(0, batch.first_sequence - end)
        end = max(end, batch.first_sequence + len(batch))
    lost += max(0, given - end)
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
    if origins:
        manifest["origins"] = to_manifest(newest(origins))
    manifest["next_sequence"] = max(end, given)
    if acknowledged is None:
        # A record whose header is damaged does not say how many events it had: numbers that they may have are left out.
        manifest["next_sequence"] += os.path.getsize(log_path(root, numbers[-1])) // _LEAST_BYTES
    last = max([*numbers[-1:], *([acknowledged.file] if acknowledged else [])])
    manifest["log"] = {"first": last + 1, "kept": last + 1}
    mark = os.path.join(root, LOG, "acknowledged")
    if os.path.exists(mark):
        os.remove(mark)
    said = f"the log was damaged: {len(users):,} events of its whole records are kept, {lost:,} are lost"
    unknown = ", and perhaps more: it is not known how far it was acknowledged" if acknowledged is None else ""
    report.actions.append(said + unknown)
    report.events_lost += lost
    lossy = lost > 0 or acknowledged is None
    report.loss |= lossy
    return lossy


def _give_up_kept(storage: LocalStorage, manifest: dict[str, Any], report: Any) -> None:
    """Gives up damaged files of events that are in parts, and that were kept to find repeated ones."""
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    log = manifest["log"]
    for number in log_numbers(storage.root):
        if log["kept"] <= number < log["first"]:
            try:
                with LogFile(storage.root, number) as file:
                    for _ in file.batches(schemas[file.schema], FILE_HEADER, file.size):
                        pass
            except CorruptionError as error:
                set_aside.set_aside(storage.root, f"log/{number:09d}.log")
                manifest["log"] = {"first": log["first"], "kept": number + 1}
                report.actions.append(f"log: {error}; its events are in parts, but it is not known which repeat them")


def _is_whole(
    storage: LocalStorage, manifest: dict[str, Any], schema: Schema, dictionaries: dict[str, Dictionary], report: Any
) -> bool:
    """Whether the next writer could take up the log as it is."""
    known = {field: Dictionary(dictionary.array.tolist()) for field, dictionary in dictionaries.items()}
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
