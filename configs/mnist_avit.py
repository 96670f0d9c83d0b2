"""A-ViT from the shipped dense ViT, on MNIST digits."""

from ml_collections import ConfigDict

from configs import mnist_dense


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg is not used."""
    config = mnist_dense.get_config(arg)
    config.name = "mnist_avit"
    config.init_from = "checkpoints/mnist_dense"
    config.model.gate_scale = 10.0
    config.model.gate_center = 30.0
    config.loss.ponder_weight = 0.01
    config.loss.prior_weight = 0.1
    config.loss.prior_target_depth = 7.0
    return config
