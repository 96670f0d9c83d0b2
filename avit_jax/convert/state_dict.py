"""PyTorch checkpoints in: a restricted .pth reader and the table of names between timm's layout and ours."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from avit_jax.config import AViTConfig, config_from
from avit_jax.model import AViT

_STORAGE_DTYPES = {"FloatStorage": np.float32, "HalfStorage": np.float16, "LongStorage": np.int64}


class _Storage:
    """Stands for torch.FloatStorage and its kin while unpickling."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = np.dtype(dtype)


def _rebuild_tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    """What torch._utils._rebuild_tensor_v2 does, as a NumPy copy; refuses views that reach beyond the storage."""
    reach = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if offset < 0 or any(step < 0 for step in strides) or reach >= max(storage.size, 1):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} reaches beyond its storage of {storage.size} values")
    byte_strides = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, byte_strides).copy()


class _TorchUnpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; every other name in the pickle is refused."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGE_DTYPES:
            return _Storage(_STORAGE_DTYPES[name])
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which is neither a tensor nor a container")

    def persistent_load(self, pid: Any) -> np.ndarray:
        _, storage, key, _, size = pid
        values = np.frombuffer(self._archive.read(f"{self._root}/data/{key}"), storage.dtype)
        if values.size != size:
            raise pickle.UnpicklingError(f"storage {key} has {values.size} values where {size} were promised")
        return values


def read_pth(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote (zip format), as NumPy arrays in plain containers, without torch and without running code.

    Raises ValueError where the file is not such a checkpoint or asks for anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise ValueError("it is a zip file without one data.pkl, so torch.save did not write it")
            content = _TorchUnpickler(archive, roots[0]).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: a checkpoint is a mapping of names to tensors")
    return content


def _to_ours(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """One PyTorch parameter under our name and layout; linear weights are stored transposed there."""
    if name == "patch_embed.proj.weight":  # [D, C, p, p] -> [p * p * C, D]
        return "patch_embed.proj.kernel", value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    if not name.endswith(".weight"):
        return name, value
    stem = name.removesuffix(".weight")
    return (f"{stem}.kernel", value.T) if value.ndim == 2 else (f"{stem}.scale", value)


def from_torch_state_dict(state_dict: Mapping[str, np.ndarray], preset: str | None = None, **overrides: Any) -> AViT:
    """A model with the weights of a published A-ViT or DeiT state dict (timm's names).

    Architecture comes from the preset and the overrides (AViTConfig fields); without a preset the head count is width
    / 64 for 192, 384 and 768, else it must be given. Raises ValueError, listing both sets, where a source key is unused
    or a target unfilled, and naming the parameter and both shapes where they differ.
    """
    if preset is None:
        width = overrides.get("embed_dim", AViTConfig.embed_dim)
        if "num_heads" not in overrides and width not in (192, 384, 768):
            raise ValueError(f"width {width} does not tell the number of heads: give num_heads or a preset")
        overrides = {"num_heads": width // 64} | overrides
        if overrides.get("gate_scale") is None:
            print("neither preset nor gate_scale is given: this model never halts")
    return _fill(config_from(preset, **overrides), state_dict)


def _fill(config: AViTConfig, state_dict: Mapping[str, np.ndarray]) -> AViT:
    found: dict[str, Any] = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "blocks":
            ours, value = _to_ours(".".join(["blocks", *parts[2:]]), value)
            found.setdefault(ours, {})[int(parts[1])] = value
        else:
            ours, value = _to_ours(name, value)
            found[ours] = value
    model = AViT(config, rngs=nnx.Rngs(0))
    targets = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    unused, unfilled = sorted(found.keys() - targets), sorted(targets.keys() - found.keys())
    if unused or unfilled:
        raise ValueError(
            f"the checkpoint does not fit the model: unused {unused or 'none'}, unfilled {unfilled or 'none'}"
        )
    for name, param in targets.items():
        value = found[name]
        if isinstance(value, dict):
            missing = sorted(set(range(config.depth)) ^ set(value))
            if missing:
                raise ValueError(f"{name}: layers {missing} differ between the checkpoint and depth {config.depth}")
            value = np.stack([value[layer] for layer in range(config.depth)])
        if value.shape != param.shape:
            raise ValueError(f"{name} has shape {value.shape} in the checkpoint and {param.shape} in the model")
        param[...] = jnp.asarray(value, param.dtype)
    return model


# Where a parameter carries the embedding's channels: its last axis, or, where it reads the embedding, the one before.
_WRITES = ("patch_embed.proj", "cls_token", "dist_token", "pos_embed", "norm", "attn.proj", "mlp.fc2")
_READS = ("attn.qkv.kernel", "mlp.fc1.kernel", "head.kernel", "head_dist.kernel")


def swap_channels(model: AViT, first: int, second: int) -> None:
    """Exchange two channels of the embedding, in place; a plain ViT's output stays exactly what it was.

    The gate reads channel 0, and a static model has no reason to keep there what should decide who halts: this brings
    another of its channels there. Raises ValueError for a channel that the embedding does not have.
    """
    width = model.config.embed_dim
    if not (0 <= first < width and 0 <= second < width):
        raise ValueError(f"channels {first} and {second} are not both within 0..{width - 1}, the embedding's channels")
    order = np.arange(width)
    order[[first, second]] = second, first
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        if any(part in name for part in _READS):
            param[...] = param[...][..., order, :]
        elif any(part in name for part in _WRITES):
            param[...] = param[...][..., order]
