"""Vaults written by earlier versions of the format stay readable for ever."""

import json
import os
import shutil

import numpy as np
import pytest

from laser_jax import vault as seqvault
from tests.vault.conftest import Model, assert_same

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden")


def written(version: int, kind: str) -> dict:
    """What was written into a vault, in order."""
    with open(os.path.join(GOLDEN, f"vault_v{version}", f"{kind}.json"), encoding="utf-8") as file:
        raw = json.load(file)
    strings = ("brand", "user") if kind == "string" else ("brand",)
    return {name: np.array(column, object if name in strings else None) for name, column in raw.items()}


def assert_whole(vault: seqvault.Vault, log: dict) -> None:
    """Every read gives the log's events."""
    model, users, median = Model(log), sorted(set(log["user"].tolist())), int(np.median(log["time"]))
    assert vault.verify() == []
    for before in (None, median):
        histories = vault.gather(users, before, 300, fields=vault.schema.names)
        for position, user in enumerate(users):
            expected = model.read(user, 300, before)
            assert_same(vault, histories[position], expected, vault.schema.names)
            assert_same(vault, vault.get(user, 300, before, fields=vault.schema.names), expected, vault.schema.names)


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_vault_of_version_1_reads_as_it_was_written(kind):
    vault = seqvault.open(os.path.join(GOLDEN, "vault_v1", kind))
    assert vault.manifest["version"] == 1 and len(vault.state.parts) == 2
    assert vault.schema.user == kind
    assert_whole(vault, written(1, kind))


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_vault_of_version_2_reads_as_it_was_written_and_is_written_on(kind, tmp_path):
    """A merged part, one made from the log, one of a later schema, events in the log only, and a snapshot."""
    path, log = tmp_path / "vault", written(2, kind)
    shutil.copytree(os.path.join(GOLDEN, "vault_v2", kind), path)
    vault = seqvault.open(path)
    assert vault.manifest["version"] == 2 and len(vault.state.parts) == 3 and len(vault.manifest["schemas"]) == 2
    assert_whole(vault, log)
    before = {name: column[:600] for name, column in log.items() if name != "price"}
    assert_whole(seqvault.open(path, at="before"), before)
    assert seqvault.repair(path).actions == []
    with seqvault.open(path, writing=seqvault.WriterOptions(background=False)) as vault:
        assert vault.append({name: column[:1] for name, column in log.items()}) == 901
        both = {name: np.concatenate([column, column[:1]]) for name, column in log.items()}
        assert_whole(vault, both)
        assert vault.manifest["version"] == 3, "older code must not read what it does not know"
        vault.merge()
        assert_whole(vault, both)
    assert_whole(seqvault.open(path), both)
    assert_whole(seqvault.open(path, at="before"), before)
