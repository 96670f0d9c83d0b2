"""Rules of other papers, fine-tuned on Fashion-MNIST at the same work and with the same objective as A-ViT.

    python train.py --config=configs/prior_art.py:tome,0.71       one training: METHOD,WORK
    python benchmarks/prior_art.py                                all trainings of the comparison, and their figures

METHOD is static, layers (the first layers of the static model), image (a smaller image), the name of a rule,
dynamicvit_own (DynamicViT with the losses and learning rates of its paper), mctf_own (MCTF with the second pass of its
paper), or avit_hidden (the second attempt of A-ViT: its gate starts from hidden units too, with depths that differ
more, and trains without ponder cost and prior).
WORK is 0.71 or 0.49, the share of the static model's multiply-adds that an image may cost; the last layer computes only
what the logits read. With layers and image it is the number of layers or the image's side in pixels. static and
confidence have no WORK. benchmarks/prior_art.py writes what layers, image and act start from, and runs `positions`,
whose depths come from a trained A-ViT.

All methods start from checkpoints/fashion_mnist_dense, which is also the teacher, and train for two epochs. The
learning rate was chosen from 3e-4, 1e-3 and 2e-3 by validation top-1 at work 0.6 after half an epoch with one seed, for
static, layers, avit, tome, evit and dynamicvit. The other methods have the rate of their nearest relative.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.execution.work import shrinking_gmacs
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT, model_of_shapes
from configs import fashion_mnist

RATES_TRIED = (3e-4, 1e-3, 2e-3)
RATES = {
    "static": 3e-4,
    "layers": 1e-3,
    "avit": 1e-3,
    "tome": 3e-4,
    "evit": 1e-3,
    "dynamicvit": 2e-3,
}
RELATIVES = {
    "avit_hidden": "avit",
    "image": "static",
    "confidence": "static",
    "pondernet": "static",
    "act": "avit",
    "similarity": "avit",
    "gates": "avit",
    "positions": "avit",
    "mctf": "tome",
    "mctf_own": "tome",
    "topk": "evit",
    "random": "evit",
    "ats": "evit",
    "mass": "evit",
}
RATES |= {method: RATES[relative] for method, relative in RELATIVES.items()}
RATES["dynamicvit_own"] = 1e-5  # of the backbone; the predictors have 100 times as much, as in the paper
# Within 1 % of the work, as avit_jax.calibrate finds it for the static model.
SETTINGS = {
    "tome": {"0.71": "tome(r=2)", "0.6": "tome(r=3)", "0.49": "tome(r=4)"},
    "evit": {"0.71": "evit(keep_rate=0.76)", "0.6": "evit(keep_rate=0.63)", "0.49": "evit(keep_rate=0.465)"},
    "topk": {"0.71": "topk(keep_rate=0.78)", "0.49": "topk(keep_rate=(0.5, 0.5, 0.46))"},
    "random": {"0.71": "random(keep_rate=0.78)", "0.49": "random(keep_rate=(0.5, 0.5, 0.46))"},
    "dynamicvit": {
        "0.71": "dynamicvit(keep_rate=0.796)",
        "0.6": "dynamicvit(keep_rate=0.675)",
        "0.49": "dynamicvit(keep_rate=0.535)",
    },
    "mctf": {
        "0.71": "mctf(r=(2, 3, 2, 3, 3, 2, 3, 3, 2, 3, 3))",
        "0.49": "mctf(r=(5, 5, 5, 5, 4, 5, 5, 5, 5, 5, 5))",
    },
}
# Where every image keeps its own number of tokens, training starts from these, and the setting that meets the work is
# found after training. PonderNet's prior has the mean depth that costs the work. One training of the exit heads serves
# all thresholds.
STARTS = {
    "confidence": {"": "confidence(threshold=0.9, own_heads=True)"},
    "pondernet": {"0.71": "pondernet(lambda_p=0.068)", "0.49": "pondernet(lambda_p=0.143)"},
    "act": {"0.71": "act()", "0.49": "act()"},
    "similarity": {
        "0.71": "similarity(thresholds=(0.79343, 0.99098, 0.99192, 0.99363, 0.99299, 0.99193, "
        "0.99332, 0.99424, 0.99318, 0.99055, 0.98693, 0.95752))",
        "0.49": "similarity(thresholds=(0.73613, 0.98526, 0.98603, 0.98965, 0.98908, 0.98746, "
        "0.98908, 0.99107, 0.98892, 0.98505, 0.97976, 0.93952))",
    },
    "ats": {"0.71": "ats(samples=374)", "0.49": "ats(samples=52)"},
    "mass": {"0.71": "mass(share=0.98)", "0.49": "mass(share=0.866)"},
    "gates": {"0.71": "gates()", "0.49": "gates()"},
}
# Mean depth at which A-ViT's gate starts, and ACT's, whose images leave whole; in layers.
GATE_START = {"0.71": 9.0, "0.6": 7.5, "0.49": 6.15}
# The share of patches, of heads and of sublayers that leaves about the work: gates^2 (1 + 2 gates) / 3.
GATES_ON = {"0.71": 0.88, "0.49": 0.77}
ACT_DEPTH = {"0.71": 8.5, "0.49": 5.9}
ACT_PRIOR = {"0.71": (6.0, 0.5), "0.49": (5.0, 5.0)}  # the centre of its prior, in layers, and its weight
# The architecture of checkpoints/fashion_mnist_dense.
STATIC = AViTConfig(image_size=28, patch_size=4, in_channels=1, num_classes=10, embed_dim=64, num_heads=4)
WHOLE_GMACS = shrinking_gmacs(STATIC, short_last_layer=False)


def get_config(arg: str = "static") -> ConfigDict:
    """The experiment; arg: METHOD,WORK. Raises ValueError for a method or work that is not there."""
    method, _, work = arg.partition(",")
    if method not in RATES:
        raise ValueError(f"{method!r} is not one of {', '.join(RATES)}")
    if method in ("static", "confidence") and work:
        raise ValueError(f"{method} has no WORK: leave out ',{work}'")
    config = fashion_mnist.get_config("avit" if method in ("avit", "avit_hidden") else "dense_more")
    config.name = f"prior_art_{method}" + (f"_{work}" if work else "")
    config.epochs = 2.0
    config.eval_every = 552
    config.checkpoint_every = 138
    config.keep_checkpoints = 1
    config.optim.update({"learning_rate": RATES[method], "warmup_steps": 50})
    if method == "static":
        pass
    elif method == "layers":
        config.model.depth = _whole(work, "layers,9 is the first 9 layers")
        config.init_from = first_layers_path(config.model.depth)
    elif method == "image":
        side = _whole(work, "image,24 is images of 24x24 pixels")
        config.data.update({"source": "npz", "path": images_path(side), "class_names": ()})
        config.model.image_size = side
        config.augment.translate *= side / 28
    elif method in ("avit", "avit_hidden"):
        if method == "avit_hidden":
            # Before any training, half of the work leaves 86.9 % with the deviation of the other A-ViT rows, 3.5, and
            # 88.2 % with 6 (benchmarks/gate_start.py; chosen on validation images).
            config.gate_start.update({"features": "hidden", "deviation": 6.0})
            # From there the ponder cost makes nearly all tokens stop after three layers within 150 steps, because gates
            # far from their threshold have no gradient that the prior could hold them with. Without both the mean depth
            # stays within a quarter of a layer, and calibration sets the work after training, as for all these rules.
            config.loss.update({"ponder_weight": 0.0, "prior_weight": 0.0})
        depth = _of(GATE_START, work, method)
        config.gate_start.target_depth = depth
        config.loss.prior_target_depth = depth + 0.6
    elif method == "positions":
        config.model.rule = method  # without depths, which training refuses; benchmarks/prior_art.py adds them
    else:
        kind = method.removesuffix("_own")
        config.model.rule = _of((SETTINGS | STARTS)[kind], work, method)
    if method == "act":
        config.init_from = gate_path(work)
        # With A-ViT's prior_weight of 5e-3, with 0.05, and with ten times the ponder cost all images go to layer 12
        # within 100 steps. With 0.5 and the centre where A-ViT has it they go to 10.4. So the centre is lower: half an
        # epoch with 6.5 at 71 % of the work ends at 8.9 layers and 89.7 % of the validation images, and one with a
        # weight of 5 around 9.1 at 8.7 layers and 88.4 %. At 49 % two epochs with 0.5 around 3 end at 8.1 layers, and
        # after calibration at 78.3 %; with 5 around 5 they end at 5.4 layers, and at 88.2 %.
        center, weight = ACT_PRIOR[work]
        config.loss.update({"ponder_weight": 2.9e-4, "prior_weight": weight, "prior_deviation": 3.0})
        config.loss.prior_target_depth = center
    if method == "pondernet":
        # With the paper's 0.01 images still cost 93 % of the work after training, and no threshold meets a budget.
        # After half an epoch 600 validation images have 89.7 % with 0.1 and 88.3 % with 0.5 at 71 % of the work, 85.7 %
        # and 85.8 % at 49 %.
        config.loss.geometric_weight = 0.1
    if method == "gates":
        config.loss.update({f"{part}_target": GATES_ON[work] for part in ("token", "head", "sublayer")})
    if method == "dynamicvit":
        config.loss.teacher_logits_weight = 0.0  # all methods learn from the teacher's logits
    if method == "mctf":  # all methods have the same losses; mctf_own adds those of its paper
        config.loss.update({"second_pass_weight": 0.0, "agreement_weight": 0.0})
    if method == "dynamicvit_own":
        config.loss.distillation_weight = 0.0
        # The paper freezes the backbone for 5 of 30 epochs.
        config.optim.update({"rule_factor": 100.0, "final_learning_rate": 1e-6, "frozen_steps": 184})
    return config


def _of(table: dict[str, Any], work: str, method: str) -> Any:
    if work not in table:
        raise ValueError(f"{method} has no settings for work {work!r}: give {' or '.join(table)}")
    return table[work]


def _whole(work: str, example: str) -> int:
    if not (work.isdigit() and work.isascii() and int(work)):
        raise ValueError(f"{work!r} is not a number: {example}")
    return int(work)


def share(config: AViTConfig) -> float:
    """The work of a model with fixed counts as a share of the static model's, with a short last layer."""
    return shrinking_gmacs(config, short_last_layer=True) / WHOLE_GMACS


def gate_path(work: str) -> str:
    """Where benchmarks/prior_art.py writes the static model with the start of a gate, for ACT."""
    return f"runs/prior_art/start/gate_{work}"


def images_path(side: int) -> str:
    """Where benchmarks/prior_art.py writes the images of this side."""
    return f"runs/prior_art/start/images_{side}.npz"


def first_layers_path(layers: int) -> str:
    """Where benchmarks/prior_art.py writes the model that `first_layers` returns."""
    return f"runs/prior_art/start/layers_{layers}"


def first_layers(model: AViT, layers: int) -> AViT:
    """The first layers of a model, with its final norm and head."""
    config = dataclasses.replace(model.config, depth=layers)
    arrays = nnx.to_pure_dict(nnx.state(model))
    arrays["blocks"] = jax.tree.map(lambda array: array[:layers], arrays["blocks"])
    graphdef, state = nnx.split(model_of_shapes(config))
    nnx.replace_by_pure_dict(state, arrays)
    return nnx.merge(graphdef, state)
