"""The bulk writer: any number of writes in, immutable parts and one atomic manifest out."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault import format as vault_format
from laser_jax.vault.columns import Coded, check_columns
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError, VaultExistsError
from laser_jax.vault.files import inventory, sync_path, sync_tree, write_strings, writer_lock
from laser_jax.vault.manifest import commit_manifest, new_manifest
from laser_jax.vault.part_writer import write_part
from laser_jax.vault.sorting import repeated_events, sort_events, trailing_rows

#: Rows buffered before they become a part: about a hundred bytes of memory each for a usual schema.
BUFFER_EVENTS = 1 << 22
_OWN_NAMES = {
    vault_format.PARTS,
    vault_format.DICTIONARIES,
    vault_format.LOCK,
    vault_format.MANIFEST + ".draft",
    vault_format.MANIFEST_COPY,
    vault_format.MANIFEST_COPY + ".draft",
    vault_format.MANIFESTS,
}


class VaultWriter:
    """Writes a new vault inside a `with` block; it exists once the block ends well, and not at all otherwise.

    Attributes:
      events: rows written into parts so far.
      duplicates_dropped: rows left out because the schema drops duplicates.
    """

    def __init__(self, path: str, schema: Schema, buffer_events: int = BUFFER_EVENTS):
        """See laser_jax.vault.create."""
        if not isinstance(schema, Schema):
            raise SchemaError(f"schema must be a laser_jax.schema.Schema, got {schema!r}")
        if buffer_events < 1:
            raise VaultError(f"buffer_events must be at least 1, got {buffer_events}")
        self.path = os.path.abspath(os.fspath(path))
        self.schema = schema
        self.events = 0
        self.duplicates_dropped = 0
        self._buffer_events = buffer_events
        self._parts: list[dict[str, Any]] | None = None
        self._dictionaries = {field.name: Dictionary() for field in schema.fields if field.type == "string"}
        self._blocks: list[dict[str, np.ndarray]] = []
        self._buffered = 0
        self._user_codes: dict[str, int] = {}
        _refuse_taken(self.path)

    def __enter__(self) -> "VaultWriter":
        self._made = not os.path.isdir(self.path)
        with contextlib.ExitStack() as stack:
            try:
                os.makedirs(self.path, exist_ok=True)
                stack.enter_context(writer_lock(self.path))
                _refuse_taken(self.path)
                self._remove(keep_lock=True)  # what a killed writer left behind
            except OSError as error:
                raise UnavailableError(f"vault {self.path} cannot be created: {error}") from error
            self._locked = stack.pop_all()
        self._parts = []
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._locked, contextlib.ExitStack() as undo:
            undo.callback(self._abandon)
            if kind is not None:
                return
            try:
                self._flush(everything=True)
                self._commit()
            except OSError as failure:
                raise UnavailableError(f"vault {self.path} cannot be written: {failure}") from failure
            undo.pop_all()

    def write(self, columns: Mapping[str, Any]) -> None:
        """Adds events, in any order of users and times.

        Args:
          columns: `user`, `time` and every field of the schema, one value (or vector) an event, all of one
            length.

        Raises:
          SchemaError: the events do not fit the schema; none of them is taken.
          UnavailableError: the storage refused.
        """
        if self._parts is None:
            raise VaultError(f"writer of {self.path} is not open: write inside its with block")
        checked = check_columns(self.schema, columns)
        for name, dictionary in self._dictionaries.items():
            checked[name] = dictionary.encode(checked[name])
        rows, done = len(checked["time"]), 0
        while done < rows:
            take = min(rows - done, self._buffer_events - self._buffered)
            block = {}
            for name, column in checked.items():
                if name == "user" and isinstance(column, Coded):
                    block[name] = self._code_users(column, slice(done, done + take))
                else:
                    block[name] = column[done : done + take]
            self._blocks.append(block)
            self._buffered += take
            done += take
            if self._buffered >= self._buffer_events:
                self._flush(everything=False)

    def _code_users(self, column: Coded, rows: slice) -> np.ndarray:
        """Codes of string users, valid until the next flush: no table of all users is kept."""
        present, places = np.unique(column.codes[rows], return_inverse=True)
        known = self._user_codes
        codes = [known.setdefault(column.values[code], len(known)) for code in present.tolist()]
        return np.array(codes, np.int64)[places]

    def _flush(self, everything: bool) -> None:
        """Writes the buffer as a part; unless `everything`, keeps back a trailing user who may go on."""
        if not self._buffered:
            return
        names = ("user", "time", *self.schema.names)
        if len(self._blocks) == 1:
            rows = self._blocks[0]
        else:
            rows = {name: np.concatenate([block[name] for block in self._blocks]) for name in names}
        self._blocks = []
        self._buffered = 0
        names_of_users = list(self._user_codes)
        self._user_codes = {}
        carried = 0 if everything else trailing_rows(rows["user"], rows["time"])
        if carried:
            kept = {name: column[-carried:].copy() for name, column in rows.items()}
            rows = {name: column[:-carried] for name, column in rows.items()}
            if self.schema.user == "string":
                user = Coded(np.zeros(carried, np.int64), [names_of_users[kept["user"][0]]])
                kept["user"] = self._code_users(user, slice(None))
            self._blocks = [kept]
            self._buffered = carried
        self._write_part(rows, names_of_users)

    def _write_part(self, rows: dict[str, np.ndarray], names_of_users: list[str]) -> None:
        order = sort_events(self.schema, rows)
        if order is not None:
            rows = {name: column[order] for name, column in rows.items()}
        if self.schema.duplicates == "drop":
            repeated = repeated_events(self.schema, rows)
            if repeated.any():
                self.duplicates_dropped += int(repeated.sum())
                rows = {name: column[~repeated] for name, column in rows.items()}
        user = rows["user"]
        starts = np.concatenate(([0], np.flatnonzero(user[1:] != user[:-1]) + 1))
        users: np.ndarray | list[str] = user[starts]
        if self.schema.user == "string":
            users = [names_of_users[code] for code in user[starts].tolist()]
        name = f"part-{len(self._parts):06d}-{secrets.token_hex(4)}"
        fields = {field: rows[field] for field in self.schema.names}
        target = os.path.join(self.path, vault_format.PARTS, name)
        entry = write_part(target, self.schema, users, np.append(starts, len(user)), rows["time"], fields)
        self._parts.append({"name": name, "schema": 0, "first_sequence": self.events, **entry})
        self.events += len(user)

    def _commit(self) -> None:
        dictionaries = {}
        folder = os.path.join(self.path, vault_format.DICTIONARIES)
        for field, dictionary in self._dictionaries.items():
            name = f"{field}-000000-{secrets.token_hex(4)}"
            piece = os.path.join(folder, name)
            write_strings(piece, "", dictionary.since(0))
            dictionaries[field] = [{"name": name, "values": len(dictionary), "files": inventory(piece, [])}]
            sync_tree(piece)
        for parent in (folder, os.path.join(self.path, vault_format.PARTS)):
            if os.path.isdir(parent):
                sync_path(parent)
        manifest = new_manifest(self.schema, self._parts, dictionaries, self.events)
        commit_manifest(self.path, manifest)
        sync_path(os.path.dirname(self.path))
        self._parts = None

    def _abandon(self) -> None:
        self._parts = None
        self._remove(keep_lock=False)
        if self._made:
            # Another writer may have moved in since the lock file went.
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def _remove(self, keep_lock: bool) -> None:
        for name in _OWN_NAMES - ({vault_format.LOCK} if keep_lock else set()):
            whole = os.path.join(self.path, name)
            if os.path.isdir(whole):
                shutil.rmtree(whole)
            elif os.path.lexists(whole):
                os.remove(whole)


def _refuse_taken(path: str) -> None:
    """VaultExistsError unless `path` is free, empty, or the leftovers of a killed writer."""
    if os.path.lexists(path) and not os.path.isdir(path):
        raise VaultExistsError(f"{path} is a file: give a new directory")
    names = set(os.listdir(path)) if os.path.isdir(path) else set()
    if vault_format.MANIFEST in names:
        raise VaultExistsError(f"{path} already holds a vault: give another path, or remove it first")
    if names - _OWN_NAMES:
        raise VaultExistsError(f"{path} is not empty (it holds {min(names - _OWN_NAMES)!r}): give a new directory")
