"""The static ViT that A-ViT starts from: MNIST digits, 28x28, patch 4, 49 tokens, 12 layers.

    python train.py --config=configs/mnist_dense.py             half an hour on 2 CPU cores

Expected: 98.0 % on the 1,000 test images (99 % on the 400 of validation). Its result is checkpoints/mnist_dense.
"""

import dataclasses

from ml_collections import ConfigDict

from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.model.settings import model_settings


def get_config(arg: str = "") -> ConfigDict:
    """The experiment; arg is not used."""
    del arg
    config = ConfigDict()
    config.name = "mnist_dense"
    config.seed = 0
    # Every key is there, with its default and its meaning in avit_jax/data/settings.py.
    config.data = ConfigDict(dataclasses.asdict(DataSettings(source="mnist", mean=(0.1307,), std=(0.3081,))))
    # In pixels, degrees and fractions: what handwriting varies by, without turning a 6 into a 9.
    affine = AugmentSettings(rotate=12.0, scale=0.12, shear=0.15, translate=2.0)
    config.augment = ConfigDict(dataclasses.asdict(affine))
    # A key for every field of AViTConfig. Image size, channels, classes and class names come from the data.
    config.model = model_settings(
        patch_size=4,
        embed_dim=64,
        depth=12,
        num_heads=4,
        mlp_ratio=4.0,
        drop_rate=0.0,
        drop_path_rate=0.05,
        halt_epsilon=0.01,  # gate_scale and gate_center are not given: no token ever halts
        dtype="float32",
        remat=True,  # faster on a CPU, where writing activations costs more than computing them again
    )
    config.init_from = ""  # a checkpoint: the weights to start from, and the dense row of the table
    # How tokens of init_from halt before training: from so many images, 0 for as its channel 0 has it (gate_start.py).
    config.gate_start = ConfigDict({"images": 0, "target_depth": 0.0, "deviation": 0.0})
    config.teacher = ""  # a checkpoint: the teacher of config.loss.distillation
    config.loss = ConfigDict(
        {
            "label_smoothing": 0.1,
            "ponder_weight": 0.0,
            "prior_weight": 0.0,
            "prior": "kl",
            "prior_target_depth": 9.0,
            "prior_deviation": 1.0,  # layers, of prior "kl"; "official" is always around layer 9 with deviation 1
            "distillation": "none",
            "distillation_weight": 0.5,
            "distillation_temperature": 1.0,
        }
    )
    config.optim = ConfigDict(
        {
            "learning_rate": 1.5e-3,
            "reference_batch": 0,  # not 0: learning_rate is for this batch and grows with batch_size
            "final_learning_rate": 1e-5,
            "schedule": "step",  # or "epoch": timm's, with warmup_epochs from warmup_learning_rate
            "warmup_steps": 180,
            "warmup_epochs": 0,
            "warmup_learning_rate": 0.0,
            "weight_decay": 0.05,
            "beta1": 0.9,
            "beta2": 0.999,
            "clip_norm": 1.0,  # 0: no clipping
            "ema_decay": 0.0,
            "compare_ema": False,  # True: raw weights are evaluated too, and the better ones on validation are kept
        }
    )
    config.mesh = ConfigDict({"data": -1, "fsdp": 1})  # devices that split the batch; that split the state too
    config.accumulation = 1  # parts that a batch is worked on in, one after the other
    config.on_nan = "stop"  # or "roll back": once, to the last checkpoint, past the data that did it
    config.peak_tflops = 0.0  # of a device, for the share of it that is used (MFU); 0: not reported
    config.profile = ""  # START:STEPS: a trace of those steps for TensorBoard or Perfetto
    config.epochs = 160.0
    config.batch_size = 100
    config.eval_batch_size = 200
    config.log_every = 12  # steps
    config.eval_every = 72
    config.checkpoint_every = 360
    config.keep_checkpoints = 2  # the last ones
    config.keep_every = 0  # and every so many steps
    config.keep_best = 0  # and so many of the best by top-1 on validation
    return config
