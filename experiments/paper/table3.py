"""Table 3: what each part of LASER is worth: one thing taken away or exchanged at a time.

  python -m experiments.paper.table3 --data=completejourney --seeds=3 --base=laser_plus

The paper's ablations (recency, fusion, FFN and LayerNorm, LayerNorm, softmax for sigmoid), and those of what laser_plus
adds. Differences are paired over users. Writes ROOT/DATA/table3-BASE.{md,csv,png}.
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
        base.but("no recency", encoder__recency="none"),
        base.but("no fusion", encoder__pool=False, encoder__recent=0, encoder__horizons=()),
        base.but("no max pool", encoder__pool=False),
        base.but("no LayerNorm", encoder__norm="none"),
        base.but(f"{other_gate} gates", encoder__gate=other_gate),
        base.but("untied", encoder__tied=False),
    ]
    if config.segment_ffn:
        rows.append(base.but("no FFN, no LayerNorm", encoder__segment_ffn=0, encoder__norm="none"))
    else:
        rows.append(base.but("with FFN 1x", encoder__segment_ffn=1))
    if config.mass_logit:
        rows.append(base.but("no mass in GSTA", encoder__mass_logit=False))
    if config.horizons:
        rows += [
            base.but("no horizons", encoder__horizons=()),
            base.but("no GSTA", encoder__layers=0),
            base.but("horizons only", encoder__layers=0, encoder__pool=False, encoder__recency="none"),
        ]
    return rows


if __name__ == "__main__":
    variants.main(__doc__, "table3", ablations, base="laser_plus")
