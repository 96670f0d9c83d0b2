"""Accuracy of a static ViT whose gate was started, without any training, on Fashion-MNIST.

    apt-get install dataset-fashion-mnist && python benchmarks/gate_start.py         10 minutes on 2 cores

checkpoints/fashion_mnist_dense gets a gate from 1,500 training images (avit_jax.start_gate), by pixels and position or
by hidden units too, with several deviations of the depths between patches and at several mean depths. Prints top-1 on
the 10,000 test images, the work as a share of the static model's, and how far the position of a patch explains its
depth; writes runs/benchmarks/gate_start.json.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import avit_jax
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.runtime.mesh import use_all_cores
from benchmarks.prior_art import figures
from benchmarks.results import save_results
from configs import fashion_mnist, prior_art

DEPTHS = (9.0, 7.4, 6.2, 5.0)  # mean token depth, of 12 layers
DEVIATIONS = {"hidden": (2.0, 3.5, 6.0, 10.0), "pixels": (3.5, 6.0)}  # in layers
IMAGES = 1500


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    use_all_cores()
    dataset = open_dataset(parse(fashion_mnist.get_config("dense")).data)
    print(f"{'features':10}{'deviation':>10}{'depth':>7}{'work':>8}{'top-1':>9}{'by position':>13}")
    found = []
    config = avit_jax.load(fashion_mnist.STATIC_MODEL).config
    chosen = np.linspace(0, len(dataset.train) - 1, IMAGES).astype(int)
    images = normalize(evaluation_images(dataset.train, chosen, config), config)
    for features, deviation, depth in (
        (features, deviation, depth)
        for features, deviations in DEVIATIONS.items()
        for deviation in deviations
        for depth in DEPTHS
    ):
        model = avit_jax.load(fashion_mnist.STATIC_MODEL, gate_scale=5.0, gate_center=10.0)
        avit_jax.start_gate(model, images, target_depth=depth, deviation=deviation, features=features)
        row = figures(model, dataset.test)
        work, share = row["gmacs"] / prior_art.WHOLE_GMACS, row["explained_by_position"]
        found.append({"features": features, "deviation": deviation, "depth": depth, "work": work})
        found[-1] |= {"top1": row["top1"], "position": share}
        print(
            f"{features:10}{deviation:10.1f}{depth:7.1f}{work:8.3f}{row['top1']:9.2%}{share:13.2f}",
            flush=True,
        )
    save_results(Path("runs/benchmarks/gate_start.json"), found)


if __name__ == "__main__":
    main()
