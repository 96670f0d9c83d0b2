"""Do learned gates look at the image? Models with gates beside the same models with random and with fixed gates.

    python benchmarks/prior_art.py --only gates_0.71_s0,gates_0.49_s0     train them first, two seeds more with _s1, _s2
    python benchmarks/gated.py                                            a few minutes a row; it may be stopped
    python benchmarks/gated.py --list                                     the rows, and which of them are there
    python benchmarks/gated.py --table                                    their table

Each row reads a model of runs/prior_art/models. Rates are of the validation images, figures of the test images,
and the row's JSON goes to benchmarks/gated/rows. The controls: the gates of another image; random gates with their
layer's mean rate; and fixed gates, those that are on most often, as many as cost what the learned ones cost on the
validation images.
"""

import dataclasses
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import avit_jax
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.evaluate.curves import paired
from avit_jax.evaluate.gate_controls import fixed_gates, gate_figures, gate_rates, gates_of_other_images, image_gates
from avit_jax.gated.work import layer_macs
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.machine import machine
from benchmarks.resumable import ROOT, commit, run_rows
from configs import prior_art

RESULTS = ROOT / "benchmarks/gated/rows"
RUNS = ROOT / "runs/gated"
BUDGETS = ("0.71", "0.49")
SEEDS = 3
CONTROLS = ("learned", "of another image", "random", "fixed")
KINDS = ("tokens", "heads", "sublayers")


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
    gates = image_gates(model, dataset.val)
    rates, layers = gate_rates(gates), layer_macs(model.config, gates, short_last_layer=True)
    fixed = fixed_gates(rates, model, float(layers.sum(0).mean()) / 1e9)
    found = {
        "learned": gate_figures(model, dataset.test),
        "of another image": gate_figures(model, dataset.test, gates_of_other_images(image_gates(model, dataset.test))),
        "random": gate_figures(model, dataset.test, rates, seed=row.seed),
        "fixed": gate_figures(model, dataset.test, fixed),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(row.result, dataclasses.asdict(row) | found | {"machine": machine(), "commit": commit()})
    print(", ".join(f"{name} {figures['top1']:.4f} at {figures['gmacs']:.5f}" for name, figures in found.items()))


def table() -> str:
    """The table of docs/neighbours.md from the rows that are there: means over seeds, least and most."""
    lines = ["| gates | seeds | top-1 (%) | minus learned, 95 % | GMACs | published count |"]
    lines[0] += " patches, heads, sublayers in which two images differ |"
    lines.append("|---|---|---|---|---|---|---|")
    for budget in BUDGETS:
        found = [read_json(row.result) for row in rows() if row.budget == budget and row.result.exists()]
        for name in CONTROLS if found else ():
            own = [result[name] for result in found]
            top1 = [100 * figures["top1"] for figures in own]
            share = 1 / len(own)
            interval = paired([(share, figures) for figures in own], [(share, result["learned"]) for result in found])
            assert interval is not None
            counts = [mean(figures[count] for figures in own) for count in ("gmacs", "published_gmacs")]
            differ = [mean(figures["disagreement"][kind] for figures in own) for kind in KINDS]
            cells = [f"{name}, {float(budget):.0%}", str(len(own))]
            cells.append(f"{mean(top1):.2f} ({min(top1):.2f} to {max(top1):.2f})")
            cells.append("-" if name == "learned" else f"{100 * interval[0]:+.2f} to {100 * interval[1]:+.2f}")
            cells += [*(f"{count:.4f}" for count in counts), ", ".join(f"{share:.1%}" for share in differ)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
    else:
        run_rows(__file__, __doc__, rows(), run, RUNS)
