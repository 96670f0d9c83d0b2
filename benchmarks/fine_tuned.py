"""The speed of the models that benchmarks/prior_art.py trained: rows for the pictures of benchmarks/compare.py.

    python benchmarks/prior_art.py                  trains them, hours
    python benchmarks/fine_tuned.py                 measures those that are there, about a minute each
    python benchmarks/compare.py --draw             pictures and table
    python benchmarks/fine_tuned.py --data=scattered --most=2500       the same on Scattered Fashion-MNIST

Each model is timed by the program that removes tokens, in turn with the static model of the comparison, on the same
images drawn from the test set (avit_jax/evaluate/bench.py). Its accuracy is that of all test images. What else the row
says of its images (tokens of each layer, executed work) is of --most of them. The machine should be idle: rounds are
repeated until they agree. A row that is there already is kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import avit_jax
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.sources import spread
from avit_jax.evaluate.bench import BATCHES, ROUNDS, Bench
from avit_jax.evaluate.rows import GROUPS, row_file, save_row, saved_row
from avit_jax.runtime.files import read_json
from avit_jax.runtime.mesh import use_all_cores
from benchmarks.compare import DATA
from benchmarks.prior_art import RUNS, Row, rows


def main() -> None:
    """Measure every trained model that has no row yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default=next(iter(DATA)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--most", type=int, default=50_000)
    options = parser.parse_args()
    if options.rounds < 1 or options.most < 1:
        parser.error(f"--rounds={options.rounds} --most={options.most}: give numbers of at least 1")
    use_all_cores()
    compared = DATA[options.data]
    options.out = options.out or compared.out
    data = parse(compared.config).data
    test = spread(open_dataset(data).test, options.most)
    bench = Bench(avit_jax.load(compared.checkpoint), test, data=data.shown_name, rounds=options.rounds)
    batches: dict[tuple[str, str], int] = {}  # the best one of each method and budget, chosen with the first seed
    for row in rows():
        folder = RUNS / "models" / row.name
        ours = row.rate is None and row.scattered == (options.data == "scattered")
        if ours and row.result.exists() and folder.exists():
            print(f"{row.name}: {_measured(bench, row, avit_jax.load(folder), options, batches)}", flush=True)


def _measured(bench: Bench, row: Row, model: avit_jax.AViT, options: Any, batches: dict[tuple[str, str], int]) -> str:
    result = read_json(row.result)
    method, budget = row.label, result["budget"]
    settings = {"trained": result["commit"], "batches": list(BATCHES), "rounds": options.rounds, "most": options.most}
    file = row_file(options.out, GROUPS[1], method, budget, row.seed)
    if saved_row(file, model.config.rule_in_force, settings):
        return "there"
    smaller = row.method == "image"
    test = spread(open_dataset(parse(row.config()).data).test, options.most) if smaller else None
    key = method, row.budget or row.work
    if key not in batches:
        batches[key] = bench.best_batch(model, test)
    measured = bench.row(
        model,
        method=method,
        group=GROUPS[1],
        batch=batches[key],
        budget=budget,
        seed=row.seed,
        settings=settings,
        test=test,
    )
    if measured["images"] < result["images"]:
        measured["evaluated"] = measured["images"]
    if row.moved:
        measured["trained_for"] = float(row.work)
    # Of all test images, as the model was evaluated after its training.
    measured |= {name: result[name] for name in ("images", "top1", "loss", "correct", "gmacs")}
    save_row(options.out, measured)
    fastest = measured["speed"][str(batches[key])]
    return f"top-1 {100 * measured['top1']:.2f} %, {fastest['ratio']:.2f} times the static model's images/s"


if __name__ == "__main__":
    main()
