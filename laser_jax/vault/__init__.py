"""SeqVault: every user's typed, time-ordered history on disk, read by one call in training and in serving.

    with vault.create(path, schema) as writer:
        writer.write({"user": ..., "time": ..., "item": ...})
    opened = vault.open(path)
    history = opened.get(user, n=1000, before=time)
    batch = opened.gather(users, before=times, n=1000)

Knows nothing of jax.
"""

import os

from laser_jax.schema import Field, Schema
from laser_jax.vault.client import TIMEOUT_S, VaultClient, is_service
from laser_jax.vault.errors import (
    CorruptionError,
    LockedError,
    MissingError,
    NotAVaultError,
    SchemaError,
    UnavailableError,
    UnknownFieldError,
    VaultError,
    VaultExistsError,
    VersionError,
)
from laser_jax.vault.history import Histories, History
from laser_jax.vault.maintenance import WriterOptions
from laser_jax.vault.partitioning import is_partitioned
from laser_jax.vault.partitions import PartitionedVault, PartitionedWriter, Sequences
from laser_jax.vault.reader import CACHE_BYTES, Vault
from laser_jax.vault.remote import RemoteWriter, publish
from laser_jax.vault.repair import RepairReport, repair
from laser_jax.vault.served_partitions import ServedPartitions, connect
from laser_jax.vault.storage import is_url, plain_path
from laser_jax.vault.verification import verify
from laser_jax.vault.writer import BUFFER_EVENTS, VaultWriter

__all__ = [
    "CorruptionError",
    "Field",
    "Histories",
    "History",
    "LockedError",
    "MissingError",
    "NotAVaultError",
    "PartitionedVault",
    "RepairReport",
    "Schema",
    "SchemaError",
    "Sequences",
    "ServedPartitions",
    "UnavailableError",
    "UnknownFieldError",
    "Vault",
    "VaultClient",
    "VaultError",
    "VaultExistsError",
    "VaultWriter",
    "VersionError",
    "WriterOptions",
    "create",
    "open",
    "publish",
    "repair",
    "verify",
]


def create(
    path: str | os.PathLike, schema: Schema, buffer_events: int = BUFFER_EVENTS, partitions: int | None = None
) -> VaultWriter | PartitionedWriter | RemoteWriter:
    """A writer of a new vault, to be used as a context manager.

    Rows are buffered; every full buffer is sorted by user and time and becomes one part. On input grouped by
    user, a user lives in one part. The vault appears when the `with` block ends without an error; otherwise
    nothing is left.

    With duplicates="drop", only events of one buffer are compared. That finds all repeated events of input sorted by
    user and time (but not an event key that comes back at another time, in a history longer than a buffer); of other
    input it leaves those whose repetition falls into a later buffer: sort first, as `ingest` does, or make the buffer
    as large as the log.

    Args:
      path: a directory that does not exist, is empty, or holds what a killed writer left; or the URL of a key-value
        store (see `open`), to which the vault is uploaded when it is complete.
      schema: of the events.
      buffer_events: rows to buffer, about 150 bytes of memory each for a usual schema.
      partitions: makes a vault of so many partitions by the hash of the user; None makes a single one.

    Raises:
      VaultExistsError: the directory is in use.
      LockedError: another writer is creating a vault there (raised on entering the block).
    """
    path = plain_path(os.fspath(path))
    if is_url(path):
        if partitions is not None:
            raise VaultError(f"{path}: a partitioned vault lies in a local directory")
        return RemoteWriter(path, schema, buffer_events)
    if partitions is not None:
        return PartitionedWriter(path, schema, buffer_events, partitions)
    return VaultWriter(path, schema, buffer_events)


def open(
    path: str | os.PathLike,
    cache_bytes: int = CACHE_BYTES,
    at: str | None = None,
    writing: WriterOptions | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Vault | PartitionedVault | VaultClient | ServedPartitions:
    """Opens a vault. The handle is safe to share among threads and pickles to its path.

    Opening takes no lock. The first call that writes (`append`, `flush`, `merge`, `forget`, `snapshot`, `evolve`, ...)
    makes the handle the vault's one writer, until `close` or the end of its `with` block.

    Args:
      path: a directory; or, read-only, the URL of a tensorstore key-value store (memory://, s3://, gs://, http://,
        https://; S3 listens to AWS_ENDPOINT_URL and AWS_REGION), or tensorstore's spec of one as JSON; or the service
        of a vault (see laser_jax.vault.service), grpc://host:port or grpc+tls://host:port, or those of all its
        partitions in order, with commas. SEQVAULT_TOKEN is the token that it wants, SEQVAULT_CA a file of the
        certificates (PEM) that it is checked by.
      cache_bytes: memory for decoded histories of hot users or, of a key-value store, for decoded pages; 0 for
        none. A service has its own.
      at: name of a snapshot to read from; the handle cannot write then.
      writing: how the handle writes, if it does; a service is told when it starts.
      timeout_s: seconds that a service has to answer a call.

    Raises:
      NotAVaultError, VersionError, CorruptionError, UnavailableError: what is wrong with the vault.
    """
    path = os.fspath(path)
    if is_service(path):
        if writing is not None:
            raise VaultError(f"{path}: how a service writes is said when it is started, see `serve --help`")
        return connect(path, at, timeout_s)
    if not is_url(path) and is_partitioned(path):
        return PartitionedVault(path, cache_bytes, at, writing)
    return Vault(path, cache_bytes, at, writing)
