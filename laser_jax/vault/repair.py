"""Makes a damaged vault readable again, and keeps everything that is whole."""

import copy
import dataclasses
import os
import secrets
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault import set_aside
from laser_jax.vault.codebook import CODES, mended_codes
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import CorruptionError, MissingError, NotAVaultError, UnavailableError, VaultError
from laser_jax.vault.files import Folder, inventory, sync_path, sync_tree, write_strings, writer_lock
from laser_jax.vault.format import DAMAGED, DICTIONARIES, MANIFEST, MANIFEST_COPY, PARTS, SNAPSHOTS
from laser_jax.vault.inspection import damaged_manifests, damaged_part
from laser_jax.vault.log_repair import repair_log
from laser_jax.vault.lookup import LocalPages
from laser_jax.vault.manifest import (
    HeldManifest,
    collect_garbage,
    commit_manifest,
    parse_manifest,
    snapshots,
    write_snapshot,
)
from laser_jax.vault.mending import mend_part, mend_strings, replace_file
from laser_jax.vault.part import Part
from laser_jax.vault.partitioning import is_partitioned, partition_paths
from laser_jax.vault.state import read_strings
from laser_jax.vault.storage import LocalStorage
from laser_jax.vault.tasks import read_entries, write_rows
from laser_jax.vault.unpacking import SEQUENCE
from laser_jax.vault.verification import damaged_codes, strings_of_partitions


@dataclasses.dataclass
class RepairReport:
    """What a repair found and did.

    Attributes:
      path: of the vault.
      events_lost: of parts and log, as far as it can be known.
      loss: whether anything was given up: events, strings, or what only a snapshot had.
      actions: what was done, in words; empty if the vault was whole.
      set_aside: what lies in `damaged/` now: {"path"}; of a part also the "events" that it held, how many of these were
        "lost" and, if it was there before, "why" it stays.
    """

    path: str
    events_lost: int = 0
    loss: bool = False
    actions: list[str] = dataclasses.field(default_factory=list)
    set_aside: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = list(self.actions)
        for one in self.set_aside:
            held = f" (part of {one['events']:,} events, {one['lost']:,} of them lost)" if "events" in one else ""
            lines.append(f"set aside: {one['path']}{held}{': ' + one['why'] if 'why' in one else ''}")
        if self.loss:
            lines.append(
                "LOST: put the bytes of a part, from a backup of the vault, where it is set aside, and repair again; "
                "what is set aside stays until `forget` is called"
            )
        lines.append(
            f"repaired, {self.events_lost:,} events lost: {self.path}" if self.actions else f"whole: {self.path}"
        )
        return "\n".join(lines)


def repair(path: str | os.PathLike) -> RepairReport:
    """Repairs the vault at `path`: what can be made anew is, other damaged things are given up, the rest is kept.

    Files of a part that follow from its pages, the schema or the manifest are made anew, byte for byte. A part with
    damaged pages is written anew without them; one whose users are damaged is given up as a whole. Log records are kept
    wherever they are whole. A lost dictionary value becomes "<lost CODE>".

    Nothing that is given up is deleted: it lies in `damaged/` as it was. A part comes back when its bytes are put there
    and `repair` is called again, unless its users were merged meanwhile. `forget` deletes all that lies there.

    Of a partitioned vault, strings whose common codes are lost get new ones; a lost code means "<lost CODE>".

    Raises:
      LockedError: somebody is writing.
      CorruptionError: the manifest and its copy are damaged; take a snapshot's file in its place. Or the common codes
        of a partitioned vault were cut off, and nobody can tell which were given.
      UnavailableError: the storage refused.
    """
    path = os.fspath(path)
    if is_partitioned(path):
        with writer_lock(path):
            found = [repair(inner) for inner in partition_paths(path)]
            found.append(_repaired_codes(path))
        return RepairReport(
            path,
            sum(one.events_lost for one in found),
            any(one.loss for one in found),
            [action for one in found for action in one.actions],
            [lying for one in found for lying in one.set_aside],
        )
    storage = LocalStorage(path)
    root = storage.root
    if not os.path.isdir(root):
        raise NotAVaultError(f"{root} is not a vault: no such directory")
    try:
        with writer_lock(root):
            return _Repair(storage).run()
    except OSError as error:
        raise UnavailableError(f"{root} cannot be repaired: {error}") from error


def _repaired_codes(path: str) -> RepairReport:
    """Makes the common codes of a partitioned vault, whose partitions are whole, anew if they are damaged."""
    report = RepairReport(path)
    damages = damaged_codes(path)
    if not damages:
        return report
    try:
        target = os.path.join(path, CODES)
        data, lost, new = mended_codes(target, strings_of_partitions(path))
        kept = set_aside.set_aside(path, CODES)
        replace_file(target, data)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be repaired: {error}") from error
    report.loss = lost > 0 or new > 0
    report.actions = [*damages, f"{target} is made anew: {lost} codes are lost at most, {new} strings have new ones"]
    report.set_aside = [{"path": kept}] if kept else []
    return report


class _Repair:
    """One vault at work."""

    def __init__(self, storage: LocalStorage):
        self._storage = storage
        self._root = storage.root
        self._report = RepairReport(storage.root)
        #: What stands for a part, or for a dictionary's piece with its values, from now on.
        self._parts: dict[str, dict[str, Any] | None] = {}
        self._pieces: dict[str, tuple[dict[str, Any], list[str]]] = {}
        #: Parts that are given up, and how many events of each.
        self._given_up: dict[str, tuple[dict[str, Any], int]] = {}

    def run(self) -> RepairReport:
        """All of it, in an order in which it can be killed at any moment and called again."""
        report, root = self._report, self._root
        manifest = self._manifest()
        pinned = self._snapshots()
        before = copy.deepcopy({None: manifest} | pinned)
        dictionaries = self._dictionaries(manifest, "")
        manifest["parts"] = self._whole_parts(manifest, "")
        report.events_lost = sum(lost for _, lost in self._given_up.values())
        if repair_log(self._storage, manifest, dictionaries, report):
            for number in range(before[None]["log"]["first"], manifest["log"]["first"]):
                set_aside.set_aside(root, f"log/{number:09d}.log")
        for name, content in pinned.items():
            self._dictionaries(content, f"snapshot {name!r}: ")
            content["parts"] = self._whole_parts(content, f"snapshot {name!r}: ")
        self._note_parts(before, manifest["next_part"])
        back, why = self._come_back(manifest, pinned)
        for folder in (PARTS, DICTIONARIES):
            if os.path.isdir(self._storage.path(folder)):
                sync_path(self._storage.path(folder))  # before a manifest names what is new there
        for name, content in pinned.items():
            if content != before[name]:
                write_snapshot(root, name, content)
        if report.actions:
            manifest["number"] += 1
            commit_manifest(root, manifest)
            collect_garbage(root, force=True)
            for name in back:
                set_aside.drop_one(root, f"{PARTS}/{name}")
        report.set_aside = [
            one | {"why": why[name]} if (name := os.path.basename(one["path"])) in why else one
            for one in set_aside.listed(root)
        ]
        return report

    def _manifest(self) -> dict[str, Any]:
        storage, say = self._storage, self._report.actions.append
        data = storage.read(MANIFEST_COPY)
        try:
            manifest = HeldManifest(storage).content
        except (CorruptionError, NotAVaultError):
            if data is None:
                raise
            manifest = parse_manifest(data, storage.path(MANIFEST_COPY), storage.root)
            say(f"{MANIFEST} was damaged or missing: restored from {MANIFEST_COPY}")
            return manifest
        try:
            if data is not None:
                parse_manifest(data, storage.path(MANIFEST_COPY), storage.root)
        except VaultError as error:
            say(f"{MANIFEST_COPY} is written anew from {MANIFEST}: {error}")
        for damage in damaged_manifests(storage):
            say(f"an older manifest is removed, which only a reader that is open may need: {damage}")
        return manifest

    def _snapshots(self) -> dict[str, dict[str, Any]]:
        """Manifests of the snapshots; one that is damaged is given up."""
        found = {}
        for name in snapshots(self._storage):
            try:
                found[name] = HeldManifest(self._storage, name).content
            except CorruptionError as error:
                set_aside.set_aside(self._root, f"{SNAPSHOTS}/{name}.json")
                os.remove(self._storage.path(f"{SNAPSHOTS}/{name}.json"))
                self._report.actions.append(f"snapshot {name!r} is given up: {error}")
                self._report.loss = True
        return found

    def _dictionaries(self, manifest: dict[str, Any], where: str) -> dict[str, Dictionary]:
        found = {}
        for field, pieces in manifest["dictionaries"].items():
            values: list[str] = []
            for position, piece in enumerate(pieces):
                if piece["name"] not in self._pieces:
                    self._pieces[piece["name"]] = self._piece(field, position, len(values), piece, where)
                pieces[position], strings = self._pieces[piece["name"]]
                values += strings
            found[field] = Dictionary(values)
        return found

    def _piece(
        self, field: str, position: int, code: int, piece: dict[str, Any], where: str
    ) -> tuple[dict[str, Any], list[str]]:
        """What stands for a dictionary's piece whose values begin at `code`, and the values."""
        say = self._report.actions.append
        mended = mend_strings(self._storage, piece)
        if mended:
            say(f"{where}dictionary {piece['name']}: {', '.join(mended)} made anew")
        try:
            folder = Folder(self._storage, f"{DICTIONARIES}/{piece['name']}", piece["files"])
            return piece, read_strings(folder, piece["values"])
        except (CorruptionError, UnicodeDecodeError) as error:
            lost = [f"<lost {code + number}>" for number in range(piece["values"])]
            name = f"{field}-{position:06d}-{secrets.token_hex(4)}"
            target = os.path.join(self._root, DICTIONARIES, name)
            write_strings(target, "", lost)
            sync_tree(target)
            set_aside.set_aside(self._root, f"{DICTIONARIES}/{piece['name']}")
            say(f"{where}{len(lost)} values of {field!r} are lost, and called '<lost {code}>' ...: {error}")
            self._report.loss = True
            return {"name": name, "values": piece["values"], "files": inventory(target, [])}, lost

    def _whole_parts(self, manifest: dict[str, Any], where: str) -> list[dict[str, Any]]:
        """Entries of what stands for the parts of a manifest."""
        schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
        for entry in manifest["parts"]:
            if entry["name"] not in self._parts:
                self._parts[entry["name"]] = self._whole_part(entry, schemas, where)
        found = [self._parts[entry["name"]] for entry in manifest["parts"]]
        return [entry for entry in found if entry is not None]

    def _whole_part(self, entry: dict[str, Any], schemas: list[Schema], where: str) -> dict[str, Any] | None:
        say = self._report.actions.append
        mended = mend_part(self._storage, entry, schemas)
        if mended:
            say(f"{where}part {entry['name']}: {', '.join(mended)} made anew")
        try:
            part = Part(self._storage, entry, schemas)
        except CorruptionError as error:
            self._give_up(entry, entry["events"])
            say(f"{where}part {entry['name']} with {entry['events']:,} events is given up: {error}")
            return None
        return self._whole_pages(part, entry, where)

    def _give_up(self, entry: dict[str, Any], lost: int) -> None:
        set_aside.set_aside(self._root, f"{PARTS}/{entry['name']}")
        self._given_up[entry["name"]] = entry, lost
        self._report.loss = True

    def _whole_pages(self, part: Part, entry: dict[str, Any], where: str) -> dict[str, Any] | None:
        """The part's entry if it is whole; else that of a new part with what can be read of it."""
        pages = LocalPages()
        fills = dict.fromkeys(part.schema.names, 0)
        users: list[Any] = []
        covers: dict[Any, int] = {}
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("time", SEQUENCE, *part.schema.names)}
        damaged, lost = [], 0
        directory = part.users
        for position in range(part.num_users):
            first, end = directory.first_page[position : position + 2].tolist()
            key = directory.key(position)
            covers[key] = int(directory.covers[position])
            try:
                runs = [read_entries(part, pages, part.schema, fills, np.array([first]), np.array([end]))]
            except (CorruptionError, MissingError):
                runs = []
                for page in range(first, end):
                    try:
                        runs.append(
                            read_entries(part, pages, part.schema, fills, np.array([page]), np.array([page + 1]))
                        )
                    except CorruptionError as error:
                        damaged.append(f"{where}{error}")
                        lost += int(part.page_count[page])
            for rows, lengths in runs:
                users.extend([key] * int(lengths.sum()))
                for name, column in rows.items():
                    columns[name].append(column)
        if not damaged:
            return entry
        self._report.actions.extend(damaged)
        self._give_up(entry, lost)
        if not users:
            self._report.actions.append(f"{where}part {part.name}: nothing of it can be read")
            return None
        name = f"part-{part.number:06d}-{secrets.token_hex(4)}"
        rows = {column: np.concatenate(found) for column, found in columns.items()}
        new = write_rows(self._root, name, part.schema, users, rows, covers if entry["covers"] else None)
        self._report.actions.append(
            f"{where}part {part.name}: {new['events']:,} of {entry['events']:,} events are kept, in {name}"
        )
        return {"name": name, "schema": entry["schema"], **new}

    def _note_parts(self, before: dict[str | None, dict[str, Any]], next_part: int) -> None:
        """Notes of the parts that are given up, for when their bytes come back."""
        for name, (entry, lost) in self._given_up.items():
            having = [home for home, content in before.items() if entry in content["parts"]]
            new = self._parts[name]
            record = {"entry": entry, "lost": lost, "instead": new and new["name"], "next_part": next_part}
            record |= {"current": None in having}
            record |= {"snapshots": {home: before[home]["number"] for home in having if home is not None}}
            set_aside.keep_record(self._root, record)

    def _come_back(
        self, manifest: dict[str, Any], pinned: dict[str, dict[str, Any]]
    ) -> tuple[list[str], dict[str, str]]:
        """Takes parts that an earlier repair set aside, and that are whole again, into the manifests that had them.

        Returns:
          Names of these parts; and of the others, why they stay.
        """
        back: list[str] = []
        why: dict[str, str] = {}
        outside = LocalStorage(os.path.join(self._root, DAMAGED))
        schemas = [Schema.from_json(schema) for schema in manifest["schemas"]]
        values = {field: sum(piece["values"] for piece in found) for field, found in manifest["dictionaries"].items()}
        for record in set_aside.records(self._root):
            entry = record["entry"]
            name = entry["name"]
            if name in self._given_up:
                continue
            mend_part(outside, entry, schemas)
            damages = damaged_part(outside, manifest, entry, schemas, values)
            if damages:
                why[name] = f"still damaged: {damages[0]}"
                continue
            part = Part(outside, entry, schemas)
            homes = [manifest] if record["current"] else []
            homes += [pinned[home] for home, number in record["snapshots"].items() if _is(pinned.get(home), number)]
            homes = [home for home in homes if not set_aside.hides(self._storage, home, record, part)]
            if not homes:
                why[name] = "whole, but it cannot come back: its users were merged since, or its snapshot is gone"
                continue
            set_aside.put_back(self._root, name)
            for home in homes:
                home["parts"] = [other for other in home["parts"] if other["name"] != record["instead"]] + [entry]
            self._report.actions.append(f"part {name} is back, with {entry['events']:,} events")
            back.append(name)
        return back, why


def _is(snapshot: dict[str, Any] | None, number: int) -> bool:
    """Whether a snapshot is still that of a manifest's number."""
    return snapshot is not None and snapshot["number"] == number
