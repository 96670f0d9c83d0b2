"""Scattered Fashion-MNIST, 56x56, patch 4, 197 tokens, 12 layers: one to three items among small pieces.

    python train.py --config=configs/scattered.py:dense                the static model, from Fashion-MNIST's
    python train.py --config=configs/scattered.py:avit                 one epoch from it at 60 % of its work

The pictures are made while they are read (avit_jax/data/scattered.py), from the files of configs/fashion_mnist.py. The
label is the largest item's. Three quarters of the pixels are black.

Hardware: 2 CPU cores, two hours on one of them. Expected: 65.5 % on the 10,000 test pictures.

- mean and std are those of the 55,200 training pictures.
- The model of Fashion-MNIST brings all weights; its 7x7 positions are resized to 14x14 when it is loaded.
- Items already vary in size and place, so pictures are only shifted, by up to two pixels.
- What is trained further has the objective and the learning rates of configs/prior_art.py: avit, avit_hidden, tome,
  evit, layers and positions at 60 % of the work, and static. ToMe's and EViT's settings are those that
  avit_jax.calibrate finds. benchmarks/prior_art.py runs positions, whose depths come from the trained avit_hidden.
- avit_hidden: three of five patches are black. Before any training, 600 validation pictures had 65.7 % with a deviation
  of 6 layers, 65.5 % with 3.5 and 60.2 % with 2, at 0.096, 0.099 and 0.104 GMACs (static: 66.5 % at 0.163).
"""

from ml_collections import ConfigDict

from configs import fashion_mnist, prior_art

STATIC_MODEL = "checkpoints/scattered_dense"
WORK = "0.6"  # of the static model's
LAYERS = 8  # that cost it
SETTINGS = {
    "tome": "tome(r=(10, 11, 11, 10, 11, 11, 11, 10, 11, 11, 10, 11))",
    "evit": "evit(keep_rate=(0.704, 0.691, 0.701))",
}
MOVED = ("avit", "avit_hidden", "positions", *SETTINGS)  # whose setting can change after training
METHODS = ("static", "layers", *MOVED)
BUDGETS = ("0.6", "0.7", "0.5")  # at which they are evaluated


def get_config(arg: str = "dense") -> ConfigDict:
    """The experiment; arg: dense, or one of METHODS. Raises ValueError for another one."""
    if arg == "dense":
        config = fashion_mnist.get_config("dense")
        config.init_from = fashion_mnist.STATIC_MODEL
        config.epochs = 2.0
        config.optim.update({"learning_rate": 1e-3, "warmup_steps": 100})
    elif arg in METHODS:
        work = {"static": "", "layers": str(LAYERS)}.get(arg, WORK)
        config = prior_art.get_config(f"{arg},{work}")
        config.init_from = first_layers_path(LAYERS) if arg == "layers" else STATIC_MODEL
        config.teacher = STATIC_MODEL
        config.epochs = 1.0
        if arg in SETTINGS:
            config.model.rule = SETTINGS[arg]
        if arg == "avit_hidden":
            config.gate_start.target_depth = 8.2
    else:
        raise ValueError(f"{arg!r} is not one of dense, {', '.join(METHODS)}")
    config.name = f"scattered_{arg}"
    config.data.update({"source": "scattered", "mean": (0.1555,), "std": (0.2903,)})
    config.model.image_size = 56
    config.augment.update({"rotate": 0.0, "scale": 0.0, "shear": 0.0, "translate": 2.0})
    return config


def first_layers_path(layers: int) -> str:
    """Where benchmarks/prior_art.py writes the first layers of the static model."""
    return f"runs/prior_art/start/scattered_layers_{layers}"
