"""Writes the stores of the storage benchmarks once, all from the same events, and opens them."""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.bench import vault_codecs as codecs
from experiments.bench.vault_data import SCHEMA, Columns, Events
from experiments.bench.vault_peers import (
    LAYOUTS,
    SMALL_CACHE,
    LmdbStore,
    LmdbWriter,
    MemmapStore,
    MemmapWriter,
    RocksDBStore,
    RocksDBWriter,
)
from laser_jax import vault as seqvault

#: A vault whose users live in one part each, and one whose users live in two.
VAULT, VAULT_TWO = "vault", "vault_two"
FOLDERS = (VAULT, VAULT_TWO, "memmap", *LAYOUTS)
#: Name of a contender -> its folder and how it decodes.
CONTENDERS = {
    "rocksdb_json": ("rocksdb_json_zstd", codecs.decode_json),
    "rocksdb_packed": ("rocksdb_packed", codecs.decode_packed),
    "rocksdb_packed_same_decode": ("rocksdb_planes", codecs.decode_planes),
    "rocksdb_raw": ("rocksdb_raw", codecs.decode_raw),
    "lmdb": ("lmdb_packed", codecs.decode_packed),
    "lmdb_same_decode": ("lmdb_planes", codecs.decode_planes),
}
_BUFFER_EVENTS = 1 << 22
#: Changes with the data and the layouts, so that stores of another version are built anew.
_VERSION = 1


class VaultStore:
    """The vault, looked up like the others."""

    def __init__(self, path: str, cache_bytes: int = 0):
        self.path = path
        self.vault = seqvault.open(path, cache_bytes=cache_bytes)
        self._read = self.vault.get

    def get(self, user: int) -> Columns:
        """The newest events of a user."""
        return self._read(user).columns

    def unmap(self) -> None:
        """Nothing is mapped."""

    def close(self) -> None:
        """Closes the vault, once vaults can be closed."""
        if hasattr(self.vault, "close"):
            self.vault.close()


def open_store(root: str, name: str, cache_bytes: int = 0) -> Any:
    """A contender, or the vault or the memory map, opened for lookups.

    Args:
      root: of the folders.
      name: a key of CONTENDERS, "vault" or "memmap".
      cache_bytes: for the vault's decoded histories or RocksDB's blocks, which never has less than SMALL_CACHE.
    """
    if name == VAULT:
        return VaultStore(os.path.join(root, name), cache_bytes)
    if name == "memmap":
        return MemmapStore(os.path.join(root, name))
    folder, decode = CONTENDERS[name]
    path = os.path.join(root, folder)
    if LAYOUTS[folder].engine == "lmdb":
        return LmdbStore(path, decode)
    return RocksDBStore(path, decode, max(cache_bytes, SMALL_CACHE))


def build(root: str, events: Events, folders: Iterable[str] = FOLDERS) -> None:
    """Writes the folders that are not there yet whole; a marker beside each says that it is."""
    os.makedirs(root, exist_ok=True)
    signature = {"version": _VERSION, "users": len(events.users), "seed": events.seed}
    missing = [name for name in folders if _marker(root, name) != signature]
    for name in missing:
        shutil.rmtree(os.path.join(root, name), ignore_errors=True)
    _build_peers(root, events, [name for name in missing if name not in (VAULT, VAULT_TWO)])
    for name in missing:
        if name == VAULT:
            _build_vault(os.path.join(root, name), events, [None])
        elif name == VAULT_TWO:
            _build_vault(os.path.join(root, name), events, [0, 1])
    for name in missing:
        _sync(os.path.join(root, name))
        with open(os.path.join(root, name + ".json"), "w", encoding="utf-8") as file:
            json.dump(signature, file)


def _sync(path: str) -> None:
    """Flushes all files: a page that is not on the disk yet cannot be evicted."""
    for folder, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _marker(root: str, name: str) -> Any:
    try:
        with open(os.path.join(root, name + ".json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def _build_peers(root: str, events: Events, names: list[str]) -> None:
    if not names:
        return
    writers = []
    for name in names:
        path = os.path.join(root, name)
        if name == "memmap":
            writers.append(MemmapWriter(path))
        else:
            engine = {"rocksdb": RocksDBWriter, "lmdb": LmdbWriter}[LAYOUTS[name].engine]
            writers.append(engine(path, LAYOUTS[name]))
    for users, start, columns in _told(events, f"{len(names)} peers"):
        for user, begin, end in zip(users.tolist(), start[:-1].tolist(), start[1:].tolist(), strict=True):
            own = {name: column[begin:end] for name, column in columns.items()}
            for writer in writers:
                writer.add(user, own)
    for name, writer in zip(names, writers, strict=True):
        tell(f"tidying {name}")
        writer.close()


def _build_vault(path: str, events: Events, passes: list[int | None]) -> None:
    """One pass writes whole users; two passes all older halves, then all newer ones, which end in other parts."""
    older = int((events.lengths // 2).sum())
    buffer_events = _BUFFER_EVENTS if passes == [None] else min(_BUFFER_EVENTS, older)
    with seqvault.create(path, SCHEMA, buffer_events=buffer_events) as writer:
        for half in passes:
            for users, start, columns in _told(events, os.path.basename(path)):
                lengths = np.diff(start)
                place = np.arange(start[-1]) - np.repeat(start[:-1], lengths)
                newer = place >= np.repeat(lengths // 2, lengths)
                rows = slice(None) if half is None else newer == half
                writer.write(
                    {"user": np.repeat(users, lengths)[rows]} | {name: value[rows] for name, value in columns.items()}
                )


def _told(events: Events, what: str) -> Iterable[tuple[np.ndarray, np.ndarray, Columns]]:
    """Blocks of events, with a line of progress every few seconds."""
    done, said = 0, time.monotonic()
    for users, start, columns in events.blocks():
        yield users, start, columns
        done += int(start[-1])
        if time.monotonic() - said > 5 or done == events.num_events:
            said = time.monotonic()
            tell(f"building {what}: {done / events.num_events:.0%} of {events.num_events:,} events")


def tell(line: str) -> None:
    """A line of progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)
