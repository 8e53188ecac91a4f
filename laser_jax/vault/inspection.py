"""What a vault holds, and whether it is whole."""

import os
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault.errors import CorruptionError, UnavailableError, VaultError
from laser_jax.vault.files import Folder, read_manifest
from laser_jax.vault.format import PAGE
from laser_jax.vault.index import VaultIndex
from laser_jax.vault.lookup import PageReader
from laser_jax.vault.pages import page_times, run_of

#: Pages that verify reads at once.
_BLOCK = 256


def stats(vault: Any) -> dict[str, Any]:
    """Sizes and shape of an open vault, as plain JSON values.

    Returns:
      users, events, parts, pages, bytes (on disk), bytes_per_event, fill (events over slots of the pages),
      first_time, last_time, time_unit, parts_per_user (mean and largest), dictionaries (values of each string
      field), index_bytes (memory), lengths: [[low, high, users], ...] with low <= events of a user < high.
    """
    manifest, index = vault.manifest, vault.index
    entries = manifest["parts"]
    pieces = [piece for field in manifest["dictionaries"].values() for piece in field]
    size = sum(file[0] for entry in (*entries, *pieces) for file in entry["files"].values())
    size += os.path.getsize(os.path.join(vault.path, vault_format.MANIFEST))
    num_pages = len(index.count)
    parts_per_user = np.diff(index.entry_start)
    lengths = index.events_of_users()
    histogram = []
    if len(lengths):
        bins = np.bincount(np.log2(lengths).astype(np.int64))
        histogram = [[1 << power, 2 << power, count] for power, count in enumerate(bins.tolist()) if count]
    return {
        "path": vault.path,
        "users": len(vault),
        "events": vault.num_events,
        "parts": len(entries),
        "pages": num_pages,
        "bytes": size,
        "bytes_per_event": size / vault.num_events if vault.num_events else None,
        "fill": vault.num_events / (num_pages * PAGE) if num_pages else None,
        "first_time": min((entry["first_time"] for entry in entries), default=None),
        "last_time": max((entry["last_time"] for entry in entries), default=None),
        "time_unit": vault.schema.time_unit,
        "parts_per_user": [float(parts_per_user.mean()), int(parts_per_user.max())] if len(vault) else None,
        "dictionaries": {field: len(vault.dictionary(field)) for field in manifest["dictionaries"]},
        "index_bytes": index.num_bytes,
        "lengths": histogram,
    }


def verify(path: str) -> list[str]:
    """Reads all of the vault at `path`, checks checksums and consistency; returns every damage in words."""
    try:
        manifest = read_manifest(path)
    except VaultError as error:
        return [str(error)]
    schema = Schema.from_json(manifest["schema"])
    damages: list[str] = []
    num_values = {}
    for field, pieces in manifest["dictionaries"].items():
        num_values[field] = sum(piece["values"] for piece in pieces)
        for piece in pieces:
            folder = Folder(os.path.join(path, vault_format.DICTIONARIES, piece["name"]), piece["files"])
            damages.extend(_damaged_files(folder))
    for entry in manifest["parts"]:
        folder = Folder(os.path.join(path, vault_format.PARTS, entry["name"]), entry["files"])
        damages.extend(_damaged_files(folder))
        damages.extend(_damaged_pages(path, manifest, entry, schema, num_values))
    if sum(entry["events"] for entry in manifest["parts"]) > manifest["next_sequence"]:
        damages.append(f"{path}: the parts hold more events than were ever numbered")
    # A damaged directory file is found by name and again when the part is opened.
    return list(dict.fromkeys(damages))


def _damaged_files(folder: Folder) -> list[str]:
    damages = []
    for name, recorded in sorted(folder.files.items()):
        try:
            if len(recorded) == 1:
                folder.check_size(name)
            else:
                folder.read(name)
        except (CorruptionError, UnavailableError) as error:
            damages.append(str(error))
    return damages


def _damaged_pages(
    path: str, manifest: dict[str, Any], entry: dict[str, Any], schema: Schema, num_values: dict[str, int]
) -> list[str]:
    """Damages of one part, found by reading all its pages."""
    damages: list[str] = []
    try:
        index = VaultIndex(path, manifest | {"parts": [entry]}, schema)
        readers = {"pages": PageReader(index, "pages", (index.layout.num_words, PAGE), np.dtype(np.uint32))}
        for field in schema.vectors:
            name = vault_format.vector_path(field.name)
            readers[name] = PageReader(index, name, (PAGE, field.size), field.dtype)
    except (CorruptionError, UnavailableError) as error:
        return [str(error)]
    for name, reader in readers.items():
        for first in range(0, len(index.count), _BLOCK):
            end = min(first + _BLOCK, len(index.count))
            try:
                pages = reader.read(first, end)
            except (CorruptionError, UnavailableError):
                damages.extend(_damages_one_by_one(reader, first, end))
                continue
            if name == "pages":
                damages.extend(_inconsistencies(index, pages, first, schema, num_values))
    return damages


def _damages_one_by_one(reader: PageReader, first: int, end: int) -> list[str]:
    damages = []
    for page in range(first, end):
        try:
            reader.read(page, page + 1)
        except (CorruptionError, UnavailableError) as error:
            damages.append(str(error))
    return damages


def _inconsistencies(
    index: VaultIndex, pages: np.ndarray, first: int, schema: Schema, num_values: dict[str, int]
) -> list[str]:
    """What the pages first, first + 1, ... of a part's only index say that the directory does not."""
    page = np.arange(first, first + len(pages))
    time = page_times(index.layout, pages)
    count = index.count[page].astype(np.int64)
    used = np.arange(PAGE) >= PAGE - count[:, None]
    oldest = np.isin(page, index.first_page)
    after = page[~oldest]
    findings = {
        "holds no event or more than a page can": (count < 1) | (count > PAGE),
        "is partly filled but not its user's oldest": (count < PAGE) & ~oldest,
        "has times that are not those of the directory": (
            (time[np.arange(len(page)), np.minimum(PAGE - count, PAGE - 1)] != index.first_time[page])
            | (time[:, -1] != index.last_time[page])
        ),
        "has times out of order": (np.diff(time, axis=1) < 0).any(axis=1),
        "has times out of range": ((time < 0) | (time >= schema.time_limit)).any(axis=1),
        "begins before the page before it ends": np.isin(
            page, after[index.first_time[after] < index.last_time[after - 1]]
        ),
        "has unused slots that are not zero": (pages.any(axis=1) & ~used).any(axis=1),
    }
    for field, values in num_values.items():
        codes = run_of(pages, index.layout.places[field], 0, pages.shape[0] * PAGE).reshape(-1, PAGE)
        findings[f"has codes of {field!r} outside the dictionary"] = (((codes < 0) | (codes >= values)) & used).any(
            axis=1
        )
    part = index.parts[0]
    return [
        f"part {part.name}, page {number}, user {index.user_of_page(number)!r}: {what} ({part.folder.path})"
        for what, wrong in findings.items()
        for number in page[wrong].tolist()
    ]
