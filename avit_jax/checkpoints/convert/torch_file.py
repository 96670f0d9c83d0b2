"""Reading what torch.save wrote as NumPy arrays, without torch: the zip format, and the one before torch 1.6.

The objects come from `pickle_machine`, which runs no code from the file. Memory stays proportional to the file: tensors
are only described until they are read.
"""

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any

from avit_jax.checkpoints.convert.archive import Archive
from avit_jax.checkpoints.convert.limits import MAX_PICKLE
from avit_jax.checkpoints.convert.pickle_machine import PickleMachine
from avit_jax.checkpoints.convert.torch_tensors import Storage, StorageFile, TorchMapping, TorchTensor
from avit_jax.runtime.files import shown

__all__ = ["TorchMapping", "TorchTensor", "read_torch_file"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def read_torch_file(path: Path) -> Any:
    """The object in the file; its tensors are TorchTensor. Raises ValueError, saying why, if it cannot be read."""
    with path.open("rb") as stream:
        if zipfile.is_zipfile(stream):
            return _read_zip(path)
    return _read_legacy(path)


def _read_zip(path: Path) -> Any:
    archive = Archive(path)
    roots = [name.removesuffix("/data.pkl") for name in archive.names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip file without exactly one data.pkl, so torch.save did not write it")

    def entry(name: str, most: int | None = None) -> bytes:
        if archive.is_compressed(f"{roots[0]}/{name}"):  # torch never compresses; a bomb would
            raise ValueError(f"its part {shown(name)} is compressed, which torch.save does not do")
        return archive.read(f"{roots[0]}/{name}", most=most)

    if f"{roots[0]}/byteorder" in archive.names and entry("byteorder", 100) != b"little":
        raise ValueError("its numbers are not little-endian")
    file = StorageFile(lambda storage: entry(f"data/{storage.key}"), path.stat().st_size)
    return PickleMachine(file).run(io.BytesIO(entry("data.pkl", MAX_PICKLE)))


def _read_legacy(path: Path) -> Any:
    """The format before torch 1.6: five pickles in a row, then the storages, each after its length."""
    with path.open("rb") as stream:
        # The file is mapped, so that reading beyond its end returns what is there and allocates nothing more.
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    places: dict[str, int] = {}

    def storage_bytes(storage: Storage) -> Any:
        start = places[storage.key]
        return memoryview(data)[start : start + storage.size * storage.dtype.itemsize]

    machine = PickleMachine(StorageFile(storage_bytes, len(data)))
    pickles = io.BytesIO(data[:MAX_PICKLE])
    magic = machine.run(pickles)
    if not isinstance(magic, int) or magic != _LEGACY_MAGIC:
        raise ValueError("torch.save did not write it")
    protocol = machine.run(pickles)
    if not isinstance(protocol, int) or protocol != _LEGACY_PROTOCOL:
        raise ValueError(f"its legacy protocol is {shown(protocol)}, not {_LEGACY_PROTOCOL}")
    system = machine.run(pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")
    content, keys = machine.run(pickles), machine.run(pickles)
    plain = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not plain or set(keys) != machine.storages.keys():
        raise ValueError("its list of storages is not that of its tensors")
    data.seek(pickles.tell())
    for key in keys:
        storage = machine.storages[key]
        count = int.from_bytes(data.read(8), "little")
        if count != storage.size:
            raise ValueError(f"storage {key} has {count} values, but {storage.size} were declared")
        places[key] = data.tell()
        if places[key] + count * storage.dtype.itemsize > len(data):
            raise ValueError(f"it ends within storage {key}")
        data.seek(places[key] + count * storage.dtype.itemsize)
    return content
