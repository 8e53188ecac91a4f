"""A model of the vault in plain Python, and vaults to compare it with."""

import dataclasses

import numpy as np
import pytest

from laser_jax import vault as seqvault
from laser_jax.schema import Field, Schema

FIELDS = (
    Field("item", "int64"),
    Field("count", "uint64"),
    Field("category", "int32"),
    Field("code", "uint32"),
    Field("dwell", "uint16"),
    Field("delta", "int16"),
    Field("action", "uint8"),
    Field("rating", "int8"),
    Field("clicked", "bool"),
    Field("price", "float64"),
    Field("score", "float32"),
    Field("weight", "float16"),
    Field("brand", "string"),
    Field("embedding", "float16", size=3),
    Field("flags", "bool", size=2),
    Field("tiny", "int8", size=5),
)


def random_log(schema: Schema, users, rows: int, seed: int, span: int = 10_000) -> dict:
    """`rows` events of the given users, times in [0, span), values over the whole range of each type."""
    rng = np.random.default_rng(seed)
    log = {"user": np.asarray(users)[rng.integers(0, len(users), rows)], "time": rng.integers(0, span, rows)}
    for field in schema.fields:
        shape = (rows,) if field.size is None else (rows, field.size)
        if field.type == "string":
            log[field.name] = np.array(["", "a", "ü☃", "a\0", "long" * 20], object)[rng.integers(0, 5, rows)]
        elif field.type == "bool":
            log[field.name] = rng.random(shape) < 0.5
        elif field.dtype.kind == "f":
            log[field.name] = rng.normal(size=shape).astype(field.dtype)
        else:
            info = np.iinfo(field.dtype)
            log[field.name] = rng.integers(info.min, info.max, shape, field.dtype, endpoint=True)
    return log


def take(log: dict, rows) -> dict:
    """Some rows of a log."""
    return {name: column[rows] for name, column in log.items()}


@dataclasses.dataclass
class Model:
    """A raw log in the order of writing, read by a brute-force filter."""

    log: dict

    def read(self, user, n: int, before: int | None) -> dict:
        """The newest n events of a user before a time, in order of (time, order of writing)."""
        log = self.log
        rows = np.flatnonzero(log["user"] == user)
        if before is not None:
            rows = rows[log["time"][rows] < before]
        rows = rows[np.argsort(log["time"][rows], kind="stable")]
        return take(log, rows[len(rows) - min(n, len(rows)) :])


def assert_same(vault, history, expected: dict, fields) -> None:
    """A read history is the model's, bit for bit, in the asked columns and no others."""
    assert list(history.columns) == ["time", *fields]
    for name in ("time", *fields):
        found, wanted = history[name], expected[name]
        assert len(found) == len(wanted), name
        if name != "time" and vault.schema.field(name).type == "string":
            assert found.tolist() == wanted.tolist()
            assert history.columns[name].dtype == np.int32
        else:
            dtype = np.dtype(np.int64) if name == "time" else vault.schema.field(name).dtype
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def small_schema() -> Schema:
    return Schema(fields=(Field("item", "int64"), Field("action", "uint8")))


@pytest.fixture
def make_vault(tmp_path):
    """Writes a log into a new vault, `parts` buffers of about equal size, and opens it."""
    made = []

    def make(schema: Schema, log: dict, parts: int = 1):
        path = tmp_path / f"vault{len(made)}"
        made.append(path)
        rows = len(log["time"])
        with seqvault.create(path, schema, buffer_events=rows // parts + 1) as writer:
            writer.write(log)
        return seqvault.open(path)

    return make
