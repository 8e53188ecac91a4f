"""What `repair` gave up is kept as it was found, until its bytes are restored or somebody is forgotten.

    damaged/parts/NAME, damaged/dictionaries/NAME, damaged/log/NAME, damaged/snapshots/NAME
    damaged/parts/NAME.json     {"entry", "lost", "instead", "next_part", "snapshots", "current", "checksum"}: the entry
                                that the manifest had of the part; how many events were lost; the part that has the
                                others; number that the next part got at that time; number of each snapshot that had
                                the part; whether the manifest had it

No reader looks there. A part comes back once it is whole: whoever has its bytes, from a backup of the vault, puts them
there and calls `repair` again.
"""

import contextlib
import json
import os
import shutil
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.files import crc32c, dump, sync_path, sync_tree
from laser_jax.vault.format import DAMAGED, PARTS
from laser_jax.vault.part import Part, part_number
from laser_jax.vault.storage import LocalStorage


def set_aside(root: str, name: str) -> str | None:
    """Gives the file or directory `name` of a vault a second place in `damaged/`; None if there is nothing to keep.

    The first place is left to who collects garbage, once no manifest names it.
    """
    source, target = os.path.join(root, name), os.path.join(root, DAMAGED, name)
    if not os.path.exists(source):
        return None
    drop_one(root, name)  # of a repair that was killed
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        shutil.copytree(source, target, copy_function=os.link)
        sync_tree(target)
    else:
        os.link(source, target)
    sync_path(os.path.dirname(target))
    sync_path(os.path.join(root, DAMAGED))
    sync_path(root)
    return target


def keep_record(root: str, record: dict[str, Any]) -> None:
    """Notes what a part was that was set aside."""
    target = os.path.join(root, DAMAGED, PARTS, record["entry"]["name"] + ".json")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target + ".draft", "wb") as file:
        file.write(dump(record | {"checksum": crc32c(dump(record))}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(target + ".draft", target)
    sync_path(os.path.dirname(target))


def records(root: str) -> list[dict[str, Any]]:
    """Notes of the parts that were set aside; those that are damaged themselves are left out."""
    folder = os.path.join(root, DAMAGED, PARTS)
    found = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        if name.endswith(".json"):
            with open(os.path.join(folder, name), "rb") as file:
                data = file.read()
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(data)
                checksum = record.pop("checksum")
                if checksum == crc32c(dump(record)):
                    found.append(record)
    return found


def hides(storage: LocalStorage, manifest: dict[str, Any], record: dict[str, Any], part: Part) -> bool:
    """Whether users of a part that was set aside have been merged since, as if it had never been there."""
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    names = {entry["name"] for entry in manifest["parts"]}
    if record["instead"] is not None and record["instead"] not in names:
        return True
    for entry in manifest["parts"]:
        if entry["covers"] and part_number(entry["name"]) >= record["next_part"]:
            users = Part(storage, entry, schemas).users
            if np.isin(users.keys[users.covers <= part.number], part.users.keys).any():
                return True
    return False


def put_back(root: str, name: str) -> None:
    """Gives a part that was set aside its place among the parts again, as well."""
    target = os.path.join(root, PARTS, name)
    if os.path.exists(target):  # of a repair that was killed; no manifest names it
        shutil.rmtree(target)
    shutil.copytree(os.path.join(root, DAMAGED, PARTS, name), target, copy_function=os.link)
    sync_tree(target)
    sync_path(os.path.dirname(target))


def drop_one(root: str, name: str) -> None:
    """Removes what was set aside under a name, and its note."""
    target = os.path.join(root, DAMAGED, name)
    if os.path.isdir(target):
        shutil.rmtree(target)
    for file in (target, target + ".json"):
        if os.path.isfile(file):
            os.remove(file)


def drop_all(root: str) -> None:
    """Removes all that was set aside: nobody can tell whose events these are."""
    target = os.path.join(root, DAMAGED)
    if os.path.isdir(target):
        shutil.rmtree(target)
        sync_path(root)


def listed(root: str) -> list[dict[str, Any]]:
    """What lies set aside: {"path", "events" that it held, "lost" of these}; no numbers if these are not known."""
    known = {record["entry"]["name"]: record for record in records(root)}
    found = []
    top = os.path.join(root, DAMAGED)
    for place in sorted(os.listdir(top)) if os.path.isdir(top) else []:
        for name in sorted(os.listdir(os.path.join(top, place))):
            if place == PARTS and name.endswith((".json", ".draft")):
                continue
            one: dict[str, Any] = {"path": os.path.join(top, place, name)}
            if place == PARTS and name in known:
                one |= {"events": known[name]["entry"]["events"], "lost": known[name]["lost"]}
            found.append(one)
    return found
