"""Fashion-MNIST, 28x28, patch 4, 49 tokens, 12 layers: the whole way from a static ViT to A-ViT on 60,000 real images.

    apt-get install dataset-fashion-mnist            (Debian, MIT licence; or give --config.data.path=FOLDER)
    python train.py --config=configs/fashion_mnist.py:dense            the static model
    python train.py --config=configs/fashion_mnist.py:avit             A-ViT from it
    python train.py --config=configs/fashion_mnist.py:dense_more       the static model, as many epochs more

4,800 of the training images are for validation; settings were chosen there. The 10,000 test images are read at the end.
"""

from ml_collections import ConfigDict

from configs import mnist_avit, mnist_dense

CLASS_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "trainer",
    "bag",
    "ankle boot",
)
STATIC_MODEL = "checkpoints/fashion_mnist_dense"


def get_config(arg: str = "avit") -> ConfigDict:
    """The experiment: dense, avit or dense_more."""
    if arg not in ("dense", "avit", "dense_more"):
        raise ValueError(f"{arg!r} is none of dense, avit, dense_more")
    config = mnist_avit.get_config() if arg == "avit" else mnist_dense.get_config()
    config.name = f"fashion_mnist_{arg}"
    config.data.update({"source": "idx", "path": "/usr/share/datasets/fashion-mnist", "class_names": CLASS_NAMES})
    config.data.update({"mean": (0.286,), "std": (0.353,)})
    # Clothes are photographed upright and centred: little of what digits vary by.
    config.augment.update({"rotate": 0.0, "scale": 0.08, "shear": 0.0, "translate": 1.5})
    config.batch_size = 100
    config.eval_batch_size = 200
    config.log_every = 50
    config.eval_every = 550
    config.checkpoint_every = 275
    if arg == "dense":
        # The digits' model is no pretraining to speak of, but 12 layers start from it far sooner than from noise.
        config.init_from = "checkpoints/mnist_dense"
        config.epochs = 10.0
        config.optim.update({"learning_rate": 1.5e-3, "warmup_steps": 275, "ema_decay": 0.0})
        return config
    config.epochs = 3.0
    config.optim.update({"learning_rate": 3e-4, "warmup_steps": 100, "ema_decay": 0.998})
    config.init_from = config.teacher = STATIC_MODEL
    config.loss.update({"distillation": "soft", "distillation_weight": 0.9, "distillation_temperature": 2.0})
    config.loss.label_smoothing = 0.0
    config.model.drop_path_rate = 0.0
    return config
