"""What a vault holds, and whether it is whole."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, UnavailableError, VaultError
from laser_jax.vault.files import Folder
from laser_jax.vault.follower import Follower
from laser_jax.vault.format import DICTIONARIES, LOG, MANIFEST, MANIFEST_COPY, MANIFESTS, PAGE
from laser_jax.vault.log import FILE_HEADER, LogFile, log_numbers, log_path, log_size, read_acknowledged
from laser_jax.vault.lookup import LocalPages, RemotePages
from laser_jax.vault.manifest import HeldManifest, parse_manifest, snapshots
from laser_jax.vault.merge_plan import all_entries
from laser_jax.vault.part import Part
from laser_jax.vault.state import read_strings
from laser_jax.vault.storage import KvStorage, LocalStorage, storage_of
from laser_jax.vault.tasks import read_entries
from laser_jax.vault.unpacking import SEQUENCE

#: Pages that verify reads at once.
_BLOCK = 256


def stats(vault: Any) -> dict[str, Any]:
    """Sizes and shape of an open vault, as plain JSON values.

    Returns:
      users, events (that can be read), superseded_events (copies in old parts, which a merge has written anew), parts,
      pages, bytes (of parts, dictionaries and manifest), bytes_per_event (copies are events, too), log_bytes, fill
      (events over slots of the pages), first_time, last_time, time_unit, parts_per_user (mean, p99 and largest),
      dictionaries (values of each string field), index_bytes (memory), tail_events, tail_bytes, snapshots, lengths:
      [[low, high, users], ...] with low <= events of a user < high; of the parts.
    """
    state = vault.state
    manifest, table = state.manifest, state.table
    entries = manifest["parts"]
    pieces = [piece for field in manifest["dictionaries"].values() for piece in field]
    size = sum(file[0] for entry in (*entries, *pieces) for file in entry["files"].values())
    log_bytes = 0
    if vault.local:
        size += os.path.getsize(os.path.join(vault.path, MANIFEST))
        log_bytes = log_size(vault.path)
    found = all_entries(state)
    per_user, events = np.bincount(found.request), np.bincount(found.request, weights=found.size).astype(np.int64)
    per_user, lengths = per_user[per_user > 0], events[events > 0]
    histogram = []
    if len(lengths):
        bins = np.bincount(np.log2(lengths).astype(np.int64))
        histogram = [[1 << power, 2 << power, count] for power, count in enumerate(bins.tolist()) if count]
    num_pages = sum(part.num_pages for part in state.parts.values())
    in_parts, alive = sum(entry["events"] for entry in entries), int(found.size.sum())
    in_tails = sum(tail.size for tail in state.tails)
    spans = [(entry["first_time"], entry["last_time"]) for entry in entries]
    spans += [span for tail in state.tails if (span := tail.span) is not None]
    shares = None
    if len(per_user):
        shares = [float(per_user.mean()), float(np.percentile(per_user, 99)), int(per_user.max())]
    return {
        "path": vault.path,
        "users": len(vault),
        "events": alive + in_tails,
        "superseded_events": in_parts - alive,
        "parts": len(entries),
        "pages": num_pages,
        "bytes": size,
        "bytes_per_event": size / in_parts if in_parts else None,
        "log_bytes": log_bytes,
        "fill": in_parts / (num_pages * PAGE) if num_pages else None,
        "first_time": min((first for first, _ in spans), default=None),
        "last_time": max((last for _, last in spans), default=None),
        "time_unit": vault.schema.time_unit,
        "parts_per_user": shares,
        "dictionaries": {field: len(vault.dictionary(field)) for field in manifest["dictionaries"]},
        "index_bytes": table.num_bytes + sum(index.num_bytes for index in state.indexes),
        "tail_events": in_tails,
        "tail_bytes": sum(tail.num_bytes for tail in state.tails),
        "snapshots": vault.snapshots(),
        "lengths": histogram,
    }


def verify(path: str | os.PathLike, progress: Callable[[str], None] | None = None) -> list[str]:
    """Reads all of a vault, checks checksums and consistency.

    Args:
      path: directory or URL of the vault, or of a partition.
      progress: called with a line for each part.

    Returns:
      Every damage in words; empty if the vault is whole.
    """
    path = os.fspath(path)
    storage = storage_of(path)
    say = progress or (lambda line: None)
    damages = _lasting(storage, lambda manifest: _damaged_files_of_all(storage, manifest, say))
    if storage.local:
        copy = storage.read(MANIFEST_COPY)
        try:
            if copy is not None:
                parse_manifest(copy, storage.path(MANIFEST_COPY), storage.root)
        except VaultError as error:
            damages.append(str(error))
        damages += damaged_manifests(storage)
        damages += _lasting(storage, lambda manifest: [] if manifest is None else _damaged_log(storage, manifest))
    # A damaged directory file is found by name and again when the part is opened.
    return list(dict.fromkeys(damages))


def damaged_manifests(storage: LocalStorage) -> list[str]:
    """Damages of the manifests that are kept for readers, but of the one that is the vault's."""
    damages = []
    folder = storage.path(MANIFESTS)
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        data = storage.read(f"{MANIFESTS}/{name}")
        with contextlib.suppress(FileNotFoundError):  # a writer may remove it, or replace the manifest, at any moment
            if data is None or os.path.samefile(storage.path(f"{MANIFESTS}/{name}"), storage.path(MANIFEST)):
                continue
        try:
            parse_manifest(data, storage.path(f"{MANIFESTS}/{name}"), storage.root)
        except VaultError as error:
            damages.append(str(error))
    return damages


def _lasting(storage: LocalStorage | KvStorage, look: Callable[[dict[str, Any] | None], list[str]]) -> list[str]:
    """The damages that `look` finds, given the manifest; None stands for one that cannot be read.

    A writer may go on meanwhile: files of the log go, and forgetting removes others even from under a manifest that is
    held. Then only what is found twice is damage.
    """
    before: list[str] = []
    while True:
        try:
            held = HeldManifest(storage)
        except VaultError as error:
            return [str(error), *look(None)]
        damages = look(held.content)
        lasting = [damage for damage in damages if damage in before]
        if not damages or not storage.local or held.is_current(storage):
            return damages
        if lasting:
            return lasting
        before = damages


def _damaged_files_of_all(
    storage: LocalStorage | KvStorage, manifest: dict[str, Any] | None, say: Callable[[str], None]
) -> list[str]:
    """Damages of the parts and dictionaries of a manifest and of all snapshots."""
    seen: set[str] = set()
    damages = [] if manifest is None else _damaged_files_of(storage, manifest, seen, say)
    for name in snapshots(storage):
        try:
            held = HeldManifest(storage, name)
        except VaultError as error:
            damages.append(str(error))
        else:
            damages += _damaged_files_of(storage, held.content, seen, say)
    return damages


def _damaged_files_of(
    storage: LocalStorage | KvStorage, manifest: dict[str, Any], seen: set[str], say: Callable[[str], None]
) -> list[str]:
    """Damages of the parts and dictionaries of a manifest, but those seen already."""
    damages: list[str] = []
    num_values = {}
    for field, pieces in manifest["dictionaries"].items():
        num_values[field] = sum(piece["values"] for piece in pieces)
        for piece in pieces:
            folder = Folder(storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
            if folder.name in seen:
                continue
            seen.add(folder.name)
            found = _damaged_files(folder)
            try:
                read_strings(folder, piece["values"])
            except (CorruptionError, UnavailableError, UnicodeDecodeError) as error:
                found.append(str(error))
            damages.extend(found)
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    for position, entry in enumerate(manifest["parts"], 1):
        if entry["name"] in seen:
            continue
        seen.add(entry["name"])
        say(f"part {position} of {len(manifest['parts'])}: {entry['name']}, {entry['events']:,} events")
        damages.extend(damaged_part(storage, manifest, entry, schemas, num_values))
    return damages


def damaged_part(
    storage: Any, manifest: dict[str, Any], entry: dict[str, Any], schemas: list[Schema], num_values: dict[str, int]
) -> list[str]:
    """Damages of one part, which is read as a whole.

    Args:
      storage: of the vault. manifest: that names the part.
      entry: of the part. schemas: of the vault.
      num_values: values of each string field.
    """
    damages = _damaged_files(Folder(storage, f"{vault_format.PARTS}/{entry['name']}", entry["files"]))
    try:
        part = Part(storage, entry, schemas)
    except (CorruptionError, UnavailableError) as error:
        return [*damages, str(error)]
    pages: Any = LocalPages() if storage.local else RemotePages(64 << 20)
    for first in range(0, part.num_pages, _BLOCK):
        end = min(first + _BLOCK, part.num_pages)
        try:
            damages.extend(_inconsistencies(part, pages, first, end, manifest, num_values))
        except (CorruptionError, UnavailableError):
            damages.extend(_damages_one_by_one(part, pages, first, end, manifest, num_values))
    return damages


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


def _damages_one_by_one(
    part: Part, pages: Any, first: int, end: int, manifest: dict[str, Any], num_values: dict[str, int]
) -> list[str]:
    damages = []
    for page in range(first, end):
        whole = True
        for field in (None, *part.schema.vectors):
            try:
                if field is None:
                    pages.words([part], np.array([page]), np.array([page + 1]))
                else:
                    pages.vectors(part, field, page, page + 1)
            except (CorruptionError, UnavailableError) as error:
                damages.append(str(error))
                whole = False
        if whole:
            damages.extend(_inconsistencies(part, pages, page, page + 1, manifest, num_values))
    return damages


def _inconsistencies(
    part: Part, pages: Any, first: int, end: int, manifest: dict[str, Any], num_values: dict[str, int]
) -> list[str]:
    """What pages first..end-1 of a part hold that its directory does not say, or that cannot be."""
    page = np.arange(first, end)
    count = part.page_count[page].astype(np.int64)
    oldest = np.isin(page, part.users.first_page)
    findings = {
        "holds no event or more than a page can": (count < 1) | (count > PAGE),
        "is partly filled but not its user's oldest": (count < PAGE) & ~oldest,
    }
    if not any(wrong.any() for wrong in findings.values()):
        rows, _ = read_entries(part, pages, part.schema, dict.fromkeys(part.schema.names, 0), page, page + 1)
        starts = np.cumsum(count) - count
        time = rows["time"]
        steps = np.diff(time, prepend=time[:1])
        steps[starts] = 0
        number = np.repeat(np.arange(len(page)), count)

        def any_in(wrong: np.ndarray) -> np.ndarray:
            return np.bincount(number, weights=wrong, minlength=len(page)) > 0

        ends = starts + count - 1
        findings["has times that are not those of the directory"] = (time[starts] != part.first_time[page]) | (
            time[ends] != part.last_time[page]
        )
        findings["has times out of order"] = any_in(steps < 0)
        findings["has times out of range"] = any_in((time < 0) | (time >= part.schema.time_limit))
        after = page[~oldest & (page > 0)]
        late = after[part.first_time[after] < part.last_time[after - 1]]
        findings["begins before the page before it ends"] = np.isin(page, late)
        sequence = rows[SEQUENCE]
        findings["has sequence numbers that were never given"] = any_in(
            (sequence < 0) | (sequence >= manifest["next_sequence"])
        )
        findings["has sequence numbers that are not those of the directory"] = (
            np.maximum.reduceat(sequence, starts) != part.last_sequence[page]
        )
        for field, values in num_values.items():
            if field in rows:
                codes = rows[field]
                findings[f"has codes of {field!r} outside the dictionary"] = any_in((codes < 0) | (codes >= values))
    return [
        f"part {part.name}, page {number}, user {part.user_of_page(number)!r}: {what} ({part.folder.path})"
        for what, wrong in findings.items()
        for number in page[wrong].tolist()
    ]


def _damaged_log(storage: LocalStorage, manifest: dict[str, Any]) -> list[str]:
    """Damages of the log, found by reading all of it."""
    damages = []
    root = storage.root
    schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
    dictionaries: dict[str, Dictionary] = {}
    try:
        for field, pieces in manifest["dictionaries"].items():
            values = []
            for piece in pieces:
                folder = Folder(storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
                values += read_strings(folder, piece["values"])
            dictionaries[field] = Dictionary(values)
        follower = Follower(storage, manifest, schemas[-1], dictionaries)
        if not follower.follow():
            damages.append(f"{log_path(root, follower.file)} is missing")
    except (CorruptionError, UnavailableError, UnicodeDecodeError) as error:
        damages.append(str(error))
    known = os.path.exists(os.path.join(root, LOG, "acknowledged"))
    end = read_acknowledged(root)
    if end is None and known:
        damages.append(
            f"{os.path.join(root, LOG, 'acknowledged')} is damaged; `repair` or the next writer makes it anew"
        )
    newest, last = (end.file, max(end.offset, FILE_HEADER)) if end is not None else (-1, 0)
    for number in log_numbers(root):
        if number < manifest["log"]["kept"] or (end is not None and number > end.file):
            continue
        try:
            with LogFile(root, number) as file:
                stop = last if number == newest else None if end is None else file.size
                for _ in file.batches(schemas[file.schema], FILE_HEADER, stop):
                    pass
        except FileNotFoundError:
            damages.append(f"{log_path(root, number)} is missing")
        except (CorruptionError, UnavailableError) as error:
            damages.append(str(error))
    return damages
