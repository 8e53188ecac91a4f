"""An experiment on the data set of conftest.py: seconds, yet with everything a real one has.

python -m laser_jax.main --config=tests/small_config.py:laser --config.data.path=DIR --workdir=DIR
"""

from laser_jax.config import Config, TrainConfig
from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.models import encoder_config
from laser_jax.models.base import HeadConfig
from laser_jax.optim import OptimConfig
from laser_jax.pipeline import DataConfig

SMALL = {"laser": dict(segment=4, key_width=4, recent=1), "laser_plus": dict(segment=4, key_width=4, heads=2)}


def get_config(encoder: str = "laser_plus") -> Config:
    return Config(
        name=encoder,
        data=DataConfig(
            path="", history_length=16, batch_size=12, candidates=4, eval_batch_size=12, eval_candidates=8, epochs=8
        ),
        features=FeatureConfig(
            item=(FieldConfig("item", 4, 100, "vocab"), FieldConfig("category", 8, 10)),
            event=(FieldConfig("action", 2, 4), FieldConfig("dwell", 2, 32, "log")),
            context=(FieldConfig("scene", 2, 4),),
            age_width=2,
        ),
        encoder=encoder_config(encoder, **SMALL.get(encoder, {})),
        width=16,
        head=HeadConfig(tokens=4, width=16, blocks=1),
        optim=OptimConfig(learning_rate=3e-3),
        train=TrainConfig(eval_every=60, save_every=20, log_every=10, length_edges=(0, 10)),
    )
