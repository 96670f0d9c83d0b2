"""Images per second of the Fashion-MNIST A-ViT in checkpoints/, dense and packed, each at several batch sizes.

    apt-get install dataset-fashion-mnist && python benchmarks/fashion_mnist.py            about two minutes on 2 cores

All variants run in turn in one process, on test images and with the default plan; medians are reported. Dense means the
same weights, with no token halting. Writes runs/benchmarks/fashion_mnist.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import avit_jax
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import DataSettings
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import data_mesh, use_all_cores
from benchmarks.drawn import dense_parts
from benchmarks.results import save_results
from benchmarks.variants import compiled_variant, measure, packed_variant
from configs import fashion_mnist

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/fashion_mnist_avit"
BATCHES = (25, 50, 100, 200, 400, 800)


def main() -> None:
    """Measure, print the table and the ratio of the best, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    use_all_cores()
    model = avit_jax.load(CHECKPOINT)
    test = open_dataset(DataSettings.from_config(dict(fashion_mnist.get_config().data))).test
    images = np.asarray(normalize(evaluation_images(test, range(max(BATCHES)), model.config), model.config))
    variants = []
    for batch in BATCHES:
        mesh = data_mesh(batch)
        variants.append(compiled_variant("dense", dense_parts(model), images[:batch], mesh, False))
        variants.append(packed_variant("packed", model, images[:batch], mesh))
    measure(variants, arguments.rounds)
    print(f"{machine()}\n{'batch':>5}{'dense':>8}{'packed':>8}  images/s")
    speeds = {name: {v.batch: v.images_per_second for v in variants if v.name == name} for name in ("dense", "packed")}
    for batch in BATCHES:
        print(f"{batch:5}{speeds['dense'][batch]:8.0f}{speeds['packed'][batch]:8.0f}")
    print(
        f"packed / dense, each at its best batch: {max(speeds['packed'].values()) / max(speeds['dense'].values()):.2f}"
    )
    save_results(Path("runs/benchmarks/fashion_mnist.json"), {"machine": machine(), "images_per_second": speeds})


if __name__ == "__main__":
    main()
