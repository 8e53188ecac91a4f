"""Shapes of a training batch, as the pipeline makes them, for programs that are compiled and not run."""

import jax
import numpy as np

from laser_jax.config import Config


def abstract_batch(
    config: Config, devices: int = 1, unique: int = 1024, sharding: jax.sharding.Sharding | None = None
) -> dict:
    """A batch of `config` for so many devices, each of which wants `unique` rows of every table from every other."""
    b, c, length = config.data.batch_size, config.data.candidates, config.data.history_length
    features = config.features

    def shape(*size, dtype=np.int32):
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    return {
        "unique": {name: shape(devices, devices, min(unique, rows)) for name, (rows, _) in features.tables().items()},
        "fresh": {},
        "bags": {},
        "vectors": {},
        "history": {field.name: shape(b, length) for field in (*features.item, *features.event)},
        "candidates": {field.name: shape(b, c) for field in features.item},
        "side": {field.name: shape(b, c) for field in features.item},
        "context": {field.name: shape(b) for field in features.context},
        "length": shape(b),
        "age": shape(b, length),
        "label": shape(b, c, dtype=np.float32),
        "mask": shape(b, c, dtype=np.bool_),
    }
