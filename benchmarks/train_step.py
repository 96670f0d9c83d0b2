"""Images per second of one training step: dense and A-ViT, remat on and off, and eager PyTorch if it is installed.

    python benchmarks/train_step.py                     the default model (28x28) and A-ViT-Tiny at 224, about 4 minutes
    python benchmarks/train_step.py --models=mnist --rounds=5

Every variant takes its real step (forward, three losses, backward, clipping, AdamW). All variants run in turn, and
medians are reported. PyTorch has the same architecture and optimiser, dense and eager (pip install -r
requirements-peers.txt). Writes runs/benchmarks/train_step.json.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx

from avit_jax import PRESETS, AViT, AViTConfig
from avit_jax.commands.typed_config import parse
from avit_jax.model.presets import config_from
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.mesh import available_cores, global_batch, training_mesh, use_all_cores
from avit_jax.train.optim import learning_rate_schedule, make_optimizer
from avit_jax.train.state import initial_state
from avit_jax.train.step import make_train_step
from benchmarks.results import machine, save_results
from configs import mnist_avit

MNIST = config_from(None, image_size=28, in_channels=1, num_classes=10, **parse(mnist_avit.get_config()).model.given)
MODELS = {"mnist": (MNIST, 100), "tiny224": (PRESETS["avit_tiny_patch16_224"], 16)}


def jax_step(model_config: AViTConfig, batch_size: int) -> Callable[[], None]:
    """A function that takes one training step, as train.py does."""
    experiment = mnist_avit.get_config()
    experiment.batch_size = batch_size
    experiment.loss.distillation, experiment.teacher = "none", ""  # its forward pass is not part of the comparison
    settings = parse(experiment)
    optimizer = make_optimizer(
        settings.optim, learning_rate_schedule(settings.optim, 10_000, epochs=100.0, batch_size=batch_size)
    )
    model = AViT(model_config, rngs=nnx.Rngs(0))
    mesh = training_mesh(settings.mesh, batch_size)
    state = initial_state(model, optimizer, 0.0, mesh)
    step = make_train_step(nnx.graphdef(model), optimizer, settings.step, mesh, state)
    images, labels = random_batch(model_config, batch_size)
    batch = global_batch({"image": images, "label": labels}, mesh)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, None)
        jax.block_until_ready(metrics)

    return run


def torch_step(model_config: AViTConfig, batch_size: int) -> Callable[[], None]:
    """A function that takes one training step of the dense model in eager PyTorch."""
    import torch
    from torch.nn import functional

    from benchmarks.torch_vit import torch_vit

    torch.set_num_threads(available_cores())
    model = torch_vit(model_config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = random_batch(model_config, batch_size)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return run


def random_batch(model_config: AViTConfig, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images and labels of the right shapes."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(batch_size, *model_config.image_shape, model_config.in_channels)).astype(np.float32)
    return images, rng.integers(0, model_config.num_classes, batch_size).astype(np.int32)


def variants(model_config: AViTConfig, batch_size: int) -> dict[str, Callable[[], Callable[[], None]]]:
    """The variants: name -> a function that builds the step."""
    dense = dataclasses.replace(model_config, gate_scale=None, gate_center=None)
    found: dict[str, Callable[[], Callable[[], None]]] = {}
    for name, base in (("dense", dense), ("A-ViT", model_config)):
        for remat in (True, False):
            label = f"{name}, remat {'on' if remat else 'off'}"
            found[label] = functools.partial(jax_step, dataclasses.replace(base, remat=remat), batch_size)
    try:
        import torch  # noqa: F401

        found["PyTorch eager, dense"] = functools.partial(torch_step, model_config, batch_size)
    except ImportError:
        print("torch is not installed: no comparison (pip install -r requirements-peers.txt)")
    return found


def measure(model_config: AViTConfig, batch_size: int, rounds: int) -> dict[str, float]:
    """Median seconds per step of each variant, measured in turn."""
    steps = {name: build() for name, build in variants(model_config, batch_size).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for timed in [False, False] + [True] * rounds:
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if timed:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mnist,tiny224", help="comma-separated: " + ", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    use_all_cores()
    where = machine()
    results: dict[str, object] = {"machine": where, "rounds": arguments.rounds}
    for name in arguments.models.split(","):
        if name not in MODELS:
            parser.error(f"there is no model {name!r}: {nearest(name, MODELS)}")
        config, batch_size = MODELS[name]
        seconds = measure(config, batch_size, arguments.rounds)
        reference = seconds.get("PyTorch eager, dense", seconds["dense, remat on"])
        print(f"\n{name}, batch {batch_size} ({where})")
        against = "time / PyTorch" if "PyTorch eager, dense" in seconds else "time / dense"
        print(f"{'variant':24}{'ms/step':>9}{'images/s':>10}{against:>16}")
        for variant, value in seconds.items():
            print(f"{variant:24}{value * 1e3:>9.0f}{batch_size / value:>10.1f}{value / reference:>16.2f}")
        results[name] = {
            "batch_size": batch_size,
            "variants": {k: {"seconds": v, "images_per_second": batch_size / v} for k, v in seconds.items()},
        }
    save_results(Path("runs/benchmarks/train_step.json"), results)


if __name__ == "__main__":
    main()
