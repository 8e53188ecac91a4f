"""The manifest: the one small file that says what belongs to a vault, how it is replaced, pinned and followed.

A reader locks the manifest that it reads from (flock, shared; it needs no right to write). The writer keeps every
manifest in `manifests/` as long as somebody holds it, and no file goes that such a manifest or a snapshot names.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from typing import Any

from laser_jax.vault import format as vault_format
from laser_jax.vault.errors import CorruptionError, NotAVaultError, UnavailableError, VaultError, VersionError
from laser_jax.vault.files import crc32c, dump, sync_path, try_flock
from laser_jax.vault.format import DICTIONARIES, MANIFEST, MANIFEST_COPY, MANIFESTS, PARTS, SNAPSHOTS
from laser_jax.vault.log import log_numbers, log_path
from laser_jax.vault.storage import KvStorage, LocalStorage

_TRIES = 20
_SNAPSHOT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def parse_manifest(data: bytes, where: str, root: str) -> dict[str, Any]:
    """A manifest's content, as version 2 has it; the error says what is wrong with the bytes."""
    try:
        manifest = json.loads(data)
    except ValueError as error:  # JSON and UTF-8 errors
        raise CorruptionError(f"{where} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != vault_format.FORMAT:
        raise NotAVaultError(f"{root} is not a vault: {where} is not of format {vault_format.FORMAT!r}")
    checksum = manifest.pop("checksum", None)
    # Comparing the whole spelling finds every flipped bit, those in white space included. Every version keeps
    # this rule.
    if checksum != crc32c(dump(manifest)) or dump(manifest | {"checksum": checksum}) != data:
        raise CorruptionError(f"{where} is damaged: its checksum does not match; `repair` may have a copy")
    if manifest["version"] > vault_format.VERSION:
        raise VersionError(
            f"{root} is a vault of version {manifest['version']}, this code reads versions up to "
            f"{vault_format.VERSION}: install a newer laser_jax"
        )
    if manifest["version"] == 1:
        manifest |= {"number": 0, "schemas": [manifest["schema"]], "log": {"first": 0, "kept": 0}, "retention": {}}
        manifest |= {"next_part": len(manifest["parts"])}
        plain = {"schema": 0, "sequence": False, "covers": False}
        manifest["parts"] = [entry | plain for entry in manifest["parts"]]
    return manifest


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """A manifest with its checksum, in the one spelling."""
    manifest = manifest | {"version": max(manifest["version"], vault_format.VERSION)}
    return dump(manifest | {"checksum": crc32c(dump(manifest))})


def new_manifest(schema: Any, parts: list[Any], dictionaries: dict[str, Any], next_sequence: int) -> dict[str, Any]:
    """The first manifest of a vault."""
    return {
        "format": vault_format.FORMAT,
        "version": vault_format.VERSION,
        "number": 0,
        "schema": schema.to_json(),
        "schemas": [schema.to_json()],
        "parts": parts,
        "dictionaries": dictionaries,
        "next_part": len(parts),
        "next_sequence": next_sequence,
        "log": {"first": 0, "kept": 0},
        "retention": {},
    }


class HeldManifest:
    """A manifest that was read and, locally, locked: while this object lives the files that it names stay.

    Attributes:
      content: the manifest.
    """

    def __init__(self, storage: LocalStorage | KvStorage, at: str | None = None):
        """Reads the newest manifest, or that of the snapshot `at`.

        Raises:
          NotAVaultError, VersionError, CorruptionError, UnavailableError: what is wrong with it.
          VaultError: no such snapshot.
        """
        self._descriptor = -1
        self.identity: tuple[int, ...] | None = None
        self._name = name = MANIFEST if at is None else f"{SNAPSHOTS}/{checked_name(at)}.json"
        where = storage.path(name)
        if storage.local:
            data = self._read_locked(storage, name, at)
        else:
            data = storage.read(name)
        if data is None and at is not None:
            known = ", ".join(snapshots(storage)) or "none"
            raise VaultError(f"{storage.root} has no snapshot {at!r}; it has: {known}")
        if data is None:
            raise NotAVaultError(f"{storage.root} is not a vault: it has no {MANIFEST}")
        self.content = parse_manifest(data, where, storage.root)

    def _read_locked(self, storage: LocalStorage, name: str, at: str | None) -> bytes | None:
        if not os.path.isdir(storage.root):
            raise NotAVaultError(f"{storage.root} is not a vault: no such directory")
        path = storage.path(name)
        for _ in range(_TRIES):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise UnavailableError(f"{path} cannot be read: {error}") from error
            # Between opening and locking it may have been replaced, and its files removed.
            locked = try_flock(descriptor, exclusive=False)
            with contextlib.suppress(FileNotFoundError):
                if locked and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    self._descriptor = descriptor
                    with open(descriptor, "rb", closefd=False) as file:
                        data = file.read()
                    found = os.fstat(descriptor)
                    self.identity = (found.st_dev, found.st_ino, found.st_mtime_ns)
                    return data
            os.close(descriptor)
        raise UnavailableError(f"{path} is being replaced all the time: try again")

    def is_current(self, storage: LocalStorage | KvStorage) -> bool:
        """Whether the vault, or its snapshot, still has this manifest; unknown, so false, for a key-value store."""
        if self.identity is None:
            return False
        try:
            found = os.stat(storage.path(self._name))
        except OSError:
            return False
        return (found.st_dev, found.st_ino, found.st_mtime_ns) == self.identity

    def __del__(self, close=os.close) -> None:
        # A default: the module's names may be gone when the interpreter ends.
        if getattr(self, "_descriptor", -1) >= 0:
            close(self._descriptor)


def read_manifest(storage: LocalStorage | KvStorage) -> dict[str, Any]:
    """The newest manifest, without holding it."""
    return HeldManifest(storage).content


def commit_manifest(root: str, manifest: dict[str, Any]) -> None:
    """Makes `manifest` the state of the vault at `root`: all of it or, if the machine dies, nothing of it."""
    data = dump_manifest(manifest)
    target = os.path.join(root, MANIFEST)
    folder = os.path.join(root, MANIFESTS)
    os.makedirs(folder, exist_ok=True)
    numbered = os.path.join(folder, f"{manifest['number']:09d}.json")
    draft, copy = target + ".draft", os.path.join(root, MANIFEST_COPY)
    for name in (draft, numbered):
        with contextlib.suppress(FileNotFoundError):
            os.remove(name)
    for name in (copy, draft):
        with open(name + ".draft" if name == copy else name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    # The copy first: nothing may fail once the manifest is replaced. It names only what is there already.
    os.replace(copy + ".draft", copy)
    # A second name of the same file: readers' locks on what was the manifest can be seen there.
    os.link(draft, numbered)
    if os.path.exists(target) and os.stat(target).st_nlink == 1:
        _keep_name(target, folder, f"before-{manifest['number']:09d}")
    sync_path(folder)
    os.replace(draft, target)
    sync_path(root)


def _keep_name(path: str, folder: str, name: str) -> None:
    """A second name in `manifests/` for a file that is about to lose its own: somebody may hold it."""
    with contextlib.suppress(FileNotFoundError):
        os.link(path, os.path.join(folder, f"{name}-{secrets.token_hex(4)}.json"))


def checked_name(name: str) -> str:
    """A snapshot's name, if it can be one."""
    if not isinstance(name, str) or not _SNAPSHOT.fullmatch(name):
        raise VaultError(f"snapshot {name!r}: need a name of letters, digits, '.', '_' and '-' (at most 100)")
    return name


def snapshots(storage: LocalStorage | KvStorage) -> list[str]:
    """Names of the pinned versions, sorted; a key-value store has none."""
    folder = storage.path(SNAPSHOTS)
    if not storage.local or not os.path.isdir(folder):
        return []
    return sorted(name[: -len(".json")] for name in os.listdir(folder) if name.endswith(".json"))


def write_snapshot(root: str, name: str, manifest: dict[str, Any]) -> None:
    """Pins a manifest under a name, durably; replaces one of that name, in one step."""
    folder = os.path.join(root, SNAPSHOTS)
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(folder, f"{checked_name(name)}.json")
    os.makedirs(os.path.join(root, MANIFESTS), exist_ok=True)
    _keep_name(target, os.path.join(root, MANIFESTS), f"snapshot-{name}")
    with open(target + ".draft", "wb") as file:
        file.write(dump_manifest(manifest))
        file.flush()
        os.fsync(file.fileno())
    os.replace(target + ".draft", target)
    sync_path(folder)
    sync_path(root)


def drop_snapshot(root: str, name: str) -> None:
    """Unpins a version; its files go with the next `collect_garbage` that finds no reader on it."""
    source = os.path.join(root, SNAPSHOTS, f"{checked_name(name)}.json")
    if not os.path.exists(source):
        raise VaultError(f"{root} has no snapshot {name!r}")
    folder = os.path.join(root, MANIFESTS)
    os.makedirs(folder, exist_ok=True)
    _keep_name(source, folder, f"snapshot-{name}")
    os.remove(source)
    sync_path(os.path.dirname(source))


def collect_garbage(root: str, force: bool = False) -> int:
    """Removes manifests that nobody holds, and files that no manifest or snapshot names. For the writer only.

    Args:
      root: of the vault.
      force: also drops manifests that readers hold.

    Returns:
      Bytes that were freed.
    """
    storage = LocalStorage(root)
    current = read_manifest(storage)
    named = _names_of(current)
    for name in snapshots(storage):
        named |= _names_of(HeldManifest(storage, name).content)
    folder = os.path.join(root, MANIFESTS)
    newest = os.stat(os.path.join(root, MANIFEST))
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if os.path.samestat(os.fstat(descriptor), newest):
                continue
            if force or try_flock(descriptor, exclusive=True):
                os.remove(path)
            else:
                with open(descriptor, "rb", closefd=False) as file:
                    named |= _names_of(parse_manifest(file.read(), path, root))
        finally:
            os.close(descriptor)
    freed = 0
    for place in (PARTS, DICTIONARIES):
        parent = os.path.join(root, place)
        for name in os.listdir(parent) if os.path.isdir(parent) else []:
            if f"{place}/{name}" not in named:
                freed += _size_of(os.path.join(parent, name))
                shutil.rmtree(os.path.join(parent, name), ignore_errors=False)
    for number in log_numbers(root):
        if number < current["log"]["kept"]:
            freed += os.path.getsize(log_path(root, number))
            os.remove(log_path(root, number))
    return freed


def _names_of(manifest: dict[str, Any]) -> set[str]:
    names = {f"{PARTS}/{entry['name']}" for entry in manifest["parts"]}
    pieces = [piece for pieces in manifest["dictionaries"].values() for piece in pieces]
    return names | {f"{DICTIONARIES}/{piece['name']}" for piece in pieces}


def _size_of(folder: str) -> int:
    return sum(os.path.getsize(os.path.join(path, name)) for path, _, names in os.walk(folder) for name in names)
