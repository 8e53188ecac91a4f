"""What tells one data set from another, and what its ids mean: kept beside a run's config."""

import hashlib
import json
import os
from typing import Any

from laser_jax import vault as seqvault
from laser_jax.features import FeatureConfig
from laser_jax.pipeline import SPLITS, DataConfig
from laser_jax.requests import CHECKSUMS, MANIFEST, read_vocabulary
from laser_jax.vault.client import is_service
from laser_jax.vault.partitioning import is_partitioned, partition_paths
from laser_jax.vault.storage import is_url, must_read, storage_of

#: Strings that are hashed at a time.
_STRINGS = 100_000


def _appended(path: str) -> int:
    """Sequence number behind what was appended to a vault since its manifest; 0 if nothing was."""
    with seqvault.open(path, cache_bytes=0) as vault:
        return vault.next_sequence if vault.next_sequence != vault.manifest["next_sequence"] else 0


def fingerprint(data: DataConfig) -> dict[str, str]:
    """Checksums of what says which data a data set holds, so that a run notices when it is continued on other data."""
    sums = {}

    def add(name: str, content: bytes) -> None:
        sums[name] = _digest(content)

    root = data.vault_path
    if is_service(root):
        with seqvault.open(root, at=data.snapshot or None) as vault:
            add("vault", json.dumps([vault.schema.to_json(), vault.num_events, vault.next_sequence]).encode())
    else:
        partitioned = not is_url(root) and is_partitioned(root)
        manifest = f"snapshots/{data.snapshot}.json" if data.snapshot else "manifest.json"
        for path in partition_paths(root) if partitioned else [root]:
            inner = f"{os.path.basename(path)}/" if partitioned else ""
            add(f"vault/{inner}{manifest}", must_read(storage_of(path), manifest))
            appended = 0 if data.snapshot or is_url(root) else _appended(path)
            if appended:  # only then: else the manifest alone says what the vault holds
                add(f"vault/{inner}appended", str(appended).encode())
    for split in SPLITS:
        with open(os.path.join(data.path, "requests", split, MANIFEST), encoding="utf-8") as file:
            told = json.load(file)
        columns = told.pop(CHECKSUMS, None)
        # Spelled as it was before there were checksums: what a run noted then is still comparable.
        add(f"requests/{split}/{MANIFEST}", json.dumps(told, indent=1).encode())
        if columns is not None:
            add(f"requests/{split}/columns", json.dumps(columns, sort_keys=True).encode())
    vocabularies = os.path.join(data.path, "vocab")
    for field in sorted(os.listdir(vocabularies)) if os.path.isdir(vocabularies) else ():
        add(f"vocab/{field}", _vocabulary(data, field))
    return sums


def strings(data: DataConfig, features: FeatureConfig) -> dict[str, list[Any]]:
    """What codes of strings mean: field -> how many have one, and a checksum of these in the order of their codes.

    A vault only ever adds to them; another one, of the same events, may have given them out in another order.
    """
    with seqvault.open(data.vault_path, at=data.snapshot or None) as vault:
        known = {name: vault.dictionary(name) for name in _string_fields(vault, features)}
        return {name: [len(values), _digest_of_strings(values)] for name, values in known.items()}


def changed_ids(told: dict[str, Any], data: DataConfig, features: FeatureConfig) -> dict[str, str]:
    """Fields of which this data set's ids do not mean what they meant to a run -> why.

    Args:
      told: the run's config.json.
      data, features: of today.
    """
    found = {}
    for field in (*features.item, *features.event, *features.context):
        name = f"vocab/{field.name}"
        if field.ids == "vocab" and told["fingerprint"].get(name) != _digest(_vocabulary(data, field.name)):
            found[field.name] = "its vocabulary is another one there, which moves its rows: use ids='dictionary'"
    before = told.get("strings", {})
    if not before:
        return found
    with seqvault.open(data.vault_path, at=data.snapshot or None) as vault:
        for name in _string_fields(vault, features):
            count, digest = before.get(name, (0, _digest_of_strings([])))
            now = vault.dictionary(name)
            if len(now) < count or _digest_of_strings(now[:count]) != digest:
                found[name] = (
                    f"its strings have other codes there than in {vault.path}: append to the vault that it was trained "
                    "on, which keeps them, instead of building another"
                )
    return found


def _string_fields(vault: Any, features: FeatureConfig) -> list[str]:
    used = {field.name for field in (*features.item, *features.event, *features.context)}
    return [field.name for field in vault.schema.fields if field.type == "string" and field.name in used]


def _vocabulary(data: DataConfig, field: str) -> bytes:
    return read_vocabulary(os.path.join(data.path, "vocab", field)).tobytes()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _digest_of_strings(values: Any) -> str:
    found = hashlib.sha256()
    for start in range(0, len(values), _STRINGS):
        found.update(json.dumps(list(values[start : start + _STRINGS])).encode())
    return found.hexdigest()[:16]
