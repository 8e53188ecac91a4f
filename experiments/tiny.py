"""experiments/xhs.py in seconds: the same model and data, small. For tests and for a first look.

python -m laser_jax.main --config=experiments/tiny.py --workdir=/tmp/tiny
"""

import dataclasses

from data.xhs_synthetic import XhsSynthetic
from experiments import xhs
from laser_jax.config import Config, TrainConfig


def get_config(encoder: str = "laser_plus") -> Config:
    config = xhs.get_config(encoder)
    data = dataclasses.replace(
        config.data,
        path="datasets/tiny",
        recipe=XhsSynthetic(
            users=300, mean_length=400, train_requests=2_000, valid_requests=200, test_requests=400, candidates=10
        ),
        history_length=200,
    )
    return dataclasses.replace(
        config,
        data=data,
        width=32,
        head=dataclasses.replace(config.head, width=32),
        train=TrainConfig(eval_every=30, save_every=10, log_every=10),
    )
