"""Images per second of one training step: dense, A-ViT masked and planned, and eager PyTorch if it is installed.

    python benchmarks/train_step.py          the default model (28x28), A-ViT-Tiny and A-ViT-Small at 224, 15 minutes
    python benchmarks/train_step.py --models=mnist --rounds=5 --remat

Every variant takes its real step (forward, three losses, backward, clipping, AdamW). The images draw the depth of each
patch (benchmarks/drawn.py), 60 % of the layers on average, and the learning rate is 0, so that depths stay. Shapes are
planned from 50 batches, as a run plans them. All variants run in turn, and medians are reported. PyTorch has the same
architecture and optimiser, dense and eager (pip install -r requirements-peers.txt). --remat: also with all activations
computed again (config.model.remat). Writes runs/benchmarks/train_step.json.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx

from avit_jax import PRESETS, AViTConfig
from avit_jax.commands.typed_config import parse
from avit_jax.execution.plan import layer_loads
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.config import NO_RULE
from avit_jax.model.presets import config_from
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import available_cores, global_batch, training_mesh, use_all_cores
from avit_jax.train.optim import learning_rate_schedule, make_optimizer
from avit_jax.train.planner import WINDOW, Planner
from avit_jax.train.state import initial_state
from avit_jax.train.step import make_train_step
from benchmarks.drawn import drawn_depths, drawn_images, drawn_model
from benchmarks.results import save_results
from configs import mnist_avit

MNIST = config_from(None, image_size=28, in_channels=1, num_classes=10, **parse(mnist_avit.get_config()).model.given)
MODELS = {
    "mnist": (MNIST, 100),
    "tiny224": (PRESETS["avit_tiny_patch16_224"], 16),
    "small224": (PRESETS["avit_small_patch16_224"], 16),
}
DEPTH, TOKEN_SPREAD, IMAGE_SPREAD = 0.6, 0.2, 0.05  # as shares of the layers
TIMED_BATCHES = 8  # the steps take them in turn
NEW_BATCHES = 1000  # of which the part that does not fit the plan is counted


@dataclasses.dataclass
class Step:
    """A training step that can be timed."""

    run: Callable[[], None]
    memory: int = 0  # bytes of the step's temporaries, by the compiler; 0: unknown
    compile_seconds: float = 0.0
    plan: str = ""  # what there is to say of it


def jax_step(model_config: AViTConfig, batch_size: int, execution: str) -> Step:
    """One training step as train.py takes it; execution: dense, masked or planned."""
    experiment = mnist_avit.get_config()
    experiment.batch_size = batch_size
    experiment.loss.distillation, experiment.teacher = "none", ""  # its forward pass is not part of the comparison
    experiment.optim.update({"learning_rate": 0.0, "final_learning_rate": 0.0})
    settings = parse(experiment)
    images, labels = drawn_batches(model_config, batch_size)
    model = drawn_model(model_config, class_depth(model_config))
    mesh = training_mesh(settings.mesh, batch_size)
    made, said = plan(model_config, batch_size // mesh.size, mesh.size) if execution == "planned" else (None, "")
    if execution == "dense":
        model = model.with_config(**NO_RULE)
    optimizer = make_optimizer(
        settings.optim, learning_rate_schedule(settings.optim, 10_000, epochs=100.0, batch_size=batch_size)
    )
    state = initial_state(model, optimizer, 0.0, mesh)
    counted = dataclasses.replace(settings.step, counts=made is not None)
    step = make_train_step(nnx.graphdef(model), optimizer, counted, mesh, state, plan=made)
    batches = [
        global_batch({"image": images[i : i + batch_size], "label": labels[i : i + batch_size]}, mesh)
        for i in range(0, len(images), batch_size)
    ]
    began = time.perf_counter()
    compiled = step.lower(state, batches[0], None).compile()
    seconds, turn = time.perf_counter() - began, itertools.cycle(batches)

    def run() -> None:
        nonlocal state
        state, metrics = compiled(state, next(turn), None)
        jax.block_until_ready(metrics)
        if made is not None and metrics["counts"]["overflow"]:
            print("a timed batch did not fit its plan")

    memory: Any = compiled.memory_analysis()
    return Step(run, memory.temp_size_in_bytes, seconds, said)


def class_depth(model_config: AViTConfig) -> int:
    """The class token's layers: three quarters of all."""
    return round(0.75 * model_config.depth)


def depths(model_config: AViTConfig, count: int, seed: int) -> np.ndarray:
    """The layers at which the patches of new images stop."""
    depth = model_config.depth
    spreads = TOKEN_SPREAD * depth, IMAGE_SPREAD * depth
    return drawn_depths(model_config, count, DEPTH * depth, *spreads, class_depth(model_config), seed)


def drawn_batches(model_config: AViTConfig, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of the batches that are timed, and random labels."""
    count = TIMED_BATCHES * batch_size
    labels = np.random.default_rng(0).integers(0, model_config.num_classes, count).astype(np.int32)
    return drawn_images(model_config, depths(model_config, count, seed=0)), labels


def plan(model_config: AViTConfig, images: int, devices: int) -> tuple[PlannedPlan, str]:
    """The plan of a run after its first 50 steps, and how it fits new batches. images: on a device."""

    def loads(batches: int, seed: int) -> np.ndarray:
        """Of each device in each batch, [batches, devices, l, images]."""
        patches = depths(model_config, batches * devices * images, seed)
        tokens = np.pad(patches.astype(int), ((0, 0), (1, 0)), constant_values=class_depth(model_config))
        found = layer_loads(tokens, model_config, image_exit=False).reshape(-1, batches, devices, images)
        return np.sort(found.transpose(1, 2, 0, 3), axis=-1)

    planner = Planner(model_config, images, steps=10**6)
    for batch in loads(WINDOW, seed=1):
        planner.saw({"loads": batch.max(0), "overflow": False})
    if not planner.renewed(WINDOW) or planner.plan is None:
        raise ValueError(f"nothing to plan at a depth of {DEPTH}: lower DEPTH")
    made = planner.plan
    late = np.mean([not all(made.fits(device) for device in batch) for batch in loads(NEW_BATCHES, seed=2)])
    return made, f"{made.share():.0%} of all places are computed, and {late:.1%} of new batches do not fit"


def torch_step(model_config: AViTConfig, batch_size: int) -> Step:
    """One training step of the dense model in eager PyTorch."""
    import torch
    from torch.nn import functional

    from benchmarks.torch_vit import torch_vit

    torch.set_num_threads(available_cores())
    model = torch_vit(model_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = (values[:batch_size] for values in drawn_batches(model_config, batch_size))
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Step(run)


def variants(model_config: AViTConfig, batch_size: int, remat: bool) -> dict[str, Callable[[], Step]]:
    """The variants: name -> a function that builds the step. remat: also with activations computed again."""
    gated = dataclasses.replace(model_config, gate_scale=40.0, gate_center=20.0)  # what drawn_model needs
    found: dict[str, Callable[[], Step]] = {}
    for again in (False, True) if remat else (False,):
        config = dataclasses.replace(gated, remat=again)
        for execution in ("dense", "masked", "planned"):
            name = ("dense" if execution == "dense" else f"A-ViT, {execution}") + (", remat" if again else "")
            found[name] = functools.partial(jax_step, config, batch_size, execution)
    try:
        import torch  # noqa: F401

        found["PyTorch eager, dense"] = functools.partial(torch_step, model_config, batch_size)
    except ImportError:
        print("torch is not installed: no comparison (pip install -r requirements-peers.txt)")
    return found


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step, measured in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for timed in [False, False] + [True] * rounds:
        for name, step in steps.items():
            began = time.perf_counter()
            step.run()
            if timed:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--batch", type=int, default=0, help="images in a step; 0: each model's own")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--remat", action="store_true", help="also with activations computed again")
    arguments = parser.parse_args()
    use_all_cores()
    where = machine()
    results: dict[str, object] = {"machine": where, "rounds": arguments.rounds}
    for name in arguments.models.split(","):
        if name not in MODELS:
            parser.error(f"there is no model {name!r}: {nearest(name, MODELS)}")
        config, batch_size = MODELS[name]
        batch_size = arguments.batch or batch_size
        steps = {label: build() for label, build in variants(config, batch_size, arguments.remat).items()}
        seconds = measure(steps, arguments.rounds)
        print(f"\n{name}, batch {batch_size} ({where})")
        print(f"{'variant':24}{'ms/step':>9}{'images/s':>10}{'time / dense':>14}{'MB':>7}{'compile, s':>12}")
        for label, value in seconds.items():
            step = steps[label]
            print(
                f"{label:24}{value * 1e3:>9.0f}{batch_size / value:>10.1f}{value / seconds['dense']:>14.2f}"
                f"{step.memory / 1e6:>7.0f}{step.compile_seconds:>12.0f}",
                flush=True,
            )
        for label, step in steps.items():
            if step.plan:
                print(f"{label}: {step.plan}")
        results[name] = {
            "batch_size": batch_size,
            "variants": {
                label: {
                    "seconds": value,
                    "images_per_second": batch_size / value,
                    "memory_bytes": steps[label].memory,
                    "compile_seconds": steps[label].compile_seconds,
                    "plan": steps[label].plan,
                }
                for label, value in seconds.items()
            },
        }
    save_results(Path("runs/benchmarks/train_step.json"), results)


if __name__ == "__main__":
    main()
