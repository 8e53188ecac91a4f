"""Vaults written by version 1 of the format stay readable for ever."""

import json
import os

import numpy as np
import pytest

from laser_jax import vault as seqvault
from tests.vault.conftest import Model, assert_same

GOLDEN = os.path.join(os.path.dirname(os.path.dirname(__file__)), "golden", "vault_v1")


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_a_vault_of_version_1_reads_as_it_was_written(kind):
    with open(os.path.join(GOLDEN, f"{kind}.json"), encoding="utf-8") as file:
        raw = json.load(file)
    strings = ("brand", "user") if kind == "string" else ("brand",)
    log = {name: np.array(column, object if name in strings else None) for name, column in raw.items()}
    vault, model = seqvault.open(os.path.join(GOLDEN, kind)), Model(log)
    assert vault.manifest["version"] == 1 and len(vault.state.parts) == 2
    assert vault.schema.user == kind and vault.verify() == []
    users = sorted(set(raw["user"]))
    median = int(np.median(log["time"]))
    for before in (None, median):
        histories = vault.gather(users, before, 300, fields=vault.schema.names)
        for position, user in enumerate(users):
            expected = model.read(user, 300, before)
            assert_same(vault, histories[position], expected, vault.schema.names)
            assert_same(vault, vault.get(user, 300, before, fields=vault.schema.names), expected, vault.schema.names)
