"""Random patches with few labels: the grid, jitter and uniform places, and fewer tokens at inference.

    python benchmarks/random_patches.py                                  hours on 2 cores; it may be stopped
    python benchmarks/random_patches.py --list                           the rows, and which of them are there
    python benchmarks/random_patches.py --only mnist_360_grid_s0         one row
    python benchmarks/random_patches.py --table                          their table and random_patches/top1.png

Each row trains configs/random_patches.py in runs/random_patches/NAME, reads the test images once on the grid and once
for each way of cutting fewer patches, and writes its JSON in benchmarks/random_patches/rows. The settings are the
config's; nothing is chosen on these figures. A row whose JSON is there is skipped.
"""

import dataclasses
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.evaluate.curves import paired
from avit_jax.evaluate.random_views import evaluate_views
from avit_jax.execution.random_views import RandomViews
from avit_jax.report.method_style import STYLE
from avit_jax.report.pictures import save_picture
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.machine import machine
from avit_jax.runtime.signals import FolderLock
from avit_jax.train.loop import train
from avit_jax.train.run_folder import check_folder
from avit_jax.train.start import initial_model
from benchmarks.resumable import ROOT, commit, run_rows
from configs import random_patches

RESULTS = ROOT / "benchmarks/random_patches/rows"
RUNS = ROOT / "runs/random_patches"
DATA = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}
SETS = (("mnist", 360), ("mnist", 1200), ("fashion", 1000), ("mnist", 3600), ("fashion", 5000))
CUTS = (("grid", ""), ("uniform", "0.5"), ("jitter", "0.5"), ("uniform", "1"), ("jitter", "1"))
INFERENCE = ("grid", "uniform")
COLOURS = ("#222222", "#0072b2", "#c98a00", "#7fb8dd", "#e0c27f")
WITH_AFFINE = CUTS[:2]
TOKENS = (49, 36, 25, 16)  # at inference
FEW = 16  # the number for which the mean of some views is taken too
VIEWS = 3  # which cost about as much as all patches once
SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One training and its figures."""

    data: str
    images: int
    law: str
    probability: str
    affine: bool
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        parts = [self.data, str(self.images), self.law, self.probability, "affine" if self.affine else ""]
        return "_".join(part for part in (*parts, f"s{self.seed}") if part)

    @property
    def label(self) -> str:
        """Of its method in the table."""
        return (self.law if self.law == "grid" else f"{self.law}, {self.probability}") + ", affine" * self.affine

    @property
    def result(self) -> Path:
        """Its JSON file."""
        return RESULTS / f"{self.name}.json"

    def config(self) -> Any:
        """The config of its training."""
        parts = [self.data, str(self.images), self.law, self.probability or "0", *(["affine"] if self.affine else [])]
        config = random_patches.get_config(",".join(parts))
        config.seed = self.seed
        return config


def rows() -> list[Row]:
    """Every row, the smallest first: all seeds of a data set, then the next one."""
    return [
        Row(data, images, law, probability, affine, seed)
        for data, images in SETS
        for affine in (False, True)
        for law, probability in (WITH_AFFINE if affine else CUTS)
        for seed in range(SEEDS)
    ]


def run(row: Row) -> None:
    """Train, evaluate, write the result."""
    settings, workdir = parse(row.config()), RUNS / row.name
    with FolderLock(workdir):
        check_folder(settings, workdir, resume=True)
        dataset = open_dataset(settings.data)
        write_json(workdir / "train_config.json", {"config": settings.to_config()})
        trained = train(settings, dataset, initial_model(settings, dataset), workdir)
        checked = evaluate_views(trained.model, dataset.val, RandomViews(law="grid"))
        ways = [RandomViews(tokens=count, law=law) for count in TOKENS for law in INFERENCE]
        ways += [RandomViews(tokens=FEW, law=law, views=VIEWS) for law in INFERENCE]
        found = [dataclasses.asdict(way) | evaluate_views(trained.model, dataset.test, way) for way in ways]
    correct = [way.pop("correct") for way in found]
    result = dataclasses.asdict(row) | {"top1": found[0]["top1"], "validation_top1": checked["top1"]}
    result |= {"train_images": row.images, "images": len(dataset.test), "correct": correct[0]}
    result |= {"inference": found, "epochs": settings.epochs}
    result |= {"seconds": round(trained.progress.seconds, 1), "machine": machine(), "commit": commit()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(row.result, result)
    shutil.rmtree(workdir)
    print(f"{row.name}: test top-1 {result['top1']:.4f} on the grid, after {result['seconds']:.0f} s of training")


def table() -> str:
    """The rows that are there as a table: means over seeds, in percent, and paired differences to the grid."""
    heads = ["data", "images", "trained with", "seeds", "top-1", "minus grid, 95 %"]
    heads += [*(f"{n} patches" for n in TOKENS[1:]), f"{VIEWS} views of {FEW}"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    found = _found()
    for (data, images, affine, law, probability), results in found.items():
        top1 = [100 * result["top1"] for result in results]
        cells = [DATA[data], f"{images:,}", Row(data, images, law, probability, affine, 0).label, str(len(results))]
        cells += [f"{mean(top1):.1f} ({min(top1):.1f} to {max(top1):.1f})"]
        cells.append("-" if law == "grid" else _difference(results, found.get((data, images, affine, *CUTS[0]), [])))
        for count, views in [*((count, 1) for count in TOKENS[1:]), (FEW, VIEWS)]:
            both = [mean(100 * _top1(result, count, places, views) for result in results) for places in INFERENCE]
            cells.append(" / ".join(f"{value:.1f}" for value in both))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _difference(results: list[dict[str, Any]], grid: list[dict[str, Any]]) -> str:
    """The 95 % interval of the difference to the trainings on the grid with the same seeds, in points."""
    seeds = {result["seed"] for result in results} & {result["seed"] for result in grid}
    own, other = ([(1 / len(seeds), one) for one in of if one["seed"] in seeds] for of in (results, grid))
    interval = paired(own, other) if seeds else None
    return "-" if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def _found() -> dict[Any, list[dict[str, Any]]]:
    """The results of all seeds of each method on each data set."""
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows():
        if row.result.exists():
            found[row.data, row.images, row.affine, row.law, row.probability].append(read_json(row.result))
    return found


def draw(path: Path) -> Path:
    """Top-1 against the number of patches at inference, on the grid and at random places; returns the path."""
    found = _found()
    looks = {
        (cut, affine): {"color": colour, "linestyle": "--" if affine else "-", "marker": "s" if affine else "o"}
        for cut, colour in zip(CUTS, COLOURS, strict=True)
        for affine in (False, True)
    }
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(SETS), 6.4), layout="constrained")
        panels = figure.subplots(2, len(SETS), sharex=True, sharey="col")
        for column, (data, images) in enumerate(SETS):
            for axes, places in zip(panels[:, column], INFERENCE, strict=True):
                for (*of, affine, law, probability), results in found.items():
                    if of != [data, images]:
                        continue
                    top1 = np.array([[100 * _top1(result, n, places, 1) for n in TOKENS] for result in results])
                    spread = np.abs([top1.min(0), top1.max(0)] - top1.mean(0))
                    name = Row(data, images, law, probability, affine, 0).label
                    look = looks[(law, probability), affine]
                    axes.errorbar(TOKENS, top1.mean(0), spread, label=name, elinewidth=0.8, capsize=2, **look)
                axes.set(xticks=TOKENS, title=f"{DATA[data]}, {images:,} images" if places == "grid" else "")
            panels[1, column].set_xlabel("patches at inference")
        panels[0, 0].set_ylabel("top-1 (%), patches of the grid")
        panels[1, 0].set_ylabel("top-1 (%), patches at random places")
        names = {
            name: line for axes in panels.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(names.values(), names, loc="outside lower center", ncols=len(looks), title="trained with")
        return save_picture(figure, path)


def _top1(result: dict[str, Any], tokens: int, law: str, views: int) -> float:
    wanted = tokens, law, views
    return next(way["top1"] for way in result["inference"] if (way["tokens"], way["law"], way["views"]) == wanted)


if __name__ == "__main__":
    if "--table" in sys.argv:
        print(table())
        print(draw(RESULTS.parent / "top1.png"))
    else:
        run_rows(__file__, __doc__, rows(), run, RUNS)
