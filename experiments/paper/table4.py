"""Table 4: segment widths.

  python -m experiments.paper.table4 --data=completejourney --seeds=3 --base=laser_plus

w = 5, 10, 20, as in the paper, and 50. Writes ROOT/DATA/table4-BASE.{md,csv,png}.
"""

from experiments.paper import models, variants
from experiments.paper.study import parse

WIDTHS = (10, 5, 20, 50)  # the base first


def main() -> None:
    def add(parser):
        parser.add_argument("--base", default="laser_plus", choices=("laser_plus", "laser"))

    args, study = parse(__doc__, add)
    base = models.model(args.base, "tricks")
    rows = [base if width == 10 else base.but(f"w={width}", encoder__segment=width) for width in WIDTHS]
    print(variants.tabulate(study, f"table4-{args.base}", rows, args.seeds, not args.only_report))
    print(f"\n{args.data}: {len(rows)} widths, {args.seeds} seeds; table and picture in {study.folder}")


if __name__ == "__main__":
    main()
