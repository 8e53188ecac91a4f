"""The zoo: encoder configs by the name the command line knows them by."""

from laser_jax.models.base import EncoderConfig
from laser_jax.models.din import DinConfig
from laser_jax.models.laser import laser, laser_plus
from laser_jax.models.mean import MeanConfig
from laser_jax.models.ta import TaConfig

ENCODERS = {"laser": laser, "laser_plus": laser_plus, "ta": TaConfig, "din": DinConfig, "mean": MeanConfig}


def encoder_config(name: str, **overrides) -> EncoderConfig:
    """The config of the encoder called `name`, a key of ENCODERS."""
    if name not in ENCODERS:
        raise ValueError(f"there is no encoder {name!r}; choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name](**overrides)
