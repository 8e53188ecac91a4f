"""The zoo: encoder configs by the name the command line knows them by.

Two-stage rivals, which search the history before they attend, or hash it: see retrieval.py.
"""

from laser_jax.models.base import EncoderConfig
from laser_jax.models.din import DinConfig
from laser_jax.models.eta import EtaConfig
from laser_jax.models.hstu import HstuConfig
from laser_jax.models.laser import laser, laser_plus
from laser_jax.models.longer import LongerConfig
from laser_jax.models.mean import MeanConfig
from laser_jax.models.mirrn import MirrnConfig
from laser_jax.models.sdim import SdimConfig
from laser_jax.models.sim import SimHardConfig, SimSoftConfig
from laser_jax.models.stca import StcaConfig
from laser_jax.models.ta import TaConfig
from laser_jax.models.transformer import TransformerConfig
from laser_jax.models.twin import TwinConfig, TwinV2Config

ENCODERS = {
    "laser": laser,
    "laser_plus": laser_plus,
    "ta": TaConfig,
    "din": DinConfig,
    "mean": MeanConfig,
    "sim_soft": SimSoftConfig,
    "sim_hard": SimHardConfig,
    "eta": EtaConfig,
    "sdim": SdimConfig,
    "twin": TwinConfig,
    "twin_v2": TwinV2Config,
    "mirrn": MirrnConfig,
    "transformer": TransformerConfig,
    "hstu": HstuConfig,
    "stca": StcaConfig,
    "longer": LongerConfig,
}


def encoder_config(name: str, **overrides) -> EncoderConfig:
    """The config of the encoder called `name`, a key of ENCODERS."""
    if name not in ENCODERS:
        raise ValueError(f"there is no encoder {name!r}; choose one of {', '.join(ENCODERS)}")
    return ENCODERS[name](**overrides)
