"""Folders of the Hugging Face Hub, written by transformers or timm: their weights and JSON files."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np

from avit_jax.checkpoints.convert.weight_files import read_weight_file
from avit_jax.model.config import INTERPOLATIONS, Preprocessing
from avit_jax.runtime.files import read_json, shown, shown_value

_MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each also in shards, with NAME.index.json
_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


@dataclasses.dataclass
class Folder:
    """The tensors of a folder, and the AViTConfig fields that its JSON files give."""

    state: dict[str, np.ndarray]
    told: dict[str, Any]
    notes: list[str]


def is_foreign_folder(path: Path) -> bool:
    """Whether a folder holds a model that transformers or timm wrote, or weights under their file names."""
    if (path / "params").exists():
        return False
    if any((path / f"{name}{end}").is_file() for name in _WEIGHTS for end in ("", ".index.json")):
        return True
    return (path / "config.json").is_file() and "model" not in _json(path / "config.json")


def read_folder(path: Path) -> Folder:
    """The weights, and what config.json and preprocessor_config.json say. No code in the folder is run.

    Raises ValueError, one sentence, for missing files, impossible values, and another architecture.
    """
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    told: dict[str, Any] = {}
    checks: dict[str, int] = {}
    notes: list[str] = []
    if config:
        where = path / "config.json"
        (_read_timm if "architecture" in config and "model_type" not in config else _read_transformers)(
            config, where, told, checks, notes
        )
    else:
        notes.append("config.json is missing: the architecture comes from names and shapes only")
    if (path / "preprocessor_config.json").is_file():
        where = path / "preprocessor_config.json"
        _read_preprocessor(_json(where), where, told, notes)
    elif "preprocessing" not in told:
        notes.append("preprocessor_config.json is missing: it would give the preprocessing")
    state = _weights(path)
    _check_shapes(state, checks, path)
    _check_image_size(state, told, path)
    return Folder(state, told, notes)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of bounded size."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: it must be a JSON object")
    return content


def _number(config: dict[str, Any], name: str, where: Path, most: int = 100_000) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(f"{where}: {name} is {shown_value(value)}, it must be a whole number from 1 to {most}")
    return value


def _side(config: dict[str, Any], name: str, where: Path) -> int | tuple[int, int] | None:
    """A size that is a number, [height, width] or {"height": h, "width": w}, as one number if it is square."""
    value = config.get(name)
    if isinstance(value, dict) and "height" in value:
        value = [value.get("height"), value.get("width")]
    if not isinstance(value, list):
        return _number(config, name, where)
    if len(value) != 2:
        raise ValueError(f"{where}: {name} is {shown_value(value)}, it must be one number or height and width")
    height, width = (_number({name: side}, name, where) for side in value)
    if height is None or width is None:
        raise ValueError(f"{where}: {name} is {shown_value(value)}, it must be one number or height and width")
    return height if height == width else (height, width)


def _read_transformers(
    config: dict[str, Any], where: Path, told: dict[str, Any], checks: dict[str, int], notes: list[str]
) -> None:
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(
            f"{where}: its architecture is unsupported (model_type {shown_value(kind)}): it must be one of "
            + ", ".join(_MODEL_TYPES)
        )
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"{where}: hidden_act is {shown_value(activation)}, but AViT has only the exact gelu")
    if config.get("use_swiglu_ffn") is True:
        raise ValueError(f"{where}: use_swiglu_ffn is true, but AViT has no gated MLP")
    for theirs, ours in (
        ("hidden_size", "embed_dim"),
        ("num_hidden_layers", "depth"),
        ("num_channels", "in_channels"),
    ):
        if (value := _number(config, theirs, where)) is not None:
            checks[ours] = value
    sizes = {
        "num_heads": _number(config, "num_attention_heads", where),
        "image_size": _side(config, "image_size", where),
    }
    told |= {name: value for name, value in sizes.items() if value is not None}
    patch = _side(config, "patch_size", where)
    if isinstance(patch, tuple):
        raise ValueError(f"{where}: patch_size is {patch}, but AViT's patches are square")
    if patch is not None:
        checks["patch_size"] = patch
    epsilon = config.get("layer_norm_eps")
    if epsilon is not None:
        if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
            raise ValueError(f"{where}: layer_norm_eps is {shown_value(epsilon)}, it must lie between 0 and 1")
        told["norm_epsilon"] = float(epsilon)
    _read_class_names(config.get("id2label"), where, told, notes)


def _read_class_names(labels: Any, where: Path, told: dict[str, Any], notes: list[str]) -> None:
    if labels is None:
        return
    names: list[Any] = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        notes.append(f"{where.name}: id2label does not name classes 0 to {len(names)}: class names were left out")
    elif not all(re.fullmatch(r"LABEL_[0-9]+", name) for name in names):
        told["class_names"] = tuple(names)


def _read_timm(
    config: dict[str, Any], where: Path, told: dict[str, Any], checks: dict[str, int], notes: list[str]
) -> None:
    architecture = config["architecture"]
    if not isinstance(architecture, str) or not re.match(r"(vit|deit|deit3)_", architecture):
        raise ValueError(f"{where}: its architecture is unsupported ({shown_value(architecture)}): not vit_ or deit_")
    for part in ("quickgelu", "_rpn", "_parallel", "_sbb", "_srelpos", "_relpos", "_siglip", "_hybrid"):
        if part in architecture:
            raise ValueError(f"{where}: its architecture is unsupported ({architecture:.100}): AViT has no {part[1:]}")
    published = config.get("pretrained_cfg")
    published = published if isinstance(published, dict) else config
    pool = config.get("global_pool")
    if pool == "avg":
        told["global_pool"] = "avg"
    elif pool not in (None, "token"):
        raise ValueError(f"{where}: global_pool is {shown_value(pool)}, but AViT's head reads class token or mean")
    else:
        told["global_pool"] = "token"
    size = published.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        told["image_size"] = _side({"input_size": size[1:]}, "input_size", where)
    fields = {"mean": "mean", "std": "std", "crop_pct": "crop_fraction", "interpolation": "interpolation"}
    values = {ours: published[theirs] for theirs, ours in fields.items() if published.get(theirs) is not None}
    if values:
        told["preprocessing"] = _preprocessing(values, where)
    if published.get("crop_mode") == "squash":
        notes.append("timm squeezes whole images into a square for this model: avit_jax crops the middle square")
    labels = config.get("label_names")
    if isinstance(labels, list) and labels and all(isinstance(label, str) and label for label in labels):
        told["class_names"] = tuple(labels)


def _read_preprocessor(config: dict[str, Any], where: Path, told: dict[str, Any], notes: list[str]) -> None:
    """Read mean, std and crop. Its image size takes precedence over config.json's; positions are then resized."""
    values: dict[str, Any] = {}
    if config.get("do_normalize", True):
        values |= {o: config[t] for t, o in (("image_mean", "mean"), ("image_std", "std")) if config.get(t) is not None}
    else:
        values |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    scale = config.get("rescale_factor", 1 / 255)
    if not _is_number(scale) or abs(scale * 255 - 1) > 1e-3:
        raise ValueError(f"{where}: rescale_factor is {shown_value(scale)}, but AViT's pixels go from 0 to 1")
    resample = config.get("resample", 2)
    if isinstance(resample, bool) or not isinstance(resample, int) or resample not in _RESAMPLE:
        raise ValueError(f"{where}: resample is {shown_value(resample)}, but AViT has {_RESAMPLE} (Pillow's numbers)")
    values["interpolation"] = _RESAMPLE[resample]
    size = config.get("size")
    edge = size if isinstance(size, dict) and "shortest_edge" in size else None
    resized = _number(edge, "shortest_edge", where) if edge is not None else _side(config, "size", where)
    crop = _side(config, "crop_size", where) if config.get("do_center_crop") and "crop_size" in config else None
    seen = crop or (resized if edge is None else None)
    values["crop_fraction"] = 1.0
    if crop is not None and resized is not None:
        shorter, shown = (min(side) if isinstance(side, tuple) else side for side in (resized, crop))
        values["crop_fraction"] = min(shown / shorter, 1.0)
    # In transformers, only the Bit and CLIP processors take a plain number as the shorter side.
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))[:100]
    if edge is None and not (isinstance(size, int) and kind.startswith(("Bit", "CLIP"))):
        notes.append("transformers squeezes whole images into a square for it: avit_jax crops the middle square")
    told["preprocessing"] = _preprocessing(values, where)
    if seen is not None and seen != told.get("image_size"):
        if "image_size" in told:
            notes.append(
                f"config.json says image_size {told['image_size']} and preprocessor_config.json {seen}, which is used"
            )
        told["image_size"] = seen


def _preprocessing(values: dict[str, Any], where: Path) -> Preprocessing:
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("mean", "std"):
            numbers = value if isinstance(value, list) else [value]
            if not 0 < len(numbers) <= 64 or not all(_is_number(x) and abs(x) < 1000 for x in numbers):
                raise ValueError(f"{where}: {name} is {shown_value(value)}, it must be a number for each channel")
            checked[name] = tuple(float(x) for x in numbers)
        elif name == "crop_fraction":
            if not _is_number(value) or not 0.1 <= value <= 1:
                raise ValueError(f"{where}: the crop is {shown_value(value)} of the image, it must be from 0.1 to 1")
            checked[name] = float(value)
        elif value not in INTERPOLATIONS:
            raise ValueError(f"{where}: interpolation is {shown_value(value)}, not one of {', '.join(INTERPOLATIONS)}")
        else:
            checked[name] = value
    try:
        return Preprocessing(**checked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of the first kind of weight file found, whole or in shards."""
    for name in _WEIGHTS:
        if (path / name).is_file():
            return read_weight_file(path / name).state
        index = path / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    others = sorted(p.name for p in path.iterdir() if p.suffix in (".h5", ".msgpack"))[:3]
    there = f"; {', '.join(others)} cannot be read here" if others else ""
    if onnx := sorted(p.name for p in path.iterdir() if p.suffix == ".onnx"):
        there = f"; give the path of {shown(onnx[0], 60)} itself"
    raise ValueError(f"{path} has neither {' nor '.join(_WEIGHTS)}, whole or in shards with an index{there}")


def _shards(index: Path) -> dict[str, np.ndarray]:
    mapping = _json(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError(f"{index}: weight_map must name the file of each tensor")
    files: dict[str, set[str]] = {}
    for name, file in mapping.items():
        # A plain name in this folder only: an untrusted index must not make us read files elsewhere.
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]{0,200}", file):
            raise ValueError(f"{index}: the shard {shown_value(file)} is not a plain file name")
        files.setdefault(file, set()).add(name)
    state: dict[str, np.ndarray] = {}
    for file in sorted(files):
        if not (index.parent / file).is_file():
            raise ValueError(f"{index.parent / file} is missing: {index.name} names it as one of {len(files)} shards")
    for file, names in sorted(files.items()):
        shard = read_weight_file(index.parent / file).state
        differ = sorted(names ^ shard.keys())
        if differ:
            raise ValueError(f"{index.parent / file} does not hold what {index.name} says: {shown_value(differ[0])}")
        state |= shard
    return state


def _check_shapes(state: dict[str, np.ndarray], checks: dict[str, int], path: Path) -> None:
    """Raises ValueError unless config.json and the weights are of the same model."""
    kernel = next((v for n, v in state.items() if n.endswith("patch_embeddings.projection.weight")), None)
    if kernel is None or kernel.ndim != 4:
        return
    found = {"embed_dim": kernel.shape[0], "in_channels": kernel.shape[1], "patch_size": kernel.shape[2]}
    layers = {match[1] for name in state if (match := re.search(r"(?:^|\.)layers?\.([0-9]{1,5})\.", name))}
    found["depth"] = len(layers)
    for name, value in checks.items():
        if found[name] != value:
            raise ValueError(f"{path / 'config.json'} says {name} {value}, but the weights have {found[name]}")


def _check_image_size(state: dict[str, np.ndarray], told: dict[str, Any], path: Path) -> None:
    """Raises ValueError for an image size so large that positions resized to it would fill the memory."""
    positions = next((v for n, v in state.items() if n.endswith(("position_embeddings", "pos_embed"))), None)
    kernel = next((v for n, v in state.items() if n.endswith(("projection.weight", "patch_embed.proj.weight"))), None)
    size = told.get("image_size")
    if size is None or positions is None or kernel is None or positions.ndim != 3 or kernel.ndim != 4:
        return
    height, width = size if isinstance(size, tuple) else (size, size)
    patches = (height // max(kernel.shape[2], 1)) * (width // max(kernel.shape[2], 1))
    if patches > 16 * positions.shape[1]:
        raise ValueError(
            f"{path} says image size {height}x{width}, {patches} patches, but pos_embed has {positions.shape[1]} rows"
        )
