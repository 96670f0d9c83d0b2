"""Your own pictures in a folder, any size: first a static ViT, then A-ViT from it.

    python train.py --config=configs/folder.py:dense,/data/pictures
    python train.py --config=configs/folder.py:avit,/data/pictures

The folder has train/CLASS/ and val/CLASS/ (and test/CLASS/ if you like), or just CLASS/. With just CLASS/, 72 % of each
class are for training, 8 % for validation and 20 % for the test. Pictures are JPEG, PNG, WebP and others, of any size.

Pictures are cut to 64x64 pixels. --config.model.image_size=128 --config.model.patch_size=16 shows the model more; the
patch size must divide the image size. Set --config.augment.flip=0 if left and right differ (text, digits).

With published weights instead of random ones, name a preset as the third word:

    python train.py --config=configs/folder.py:dense,/data/pictures,deit_tiny_patch16_224
    python train.py --config=configs/folder.py:avit,/data/pictures,deit_tiny_patch16_224

The first reads deit_tiny_patch16_224.pth in the current folder, or --config.init_from=FILE.

The settings are for hundreds to thousands of pictures; they were tried on made-up pictures of three classes.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base


def get_config(arg: str = "avit") -> ConfigDict:
    """The experiment: dense or avit, then after commas the folder, and a preset if the weights are published ones."""
    kind, _, rest = arg.partition(",")
    path, _, preset = rest.partition(",")
    if kind not in ("dense", "avit"):
        raise ValueError(f"{kind!r} is neither dense nor avit: write folder:dense,FOLDER or folder:avit,FOLDER")
    config = base.get_config()
    stem = Path(path).name or "folder"
    config.name = f"{stem}_{kind}"
    config.data.update({"source": "folder", "path": path})  # mean and std are those of ImageNet
    config.augment.update({"crop_scale": (0.4, 1.0), "flip": 0.5, "color_jitter": 0.2})
    if preset:
        config.model.update({"preset": preset, "drop_path_rate": 0.1, "remat": True})
        config.init_from = f"{preset}.pth"
    else:
        config.model.update({"image_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 12, "num_heads": 4})
        config.model.update({"mlp_ratio": 4.0, "halt_epsilon": 0.01, "drop_rate": 0.0, "drop_path_rate": 0.05})
        config.model.update({"dtype": "float32", "remat": True})
    config.loss.label_smoothing = 0.1
    config.batch_size = 32
    config.eval_batch_size = 64
    config.log_every = 10
    config.eval_every = config.checkpoint_every = 100
    # Warm-up is counted in epochs, so that it suits folders of any number of pictures.
    config.optim.update({"schedule": "epoch", "warmup_epochs": 5, "warmup_learning_rate": 1e-5, "clip_norm": 1.0})
    config.optim.warmup_steps = 180  # not used by schedule "epoch"; kept, so that earlier runs resume
    config.optim.learning_rate = 1e-4 if preset else 5e-4
    config.epochs = 30.0 if preset else 100.0
    if kind == "dense":
        return config
    config.init_from = config.teacher = f"runs/{stem}_dense/model"
    config.gate_start.update({"images": 1000, "target_depth": 8.0, "deviation": 2.5})
    config.model.update({"gate_scale": 5.0, "gate_center": 10.0, "drop_path_rate": 0.0})
    config.loss.update({"distillation": "soft", "distillation_weight": 0.9, "distillation_temperature": 2.0})
    config.loss.update({"ponder_weight": 5e-4, "prior_weight": 5e-3, "prior_target_depth": 8.0, "prior_deviation": 3.0})
    config.loss.label_smoothing = 0.0
    config.optim.update({"learning_rate": 1e-4 if preset else 2e-4, "warmup_epochs": 2, "ema_decay": 0.98})
    config.epochs = 20.0
    return config
