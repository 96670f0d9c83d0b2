"""Patches cut at random places (RaViTT, arXiv 2306.10959) with few labels: digits and Fashion-MNIST, random weights.

    python train.py --config=configs/random_patches.py:mnist,360,uniform,0.5            one training
    python benchmarks/random_patches.py                                                 every training of the table

The argument is DATA,IMAGES,LAW,PROBABILITY or the same with ",affine" at its end. DATA is mnist (360, 1200 or 3600
digits) or fashion (1000, 5000 or 55200 images). LAW is grid (the model of today), jitter or uniform. PROBABILITY is
that of cutting an image at random. "affine" adds the random affine changes of configs/mnist_dense.py or
configs/fashion_mnist.py, which overlap with random patches.

The paper's settings are not known to us; all of these are our choices.
"""

from ml_collections import ConfigDict

from configs import fashion_mnist, mnist_dense

LAWS = ("grid", "jitter", "uniform")
# Every training sees about 108,000 images, in 1,800 steps. With 12 layers and a third of the steps, random patches and
# affine changes are far from learned when training ends, and lose 5 to 17 points to the grid on 360 digits.
EPOCHS = {"mnist": {360: 300, 1200: 90, 3600: 30}, "fashion": {1000: 108, 5000: 22, 55200: 2}}
LAYERS = 4
_FORM = "write DATA,IMAGES,LAW,PROBABILITY such as mnist,360,uniform,0.5, with ,affine at its end or without"


def get_config(arg: str = "mnist,360,uniform,0.5") -> ConfigDict:
    """The experiment; arg: see above. Raises ValueError for anything else."""
    parts = arg.split(",")
    affine = parts[-1] == "affine"
    if len(parts) - affine != 4:
        raise ValueError(f"{arg!r} is not an experiment: {_FORM}")
    data, images, law, probability = parts[:4]
    if data not in EPOCHS or not images.isdigit() or int(images) not in EPOCHS[data]:
        known = "; ".join(f"{name} with {', '.join(map(str, sizes))}" for name, sizes in EPOCHS.items())
        raise ValueError(f"{data},{images} is not one of the data: {known}")
    if law not in LAWS:
        raise ValueError(f"the law {law!r} is not one of {', '.join(LAWS)}")
    try:
        share = float(probability)
    except ValueError:
        raise ValueError(f"the probability {probability!r} is not a number: {_FORM}") from None
    config = fashion_mnist.get_config("dense") if data == "fashion" else mnist_dense.get_config()
    config.name = "random_patches_" + "_".join(parts)
    config.init_from = ""
    config.data.train_images = int(images)
    if not affine:
        config.augment.update({"rotate": 0.0, "scale": 0.0, "shear": 0.0, "translate": 0.0})
    # On the grid the probability changes nothing, and the code of random patches is not even there.
    config.augment.update({"random_law": law, "random_patches": 0.0 if law == "grid" else share})
    config.epochs = float(EPOCHS[data][int(images)])
    config.batch_size = 60
    config.model.depth = LAYERS
    steps = config.epochs * int(images) / config.batch_size
    config.optim.update({"learning_rate": 1e-3, "warmup_steps": int(steps / 20), "ema_decay": 0.0})
    config.model.drop_path_rate = 0.0
    config.loss.label_smoothing = 0.1
    config.eval_every = config.checkpoint_every = max(1, int(steps / 5))
    config.keep_checkpoints = 1
    return config
