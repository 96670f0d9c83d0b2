"""A static ViT on your own images: python train.py --config=configs/npz_dense.py:my_images.npz

The file holds images [N, H, W] or [N, H, W, C] (uint8), labels [N] (0, 1, ...) and, if you like, class_names,
test_images and test_labels. Choose config.model.patch_size so that it divides height and width.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import mnist_dense


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg is the path of the .npz file."""
    config = mnist_dense.get_config()
    config.name = f"{Path(arg).stem}_dense"
    config.data.source = "npz"
    config.data.path = arg
    config.data.mean = config.data.std = ()  # measured on the training images
    return config
