"""Table 3: what each part of LASER is worth: one thing taken away or exchanged at a time.

  python -m experiments.paper.table3 --data=completejourney --seeds=3 --base=laser_plus

Of laser the paper's ablations: recency, fusion, FFN and LayerNorm, LayerNorm, softmax for sigmoid. Of laser_plus its
horizons, the mean beside them, and what it has no more. Differences are paired over users. Writes
ROOT/DATA/table3-BASE.{md,csv,png}.
"""

from experiments.paper import variants
from experiments.paper.study import Model
from laser_jax.models import encoder_config


def ablations(base: Model) -> list[Model]:
    """The base and its variants."""
    config = encoder_config(base.encoder)
    other_gate = "softmax" if config.gate == "sigmoid" else "sigmoid"
    rows = [
        base,
        base.but(f"{other_gate} gates", encoder__gate=other_gate),
        base.but("untied", encoder__tied=False),
    ]
    if config.layers:
        rows += [
            base.but("no recency", encoder__recency="none"),
            base.but("no fusion", encoder__pool=False, encoder__recent=0, encoder__horizons=()),
            base.but("no max pool", encoder__pool=False),
            base.but("no LayerNorm", encoder__norm="none"),
            base.but("no FFN, no LayerNorm", encoder__segment_ffn=0, encoder__norm="none"),
        ]
    rows.append(base.but("no mean", head__mean=False))
    if config.horizons:
        tokens = dict(encoder__segment=10, encoder__recency="age", encoder__pool=True)
        rows += [
            base.but("the whole history only", encoder__horizons=(1000,)),
            base.but("also max pool", **tokens),
            base.but("also max pool and GSTA", **tokens, encoder__layers=2),
            base.but("also max pool, GSTA and FFN 1x", **tokens, encoder__layers=2, encoder__segment_ffn=1),
        ]
    return rows


if __name__ == "__main__":
    variants.main(__doc__, "table3", ablations, base="laser_plus")
