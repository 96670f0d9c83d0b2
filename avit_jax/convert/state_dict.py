"""Weights of PyTorch, Hugging Face and AugReg in, weights for PyTorch out."""

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from avit_jax.config import AViTConfig, config_from
from avit_jax.convert.layouts import recognise
from avit_jax.convert.positions import resize_positions
from avit_jax.convert.weight_files import write_pth, write_safetensors
from avit_jax.layers import linear
from avit_jax.model import AViT

_HEADS = ("head", "head_dist")


@dataclasses.dataclass
class Conversion:
    """A model and what became of its source."""

    model: AViT
    layout: str
    notes: list[str]
    changed: dict[str, str]  # our parameter -> what was done besides renaming


def from_torch_state_dict(state_dict: Mapping[str, np.ndarray], preset: str | None = None, **overrides: Any) -> AViT:
    """A model with the weights of a state dict: names to arrays, in any layout that `layouts.recognise` knows.

    The architecture comes from the preset, the overrides (AViTConfig fields), and else from the shapes; the head count,
    which no shape tells, is width / 64 for 192, 384 and 768. The gate comes from preset or overrides alone. Positions
    are resized to the image size asked for; with num_classes given and another than the checkpoint's, heads are new.
    Prints a line for either. Raises ValueError, listing both sets, where a source key is unused or a target unfilled,
    and naming the parameter and both shapes where they differ.
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
    **overrides: Any,
) -> Conversion:
    """As from_torch_state_dict, with the account of it; saved is the configuration that a file of ours carries.

    The state dict is emptied as it is used, so that no second copy of it stays in memory.
    """
    found = recognise(state_dict)
    notes = list(found.notes)
    config = _config(found.state, found.num_heads, preset, saved, overrides)
    if preset is None and saved is None and "gate_scale" not in overrides:
        notes.append("neither preset nor gate_scale is given: this model never halts")
    extras = found.extras + _drop_extra_heads(found.state, config)
    if extras:
        warnings.warn(f"left out, as the model has no such part: {', '.join(extras)}", stacklevel=2)
    conversion = fit(_to_ours(found.state, config.depth), config, saved, overrides.keys())
    return dataclasses.replace(conversion, layout=found.layout, notes=notes + conversion.notes)


def fit(
    parameters: dict[str, Any], config: AViTConfig, saved: AViTConfig | None, given: Collection[str] = ()
) -> Conversion:
    """A model of this configuration from parameters under our own names (emptied as they are used).

    Positions are resized from the grid of `saved` (None: a square one); heads are new where their classes differ and
    num_classes is among the `given` fields. Raises ValueError where anything else does not fit.
    """
    notes: list[str] = []
    changed: dict[str, str] = {}
    _fit_positions(parameters, config, saved, notes, changed)
    _fit_heads(parameters, config, "num_classes" in given, notes, changed)
    return Conversion(_filled(config, parameters), "avit_jax", notes, changed)


def override(saved: AViTConfig, overrides: dict[str, Any]) -> AViTConfig:
    """The configuration that a checkpoint carries, with fields replaced; class names go where their number changes."""
    if overrides.get("num_classes", saved.num_classes) != saved.num_classes:
        overrides = {"class_names": None} | overrides
    return config_from(None, **(vars(saved) | overrides))


def _config(
    state: Mapping[str, np.ndarray],
    num_heads: int | None,
    preset: str | None,
    saved: AViTConfig | None,
    overrides: dict[str, Any],
) -> AViTConfig:
    """Overrides before the preset before the file's own configuration before what the shapes tell."""
    if preset is not None:
        return config_from(preset, **overrides)
    if saved is not None:
        return override(saved, overrides)
    kernel = state["patch_embed.proj.weight"]
    if kernel.ndim != 4 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(
            f"patch_embed.proj.weight has shape {kernel.shape}: patches are square, [width, channels, p, p]"
        )
    width, channels, patch, _ = kernel.shape
    inferred: dict[str, Any] = {"embed_dim": width, "in_channels": channels, "patch_size": patch}
    layers = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    inferred |= {"depth": max(layers, default=-1) + 1, "qkv_bias": "blocks.0.attn.qkv.bias" in state}
    inferred["distilled"] = "dist_token" in state
    if "blocks.0.mlp.fc1.weight" in state:
        inferred["mlp_ratio"] = state["blocks.0.mlp.fc1.weight"].shape[0] / width
    if "head.weight" in state:
        inferred["num_classes"] = state["head.weight"].shape[0]
    if "num_heads" not in overrides:
        if num_heads is None and width not in (192, 384, 768):
            raise ValueError(f"width {width} does not tell the number of heads: give num_heads or a preset")
        inferred["num_heads"] = num_heads or width // 64
    fields = inferred | overrides
    if "image_size" not in fields:
        count = state["pos_embed"].shape[1] if "pos_embed" in state else 0
        side = _square(count - (2 if "dist_token" in state else 1)) or _square(count)
        if not side:
            raise ValueError(f"{count} position embeddings are of no square image: give image_size=(height, width)")
        fields["image_size"] = side * fields["patch_size"]
    return config_from(None, **fields)


def _square(count: int) -> int:
    """The side of a square grid of so many patches, or 0."""
    side = round(max(count, 0) ** 0.5)
    return side if side * side == count else 0


def _drop_extra_heads(state: dict[str, np.ndarray], config: AViTConfig) -> list[str]:
    """What a distilled checkpoint has for a model without a distillation token, taken out of the state."""
    if config.distilled:
        return []
    dropped: list[str] = [name for name in ("dist_token", "head_dist.weight", "head_dist.bias") if name in state]
    for name in dropped:
        del state[name]
    if "dist_token" in dropped and "pos_embed" in state:
        state["pos_embed"] = np.delete(state["pos_embed"], 1, axis=1)
        dropped.insert(1, "row 1 of pos_embed")
    return dropped


def _to_ours(state: dict[str, np.ndarray], depth: int) -> dict[str, Any]:
    """Our names and layouts, the blocks' parameters stacked on a layer axis; ValueError where a layer is missing."""
    flat: dict[str, Any] = {}
    for name in list(state):
        value = state.pop(name)
        parts = name.split(".")
        if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit():
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
                raise ValueError(f"{name} is there for layers {listed}, and the model has {depth} layers")
            shapes = {value.shape for value in layers.values()}
            if len(shapes) > 1:
                raise ValueError(f"{name} has different shapes in different layers: {sorted(shapes)}")
            flat[name] = np.stack([layers.pop(layer) for layer in range(depth)])
    return flat


def _turned(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """One PyTorch parameter under our name; linear weights are stored transposed there."""
    if name == "patch_embed.proj.weight" and value.ndim == 4:  # [D, C, p, p] -> [p * p * C, D]
        return "patch_embed.proj.kernel", value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    if not name.endswith(".weight"):
        return name, value
    stem = name.removesuffix(".weight")
    return (f"{stem}.kernel", value.T) if value.ndim == 2 else (f"{stem}.scale", value)


def _fit_positions(
    flat: dict[str, Any],
    config: AViTConfig,
    saved: AViTConfig | None,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Position embeddings for this image size."""
    positions = flat.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return  # said where shapes are compared
    special, rows = config.num_special, positions.shape[1]
    if rows == config.num_tokens and (saved is None or saved.patch_grid == config.patch_grid):
        return  # as many as this image has patches: they are taken as they are
    source = saved.patch_grid if saved is not None else None
    if source is None:
        if side := _square(rows - special):
            source = (side, side)
        elif (side := _square(rows)) or rows == config.num_tokens - special:
            # timm's no_embed_class: special tokens have no position.
            positions = np.concatenate([np.zeros_like(positions[:, :1]).repeat(special, axis=1), positions], axis=1)
            source = (side, side) if side else config.patch_grid
            changed["pos_embed"] = "zero for special tokens"
        else:
            raise ValueError(
                f"{rows} position embeddings are neither those of the {config.num_tokens} tokens of image size "
                f"{config.image_shape} nor of a square image: give the image_size they belong to"
            )
    if positions.shape[1] != special + source[0] * source[1]:
        return  # other special tokens: said where names are compared
    flat["pos_embed"] = resize_positions(positions, special, source, config.patch_grid)
    if source != config.patch_grid:
        what = "resized from {}x{} to {}x{} patches".format(*source, *config.patch_grid)
        changed["pos_embed"] = what
        notes.append(f"pos_embed was {what}")


def _fit_heads(
    flat: dict[str, Any],
    config: AViTConfig,
    classes_given: bool,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Heads for this number of classes: the checkpoint's, or new ones where num_classes was asked for."""
    found = flat["head.bias"].shape[0] if "head.bias" in flat else None
    reads_tanh = any(name.startswith("pre_logits.") for name in flat)
    if found == config.num_classes and not reads_tanh:
        return
    if not classes_given:
        if reads_tanh:
            raise ValueError(
                "its head reads a tanh layer (pre_logits), which AViT has not: pass num_classes for a new head"
            )
        if found is None:
            raise ValueError("the checkpoint has no head: pass num_classes for a new one")
        raise ValueError(
            f"the checkpoint has {found} classes and the model {config.num_classes}: pass num_classes="
            f"{config.num_classes} for a new head, or num_classes={found} for the checkpoint's"
        )
    for name in [name for name in flat if name.startswith("pre_logits.")]:
        del flat[name]
    for name in _HEADS[: config.num_special]:
        new = nnx.to_pure_dict(nnx.state(linear(config.embed_dim, config.num_classes, "float32", nnx.Rngs(0))))
        for part, value in new.items():
            flat[f"{name}.{part}"] = value
            changed[f"{name}.{part}"] = "new"
    was = "no head" if found is None else f"{found} classes" + (" behind a tanh layer" if reads_tanh else "")
    notes.append(f"the head is new and untrained: the checkpoint has {was}, the model {config.num_classes} classes")


def _filled(config: AViTConfig, flat: dict[str, Any]) -> AViT:
    """The model with these parameters, each used and each filled."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: AViT(config, rngs=nnx.Rngs(0))))
    targets = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    unused, unfilled = sorted(flat.keys() - targets), sorted(targets.keys() - flat.keys())
    if unused or unfilled:
        raise ValueError(
            f"the checkpoint does not fit the model: unused {unused or 'none'}, unfilled {unfilled or 'none'}"
        )
    for name, target in targets.items():
        value = flat[name]
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {value.shape} in the checkpoint and {target.shape} in the model")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} holds {value.dtype} in the checkpoint: weights are floating-point numbers")
    arrays = {}
    for name, target in targets.items():  # one after the other, so that no second copy of all stays alive
        arrays[name] = jnp.asarray(flat.pop(name), target.dtype)
    nnx.replace_by_pure_dict(abstract, unflatten_dict(arrays, sep="."))
    return nnx.merge(graphdef, abstract)


def to_torch_state_dict(model: AViT) -> dict[str, np.ndarray]:
    """The weights under the names and in the shapes of timm, published DeiT and A-ViT; float32."""
    state: dict[str, np.ndarray] = {}
    patch, channels = model.config.patch_size, model.config.in_channels
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name, value = ".".join(map(str, path)), np.asarray(param[...])
        name = torch_name(name)
        if name == "patch_embed.proj.weight":  # [p * p * C, D] -> [D, C, p, p]
            value = value.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1)
        if name.startswith("blocks."):
            for layer in range(model.config.depth):
                state[f"blocks.{layer}.{name.removeprefix('blocks.')}"] = _for_torch(name, value[layer])
        else:
            state[name] = _for_torch(name, value)
    return state


def torch_name(name: str) -> str:
    """PyTorch's name of one of our parameters; of the blocks', without the layer."""
    return re.sub(r"\.(kernel|scale)$", ".weight", name)


def _for_torch(name: str, value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.T if name.endswith(".weight") and value.ndim == 2 else value)


def save_torch(model: AViT, path: str | Path) -> None:
    """Write .safetensors, or .pth (which needs torch), for load_state_dict(strict=True); the configuration goes along.

    Raises ValueError for another suffix, a path that exists, and a .pth without torch.
    """
    path = Path(path)
    writers = {".safetensors": write_safetensors, ".pth": write_pth, ".pt": write_pth, ".bin": write_pth}
    if path.suffix not in writers:
        raise ValueError(f"{path}: the suffix says the format, give one of {', '.join(writers)}")
    if path.exists():
        raise ValueError(f"{path} exists already: choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writers[path.suffix](to_torch_state_dict(model), model.config, partial)
    partial.rename(path)
