"""Writes one immutable part: sorted rows in, a durable zarr group out."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from laser_jax.schema import Schema
from laser_jax.vault import format as vault_format
from laser_jax.vault import pages as paging_of_rows
from laser_jax.vault.errors import UnavailableError
from laser_jax.vault.files import dump, inventory, sync_tree, write_file, write_strings
from laser_jax.vault.format import PageLayout
from laser_jax.vault.hashing import hash_strings
from laser_jax.vault.pages import Paging

#: Shards encoded at the same time, each of at most MAX_SHARD_BYTES before compression.
_SHARDS_IN_FLIGHT = 2


def write_part(
    path: str,
    schema: Schema,
    users: np.ndarray | list[str],
    user_start: np.ndarray,
    time: np.ndarray,
    columns: dict[str, np.ndarray],
    sequence: np.ndarray | None = None,
    covers: np.ndarray | None = None,
    level: int = vault_format.MOST_LEVEL,
    pace: Callable[[int], None] = lambda size: None,
) -> dict[str, Any]:
    """Writes the part directory `path` and makes it durable.

    Args:
      path: a directory that does not exist yet.
      schema: of the vault.
      users: keys of the U users, each once, int64 [U] or strings.
      user_start: int64 [U + 1], first row of each user.
      time: int64 [N], ascending for each user.
      columns: every field, [N] or [N, size]; strings as int32 codes.
      sequence: int64 [N], sequence numbers; without it the rows are numbered as they lie.
      covers: int32 [U], see laser_jax.vault.format; without it the part stands for no other.
      level: of compression.
      pace: called with bytes (before compression) as they are written; may sleep.

    Returns:
      The part's entry for the manifest, without name, schema and first sequence number.

    Raises:
      UnavailableError: the storage refused (disk full, no permission).
    """
    layout = PageLayout(schema, sequence is not None)
    paging = Paging.of(user_start)
    try:
        write_file(os.path.join(path, "zarr.json"), dump(vault_format.group_metadata(layout.to_json())))
        if schema.vectors:
            write_file(os.path.join(path, "vectors", "zarr.json"), dump(vault_format.group_metadata({})))
        shards = _write_pages(path, schema, layout, paging, time, columns, sequence, level, pace)
        _write_directory(path, users, paging, time, sequence, covers)
        files = inventory(path, shards)
        sync_tree(path)
    except OSError as error:
        raise UnavailableError(f"part {path} cannot be written: {error}") from error
    return {
        "events": len(time),
        "users": len(users),
        "pages": paging.num_pages,
        "first_time": int(time.min()),
        "last_time": int(time.max()),
        "sequence": sequence is not None,
        "covers": covers is not None,
        "files": files,
    }


def _write_pages(
    path: str,
    schema: Schema,
    layout: PageLayout,
    paging: Paging,
    time: np.ndarray,
    columns: dict[str, np.ndarray],
    sequence: np.ndarray | None,
    level: int,
    pace: Callable[[int], None],
) -> list[str]:
    """Writes the sharded arrays; returns the paths of their shard files inside the part."""
    context = _context()
    num_pages = paging.num_pages
    arrays = {"pages": vault_format.pages_metadata(num_pages, layout.num_words, level)}
    for field in schema.vectors:
        arrays[vault_format.vector_path(field.name)] = vault_format.vector_metadata(
            num_pages, field.size, field.dtype, level
        )
    deltas = paging_of_rows.deltas(time, paging)
    steps = None if sequence is None else paging_of_rows.deltas(sequence, paging)
    shards: list[str] = []
    pending: list[Any] = []
    try:
        for name, metadata in arrays.items():
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": os.path.join(path, name) + "/"},
                "metadata": metadata,
                # Without it a page of zeros is left out, and could not be told from one that was lost.
                "store_data_equal_to_fill_value": True,
            }
            store = _result(ts.open(spec, create=True, context=context), path)
            shard_pages = vault_format.shard_pages(metadata)
            for shard, first in enumerate(range(0, num_pages, shard_pages)):
                end = min(first + shard_pages, num_pages)
                if name == "pages":
                    block = paging_of_rows.pack(layout, deltas, steps, columns, paging, first, end)
                else:
                    block = paging_of_rows.pack_vectors(columns[name.split("/")[-1]], paging, first, end)
                if len(pending) == _SHARDS_IN_FLIGHT:
                    _result(pending.pop(0), path)
                pace(block.nbytes)
                # Whole shards only: writing part of one rewrites all of it.
                pending.append(store[first:end].write(block, can_reference_source_data_indefinitely=True))
                shards.append(vault_format.shard_path(name, shard))
        for future in pending:
            _result(future, path)
    finally:
        # No write may go on behind the back of whoever tidies up after an error.
        for future in pending:
            future.exception()
    return shards


def _result(future: Any, path: str) -> Any:
    """What tensorstore promised, or UnavailableError."""
    try:
        return future.result()
    except (ValueError, NotImplementedError) as error:  # any failure of tensorstore's storage
        raise UnavailableError(f"part {path} cannot be written: {error}") from error


def _write_directory(
    path: str,
    users: np.ndarray | list[str],
    paging: Paging,
    time: np.ndarray,
    sequence: np.ndarray | None,
    covers: np.ndarray | None,
) -> None:
    """Writes the arrays from which a reader builds its index."""
    if isinstance(users, list):
        write_strings(path, "user_", users)
        arrays = {"user_hashes": hash_strings(users).view(np.uint64)}
    else:
        arrays = {"users": users}
    starts, ends = paging.page_start[:-1], paging.page_start[1:]
    arrays |= {
        "user_first_page": paging.user_first_page,
        "page_count": (ends - starts).astype(np.uint16),
        "page_first_time": time[starts],
        "page_last_time": time[ends - 1],
    }
    if sequence is not None:
        arrays["page_last_sequence"] = np.maximum.reduceat(sequence, starts)
    if covers is not None:
        arrays["user_covers"] = covers.astype(np.int32)
    pending = []
    for name, array in arrays.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": os.path.join(path, name) + "/"},
            "metadata": vault_format.packed_metadata(array),
            "store_data_equal_to_fill_value": True,
        }
        store = _result(ts.open(spec, create=True, context=_context()), path)
        pending.append(store.write(np.ascontiguousarray(array)))
    for future in pending:
        _result(future, path)


def _context() -> ts.Context:
    """Of all writes of parts: write_part itself makes every file durable, once, at the end."""
    return ts.Context({"file_io_sync": False})
