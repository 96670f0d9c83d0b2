"""Arrays of .safetensors and .npz files, and the metadata that avit_jax writes beside them."""

import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from avit_jax.checkpoints.convert.archive import Archive
from avit_jax.checkpoints.convert.limits import MAX_HEADER, MAX_TENSORS, check_names, elements
from avit_jax.model.config import AViTConfig
from avit_jax.runtime.files import parse_json, shown

KEY = "avit_jax"  # the metadata entry of files that avit_jax wrote


def looks_like_safetensors(start: bytes, size: int) -> bool:
    """Whether a file of `size` bytes begins as safetensors files do: the length of a header, then a brace."""
    return size > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], AViTConfig | None]:
    """The file's tensors, and its configuration if save_torch wrote it. Raises ValueError if it is damaged."""
    assert ml_dtypes.bfloat16  # the import makes the type known to NumPy
    with _safetensors(path) as file:
        names = list(file.keys())
        check_names(dict.fromkeys(names))
        state = {name: file.get_tensor(name) for name in names}
        metadata = (file.metadata() or {}).get(KEY)
    for array in state.values():
        elements(array.shape)
    if metadata is None:
        return state, None
    ours = parse_json(metadata)
    config = own_config(ours)
    if ours.get("crc32") != crc32(state, ours["config"]):
        raise ValueError("it is damaged: its tensors are not those that were written")
    return state, config


def read_safetensors_config(path: Path) -> AViTConfig | None:
    """The configuration that save_torch wrote; None if another program wrote the file."""
    with _safetensors(path) as file:
        metadata = (file.metadata() or {}).get(KEY)
    return None if metadata is None else own_config(parse_json(metadata))


def _safetensors(path: Path) -> Any:
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if header > MAX_HEADER:  # the library parses up to 100 MB, which takes many times as much memory
        raise ValueError(f"its header has {header} bytes: a ViT's has at most {MAX_HEADER}")
    return safetensors.safe_open(path, framework="numpy")


def own_config(ours: Any) -> AViTConfig:
    """The configuration in the metadata that save_torch wrote. Raises ValueError if there is none."""
    if not isinstance(ours, dict) or not isinstance(ours.get("config"), str):
        raise ValueError("it is damaged: it says that avit_jax wrote it, but has no configuration")
    return AViTConfig.from_json(parse_json(ours["config"]))


def crc32(state: Mapping[str, np.ndarray], config: str) -> int:
    """The checksum of names, types, shapes, values and configuration (JSON text); safetensors itself has none."""
    checksum = zlib.crc32(config.encode())
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        checksum = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum)
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, checksum)
    return checksum


def metadata_of(state: Mapping[str, np.ndarray], model_config: AViTConfig) -> dict[str, str]:
    """The metadata that write_safetensors puts beside the tensors: configuration and checksum."""
    described = json.dumps(model_config.to_json())
    return {"format": "pt", KEY: json.dumps({"config": described, "crc32": crc32(state, described)})}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file by name. Raises ValueError if it is damaged, or unpacks to far more than its size."""
    with Archive(path) as archive:
        names = archive.names
        if others := [name for name in names if not name.endswith(".npy")]:
            raise ValueError(
                f"its part {shown(others[0])} is not an array, and NumPy writes only arrays: it may be damaged"
            )
        if len(names) > MAX_TENSORS:
            raise ValueError(f"it has {len(names)} arrays: a ViT has at most {MAX_TENSORS}")
        check_names(dict.fromkeys(names))
        return {name.removesuffix(".npy"): _npy(archive.read(name), name) for name in names}


def _npy(content: bytes, name: str) -> np.ndarray:
    """The array of a .npy file in memory. Nothing is allocated for the size that its header declares."""
    head = io.BytesIO(content[: 2**15])
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_columns, dtype = read(head)
    except Exception as error:  # NumPy evaluates the header as Python literals, which can raise nearly anything
        raise ValueError(
            f"its array {shown(name)} has a damaged header ({type(error).__name__}: {shown(str(error), 100)})"
        ) from error
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"its array {shown(name)} holds {shown(str(dtype), 50)}, not numbers")
    values = memoryview(content)[head.tell() :]
    if elements(shape) * dtype.itemsize != len(values):
        raise ValueError(f"its array {shown(name)} has {len(values)} bytes, but its header declares another size")
    return np.frombuffer(values, dtype).reshape(shape, order="F" if by_columns else "C")
