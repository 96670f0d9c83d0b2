"""A-ViT on your own images, after configs/npz_dense.py: python train.py --config=configs/npz_avit.py:my_images.npz"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import mnist_avit


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg is the path of the .npz file."""
    config = mnist_avit.get_config()
    config.name = f"{Path(arg).stem}_avit"
    config.data.source = "npz"
    config.data.path = arg
    config.data.mean = config.data.std = ()  # measured on the training images
    config.init_from = config.teacher = f"runs/{Path(arg).stem}_dense/model"
    return config
