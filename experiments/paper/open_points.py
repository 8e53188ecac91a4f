"""What the paper leaves open (r, gate bias, recency, norm, RankMixer's sizes ...), one row a choice.

  python -m experiments.paper.open_points --data=completejourney --seeds=3 --base=laser

Writes ROOT/DATA/open_points-BASE.{md,csv,png}.
"""

from experiments.paper import variants
from experiments.paper.study import Model
from laser_jax.models import encoder_config

#: T, D and blocks of the head, other than the experiments' 8, 64 and 2.
RANKMIXER = {"tokens": (4, 16), "width": (32, 128), "blocks": (1, 4)}


def choices(base: Model) -> list[Model]:
    """The base, and one row for every other choice of an open point."""
    config = encoder_config(base.encoder)
    points = {
        "horizons": ((), (20, 50, 200, 1000), (10, 20, 50, 100, 200, 500, 1000)),
        "heads": (1, 2, 4, 8),
        "key_width": (8, 16, 32),
        "gate": ("sigmoid", "softmax"),
    }
    if config.layers:
        points |= {
            "recent": (0, 1, 3, 10),
            "recency": ("none", "age", "position", "both"),
            "norm": ("pre", "post"),
            "segment_ffn": (0, 1, 4),
            "gsta_ffn": (0, 1, 4),
            "gsta_gate": ("softmax", "sigmoid"),
            "mass_logit": (False, True),
            "fusion": ("tokens", "sum"),
            "joined": ("concat",) if config.horizons else ("concat", "sum"),
        }
    else:  # nothing but horizons is read
        points["horizons"] = ((1000,), *points["horizons"][1:])
    if config.gate == "sigmoid":
        points["gate_bias"] = (None, 0.0, -4.6, -6.9)
    rows = [base]
    for point, values in points.items():
        for value in values:
            if value != getattr(config, point):
                rows.append(base.but(f"{point}={value}", **{f"encoder__{point}": value}))
    head = {"products": (not base.settings["head.products"],), "mean": (False,), **RANKMIXER}
    for point, values in head.items():
        rows += [base.but(f"head.{point}={value}", **{f"head__{point}": value}) for value in values]
    if config.layers:  # the segments' recency is then all that tells when
        rows.append(base.but("no ages of events", features__age_buckets=1))
    return rows


if __name__ == "__main__":
    variants.main(__doc__, "open_points", choices, base="laser")
