"""Conversion of weights from PyTorch, Hugging Face and AugReg, and to PyTorch."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from avit_jax.checkpoints.convert.architecture import configuration
from avit_jax.checkpoints.convert.fitting import Conversion, fit
from avit_jax.checkpoints.convert.gated import take_gates
from avit_jax.checkpoints.convert.huggingface import read_folder
from avit_jax.checkpoints.convert.layouts import Recognised, can_tell_pool, recognise
from avit_jax.checkpoints.convert.names import LAYER
from avit_jax.checkpoints.convert.published import CHANGE, described, merged, published
from avit_jax.checkpoints.convert.weight_files import read_weight_file, write_pth, write_safetensors
from avit_jax.gated.gates import Gates
from avit_jax.model.config import AViTConfig, Preprocessing
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import writable_folder


def from_torch_state_dict(state_dict: Mapping[str, np.ndarray], preset: str | None = None, **overrides: Any) -> AViT:
    """A model with the weights of a state dict: names to arrays, in any layout that `layouts.recognise` knows.

    The architecture comes from the preset and the overrides (AViTConfig fields), and otherwise from names and shapes.
    No shape shows the number of heads, which is then that of the published models of this width. The gate comes only
    from preset or overrides. Preprocessing is what was published with this layout, unless given (a Preprocessing, or a
    dict of some of its fields). Positions are resized to the given image size. If num_classes is given and differs from
    the checkpoint's, heads are new. Prints a line for each of these. Raises ValueError, listing both sets, if a source
    key is unused or a target unfilled, and naming the parameter and both shapes if they differ.
    """
    conversion = convert({name: np.asarray(value) for name, value in state_dict.items()}, preset, **overrides)
    for note in conversion.notes:
        print(note)
    return conversion.model


def convert(
    state_dict: dict[str, np.ndarray],
    preset: str | None = None,
    *,
    saved: AViTConfig | None = None,
    told: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Conversion:
    """As from_torch_state_dict, but returns the model with its notes and changes, and prints nothing.

    state_dict: emptied as it is used, so that there is never a second copy in memory. saved: the configuration in a
    file that avit_jax wrote. told: AViTConfig fields from JSON files beside the weights.
    """
    told = dict(told or {})
    found = recognise(state_dict)
    notes = list(found.notes)
    averages = told.pop("global_pool", None)  # timm's name; the names show whether a LayerNorm follows the mean
    if averages is not None:
        told["pool"] = found.traits.get("pool", "norm_mean") if averages == "avg" else "token"
    found.traits |= {name: value for name, value in told.items() if name != "preprocessing"}
    gates = take_gates(found.state)
    if gates and not overrides.keys() & {"gate_scale", "gate_center"}:  # a gate of A-ViT replaces other rules
        found.traits["rule"] = Gates()
    asked = overrides.pop("preprocessing", None)
    config = configuration(found.state, found.traits, preset, saved, overrides)
    if saved is None:
        config, how = _with_preprocessing(config, found, told.get("preprocessing"), asked)
        notes += how
        notes += _doubts_of_pool(config, found, told, overrides)
    elif asked is not None:
        config = dataclasses.replace(config, preprocessing=merged(asked, config.preprocessing))
    if gates and config.gates is None:
        gates = {}
        notes.append("its gates were left out, as the model has another rule")
    if preset is None and saved is None and "gate_scale" not in overrides and config.gates is None:
        notes.append("neither preset nor gate_scale is given: this model never halts")
    if saved is None and not config.num_classes and "head.weight" not in found.state:
        notes.append(f"it has no head: logits are the {config.head_inputs} features that a head would read")
    extras = [f"{name:.100}" for name in found.extras] + _drop_extra_heads(found.state, config)
    if extras:
        shown = ", ".join(extras[:8]) + (f" and {len(extras) - 8} more" if len(extras) > 8 else "")
        warnings.warn(f"left out, because the model has no such part: {shown}", stacklevel=2)
    conversion = fit(_to_ours(found.state, config.depth) | gates, config, saved, overrides.keys())
    return dataclasses.replace(conversion, layout=found.layout, notes=notes + conversion.notes)


def read_foreign(path: Path, preset: str | None = None, *, ema: bool = False, **overrides: Any) -> Conversion:
    """The model in a file of weights, or in a folder that transformers or timm wrote, with its notes and changes.

    preset, ema, overrides: as in avit_jax.load. Raises ValueError, one sentence, for a file or folder that cannot be
    read or has another architecture.
    """
    if path.is_file():
        file = read_weight_file(path, ema=ema)
        conversion = convert(
            file.state, preset, saved=file.model_config, told=file.told, **overrides
        )  # file.state is empty after it
        return dataclasses.replace(conversion, notes=file.notes + conversion.notes)
    if ema:
        raise ValueError("it holds one set of weights and no moving average: leave ema out")
    folder = read_folder(path)
    conversion = convert(folder.state, preset, told=folder.told, **overrides)
    return dataclasses.replace(conversion, notes=folder.notes + conversion.notes)


def _with_preprocessing(
    model_config: AViTConfig, found: Recognised, told: Preprocessing | None, asked: Any
) -> tuple[AViTConfig, list[str]]:
    """The configuration with the preprocessing given, else JSON's, else the published; and a line that says which."""
    side = min(model_config.image_shape)
    known = published(found.kind, side)
    base = told or known.preprocessing
    if asked is not None:
        return dataclasses.replace(model_config, preprocessing=merged(asked, base)), []
    model_config = dataclasses.replace(model_config, preprocessing=base)
    what = described(base, side)
    if told is not None:
        return model_config, [f"preprocessing: {what}, as the JSON beside the weights says"]
    if model_config.in_channels != len(base.mean):
        return model_config, [f"preprocessing: nothing is published for {model_config.in_channels} channels; {CHANGE}"]
    if not known.doubt:
        return model_config, [f"preprocessing: {what} ({known.whose} values)"]
    doubt = f"the file does not say, so {known.whose} values are assumed ({known.doubt})"
    return model_config, [f"preprocessing: {what}: {doubt}; {CHANGE}"]


def _doubts_of_pool(
    model_config: AViTConfig, found: Recognised, told: Mapping[str, Any], overrides: Mapping[str, Any]
) -> list[str]:
    if "pool" in told or "pool" in overrides or can_tell_pool(found) or "head.weight" not in found.state:
        return []
    return [
        "the file does not say what its head reads: the class token is assumed; for timm's global_pool='avg' without "
        "fc_norm give pool='norm_mean' (--pool norm_mean)"
    ]


def _drop_extra_heads(state: dict[str, np.ndarray], model_config: AViTConfig) -> list[str]:
    """Remove from the state what only a distilled model has, if this model is not distilled; returns the names."""
    if model_config.distilled:
        return []
    dropped: list[str] = [name for name in ("dist_token", "head_dist.weight", "head_dist.bias") if name in state]
    for name in dropped:
        del state[name]
    if "dist_token" in dropped and "pos_embed" in state:
        state["pos_embed"] = np.delete(state["pos_embed"], 1, axis=1)
        dropped.insert(1, "row 1 of pos_embed")
    return dropped


def _to_ours(state: dict[str, np.ndarray], depth: int) -> dict[str, Any]:
    """Our names and layouts, with the blocks' parameters stacked on a layer axis. ValueError if a layer is missing."""
    flat: dict[str, Any] = {}
    for name in list(state):
        value = state.pop(name)
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 2 and re.fullmatch(LAYER, parts[1]):
            ours, value = _turned(".".join(["blocks", *parts[2:]]), value)
            flat.setdefault(ours, {})[int(parts[1])] = value
        else:
            ours, value = _turned(name, value)
            flat[ours] = value
    for name, layers in flat.items():
        if isinstance(layers, dict):
            if len(layers) != depth or max(layers) >= depth:
                there = sorted(layers)
                listed = f"{there[:20]}" + (" ..." if len(there) > 20 else "")
                raise ValueError(f"{name} is there for layers {listed}, but the model has {depth} layers")
            shapes = {value.shape for value in layers.values()}
            if len(shapes) > 1:
                raise ValueError(f"{name} has different shapes in different layers: {sorted(shapes)}")
            flat[name] = np.stack([layers.pop(layer) for layer in range(depth)])
    return flat


def _turned(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """One PyTorch parameter under our name and in our layout; PyTorch stores linear weights transposed."""
    if name == "patch_embed.proj.weight" and value.ndim == 4:  # [D, C, p, p] -> [p * p * C, D]
        return "patch_embed.proj.kernel", value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    if not name.endswith(".weight"):
        return name, value
    stem = name.removesuffix(".weight")
    return (f"{stem}.kernel", value.T) if value.ndim == 2 else (f"{stem}.scale", value)


def to_torch_state_dict(model: AViT) -> dict[str, np.ndarray]:
    """The weights under the names and in the shapes of timm, published DeiT and A-ViT; float32.

    Raises ValueError for a model whose rule has parameters of its own: PyTorch's models have no place for them.
    """
    rule = model.config.rule_in_force
    if rule is not None and model.rule_module is not None:
        raise ValueError(
            f"the rule {rule.describe()!r} has parameters of its own, which PyTorch's models have no "
            "place for: convert model.with_config(rule=None), and keep this model with avit_jax.save"
        )
    state: dict[str, np.ndarray] = {}
    patch, channels = model.config.patch_size, model.config.in_channels
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = ".".join(map(str, path)), np.asarray(param[...])
        name = torch_name(name, model.config.pool)
        if name == "patch_embed.proj.weight":  # [p * p * C, D] -> [D, C, p, p]
            value = value.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)
        if name.startswith("blocks."):
            for layer in range(model.config.depth):
                state[f"blocks.{layer}.{name.removeprefix('blocks.')}"] = _for_torch(name, value[layer])
        else:
            state[name] = _for_torch(name, value)
    return state


def torch_name(name: str, pool: str = "token") -> str:
    """PyTorch's name of one of our parameters, without the layer if it belongs to the blocks; pool: of the config."""
    if pool == "mean_norm":
        name = re.sub(r"^norm\.", "fc_norm.", name)
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def _for_torch(name: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T if name.endswith(".weight") and value.ndim == 2 else value)


def save_torch(model: AViT, path: str | Path) -> None:
    """Write .safetensors, or .pth (which needs torch), for load_state_dict(strict=True), with the configuration inside.

    path: its suffix sets the format: .safetensors, or .pth, .pt or .bin. Raises ValueError for another suffix, a path
    that exists or cannot be written to, and a .pth without torch.
    """
    path = Path(path)
    writers = {".safetensors": write_safetensors, ".pth": write_pth, ".pt": write_pth, ".bin": write_pth}
    if path.suffix not in writers:
        raise ValueError(f"{path}: the suffix sets the format, give one of {', '.join(writers)}")
    if path.exists():
        raise ValueError(f"{path} exists already: choose another path or remove it")
    writable_folder(path.parent)
    partial = path.with_name(path.name + ".partial")
    writers[path.suffix](to_torch_state_dict(model), model.config, partial)
    partial.rename(path)
