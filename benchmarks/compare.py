"""The repository's comparison of rules on Fashion-MNIST: training-free rows, pictures and table.

    python benchmarks/compare.py                    every rule at ten budgets
    python benchmarks/compare.py --rules=tome,confidence --budgets=0.82,0.6
    python benchmarks/compare.py --draw             pictures and table of the rows that are there, fine-tuned ones too

It is python -m avit_jax.compare for checkpoints/fashion_mnist_dense. The rows that the documentation shows are in
benchmarks/prior_art/compared/rows, beside those of fine-tuned models (benchmarks/fine_tuned.py), and a row that is
there is not measured again: --out=FOLDER measures all of them anew.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from avit_jax.commands.compare_checkpoint import compare_checkpoint, comparison_from, write_pictures
from avit_jax.runtime.mesh import use_all_cores
from configs import fashion_mnist

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/fashion_mnist_dense"
OUT = Path(__file__).parent / "prior_art/compared"


def main() -> None:
    """Measure what is missing, draw, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules")
    parser.add_argument("--budgets", type=lambda text: text.split(","))
    parser.add_argument("--batches", type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--most", type=int, default=50_000)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    use_all_cores()
    if options.draw:
        lines = write_pictures(options.out)
    else:
        chosen = comparison_from(options.rules, options.budgets, options.batches, options.rounds)
        config = fashion_mnist.get_config("dense")
        lines = compare_checkpoint(config, CHECKPOINT, chosen, out=options.out, most=options.most)
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
