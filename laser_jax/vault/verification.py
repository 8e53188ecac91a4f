"""Whether a vault is whole, in one piece or in partitions with their common codes."""

import contextlib
import os
from collections.abc import Callable

from laser_jax.vault import inspection
from laser_jax.vault.codebook import CODES, Codebook
from laser_jax.vault.dictionary import Dictionary
from laser_jax.vault.errors import VaultError
from laser_jax.vault.partitioning import is_partitioned, partition_paths
from laser_jax.vault.reader import Vault
from laser_jax.vault.storage import is_url


def verify(path: str | os.PathLike, progress: Callable[[str], None] | None = None) -> list[str]:
    """Reads all of a vault, checks checksums and consistency.

    Args:
      path: directory or URL of the vault; of a partitioned one, every partition is read, and their common codes.
      progress: called with a line for each part.

    Returns:
      A line for each damage; empty if the vault is whole.
    """
    path = os.fspath(path)
    if is_url(path) or not is_partitioned(path):
        return inspection.verify(path, progress)
    damages = [damage for inner in partition_paths(path) for damage in inspection.verify(inner, progress)]
    return damages + damaged_codes(path)


def damaged_codes(path: str) -> list[str]:
    """Damages of the common codes of the partitioned vault at `path`; strings that have none are such, too."""
    strings = strings_of_partitions(path)
    try:
        codes = Codebook(os.path.join(path, CODES), [])
    except VaultError as error:
        return [str(error)]
    damages = []
    for field, values in strings.items():
        known = codes.dictionaries.get(field, Dictionary())
        lost = [value for value in values if known.code(value) < 0]
        if lost:
            damages.append(f"{codes.path}: {len(lost)} strings of field {field!r} have no code, such as {lost[0]!r}")
    return damages


def strings_of_partitions(path: str) -> dict[str, list[str]]:
    """All values of each string field that the partitions hold; one that cannot be opened is left out."""
    found: dict[str, dict[str, None]] = {}
    for inner in partition_paths(path):
        with contextlib.suppress(VaultError):
            vault = Vault(inner, 0)
            for field in vault.schema.fields:
                if field.type == "string":
                    found.setdefault(field.name, {}).update(dict.fromkeys(vault.dictionary(field.name).tolist()))
    return {field: list(values) for field, values in found.items()}
