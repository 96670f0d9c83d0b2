"""The configuration of a model, from the names and shapes of its weights and from what the caller gives."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.names import LAYER
from avit_jax.model.config import AViTConfig, changed
from avit_jax.model.presets import config_from

# Width -> heads of published ViTs. Each head has 64 channels, or 80 in ViT-Huge.
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
# The fields of another program's checkpoint that a preset does not determine.
BESIDE_PRESET = ("norm_epsilon", "pool", "class_token", "num_registers", "rule")


def override(saved: AViTConfig, overrides: dict[str, Any]) -> AViTConfig:
    """A checkpoint's own configuration with fields replaced; without class names if the number of classes changes."""
    if overrides.get("num_classes", saved.num_classes) != saved.num_classes:
        overrides = {"class_names": None} | overrides
    return changed(saved, **overrides)


def configuration(
    state: Mapping[str, np.ndarray],
    traits: dict[str, Any],
    preset: str | None,
    saved: AViTConfig | None,
    overrides: dict[str, Any],
) -> AViTConfig:
    """The configuration of a checkpoint.

    Each of these takes precedence over the next: overrides, the preset, the file's own configuration (saved), what JSON
    files and names say (traits), the shapes of the weights (state). Raises ValueError if these do not determine an
    architecture, or not one that AViT has.
    """
    layers = _depth(state)
    if preset is not None:
        config = config_from(preset, **({name: traits[name] for name in BESIDE_PRESET if name in traits} | overrides))
        names = traits.get("class_names")
        if names is None or config.class_names is not None or len(names) != config.num_classes:
            return config
        return dataclasses.replace(config, class_names=names)
    if saved is not None:
        return override(saved, overrides)
    kernel = _tensor(state, "patch_embed.proj.weight", 4, "[width, channels, p, p]")
    width, channels, patch, columns = kernel.shape
    if patch != columns or not patch:
        raise ValueError(
            f"patch_embed.proj.weight has shape {kernel.shape}: patches must be square, [width, channels, p, p]"
        )
    inferred: dict[str, Any] = {"embed_dim": width, "in_channels": channels, "patch_size": patch, "depth": layers}
    inferred["qkv_bias"] = "blocks.0.attn.qkv.bias" in state
    inferred["distilled"] = "dist_token" in state
    if "blocks.0.mlp.fc1.weight" in state:
        hidden = _tensor(state, "blocks.0.mlp.fc1.weight", 2, "[hidden, width]").shape[0]
        ratio = hidden / max(width, 1)
        inferred["mlp_ratio"] = ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
    inferred["num_classes"] = 0
    if "head.weight" in state:
        inferred["num_classes"] = _tensor(state, "head.weight", 2, "[classes, features]").shape[0]
    if "num_heads" not in overrides and "num_heads" not in traits:
        if width not in _HEADS:
            raise ValueError(f"the number of heads is not known for width {width}: give num_heads or a preset")
        inferred["num_heads"] = _HEADS[width]
    fields = inferred | traits | overrides
    if "class_names" in traits and fields["num_classes"] != len(traits["class_names"]):
        fields["class_names"] = overrides.get("class_names")
    if "image_size" not in fields:
        if "pos_embed" not in state:
            raise ValueError(
                "pos_embed is missing: its architecture has no learned positions (perhaps rotary ones, as in DINOv3), "
                "which AViT needs"
            )
        count = _tensor(state, "pos_embed", 3, "[1, tokens, width]").shape[1]
        side = next((side for special in special_rows(state) if (side := square(count - special))), 0)
        if not side:
            raise ValueError(f"{count} position embeddings do not fit a square image: give image_size=(height, width)")
        fields["image_size"] = side * fields["patch_size"]
    return config_from(None, **fields)


def special_rows(state: Mapping[str, np.ndarray]) -> list[int]:
    """How many rows of pos_embed may not belong to patches: those of all special tokens, without registers, or none."""
    special = sum(name in state for name in ("cls_token", "dist_token"))
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    return [special + registers, special, 0]


def square(count: int) -> int:
    """The side of a square grid of `count` patches, or 0."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0


def _depth(state: Mapping[str, np.ndarray]) -> int:
    """The number of layers. Raises ValueError if they are not numbered from 0 without a gap."""
    layers = {int(match[1]) for name in state if (match := re.match(rf"blocks\.({LAYER})\.", name))}
    if layers and max(layers) + 1 != len(layers):
        missing = next(layer for layer in range(len(layers) + 1) if layer not in layers)
        raise ValueError(f"its layers reach up to blocks.{max(layers)}, but blocks.{missing} is missing")
    return len(layers)


def _tensor(state: Mapping[str, np.ndarray], name: str, ndim: int, shape: str) -> np.ndarray:
    value = state.get(name)
    if value is None or value.ndim != ndim:
        found = "missing" if value is None else f"of shape {value.shape}"
        raise ValueError(f"{name} is {found}: it must be {shape}")
    return value
