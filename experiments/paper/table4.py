"""Table 4: segment widths.

  python -m experiments.paper.table4 --data=completejourney --seeds=3

w = 5, 10, 20, as in the paper, and 50; of laser, since the width changes nothing in what laser_plus computes. Writes
ROOT/DATA/table4-BASE.{md,csv,png}.
"""

from experiments.paper import variants
from experiments.paper.study import Model
from laser_jax.models import encoder_config

WIDTHS = (5, 10, 20, 50)


def widths(base: Model) -> list[Model]:
    """The base, and what has the other widths."""
    others = [width for width in WIDTHS if width != encoder_config(base.encoder).segment]
    return [base, *(base.but(f"w={width}", encoder__segment=width) for width in others)]


if __name__ == "__main__":
    variants.main(__doc__, "table4", widths, base="laser")
