"""Table 4: segment widths.

  python -m experiments.paper.table4 --data=completejourney --seeds=3

w = 5, 10, 20, as in the paper, and 50; of laser, since the width changes nothing in what laser_plus computes. Writes
ROOT/DATA/table4-BASE.{md,csv,png}.
"""

from experiments.paper import variants
from experiments.paper.study import Model

WIDTHS = (10, 5, 20, 50)  # the base first


def widths(base: Model) -> list[Model]:
    """The base, whose segments are of 10 events, and the other widths."""
    return [base if width == 10 else base.but(f"w={width}", encoder__segment=width) for width in WIDTHS]


if __name__ == "__main__":
    variants.main(__doc__, "table4", widths, base="laser")
