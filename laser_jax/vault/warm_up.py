"""Compiles the loops of reading and writing before anybody waits for them."""

import dataclasses
import os
import tempfile
from typing import Any

import numpy as np

from laser_jax.schema import Schema
from laser_jax.vault.maintenance import WriterOptions
from laser_jax.vault.reader import Vault
from laser_jax.vault.writer import VaultWriter


def warm_up(schema: Schema) -> None:
    """Reads and writes a few events of a vault of its own, so that no caller waits for loops to be compiled."""
    user = 1 if schema.user == "int64" else "1"
    events: dict[str, Any] = {"user": [user] * 3, "time": [1, 2, 3]}
    for field in schema.fields:
        shape = (3,) if field.size is None else (3, field.size)
        events[field.name] = ["1"] * 3 if field.type == "string" else np.ones(shape, field.dtype)
    with tempfile.TemporaryDirectory(prefix="seqvault-") as folder:
        path = os.path.join(folder, "vault")
        with VaultWriter(path, dataclasses.replace(schema, duplicates="keep"), 1024) as writer:
            writer.write(events)
        with Vault(path, writing=WriterOptions(background=False)) as vault:
            for _ in range(2):
                vault.get(user)
                vault.get(user, before=3)
                vault.gather([user] * 2, before=[2, 3])
                vault.append(events)
