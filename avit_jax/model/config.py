"""The configuration of a model: architecture, rule, and the preprocessing and class names saved with it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from avit_jax.gated.gates import Gates
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.rule import Halting
from avit_jax.model.fused import ATTENTION, cudnn_takes
from avit_jax.reduction.groups import Reduction
from avit_jax.rules import RULES, rule_from_json, rule_to_json
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.json_fields import typed_fields
from avit_jax.runtime.settings import setting

# At least this part of the resized image is cropped: 384 pixels of 3840. Published models use 0.8 to 1.
MIN_CROP_FRACTION = 0.1
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
POOLS = ("token", "mean_norm", "norm_mean", "token_and_mean")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image is prepared for the model; mean and std are per channel, for pixels of 0..1.

    Raises ValueError for values that are out of range.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_fraction: float = 0.875  # the model sees this part of the resized image (224 of 256)
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}: give both the same number")
        if not self.std or min(self.std) <= 0:
            raise ValueError(f"std is {self.std}: give a number above 0 for every channel")
        if not MIN_CROP_FRACTION <= self.crop_fraction <= 1:
            raise ValueError(
                f"crop_fraction is {self.crop_fraction}: it must be at least {MIN_CROP_FRACTION} and at most 1"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {self.interpolation!r} is unknown: choose one of {INTERPOLATIONS}")


@dataclasses.dataclass(frozen=True)
class AViTConfig:
    """Architecture and rule of a model; hashable, and written as JSON beside every checkpoint.

    rule decides which tokens go on. None means A-ViT's gate if gate_scale is given, and otherwise a plain ViT in which
    every token runs through all layers. A rule given here takes precedence over the gate.

    pool is what the head reads: "token", the class token after the final LayerNorm; "mean_norm", the mean of the
    patches, then LayerNorm (timm's fc_norm, MAE); "norm_mean", LayerNorm, then the mean of the patches (AugReg's GAP);
    "token_and_mean", LayerNorm, then the class token beside the mean of the patches (DINOv2's classifier). The value of
    a token is its weighted sum over layers, and the mean is over all patches. The num_registers register tokens come
    after the class (and distillation) token and before the patches. With num_classes 0 there is no head, and the logits
    are the features that it would read.

    Raises ValueError if the values do not fit together.
    """

    image_size: int | Sequence[int] = setting(224, "Pixels: one side, or (height, width).")
    patch_size: int = setting(16, "Side of a patch in pixels; height and width must be multiples of it.")
    in_channels: int = setting(3, "Channels of an image.")
    num_classes: int = setting(1000, "Classes; 0: no head.")
    embed_dim: int = setting(192, "Width of a token.")
    depth: int = setting(12, "Layers.")
    num_heads: int = setting(3, "Attention heads; embed_dim must be a multiple of their number.")
    mlp_ratio: float = setting(4.0, "Width of the MLP's hidden layer, in units of embed_dim.")
    qkv_bias: bool = setting(True, "Whether queries, keys and values have biases.")
    distilled: bool = setting(False, "Whether there is a distillation token, with a head of its own.")
    class_token: bool = setting(True, "Whether there is a class token.")
    num_registers: int = setting(0, "Register tokens, which no head reads.")
    pool: str = setting("token", "What the head reads: token, mean_norm, norm_mean or token_and_mean.")
    norm_epsilon: float = setting(1e-6, "Added to the variance in every LayerNorm.")
    gate_scale: float | None = setting(None, "Halting score: sigmoid(gate_scale * channel 0 - gate_center).")
    gate_center: float | None = setting(None, "See gate_scale; without both no token ever halts.")
    halt_epsilon: float = setting(0.01, "A token stops once its halting scores add up to 1 - halt_epsilon.")
    rule: Halting | Reduction | Gates | None = setting(None, "A rule to use instead of the gate, such as tome(r=8).")
    drop_rate: float = setting(0.0, "Dropout rate in training, for embeddings, attention output and MLP.")
    drop_path_rate: float = setting(0.0, "Stochastic depth in training: rate of the last layer; the first has 0.")
    dtype: str = setting("float32", "Type of matrix products: float32 or bfloat16. Parameters are float32.")
    attention: str = setting(
        "auto", "auto: cuDNN's fused kernel on a GPU if it applies; plain: no kernel; cudnn; xla: JAX's own."
    )
    remat: bool = setting(
        False, "Recompute all activations in the backward pass; False: only norms, GELU and attention weights."
    )
    preprocessing: Preprocessing = Preprocessing()
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.rule, AViTGate):  # its settings have fields of their own
            for name, value in dataclasses.asdict(self.rule).items():
                object.__setattr__(self, name, value)
            object.__setattr__(self, "rule", None)
        if isinstance(self.rule, type):
            raise ValueError(f"rule is the class {self.rule.__name__}: give its settings, such as ToMe(r=8)")
        if self.rule is not None and not isinstance(self.rule, Halting | Reduction | Gates):
            kind = type(self.rule).__name__
            raise ValueError(f"rule has the type {kind}: give one of the rules {', '.join(RULES)}, or None")
        for name in ("image_size", "class_names"):
            if isinstance(getattr(self, name), list):  # from JSON or a config file; a tuple can be hashed
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size has {len(self.image_size)} numbers: give one side, or height and width")
        for name in ("patch_size", "in_channels", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("num_classes", "num_registers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        for side, size in zip(("height", "width"), self.image_shape, strict=True):
            if size < self.patch_size or size % self.patch_size:
                raise ValueError(
                    f"image {side} {size} is not divisible by patch_size {self.patch_size}: change one of them"
                )
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}: change one of them"
            )
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown: choose one of {', '.join(POOLS)}")
        if self.distilled and (self.pool != "token" or not self.class_token):
            raise ValueError(
                "a distilled model has a head on its class token and one on its distillation token: "
                "give class_token=True and pool='token'"
            )
        if not self.class_token and self.pool in ("token", "token_and_mean"):
            raise ValueError(
                f"pool {self.pool!r} reads the class token and class_token is False: "
                "choose pool 'mean_norm' or 'norm_mean'"
            )
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}: it must lie between 0 and 1")
        if (self.gate_scale is None) != (self.gate_center is None):
            raise ValueError(
                f"gate_scale is {self.gate_scale} and gate_center {self.gate_center}: give both, or None for both"
            )
        if self.mlp_dim < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}: the MLP needs at least one hidden value")
        if not 0 < self.halt_epsilon < 1:
            raise ValueError(f"halt_epsilon is {self.halt_epsilon}: it must lie between 0 and 1")
        for name in ("drop_rate", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is unknown: choose float32 or bfloat16")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention {self.attention!r} is unknown: choose one of {', '.join(ATTENTION)}")
        if self.attention == "cudnn" and not cudnn_takes(self.dtype, self.embed_dim // self.num_heads):
            raise ValueError(
                f"attention 'cudnn' needs dtype bfloat16 and heads of a multiple of 8 and at most 128 channels, and "
                f"this is {self.dtype} with heads of {self.embed_dim // self.num_heads}: choose attention 'auto'"
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class_names for num_classes {self.num_classes}: give one for each"
            )
        if self.halting is not None:
            self.halting.check(self)
        if self.reduction is not None:
            self.reduction.counts(self)  # refuses a model that it does not fit
        if self.gates is not None:
            self.gates.check(self)

    @property
    def image_shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_shape
        return height // self.patch_size, width // self.patch_size

    @property
    def num_special(self) -> int:
        """The number of tokens before the patches: class, distillation and register tokens, if any."""
        return self.class_token + self.distilled + self.num_registers

    @property
    def num_outputs(self) -> int:
        """The number of first tokens whose weighted sums over layers are kept; all tokens if the head reads a mean."""
        return 1 + self.distilled if self.pool == "token" else self.num_tokens

    @property
    def tokens_read(self) -> tuple[bool, ...]:
        """For each token, whether the logits depend on it; an image is finished once all of these have halted."""
        patches = self.num_tokens - self.num_special
        special = [self.pool in ("token", "token_and_mean")] * (self.class_token + self.distilled)
        return (*special, *[False] * self.num_registers, *[self.pool != "token"] * patches)

    @property
    def head_inputs(self) -> int:
        """The number of features that a head reads."""
        return (2 if self.pool == "token_and_mean" else 1) * self.embed_dim

    @property
    def num_tokens(self) -> int:
        """The number of special tokens and patches."""
        return self.num_special + self.patch_grid[0] * self.patch_grid[1]

    @property
    def mlp_dim(self) -> int:
        """Width of the hidden layer of a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def halting(self) -> Halting | None:
        """The halting rule in force, under which each image keeps its own number of tokens, or None."""
        if self.rule is not None:
            return self.rule if isinstance(self.rule, Halting) else None
        if self.gate_scale is None or self.gate_center is None:
            return None
        return AViTGate(self.gate_scale, self.gate_center, self.halt_epsilon)

    @property
    def reduction(self) -> Reduction | None:
        """The reduction rule in force, under which all images have the same number of tokens, or None."""
        return self.rule if isinstance(self.rule, Reduction) else None

    @property
    def gates(self) -> Gates | None:
        """The gates in force, which choose anew in every layer what is computed, or None."""
        return self.rule if isinstance(self.rule, Gates) else None

    @property
    def rule_in_force(self) -> Halting | Reduction | Gates | None:
        """The rule in force, of any kind and including A-ViT's gate; None if every token runs through all layers."""
        return self.reduction or self.gates or self.halting

    @property
    def halts(self) -> bool:
        """Whether there is a halting rule."""
        return self.halting is not None

    def to_json(self) -> dict[str, Any]:
        """Three parts, all plain JSON: model, preprocessing, class_names."""
        model = dataclasses.asdict(dataclasses.replace(self, rule=None))
        gated = {"name": AViTGate.name} if self.gate_scale is not None else None  # the numbers are in gate_*
        model["rule"] = gated if self.rule is None else rule_to_json(self.rule)
        return {"preprocessing": model.pop("preprocessing"), "class_names": model.pop("class_names"), "model": model}

    @classmethod
    def from_json(cls, parts: Any) -> "AViTConfig":
        """The inverse of to_json. The parts may come from a stranger: ValueError names the field that is wrong."""
        if not isinstance(parts, dict) or parts.keys() != {"model", "preprocessing", "class_names"}:
            raise ValueError("a model's configuration has three parts: model, preprocessing and class_names")
        preprocessing = typed_fields(Preprocessing, parts["preprocessing"], "preprocessing", _PREPROCESSING)
        content, rule = parts["model"], None
        if isinstance(content, dict):
            content = dict(content)
            rule = content.pop("rule", None)  # a file written before there were several rules has none
        model = typed_fields(AViTConfig, content, "model", _NEEDED)
        if rule == {"name": AViTGate.name}:
            if model["gate_scale"] is None:
                raise ValueError(f"the rule is {AViTGate.name} and gate_scale is null: give gate_scale and gate_center")
        elif rule is not None:
            model["rule"] = rule_from_json(rule)
        names = typed_fields(AViTConfig, {"class_names": parts["class_names"]}, "the configuration", ())
        return AViTConfig(**{**model, **names, "preprocessing": Preprocessing(**preprocessing)})


def rule_of_training(config: AViTConfig) -> Halting | Gates | None:
    """The rule that has terms in training: the model's own, or the one that stands in for its reduction rule."""
    if config.gates is not None:
        return config.gates
    return config.halting if config.reduction is None else config.reduction.in_training(config)


# Fields that a file must have: without one of them it would silently describe another model. Old files may lack others.
_NEEDED = (
    "image_size",
    "patch_size",
    "embed_dim",
    "depth",
    "num_heads",
    "gate_scale",
    "gate_center",
    "halt_epsilon",
)
_PREPROCESSING = tuple(field.name for field in dataclasses.fields(Preprocessing))

# A change to one of these needs other weights, or makes another network of the same weights.
WEIGHTS_DEPEND_ON = (
    "patch_size",
    "in_channels",
    "num_classes",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_dim",
    "qkv_bias",
    "distilled",
    "class_token",
    "num_registers",
    "pool",
)
# The changes that make a plain ViT of the same weights: every token runs through all layers.
NO_RULE: dict[str, Any] = {"rule": None, "gate_scale": None, "gate_center": None}


def changed(config: AViTConfig, **changes: Any) -> AViTConfig:
    """The configuration with fields replaced. Raises ValueError for an unknown field, naming the nearest one.

    A change of the gate that names no rule is a change to A-ViT's rule, which then replaces any other rule.
    """
    fields = {field.name for field in dataclasses.fields(AViTConfig)}
    for name in changes:
        if name not in fields:
            raise ValueError(f"AViTConfig has no field {name!r}: {nearest(name, fields)}")
    if {"gate_scale", "gate_center"} & changes.keys():
        changes = {"rule": None} | changes
    return dataclasses.replace(config, **changes)
