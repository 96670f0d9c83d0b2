"""Do learned gates look at the image? Models with gates beside the same models with random and with fixed gates.

    python benchmarks/prior_art.py --only gates_0.71_s0,gates_0.49_s0     train them first, two seeds more with _s1, _s2
    python benchmarks/gated.py                                            a few minutes a row; it may be stopped
    python benchmarks/gated.py --list                                     the rows, and which of them are there
    python benchmarks/gated.py --table                                    their table

Each row reads a model of runs/prior_art/models. Rates are of the validation images, figures of the test images,
and the row's JSON goes to benchmarks/gated/rows. Random gates have their layer's mean rate; fixed gates are those that
are on most often, as many as cost what the learned ones cost on the validation images.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import avit_jax
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.evaluate.gate_controls import fixed_gates, gate_figures, gate_rates
from avit_jax.execution.work import embedding_macs, head_macs
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.machine import machine
from benchmarks.resumable import ROOT, commit, run_rows
from configs import prior_art

RESULTS = ROOT / "benchmarks/gated/rows"
RUNS = ROOT / "runs/gated"
BUDGETS = ("0.71", "0.49")
SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One trained model and its controls."""

    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files, and of its row in benchmarks/prior_art."""
        return f"gates_{self.budget}_s{self.seed}"

    @property
    def label(self) -> str:
        """Of its method in the results."""
        return "gates"

    @property
    def result(self) -> Path:
        """Its JSON file."""
        return RESULTS / f"{self.name}.json"


def rows() -> list[Row]:
    """Every row."""
    return [Row(budget, seed) for seed in range(SEEDS) for budget in BUDGETS]


def run(row: Row) -> None:
    """Measure, write the result. Raises ValueError if the model is not trained yet."""
    folder = ROOT / "runs/prior_art/models" / row.name
    if not folder.exists():
        raise ValueError(f"{folder} is not there: python benchmarks/prior_art.py --only {row.name} trains it")
    model = avit_jax.load(folder)
    dataset: Any = open_dataset(parse(prior_art.get_config(f"gates,{row.budget}")).data)
    rates = gate_rates(model, dataset.val)
    learned = gate_figures(model, dataset.val)["gmacs"] - (embedding_macs(model.config) + head_macs(model.config)) / 1e9
    found = {
        "learned": gate_figures(model, dataset.test),
        "random": gate_figures(model, dataset.test, rates, seed=row.seed),
        "fixed": gate_figures(model, dataset.test, fixed_gates(rates, model, learned)),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(row.result, dataclasses.asdict(row) | found | {"machine": machine(), "commit": commit()})
    print(", ".join(f"{name} {figures['top1']:.4f} at {figures['gmacs']:.5f}" for name, figures in found.items()))


def table() -> str:
    """The table of docs/neighbours.md from the rows that are there."""
    lines = ["| budget | seed | gates | top-1 | GMACs | published count | deviation of patches between images |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows():
        result = read_json(row.result) if row.result.exists() else {}
        for name in ("learned", "random", "fixed") if result else ():
            own = result[name]
            cells = [row.budget, row.seed, name, f"{100 * own['top1']:.2f} %", f"{own['gmacs']:.5f}"]
            cells += [f"{own['published_gmacs']:.5f}", f"{own['deviation']['tokens']:.3f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        run_rows(__file__, __doc__, rows(), run, RUNS)
