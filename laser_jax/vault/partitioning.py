"""Which partition a user belongs to, and where partitions lie."""

import json
import os
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.errors import CorruptionError, NotAVaultError, UnavailableError
from laser_jax.vault.files import crc32c, dump
from laser_jax.vault.hashing import hash_strings, splitmix64

PARTITIONS = "partitions.json"
FORMAT = "laser_jax.vault.partitions"


def partition_of(schema: Schema, users: Any, partitions: int) -> np.ndarray:
    """Partition of each user, int64 [N]; `users` are int64 [N] or strings."""
    hashed = splitmix64(users) if schema.user == "int64" else hash_strings(users).view(np.uint64)
    # Other bits than those by which a partition's own table is ordered.
    return ((hashed >> np.uint64(17)) % np.uint64(partitions)).astype(np.int64)


def is_partitioned(path: str) -> bool:
    """Whether a directory holds a partitioned vault."""
    return os.path.exists(os.path.join(path, PARTITIONS))


def read_count(path: str) -> int:
    """Number of partitions; errors as for opening a vault."""
    return read_partitions(path)["partitions"]


def read_partitions(path: str) -> dict[str, Any]:
    """What partitions.json says; errors as for opening a vault."""
    name = os.path.join(path, PARTITIONS)
    try:
        with open(name, "rb") as file:
            content = json.loads(file.read())
    except FileNotFoundError as error:
        raise NotAVaultError(f"{path} is not a vault: it has no {PARTITIONS}") from error
    except ValueError as error:
        raise CorruptionError(f"{name} is damaged: {error}") from error
    except OSError as error:
        raise UnavailableError(f"{name} cannot be read: {error}") from error
    checksum = content.pop("checksum", None) if isinstance(content, dict) else None
    if checksum is None or checksum != crc32c(dump(content)) or content.get("format") != FORMAT:
        raise CorruptionError(f"{name} is damaged: its checksum does not match")
    return content


def partition_path(path: str, number: int) -> str:
    """Directory of a partition."""
    return os.path.join(path, f"partition-{number:05d}")


def partition_paths(path: str) -> list[str]:
    """Directories of all partitions."""
    return [partition_path(path, number) for number in range(read_count(path))]
