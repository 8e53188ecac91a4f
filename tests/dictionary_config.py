"""tests/small_config.py with items in a growing dictionary, too small for all: ids are admitted, evicted, refused."""

from laser_jax.config import Config
from laser_jax.features import FieldConfig
from tests import small_config


def get_config(encoder: str = "laser_plus") -> Config:
    config = small_config.get_config(encoder)
    _, category = config.features.item
    config.features.item = (FieldConfig("item", 4, 60, "dictionary", admit=2, keep=3), category)
    return config
