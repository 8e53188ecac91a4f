"""The directory of an exported model: what it is called, how it is written whole and checked.

model.json          everything below that is not an array, and size and CRC-32C of every other file
programs/NAME.bin   StableHLO by jax.export, one for each form and history length
weights.npz         dense parameters, in the programs' order
tables/N.npy        embedding rows [V, D] in the order of row numbers: float32, or uint16 bits of bfloat16, or int8
tables/N.scale.npy  for int8: float32 [V], what a row is multiplied by
ids/FIELD.npy       sorted int64 ids of a field with ids="vocab"
ids/FIELD.npz       state of the dictionary of a table with ids="dictionary"
strings/FIELD.json  strings of a field of the vault, by code
"""

import json
import os
import shutil
from typing import Any

import google_crc32c

from laser_jax.vault.files import sync_path, sync_tree

MANIFEST = "model.json"
FORMAT, VERSION = "laser_jax.model", 3
_BLOCK = 1 << 24


class ModelError(Exception):
    """A directory holds no exported model, a damaged one, or one of another version of the format."""


def checksum(path: str) -> int:
    """CRC-32C of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            value = google_crc32c.extend(value, block)
    return value


def describe(draft: str) -> dict[str, list[int]]:
    """Size and CRC-32C of every file."""
    files = {}
    for folder, _, names in os.walk(draft):
        for name in names:
            path = os.path.join(folder, name)
            files[os.path.relpath(path, draft)] = [os.path.getsize(path), checksum(path)]
    return files


def commit(draft: str, target: str, content: dict[str, Any], files: dict[str, list[int]]) -> None:
    """Writes the manifest into `draft`, whose `files` are written, and makes it `target`: whole, or not at all."""
    content = {"format": FORMAT, "version": VERSION, **content, "files": files}
    text = json.dumps(content, indent=1, sort_keys=True)
    content["checksum"] = google_crc32c.value(text.encode())
    with open(os.path.join(draft, MANIFEST), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, sort_keys=True)
    sync_tree(draft)
    os.rename(draft, target)
    sync_path(os.path.dirname(os.path.abspath(target)))


def begin(target: str) -> str:
    """An empty directory beside `target` to write into.

    Raises:
      ModelError: `target` is there already.
    """
    if os.path.exists(target):
        raise ModelError(f"{target} is there already: give another --out, or remove it")
    draft = target.rstrip("/") + ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    os.makedirs(draft)
    return draft


def read_manifest(path: str, verify: bool = True) -> dict[str, Any]:
    """The content of model.json, its files checked: their sizes, and if asked their checksums.

    Raises:
      ModelError: what is wrong.
    """
    name = os.path.join(path, MANIFEST)
    try:
        with open(name, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError as error:
        raise ModelError(f"{path} holds no exported model: it has no {MANIFEST}") from error
    except ValueError as error:
        raise ModelError(f"{name} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"{name} is not of format {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int:
        raise ModelError(f"{name} is damaged: version={version!r}; export the model again")
    if version != VERSION:
        remedy = "install a newer one" if version > VERSION else "export the model again"
        raise ModelError(f"{path} is of version {version}, this code reads {VERSION}: {remedy}")
    stored = content.pop("checksum", None)
    if stored != google_crc32c.value(json.dumps(content, indent=1, sort_keys=True).encode()):
        raise ModelError(f"{name} is damaged: its checksum does not match; export the model again")
    for file, (size, crc) in content["files"].items():
        inner = os.path.join(path, file)
        if not os.path.exists(inner) or os.path.getsize(inner) != size or (verify and checksum(inner) != crc):
            raise ModelError(f"{inner} is missing or damaged; export the model again")
    return content
