"""The comparison of rules on Fashion-MNIST or Scattered Fashion-MNIST: training-free rows, pictures and table.

    python benchmarks/compare.py                    every rule at ten budgets
    python benchmarks/compare.py --rules=tome,confidence --budgets=0.82,0.6
    python benchmarks/compare.py --draw             pictures and table of the rows that are there, fine-tuned ones too
    python benchmarks/compare.py --draw --reference=avit        the table with differences to A-ViT
    python benchmarks/compare.py --data=scattered --budgets=0.82,0.71,0.6,0.49 --most=2500

It is python -m avit_jax.compare for checkpoints/fashion_mnist_dense, or for checkpoints/scattered_dense. The rows that
the documentation shows are in benchmarks/prior_art/compared/rows and benchmarks/prior_art/scattered/rows, beside those
of fine-tuned models (benchmarks/fine_tuned.py). A row that is there is not measured again: --out=FOLDER measures all of
them anew.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from ml_collections import ConfigDict

from avit_jax.commands.compare_checkpoint import compare_checkpoint, comparison_from, write_pictures
from avit_jax.runtime.mesh import use_all_cores
from configs import fashion_mnist, scattered

ROOT = Path(__file__).parents[1]


class Compared(NamedTuple):
    """One data set of the comparison."""

    config: ConfigDict  # that has the data
    checkpoint: Path  # the static model
    out: Path


DATA = {
    name: Compared(config, ROOT / checkpoint, ROOT / "benchmarks/prior_art" / folder)
    for name, config, checkpoint, folder in (
        ("fashion_mnist", fashion_mnist.get_config("dense"), fashion_mnist.STATIC_MODEL, "compared"),
        ("scattered", scattered.get_config("dense"), scattered.STATIC_MODEL, "scattered"),
    )
}


def main() -> None:
    """Measure what is missing, draw, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules")
    parser.add_argument("--budgets", type=lambda text: text.split(","))
    parser.add_argument("--batches", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--most", type=int, default=50_000)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--reference", help="with --draw: a method, such as avit; the static model by default")
    parser.add_argument("--data", choices=DATA, default=next(iter(DATA)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    use_all_cores()
    compared = DATA[options.data]
    out = options.out or compared.out
    if options.reference and not options.draw:
        parser.error("--reference is for the table: give --draw too")
    try:
        if options.draw:
            lines = write_pictures(out, reference=options.reference)
        else:
            chosen = comparison_from(options.rules, options.budgets, options.batches, options.rounds)
            lines = compare_checkpoint(compared.config, compared.checkpoint, chosen, out=out, most=options.most)
        for line in lines:
            print(line)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
