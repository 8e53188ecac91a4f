"""The bulk writer: any number of writes in, immutable parts and one atomic manifest out."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

from laser_jax.schema import Schema, SchemaError
from laser_jax.vault import format as vault_format
from laser_jax.vault.columns import check_columns
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import UnavailableError, VaultError, VaultExistsError
from laser_jax.vault.files import inventory, sync_path, sync_tree, write_strings, writer_lock
from laser_jax.vault.manifest import commit_manifest, new_manifest
from laser_jax.vault.part_buffer import PartBuffer

#: Rows buffered before they become a part: some 150 bytes of memory each for a usual schema, half of them for the part
#: that is being written meanwhile.
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

    Parts are written in a thread of its own: an error of the storage may be raised by a later `write`, or at the end.
    """

    def __init__(self, path: str, schema: Schema, buffer_events: int = BUFFER_EVENTS):
        """See laser_jax.vault.create."""
        if not isinstance(schema, Schema):
            raise SchemaError(f"schema must be a laser_jax.schema.Schema, got {schema!r}")
        if buffer_events < 1:
            raise VaultError(f"buffer_events must be at least 1, got {buffer_events}")
        self.path = os.path.abspath(os.fspath(path))
        self.schema = schema
        self._buffer = PartBuffer(os.path.join(self.path, vault_format.PARTS), schema, buffer_events)
        self._open = False
        self._dictionaries = {field.name: Dictionary() for field in schema.fields if field.type == "string"}
        _refuse_taken(self.path)

    @property
    def events(self) -> int:
        """Rows written into parts so far."""
        return self._buffer.events

    @property
    def duplicates_dropped(self) -> int:
        """Rows left out because the schema drops duplicates."""
        return self._buffer.duplicates_dropped

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
        self._open = True
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._open = False
        with self._locked, contextlib.ExitStack() as undo:
            undo.callback(self._abandon)
            try:
                # Nobody may write behind the back of whoever tidies up.
                with contextlib.closing(self._buffer):
                    if kind is not None:
                        return
                    self._buffer.finish()
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
        if not self._open:
            raise VaultError(f"writer of {self.path} is not open: write inside its with block")
        checked = check_columns(self.schema, columns)
        for name, dictionary in self._dictionaries.items():
            checked[name] = dictionary.encode(checked[name])
        self._buffer.add(checked)

    def adopt(self, parts: list[dict[str, Any]], strings: Mapping[str, list[str]], duplicates_dropped: int) -> None:
        """Takes over what other processes wrote into the vault's directory of parts, instead of `write`.

        Args:
          parts: their entries as PartBuffer makes them; a user's parts in order of time.
          strings: values of each string field, by code.
          duplicates_dropped: rows that were left out.
        """
        self._buffer.adopt(parts, duplicates_dropped)
        for name, values in strings.items():
            self._dictionaries[name].extend(0, values)
        folder = os.path.join(self.path, vault_format.PARTS)
        ours = {entry["name"] for entry in self._buffer.parts}
        for name in os.listdir(folder):
            # Of a task that failed, and was done again.
            if name.startswith("part-") and name not in ours:
                shutil.rmtree(os.path.join(folder, name))

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
        manifest = new_manifest(self.schema, self._buffer.parts, dictionaries, self.events)
        commit_manifest(self.path, manifest)
        sync_path(os.path.dirname(self.path))

    def _abandon(self) -> None:
        self._remove(keep_lock=False)
        if self._made:
            # Another writer may have moved in since the lock file went.
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def _remove(self, keep_lock: bool) -> None:
        # The manifest first, if it was put in place before something failed: what it names goes now.
        for name in (vault_format.MANIFEST, *(_OWN_NAMES - ({vault_format.LOCK} if keep_lock else set()))):
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
