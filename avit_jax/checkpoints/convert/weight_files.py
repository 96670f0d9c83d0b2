"""Reading and writing files of weights: .pth (torch.save, both formats), .safetensors, .npz, .onnx, by content."""

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from avit_jax.checkpoints.convert.archive import Archive
from avit_jax.checkpoints.convert.array_files import (
    KEY,
    looks_like_safetensors,
    metadata_of,
    own_config,
    read_npz,
    read_safetensors,
    read_safetensors_config,
)
from avit_jax.checkpoints.convert.limits import check_names
from avit_jax.checkpoints.convert.onnx_graph import read_onnx_graph
from avit_jax.checkpoints.convert.onnx_weights import weights_in
from avit_jax.checkpoints.convert.torch_file import TorchMapping, TorchTensor, read_torch_file
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import shown

_RAW = ("model", "state_dict", "model_state_dict", "model_state", "teacher", "student")  # DINO: its teacher is used
_EMA = ("model_ema", "state_dict_ema", "ema", "ema_state_dict", "model_ema_state_dict")
_FOREIGN = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"<": "it is a web page, not a checkpoint: download the file itself",
    b"\x89HDF": "it is HDF5 (Keras): export its arrays as .npz",
    b"\x1f\x8b": "it is compressed with gzip: unpack it first",
}


@dataclasses.dataclass
class WeightFile:
    """The tensors of a file, by the file's own names."""

    state: dict[str, np.ndarray]
    model_config: AViTConfig | None  # of a file that save_torch wrote
    notes: list[str]
    told: dict[str, Any] = dataclasses.field(default_factory=dict)  # AViTConfig fields that the file shows


def read_weight_file(path: Path, *, ema: bool = False) -> WeightFile:
    """The state dict in a file. In a training checkpoint it is the model's, or with ema its moving average's.

    No code in the file is run. Raises ValueError, one sentence with the path, for a file that cannot be read, is
    damaged, or holds no state dict.
    """
    try:
        return _read(path, ema)
    except Exception as error:  # damaged files raise nearly anything, from zip, NumPy, safetensors and the pickle
        reason = shown(str(error) or type(error).__name__, 500)
        raise ValueError(f"{shown(path, 300)} cannot be read as a checkpoint: {reason}") from error


def read_config(path: Path) -> AViTConfig | None:
    """The configuration in a file that save_torch wrote; None for any other file, readable or not."""
    try:
        if _kind(path) == "safetensors":
            return read_safetensors_config(path)
        return _carried_config(read_torch_file(path)) if _kind(path) == "torch" else None
    except Exception:  # reading the weights will report what is wrong
        return None


def _kind(path: Path) -> str:
    """The format by content: safetensors, npz, onnx or torch. ValueError, with what it looks like, for others."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    with path.open("rb") as stream:
        start = stream.read(64)
    size = path.stat().st_size
    if not size:
        raise ValueError("it is empty")
    if looks_like_safetensors(start, size):  # checked first: the length of a header may look like any format
        return "safetensors"
    for magic, what in _FOREIGN.items():
        if start.startswith(magic):
            raise ValueError(what)
    if zipfile.is_zipfile(path):
        with Archive(path) as archive:
            return "npz" if any(name.endswith(".npy") for name in archive.names) else "torch"
    if path.suffix == ".onnx" or start.startswith(b"\x08"):  # the first field of ONNX is its version
        return "onnx"
    if not start.startswith(b"\x80"):
        raise ValueError("it is neither a zip file, nor a pickle, nor safetensors; or it is truncated")
    return "torch"


def _read(path: Path, ema: bool) -> WeightFile:
    kind = _kind(path)
    if kind == "torch":
        state, notes = _state_dict(read_torch_file(path), ema)
        return WeightFile({name: tensor.read() for name, tensor in state.items()}, _carried_config(state), notes)
    if ema:
        raise ValueError("it holds one set of weights and no moving average: leave ema out")
    if kind == "safetensors":
        return WeightFile(*read_safetensors(path), [])
    if kind == "onnx":
        weights, told, notes = weights_in(read_onnx_graph(path))
        check_names(weights)
        return WeightFile(weights, None, notes, told)
    return WeightFile(read_npz(path), None, [])


def _carried_config(state: Any) -> AViTConfig | None:
    attributes = state.attributes if isinstance(state, TorchMapping) else None
    metadata = attributes.get("_metadata") if isinstance(attributes, dict) else None
    return own_config(metadata[KEY]) if isinstance(metadata, dict) and KEY in metadata else None


def _state_dict(content: Any, ema: bool) -> tuple[dict[str, TorchTensor], list[str]]:
    """The mapping of names to tensors inside a checkpoint's wrappers."""
    notes: list[str] = []
    chosen = False
    for _ in range(5):  # no checkpoint is wrapped deeper, and a cyclic one ends here
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}: a checkpoint is a mapping of names to tensors")
        raw = [name for name in _RAW if isinstance(content.get(name), dict)]
        average = [name for name in _EMA if isinstance(content.get(name), dict)]
        if not raw and not average:
            break
        wanted = average if ema and not chosen else raw or average
        if not wanted:
            raise ValueError(f"it has {', '.join(raw)} and no moving average: leave ema out")
        if not raw and not ema:
            notes.append(f"it has only the moving average ({wanted[0]}), which is used")
        chosen = chosen or bool(average)
        content = content[wanted[0]]
    if ema and not chosen:
        raise ValueError("it holds one set of weights and no moving average: leave ema out")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, TorchTensor)):
            names = ", ".join(shown(name, 40) for name in list(content)[:5])
            raise ValueError(f"it is not a state dict but holds {names}: {shown(name, 40)} is a {type(value).__name__}")
    if not content:
        raise ValueError("its state dict is empty")
    check_names(content)
    return content, notes


def write_safetensors(state: Mapping[str, np.ndarray], model_config: AViTConfig, path: Path) -> None:
    """Write a .safetensors file, with the configuration and a checksum as metadata."""
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    safetensors.numpy.save_file(arrays, path, metadata_of(state, model_config))


def write_pth(state: Mapping[str, np.ndarray], model_config: AViTConfig, path: Path) -> None:
    """Write a state dict with torch.save, with the configuration in its metadata. Raises ValueError without torch."""
    try:
        import torch
    except ImportError:
        raise ValueError(f"{path}: only PyTorch writes this format: pip install torch, or give .safetensors") from None
    from collections import OrderedDict

    tensors: Any = OrderedDict((name, torch.from_numpy(np.array(array))) for name, array in state.items())
    tensors._metadata = OrderedDict({KEY: {"version": 1, "config": json.dumps(model_config.to_json())}})
    torch.save(tensors, path)
