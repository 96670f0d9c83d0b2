"""The static ViT that A-ViT starts from: MNIST digits, 28x28, patch 4, 49 tokens, 12 layers.

    python train.py --config=configs/mnist_dense.py             half an hour on 2 CPU cores

Expected: 98.0 % on the 1,000 test images (99 % on the 400 validation images). The result is checkpoints/mnist_dense.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg is not used."""
    config = base.get_config(arg)
    config.name = "mnist_dense"
    config.data.update({"mean": (0.1307,), "std": (0.3081,)})
    # Degrees, fractions and pixels by which handwriting varies; too few to turn a 6 into a 9.
    config.augment.update({"rotate": 12.0, "scale": 0.12, "shear": 0.15, "translate": 2.0})
    # Image size, channels, classes and class names come from the data. Without a gate no token ever halts.
    config.model.update({"patch_size": 4, "embed_dim": 64, "depth": 12, "num_heads": 4, "mlp_ratio": 4.0})
    config.model.update({"drop_rate": 0.0, "drop_path_rate": 0.05, "halt_epsilon": 0.01, "dtype": "float32"})
    config.model.remat = True  # faster on a CPU, where writing activations costs more than computing them again
    config.loss.label_smoothing = 0.1
    config.optim.update({"learning_rate": 1.5e-3, "warmup_steps": 180, "clip_norm": 1.0})
    config.epochs = 160.0
    config.log_every = 12
    config.eval_every = 72
    config.checkpoint_every = 360
    return config
