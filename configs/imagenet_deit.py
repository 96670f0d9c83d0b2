"""DeiT on ImageNet, 224x224, as its authors trained it: the static models that A-ViT starts from.

    python train.py --config=configs/imagenet_deit.py:tiny --config.data.path=/data/imagenet       (or :small, :base)
    ... --config.data.source=tfds --config.data.name=imagenet2012                                  from ArrayRecord

Published (arXiv 2012.12877; top-1, 10^9 multiply-adds): tiny 72.2 %, 1.25; small 79.8 %, 4.60; base 81.8 %, 17.6.
Not run by us: no ImageNet here. Computed, not measured, for 300 epochs of 1,281,167 images (a step does the work of 3
forward passes, 4 with remat, at 40 % of the peak bfloat16 matmul rate, and never waits for data), without the
optimiser's update and the sums of gradients; docs/scaling.md counts them:

    hardware    peak        tiny                  small                 base
    8 x H100    989 TF/s    316k images/s, 0.3 h  86k images/s, 1.2 h   22k images/s, 4.8 h
    v5e-256     197 TF/s    2.0M images/s, 0.1 h  548k images/s, 0.2 h  143k images/s, 0.7 h
    v5e-8       197 TF/s    63k images/s, 1.7 h   17k images/s, 6.2 h   4.5k images/s, 24 h

docs/results.md says how many images a CPU core reads per second (benchmarks/input_pipeline.py). For tiny, this is the
limit. On v5e-256 a batch of 1024 leaves 4 images for each chip, and summing gradients then takes most of a step
(docs/scaling.md: 414k, 206k, 70k images/s). The figures above are for at least 128 images for each chip.
"""

from ml_collections import ConfigDict

from configs import base

LEARNING_RATES = {"tiny": 5e-4, "small": 5e-4, "base": 5e-4}  # for a batch of 512
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def get_config(arg: str = "small") -> ConfigDict:
    """The experiment: tiny, small or base."""
    if arg not in LEARNING_RATES:
        raise ValueError(f"{arg!r} is not a size: choose one of {', '.join(LEARNING_RATES)}")
    config = base.get_config()
    config.name = f"imagenet_deit_{arg}"
    config.data.update({"source": "folder", "path": "/data/imagenet", "mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    config.data.update({"repeated_augmentation": 3, "workers": 16})
    config.augment.update({"crop_scale": (0.08, 1.0), "flip": 0.5, "randaugment": "rand-m9-mstd0.5-inc1"})
    config.augment.update({"color_jitter": 0.3})  # used if RandAugment is switched off
    config.augment.update({"erasing": 0.25, "mixup": 0.8, "cutmix": 1.0})
    config.model.update({"preset": f"deit_{arg}_patch16_224", "image_size": 224, "drop_path_rate": 0.1})
    config.model.update({"dtype": "bfloat16", "remat": True})
    config.optim.update({"learning_rate": LEARNING_RATES[arg], "reference_batch": 512, "final_learning_rate": 1e-5})
    config.optim.update({"schedule": "epoch", "warmup_epochs": 5, "warmup_learning_rate": 1e-6})
    config.optim.warmup_steps = 180  # not used by schedule "epoch"; kept, so that earlier runs resume
    config.optim.update({"weight_decay": 0.05, "ema_decay": 0.99996, "compare_ema": True})
    config.loss.label_smoothing = 0.1
    config.epochs = 300.0
    config.batch_size = 1024
    config.eval_batch_size = 1024
    config.log_every = 50
    config.eval_every = config.checkpoint_every = 1251  # an epoch
    return config
