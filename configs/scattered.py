"""Scattered Fashion-MNIST, 56x56, patch 4, 197 tokens, 12 layers: one to three items among small pieces.

    python train.py --config=configs/scattered.py:dense                the static model, from Fashion-MNIST's

The pictures are made while they are read (avit_jax/data/scattered.py), from the files of configs/fashion_mnist.py. The
label is the largest item's. Three quarters of the pixels are black.

Hardware: 2 CPU cores. Expected: not yet run.

- mean and std are those of the 55,200 training pictures.
- The model of Fashion-MNIST brings all weights; its 7x7 positions are resized to 14x14 when it is loaded.
- Items already vary in size and place, so pictures are only shifted, by up to two pixels.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist


def get_config(arg: str = "dense") -> ConfigDict:
    """The experiment: dense."""
    if arg != "dense":
        raise ValueError(f"{arg!r} is unknown: dense is the only experiment")
    config = fashion_mnist.get_config("dense")
    config.name = "scattered_dense"
    config.data.update({"source": "scattered", "mean": (0.1555,), "std": (0.2903,)})
    config.model.image_size = 56
    config.augment.update({"rotate": 0.0, "scale": 0.0, "shear": 0.0, "translate": 2.0})
    config.init_from = fashion_mnist.STATIC_MODEL
    config.epochs = 3.0
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": 100})
    return config
