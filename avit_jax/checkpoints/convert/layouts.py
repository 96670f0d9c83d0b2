"""Checkpoint layouts, recognised by their names and converted to timm's names, shapes and one kind of block."""

import dataclasses
import re
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.foreign import refuse_foreign_architectures
from avit_jax.checkpoints.convert.limits import MAX_TENSORS
from avit_jax.checkpoints.convert.names import (
    AUGREG,
    EXTRAS,
    FAMILIES,
    HUGGING_FACE,
    LAYER,
    TIMM,
    TORCHVISION,
    Family,
    renamed,
)

State = dict[str, np.ndarray]
_MOST_TOKENS = 2**17  # 1,448 x 1,448 pixels in patches of 4


@dataclasses.dataclass
class Recognised:
    """A checkpoint under timm's names. The final LayerNorm is called norm, whatever the head reads."""

    layout: str
    kind: str  # which published preprocessing it has, see published.py
    state: State
    traits: dict[str, Any]  # AViTConfig fields found from names: num_heads, pool, norm_epsilon, ...
    extras: list[str]  # source names that were left out
    notes: list[str]  # what was changed besides names


def recognise(source: State) -> Recognised:
    """A checkpoint with timm's names and shapes, one query-key-value matrix, and LayerScale folded in.

    source: arrays by name, emptied as they are used. A prefix that all names share is removed. Raises ValueError, with
    some of the names, for a layout other than timm's, Hugging Face's, torchvision's and AugReg's, and for an
    architecture that this project does not have.
    """
    names = list(source)
    if len(names) > MAX_TENSORS:
        raise ValueError(f"it has {len(names)} tensors: no vision transformer has more than {MAX_TENSORS}")
    refuse_foreign_architectures(names)
    family, prefix, notes = family_of(names)
    extras = [name for name in names if EXTRAS.fullmatch(name)]
    kept = set(names).difference(extras)
    # DINOv2's classifier is stored beside the backbone.
    inside = {name: name.removeprefix(prefix) for name in kept if name.startswith((prefix, "linear_head."))}
    other = sorted(kept.difference(inside))
    if any(name.startswith("student.") for name in other) and prefix.startswith("teacher."):
        notes.append("the student's weights were left out")
        other = [name for name in other if not name.startswith("student.")]
    if other:
        raise ValueError(
            f"its model is under {prefix!r}, but it has {len(other)} more tensors: {', '.join(other[:5])}; "
            "leave them out"
        )
    kind = _kind(family, set(inside.values()), [name.removeprefix(prefix) for name in extras])
    head_on_class_token = kind == "Hugging Face DeiT" and "classifier.weight" in inside.values()
    state: State = {}
    for name in names:
        if name in inside:
            new = renamed(inside[name], family.rules)
            if new in state:
                raise ValueError(f"two of its tensors map to {new}, one of them {name}")
            state[new] = source.pop(name)
    traits: dict[str, Any] = {}
    if family is AUGREG:
        state, traits = _from_augreg(state)
    positions = state.get("pos_embed")
    if positions is not None and max(positions.shape, default=0) > _MOST_TOKENS:
        # A few bytes can declare any number of them, and the whole model would be as large.
        raise ValueError(f"pos_embed has shape {positions.shape}: at most {_MOST_TOKENS} tokens are allowed")
    result = Recognised(family.name, kind, _joined_query_key_value(state), traits, extras, notes)
    _fold_layer_scale(result)
    if head_on_class_token and "dist_token" in result.state and "head.bias" in result.state:
        _split_single_head(result)
    _tell_architecture(result)
    return result


def family_of(names: list[str]) -> tuple[Family, str, list[str]]:
    """The family and the prefix of its names, and notes. Of a teacher and its student, the teacher is taken."""
    for family in FAMILIES:
        pattern = re.compile(rf"((?:.*?[./])??){family.anchor}")
        prefixes = sorted({match[1] for name in names if len(name) < 300 and (match := pattern.fullmatch(name))})
        teachers = [prefix for prefix in prefixes if prefix.startswith("teacher.")]
        if len(prefixes) == 1:
            return family, prefixes[0], []
        if len(teachers) == 1 and all(prefix.startswith(("teacher.", "student.")) for prefix in prefixes):
            return family, teachers[0], []
        if prefixes:
            raise ValueError(f"it holds {len(prefixes)} models, under {', '.join(prefixes[:5])}: keep one of them")
    raise ValueError(
        "its names match no known layout (timm, published DeiT and A-ViT, Hugging Face ViT, DeiT and DINOv2, "
        f"torchvision, AugReg .npz): {', '.join(f'{name:.100}' for name in sorted(names)[:5]) or 'it has no tensors'}"
    )


def _kind(family: Family, names: set[str], extras: list[str]) -> str:
    if family is AUGREG:
        return "AugReg"
    if family is TORCHVISION:
        return "torchvision"
    if family is HUGGING_FACE:
        if any(name.startswith("deit.") or name.endswith("distillation_token") for name in names):
            return "Hugging Face DeiT"
        scaled = any("layer_scale1." in name for name in names)
        return "DINOv2" if scaled else "Hugging Face ViT"
    if "dist_token" in names:
        return "DeiT"
    if any(name.endswith(".gamma_1") for name in names):
        return "DeiT III"
    if "register_tokens" in names or ("mask_token" in extras and any(".ls1." in name for name in names)):
        return "DINOv2"
    if any(name.startswith("decoder_") for name in extras):
        return "MAE"
    return "timm with fc_norm" if "fc_norm.weight" in names else "timm"


def _from_augreg(state: State) -> tuple[State, dict[str, Any]]:
    """The state with kernels turned from [in, out] to [out, in] and heads joined, and the number of heads."""
    heads = [value.shape[0] for name, value in state.items() if name.endswith("attn.query.bias") and value.ndim == 2]
    result: State = {}
    for name, value in state.items():
        if name == "patch_embed.proj.weight" and value.ndim == 4:  # [p, p, C, D] -> [D, C, p, p]
            value = value.transpose(3, 2, 0, 1)
        elif name.endswith("attn.proj.weight") and value.ndim == 3:  # [heads, d, D] -> [D, heads * d]
            value = value.reshape(-1, value.shape[-1]).T
        elif re.search(r"attn\.(query|key|value)\.weight", name) and value.ndim == 3:  # [D, heads, d]
            value = value.reshape(value.shape[0], -1).T
        elif re.search(r"attn\.(query|key|value)\.bias", name):
            value = value.reshape(-1)
        elif name.endswith(".weight") and value.ndim == 2:
            value = value.T
        result[name] = value
    return result, {"num_heads": heads[0]} if heads else {}


def _joined_query_key_value(state: State) -> State:
    result: State = {}
    for name in list(state):
        match = re.fullmatch(rf"(blocks\.{LAYER}\.attn)\.(q|k|v|query|key|value)\.(weight|bias)", name)
        if match is None:
            result[name] = state.pop(name)
            continue
        stem, _, kind = match.groups()
        joined = f"{stem}.qkv.{kind}"
        if joined in result:
            continue
        names = [[f"{stem}.{part}.{kind}", f"{stem}.{part[0]}.{kind}"] for part in ("query", "key", "value")]
        parts = [state.pop(name) for both in names for name in both if name in state]
        if len(parts) != 3 or len({part.shape for part in parts}) != 1 or not parts[0].ndim:
            shapes = [part.shape for part in parts]
            raise ValueError(f"{stem} needs query, key and value of one shape ({kind}), but has {shapes}")
        result[joined] = np.concatenate(parts)
    return result


def _fold_layer_scale(result: Recognised) -> None:
    """x + gamma * (W y + b) = x + (gamma W) y + gamma b."""
    state, folded = result.state, 0
    for name in [name for name in state if re.fullmatch(rf"blocks\.{LAYER}\.ls[12]\.gamma", name)]:
        gamma = np.asarray(state.pop(name), np.float32)
        block = name.rsplit(".", 2)[0]
        layer = f"{block}.{'attn.proj' if '.ls1.' in name else 'mlp.fc2'}"
        if gamma.ndim != 1:
            raise ValueError(f"{name} has shape {gamma.shape}: LayerScale has one number for each channel")
        for parameter, scale in ((f"{layer}.weight", gamma[:, None]), (f"{layer}.bias", gamma)):
            if parameter not in state or state[parameter].shape[:1] != gamma.shape:
                raise ValueError(f"{name} of shape {gamma.shape} scales {parameter}, which is missing or has another")
            state[parameter] = np.asarray(state[parameter], np.float32) * scale
        folded += 1
    if folded:
        result.notes.append(f"LayerScale of {folded} branches was folded into attn.proj and mlp.fc2")


def _split_single_head(result: Recognised) -> None:
    """Make two heads of one, for a distillation token without its own: our logits are the mean of two heads."""
    for kind in ("weight", "bias"):
        head = np.asarray(result.state[f"head.{kind}"], np.float32)
        result.state[f"head.{kind}"], result.state[f"head_dist.{kind}"] = 2 * head, np.zeros_like(head)
    result.notes.append(
        "it has a distillation token but one head: head is twice that and head_dist zero, so their mean is its logits"
    )


def _tell_architecture(result: Recognised) -> None:
    """Add what names and shapes show: registers, class token, what the head reads, the LayerNorms' epsilon."""
    state, traits = result.state, result.traits
    if "reg_token" in state:
        registers = state["reg_token"]
        if registers.ndim != 3:
            raise ValueError(f"reg_token has shape {registers.shape}: registers are [1, number, width]")
        traits["num_registers"] = registers.shape[1]
    if "cls_token" not in state:
        traits["class_token"], traits["pool"] = False, "norm_mean"
    if "fc_norm.weight" in state:
        if "norm.weight" in state:
            raise ValueError("its architecture is unsupported (fc_norm.weight): two LayerNorms before its head")
        traits["pool"] = "mean_norm"
        for kind in ("weight", "bias"):
            if f"fc_norm.{kind}" in state:
                state[f"norm.{kind}"] = state.pop(f"fc_norm.{kind}")
    head, width = state.get("head.weight"), state.get("norm.bias")
    if (
        head is not None
        and width is not None
        and head.ndim == 2
        and width.ndim == 1
        and len(width)
        and "pool" not in traits
    ):
        if head.shape[1] == 2 * len(width):
            traits["pool"] = "token_and_mean"
        elif head.shape[1] > 2 * len(width) and head.shape[1] % len(width) == 0:
            raise ValueError(
                f"its head reads {head.shape[1]} features, {head.shape[1] // len(width)} times the width (DINOv2's "
                "classifier on several layers): AViT's head reads only the last layer"
            )
    # This value is in transformers and in the published config.json; all other families have 1e-6.
    if result.layout == HUGGING_FACE.name and result.kind != "DINOv2":
        traits["norm_epsilon"] = 1e-12
    for name in [name for name in state if name.endswith("mlp.fc2.weight")]:
        first, second = state.get(name.replace("fc2", "fc1")), state[name]
        if first is not None and first.ndim == second.ndim == 2 and first.shape[0] == 2 * second.shape[1]:
            raise ValueError(f"its architecture is unsupported ({name}): its MLP is gated (SwiGLU), AViT's is not")


def can_tell_pool(result: Recognised) -> bool:
    """Whether the names show what the head reads. timm's models have the same names with global_pool="avg"."""
    return result.layout != TIMM.name or result.kind in ("DeiT", "DeiT III", "DINOv2", "MAE") or "pool" in result.traits
