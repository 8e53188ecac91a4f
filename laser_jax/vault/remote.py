"""Puts a complete vault into a key-value store, from which `open` reads it. Appending and merging stay local."""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from laser_jax.schema import Schema
from laser_jax.vault.errors import UnavailableError, VaultError, VaultExistsError
from laser_jax.vault.format import DICTIONARIES, MANIFEST, PARTS
from laser_jax.vault.ingest import Report, ingest
from laser_jax.vault.manifest import HeldManifest, dump_manifest
from laser_jax.vault.partitioning import is_partitioned, partition_path
from laser_jax.vault.reader import Vault
from laser_jax.vault.storage import KvStorage, LocalStorage, is_url, plain_path
from laser_jax.vault.writer import VaultWriter

_UPLOADS = 8


def publish(path: str | os.PathLike[str], url: str, at: str | None = None) -> int:
    """Uploads a vault, or its snapshot `at`.

    The manifest goes last, and only if there is none: a reader finds a whole vault or none.

    Args:
      path: directory of the vault.
      url: see laser_jax.vault.open; anything but http.

    Returns:
      Bytes uploaded.

    Raises:
      VaultError: this is no single vault in a directory, or events of it are in its log only.
      VaultExistsError: there is a vault already.
      UnavailableError: the store refused. What was uploaded stays; the next `publish` to the same place writes over it.
    """
    path = plain_path(os.fspath(path))
    if is_url(path) or "://" in path:
        raise VaultError(f"{path}: give the directory of a vault; what is published lies on this machine")
    if is_partitioned(path):
        raise VaultError(
            f"{path} is a vault in partitions: publish each of them, {partition_path(path, 0)} and so on, to a place "
            "of its own"
        )
    if at is None:
        with Vault(path, cache_bytes=0) as vault:
            waiting = vault.next_sequence - vault.manifest["next_sequence"]
        if waiting:
            raise VaultError(
                f"{path}: {waiting:,} events are in its log only, and would be left out: make a snapshot, and publish "
                "that (at=, --at)"
            )
    source, target = LocalStorage(path), KvStorage(url)
    if target.read(MANIFEST) is not None:
        raise VaultExistsError(f"{url} already holds a vault: give another place")
    held = HeldManifest(source, at)
    names = [f"{PARTS}/{entry['name']}/{file}" for entry in held.content["parts"] for file in entry["files"]]
    for pieces in held.content["dictionaries"].values():
        names += [f"{DICTIONARIES}/{piece['name']}/{file}" for piece in pieces for file in piece["files"]]

    def upload(name: str) -> int:
        data = source.read(name)
        if data is None:
            raise UnavailableError(f"{source.path(name)} is gone: verify the vault")
        target.write(name, data)
        return len(data)

    with concurrent.futures.ThreadPoolExecutor(_UPLOADS) as pool:
        total = sum(pool.map(upload, names))
    log = {"first": 0, "kept": 0}
    manifest = dump_manifest(held.content | {"log": log})
    if not target.write(MANIFEST, manifest, if_absent=True):
        raise VaultExistsError(f"{url}: somebody else has put a vault there meanwhile")
    return total + len(manifest)


def ingest_anywhere(
    schema: Schema,
    inputs: str | list[str],
    out: str,
    engine: str = "duckdb",
    memory: int = 2 << 30,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Builds a vault from log files by DuckDB or Spark, in a directory or in a key-value store.

    Args:
      out: directory, or the URL of a key-value store (see `open`), to which the complete vault is uploaded. It is
        built in a temporary directory, and stays there if it cannot be uploaded: the error says where. Spark on a
        cluster cannot build there: give a directory that all executors see, then publish it.
      engine: "duckdb" or "spark".
      schema, inputs, memory, threads, progress: see laser_jax.vault.ingest.ingest.

    Raises:
      As laser_jax.vault.ingest.ingest and publish.
    """

    def build(place: str) -> Report:
        if engine == "duckdb":
            return ingest(schema, inputs, place, memory, threads, progress)
        if engine == "spark":
            from laser_jax.vault.spark_ingest import ingest_spark

            if threads is not None and threads < 1:
                raise VaultError(f"threads must be at least 1, got {threads}; leave it out to use every core")
            master = f"local[{threads}]" if threads else None
            return ingest_spark(schema, inputs, place, memory, master, progress=progress)
        raise VaultError(f"engine {engine!r} is not one of duckdb, spark")

    out = plain_path(out)
    if not is_url(out):
        return build(out)
    if KvStorage(out).read(MANIFEST) is not None:
        raise VaultExistsError(f"{out} already holds a vault: give another place")
    with _uploaded(out) as place:
        report = build(place)
    return dataclasses.replace(report, path=out)


@contextlib.contextmanager
def _uploaded(url: str) -> Iterator[str]:
    """A temporary place for a vault, published when the block ends; what cannot be published is not thrown away."""
    place = tempfile.mkdtemp(prefix="laser_jax-")
    path = os.path.join(place, "vault")
    try:
        yield path
        publish(path, url)
    except BaseException as error:
        if not isinstance(error, VaultError) or not os.path.exists(os.path.join(path, MANIFEST)):
            shutil.rmtree(place)
            raise
        remedy = f"the vault itself is whole: publish {path}, or remove {place}"
        raise type(error)(f"{error}; {remedy}") from error
    shutil.rmtree(place)


class RemoteWriter:
    """Bulk writer of a vault in a key-value store: made in a temporary directory, and uploaded when it is whole.

    If it cannot be uploaded it stays in that directory, and the error says where.
    """

    def __init__(self, url: str, schema: Schema, buffer_events: int):
        self.path = url
        if KvStorage(url).read(MANIFEST) is not None:
            raise VaultExistsError(f"{url} already holds a vault: give another place")
        self._schema, self._buffer_events = schema, buffer_events
        self._writer: VaultWriter | None = None

    def __enter__(self) -> "RemoteWriter":
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(_uploaded(self.path))
            self._writer = stack.enter_context(VaultWriter(place, self._schema, self._buffer_events))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stack.__exit__(kind, error, trace)

    def write(self, columns: Mapping[str, Any]) -> None:
        """As VaultWriter.write."""
        if self._writer is None:
            raise VaultError(f"writer of {self.path} is not open: write inside its with block")
        self._writer.write(columns)
