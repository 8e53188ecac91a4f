"""LASER in the shape of the paper's production model, on generated multi-scene logs with a known oracle.

  python -m laser_jax.main --config=experiments/xhs.py --workdir=runs/xhs

`:NAME` picks the encoder, of laser_jax.models.ENCODERS. The data set (3000 users, 3.6 M events, built on first
use) and one pass over 20 000 requests of 10 candidates fit 2 CPU cores; on your own logs set data.path and data.recipe,
or `--config.data.recipe.users=...` for more of the generated ones.
"""

from data.xhs_synthetic import XhsSynthetic
from laser_jax.config import Config, TrainConfig
from laser_jax.features import FeatureConfig, FieldConfig
from laser_jax.models import encoder_config
from laser_jax.models.base import HeadConfig
from laser_jax.optim import TO_THE_END, OptimConfig
from laser_jax.pipeline import DataConfig


def get_config(encoder: str = "laser_plus") -> Config:
    return Config(
        name=encoder,
        data=DataConfig(
            path="datasets/xhs_synthetic",
            recipe=XhsSynthetic(),
            history_length=1000,  # L
            batch_size=32,  # requests
            candidates=10,  # of a request
            eval_batch_size=32,
            eval_candidates=10,
        ),
        features=FeatureConfig(
            item=(
                FieldConfig("item", width=32, rows=400_000, ids="vocab"),
                FieldConfig("category", width=16, rows=512),
                FieldConfig("author", width=16, rows=40_000, ids="vocab"),
            ),
            event=(
                FieldConfig("scene", width=4, rows=4),
                FieldConfig("action", width=8, rows=8),
                FieldConfig("dwell", width=4, rows=32, ids="log"),
            ),
            context=(FieldConfig("scene", width=4, rows=4),),
            age_width=8,
        ),
        encoder=encoder_config(encoder),  # laser: w=10, H=2, d_q=16, M=2; laser_plus: H=4, horizons
        width=128,  # d
        head=HeadConfig(
            tokens=16,
            width=128,
            mean=encoder != "mean",  # whose token it is
            matches=("item", "category", "author"),
            match_horizons=(20, 50, 200),
        ),
        optim=OptimConfig(learning_rate=2e-3, b1=0.9, b2=0.9999, warmup=25, decay=TO_THE_END),
        train=TrainConfig(eval_every=250, save_every=125, log_every=25),
    )
