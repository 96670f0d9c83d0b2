"""The time of a training step by the number of devices: computed from stated assumptions, not measured.

    python benchmarks/step_model.py                             the tables of docs/scaling.md, and docs/scaling.png

step = work + update + sums, one after the other, with no overlap.
- work: the multiply-adds (avit_jax.execution.work) of 4 forward passes (1 forward, 2 backward, 1 again for remat),
  2 flops each, at 40 % of the peak bfloat16 matmul rate. An A-ViT trains masked, so it costs the same as its DeiT.
- update: AdamW and the moving average read and write 36 bytes per parameter at the memory's stated rate.
- sums: 26 sums of gradients in a step, as in the compiled program (benchmarks/tpu_compile.py), with 2 bytes per
  parameter of the blocks and 4 per other parameter. A ring moves 2 (n - 1) / n of that through every device, at 80 % of
  its links' stated rate, and each sum waits for its hops.
Image loading is left out. `cores` is the number of CPU cores that would keep up, at the images per CPU second of
benchmarks/input_pipeline.py. Writes runs/benchmarks/step_model.json.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from flax import nnx

from avit_jax.execution.work import whole_gmacs
from avit_jax.model.presets import config_from
from avit_jax.model.vit import model_of_shapes
from benchmarks.results import save_results

PASSES, MATMUL_SHARE, LINK_SHARE = 4, 0.4, 0.8
UPDATE_BYTES = 36  # per parameter, float32: read gradient, weight, two moments and average; write all but the gradient
SUMS = 26
INPUT_RATE = 258  # training images per CPU second (docs/results.md)
SIZES = ("tiny", "small", "base")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a data sheet says about a device and its links."""

    name: str
    counts: tuple[int, ...]
    peak: float  # flops per second, bfloat16, dense
    memory: float  # bytes per second

    def links(self, count: int) -> float:
        """Bytes per second out of a device, in a sum over `count` devices."""
        raise NotImplementedError

    def wait(self, count: int) -> float:
        """Seconds that even the smallest sum over `count` devices takes."""
        raise NotImplementedError


class V5e(Machine):
    """cloud.google.com/tpu/docs/v5e: 197 TF/s, 819 GB/s, links 400 GB/s a chip, both directions; 16x16 is a torus."""

    def links(self, count: int) -> float:
        """Half in slices of fewer than 256, which lack the links that close the rings."""
        return 200e9 if count == 256 else 100e9

    def wait(self, count: int) -> float:
        """1 microsecond a hop, there and back along both axes of the slice."""
        rows = 2 ** (int(math.log2(count)) // 2)
        return 2 * (rows - 1 + count // rows - 1) * 1e-6


class H100(Machine):
    """NVIDIA's data sheet, SXM: 989 TF/s, 3.35 TB/s, NVLink 900 GB/s in both directions together."""

    def links(self, count: int) -> float:
        """Through the switch of one box."""
        return 450e9

    def wait(self, count: int) -> float:
        """The launch of a kernel, and waiting for the other devices."""
        return 20e-6


MACHINES = (
    V5e("v5e", (1, 8, 16, 32, 64, 128, 256), 197e12, 819e9),
    H100("H100", (1, 2, 4, 8), 989e12, 3.35e12),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What a step's time depends on."""

    name: str
    gmacs: float
    parameters: int
    sum_bytes: int


def model_of(size: str) -> Model:
    """A-ViT of a size at 224x224."""
    config = config_from(f"avit_{size}_patch16_224")
    _, params = nnx.split(model_of_shapes(config), nnx.Param)
    count, sum_bytes = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        count += leaf.size
        sum_bytes += leaf.size * (2 if "blocks" in jax.tree_util.keystr(path) else 4)
    return Model(size, whole_gmacs(config), count, sum_bytes)


def step_seconds(model: Model, machine: Machine, devices: int, images_a_device: float) -> dict[str, float]:
    """The three parts of a step's time."""
    return {
        "work": PASSES * 2e9 * model.gmacs * images_a_device / (MATMUL_SHARE * machine.peak),
        "update": UPDATE_BYTES * model.parameters / machine.memory,
        "sums": (devices > 1)
        * (
            2 * (devices - 1) / devices * model.sum_bytes / (LINK_SHARE * machine.links(devices))
            + SUMS * machine.wait(devices)
        ),
    }


def computed(images: int, each: bool) -> list[dict[str, float | str]]:
    """A row for every model and number of devices.

    images: how many in a step, on each device if `each`, else on all devices together.
    """
    rows: list[dict[str, float | str]] = []
    for machine in MACHINES:
        for model in map(model_of, SIZES):
            one = None
            for devices in machine.counts:
                parts = step_seconds(model, machine, devices, images if each else images / devices)
                seconds = sum(parts.values())
                rate = images * (devices if each else 1) / seconds
                one = one or rate
                rows.append(
                    {"machine": machine.name, "model": model.name, "devices": devices, "step": seconds, **parts}
                    | {"images_per_second": rate, "efficiency": rate / devices / one, "cores": rate / INPUT_RATE}
                )
    return rows


def show(title: str, rows: list[dict[str, float | str]]) -> None:
    """Print a table of the rows with 1, 8 and 256 devices."""
    print(f"\n{title}\n| devices | model | step, ms | work | update | sums | images/s | of linear | cores to feed it |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        if row["devices"] in (1, 8, 256):
            parts = " | ".join(f"{1e3 * float(row[part]):.2f}" for part in ("step", "work", "update", "sums"))
            print(
                f"| {row['devices']} x {row['machine']} | {row['model']} | {parts} | "
                f"{row['images_per_second']:,.0f} | {row['efficiency']:.0%} | {row['cores']:,.0f} |"
            )


def draw(tables: dict[str, list[dict[str, float | str]]], path: Path) -> None:
    """Draw images per second by the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(MACHINES), figsize=(10, 4), constrained_layout=True)
    for machine, axis in zip(MACHINES, axes, strict=True):
        for size, colour in zip(SIZES, ("tab:green", "tab:blue", "tab:orange"), strict=True):
            for (label, rows), style in zip(tables.items(), ("-", "--"), strict=True):
                own = [row for row in rows if (row["machine"], row["model"]) == (machine.name, size)]
                axis.loglog(
                    [row["devices"] for row in own],
                    [row["images_per_second"] for row in own],
                    style,
                    color=colour,
                    label=f"{size}, {label}",
                )
        axis.set_xticks(machine.counts, [str(count) for count in machine.counts])
        axis.minorticks_off()
        axis.set_xlabel(f"{machine.name} devices")
        axis.set_title(f"{machine.name}: computed, not run")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training images a second")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, draw the picture, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="docs/scaling.png", type=Path)
    options = parser.parse_args()
    tables = {"128 images a device": computed(128, each=True), "batch 1024": computed(1024, each=False)}
    for title, rows in tables.items():
        show(title, rows)
    draw(tables, options.picture)
    save_results(Path("runs/benchmarks/step_model.json"), tables)
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
