"""The cycles of inference and of a training step on one TPU v5e, estimated by its compiler: nothing runs on a TPU.

    pip install -r requirements-tpu.txt
    python benchmarks/tpu_estimate.py                           everything, an hour or more of two cores
    python benchmarks/tpu_estimate.py --only=tiny-inference,small-inference-planned --top=20

libtpu's compiler runs on this machine's CPU and writes estimated cycles beside the operations of the compiled program.
They are summed over loops and branches (tests/harness/tpu_cycles.py). Gathers and sorts have no estimate; the column
"charged" is what they cost by the compiler's schedules. Both are estimates, not measurements. Copies between memories,
which run beside the computation, are not in them.

bfloat16, batch 256 in inference and 128 in training. Depths are drawn as in benchmarks/throughput.py (mean 0.60 of 12
layers for Tiny, 0.78 for Small, token spread 2 layers, image spread 0.8). They decide the plan of planned execution,
which has at most 6 stages, and how often each branch of packed execution is taken. One planned batch in 1,000 does not
fit. The training step is that of configs/imagenet_avit.py without mixup, CutMix and erasing, and of
configs/imagenet_deit.py for the dense model. Every program is compiled in a process of its own, and rows are kept in
runs/benchmarks/tpu_estimate.json: a run goes on where an earlier one with the same compiler stopped. --only compiles
the programs whose names begin so again.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from avit_jax import AViTConfig
from avit_jax.commands.typed_config import parse
from avit_jax.execution.plan import default_plan, layer_loads, padded_loads
from avit_jax.execution.stages import plan_loads
from avit_jax.model.config import NO_RULE
from avit_jax.model.presets import config_from
from avit_jax.runtime.machine import machine
from benchmarks.results import save_results
from benchmarks.throughput import MODELS, Profile
from configs import imagenet_avit, imagenet_deit
from tests.harness.tpu_cycles import Counted, counted
from tests.harness.tpu_programs import (
    compile_masked_evaluation,
    compile_packed_evaluation,
    compile_planned_evaluation,
    compile_train_step,
    model_of,
    topology_mesh,
)

BATCH = {"inference": 256, "training": 128}
EXECUTIONS = {"inference": ("dense", "masked", "packed", "planned"), "training": ("dense", "masked", "planned")}
STAGES = 6  # of plans; more take libtpu longer to compile
OVERFLOWS = 0.001  # share of planned batches that do not fit
TRAINING_MARGIN = 0.05  # of a plan in training (avit_jax.train.planner)
OUT = Path("runs/benchmarks/tpu_estimate.json")
Shares = Callable[[int, float], Sequence[float]]


def names() -> list[str]:
    """Every program: size-task-execution."""
    return [f"{size}-{task}-{execution}" for task in EXECUTIONS for size in MODELS for execution in EXECUTIONS[task]]


def loads_of(size: str, config: AViTConfig, image_exit: bool) -> np.ndarray:
    """The tokens that each layer computes of each of 512 images, [l 512]."""
    profile = Profile("published", MODELS[size][1])
    patches = profile.depths(config).astype(int)
    first = np.full((len(patches), 1), profile.class_depth(config))
    return layer_loads(np.concatenate([first, patches], axis=1), config, image_exit)


def inference(size: str, execution: str) -> tuple[Any, Shares]:
    """The compiled program for a batch, and how often its branches are taken."""
    batch, mesh = BATCH["inference"], topology_mesh("v5e:1x1")
    config = config_from(MODELS[size][0], dtype="bfloat16", **(NO_RULE if execution == "dense" else {}))
    if execution == "packed":
        return compile_packed_evaluation(config, batch, mesh), packed_shares(size, config, batch)
    if execution == "planned":
        plan = plan_loads(loads_of(size, config, image_exit=True), config, batch, most_stages=STAGES)
        print(plan, flush=True)
        return compile_planned_evaluation(config, plan, mesh), planned_shares
    return compile_masked_evaluation(config, batch, mesh), planned_shares


def packed_shares(size: str, config: AViTConfig, batch: int) -> Shares:
    """How often packed execution takes each capacity: in all layers but the last, and in the last."""
    plan, loads = default_plan(config, batch, "tpu"), loads_of(size, config, image_exit=True)
    padded = padded_loads(np.stack(np.split(loads, loads.shape[1] // batch, axis=1)), plan)  # [batches l groups]

    def shares(branches: int, times: float) -> Sequence[float]:
        layers = padded[:, -1] if times == padded.shape[2] else padded[:, :-1]
        return [float((layers == places).mean()) for places in (0, *plan.capacities)]

    return shares


def planned_shares(branches: int, times: float) -> Sequence[float]:
    """Of the one conditional of a planned program; those inside its rare branch hardly count."""
    return (1 - OVERFLOWS, OVERFLOWS) if times == 1 else (1 / branches,) * branches


def training(size: str, execution: str) -> tuple[Any, Shares]:
    """The compiled step for a batch, and how often its branches are taken."""
    experiment = (imagenet_deit if execution == "dense" else imagenet_avit).get_config(size)
    experiment.batch_size, experiment.accumulation = BATCH["training"], 1
    experiment.augment.update({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0})  # half of the time to compile
    experiment.execution = "planned" if execution == "planned" else "masked"
    settings, plan = parse(experiment), None
    if execution == "planned":
        config = model_of(settings)
        loads = loads_of(size, config, image_exit=False)
        plan = plan_loads(loads, config, settings.batch_size, margin=TRAINING_MARGIN, most_stages=STAGES)
        print(plan, flush=True)
    return compile_train_step(settings, topology_mesh("v5e:1x1"), plan), planned_shares


def row_of(name: str, top: int) -> dict[str, Any]:
    """Compile a program and sum its cycles; print its `top` largest operations. Raises ValueError for odd loops."""
    size, task, execution = name.split("-")
    began = time.perf_counter()
    compiled, shares = {"inference": inference, "training": training}[task](size, execution)
    seconds = time.perf_counter() - began
    rows = counted(compiled.as_text(), shares)
    for row in sorted(rows, key=lambda row: -(row.estimated + row.charged))[:top]:
        print(line_of(row), flush=True)
    cycles = {"estimated": sum(row.estimated for row in rows), "charged": sum(row.charged for row in rows)}
    return {"name": name, "batch": BATCH[task], **cycles, "compile_seconds": seconds}


def line_of(row: Counted) -> str:
    """An operation as one line."""
    operation = row.operation
    mega = (row.estimated + row.charged) / 1e6
    return f"{mega:8.3f} x{row.times:<6.1f} {operation.code:12} {operation.shape[:60]:60} {operation.source[-70:]}"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of the table: cycles and ratios to dense and masked of the same size and task."""
    lines = [
        "| model, task | execution | estimated, 10^6 | charged, 10^6 | dense / this | masked / this | compile, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in names() if name in rows):
        size, task, execution = name.split("-")
        row = rows[name]

        def ratio(other: str, name: str = name, prefix: str = f"{size}-{task}-") -> str:
            if prefix + other not in rows:
                return ""
            total, base = (rows[n]["estimated"] + rows[n]["charged"] for n in (name, prefix + other))
            return f"{base / total:.2f}"

        lines.append(
            f"| {size}, {task}, batch {row['batch']} | {execution} | {row['estimated'] / 1e6:.1f} | "
            f"{row['charged'] / 1e6:.1f} | {ratio('dense')} | {ratio('masked')} | {row['compile_seconds']:.0f} |"
        )
    return lines


def main() -> None:
    """Compile what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated beginnings of names, such as tiny-inference")
    parser.add_argument("--top", type=int, default=0, help="operations to print of each program")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)  # compile this one in this process
    options = parser.parse_args()
    if options.row:
        print(json.dumps(row_of(options.row, options.top)))
        return
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    earlier = json.loads(OUT.read_text()) if OUT.is_file() else {}
    rows = {row["name"]: row for row in earlier.get("rows", []) if earlier.get("versions") == versions}
    chosen = [name for name in names() if name.startswith(tuple(options.only.split(",")))]
    for name in chosen if options.only else [name for name in chosen if name not in rows]:
        print(name, flush=True)
        command = [sys.executable, __file__, "--row", name, "--top", str(options.top)]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print("\n".join(said[:-1]), flush=True)
        rows[name] = json.loads(said[-1])
        save_results(OUT, {"machine": machine(), "versions": versions, "rows": list(rows.values())})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
