"""Files of weights that could take long, much memory, or the process with them."""

import json
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests.harness.builders import small_config
from tests.harness.hostile_pickles import (
    ORDERED,
    START,
    doubled,
    everywhere,
    get,
    legacy,
    number,
    numbers,
    put,
    state,
    storage,
    tensor,
    text,
    write_zip,
)

ONE = tensor(numbers((1,)), numbers((1,)))
FLOAT = {"data/0": np.float32([1]).tobytes()}


def npy(shape: tuple[int, ...], data: bytes = b"", *, header: str = "", kind: str = "<f4") -> bytes:
    text = (header or repr({"descr": kind, "fortran_order": False, "shape": shape})).encode() + b"\n"
    return b"\x93NUMPY\x02\0" + struct.pack("<I", len(text)) + text + data


def npz(path: Path, parts: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def tensors_file(path: Path, header: Any, data: bytes = b"") -> Path:
    described = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(described)) + described + data)
    return path


def overlapping(path: Path, parts: int, size: int) -> Path:
    """A zip file of `parts` storages of `size` bytes and more, each a part of the one before it."""
    content, found = bytes(size), []
    for index in range(parts):
        name = f"archive/data/{index}".encode()
        sums = struct.pack("<3L", zlib.crc32(content), len(content), len(content))
        front = struct.pack("<4s5H", b"PK\3\4", 20, 0, 0, 0, 33) + sums + struct.pack("<2H", len(name), 0) + name
        found.append((name, sums, len(front), len(content)))
        content = front + content
    reads = [
        tensor(numbers((n // 4,)), numbers((1,)), storage(text(str(i)), number(n // 4)))
        for i, (_, _, _, n) in enumerate(found)
        if n % 4 == 0
    ]
    pickled, name = state(*reads), b"archive/data.pkl"
    sums = struct.pack("<3L", zlib.crc32(pickled), len(pickled), len(pickled))
    start = struct.pack("<4s5H", b"PK\3\4", 20, 0, 0, 0, 33) + sums + struct.pack("<2H", len(name), 0) + name
    entries, place = [(name, sums, len(content))], 0
    for entry, checks, length, _ in reversed(found):
        entries.append((entry, checks, place))
        place += length
    table = b"".join(
        struct.pack("<4s6H", b"PK\1\2", 20, 20, 0, 0, 0, 33) + checks
        + struct.pack("<5H2L", len(entry), 0, 0, 0, 0, 0, where) + entry
        for entry, checks, where in entries
    )  # fmt: skip
    content += start + pickled
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(entries), len(entries), len(table), len(content), 0)
    path.write_bytes(content + table + end)
    return path


def strange_pickles() -> dict[str, bytes]:
    found = {
        f"{kind} {what}": program
        for kind in ("tuple", "list", "dict")
        for what, program in everywhere(doubled(60, kind)).items()
    }
    shared = b"".join(text(f"w{i}") + get(5) for i in range(90_000))
    return found | {
        "deep key": START + b"}N" + pickle.TUPLE1 * 2_000_000 + b"Ns.",
        "deep key within the steps": START + b"}N" + pickle.TUPLE1 * 400_000 + b"Ns.",
        "deep lists": START + pickle.EMPTY_LIST * 190_000 + pickle.APPEND * 189_999 + b".",
        "lists that grow from within": START
        + pickle.EMPTY_LIST
        + b"".join(put(i) + pickle.EMPTY_LIST + put(i + 1) + pickle.APPEND + get(i + 1) for i in range(50_000))
        + b".",
        "deep attributes": START + (ORDERED + b")R") * 60_000 + pickle.BUILD * 59_999 + b".",
        "many sets": START + pickle.EMPTY_SET * 900_000 + b".",
        "many numbers": START + b"](" + (pickle.BINFLOAT + bytes(8)) * 990_000 + b"e.",
        "wide text": START + text("\U0001f600" + "a" * (2**24 - 1000)) + b".",
        "long number": START + pickle.LONG4 + struct.pack("<I", 2**23) + b"\1" * 2**23 + b".",
        "75,000 tensors": state(*[ONE] * 75_000),
        "90,000 shared tensors": START + b"}(" + text("a") + ONE + put(5) + shared + b"u.",
        "repeated storages": state(*[tensor(numbers((1000, 1000)), numbers((0, 0)))] * 1000),
        "shape of huge numbers": state(tensor(numbers((2**62,) * 7), numbers((0,) * 7))),
        "shape of 10,000 axes": state(tensor(numbers((2**62,) * 10_000), numbers((0,) * 10_000))),
        "number keys": START + b"}(" + b"".join(number(i << 44) + b"N" for i in range(90_000)) + b"u.",
        "escapes": START + b"}" + text("\x1b[2J\n" * 20) + b"Ns.",
        "escapes in a module": START + text("\x1b[2J\n") + text("x" * 10**6) + pickle.STACK_GLOBAL + b".",
        "pairs copied again and again": START
        + b"](" + b"".join(text("a") + b"N\x86" for _ in range(50_000)) + b"e" + put(7)
        + (ORDERED + get(7) + b"\x85R") * 10_000 + b".",
    }  # fmt: skip


def strange_files(folder: Path) -> list[Path]:
    """Everything that could take long, much memory, or the process with it."""
    paths = [
        write_zip(folder / f"{name}.pth", program, **FLOAT)
        for name, program in (
            strange_pickles() | {"cyclic": START + b"}" + put(1) + text("a") + get(1) + b"s."}
        ).items()
    ]
    twice = [tensor(numbers((1,)), numbers((1,)), storage(text(str(i % 2)), number(10**6))) for i in range(5000)]
    two = {"data/0": bytes(4 * 10**6), "data/1": bytes(4 * 10**6)}
    paths.append(write_zip(folder / "alternating storages.pth", state(*twice), **two))
    for name, first in {"protocol": b"", "system": START + number(1001) + b"."}.items():
        (folder / f"legacy {name}.pth").write_bytes(legacy(first, START + doubled(60) + b"."))
        paths.append(folder / f"legacy {name}.pth")
    right = START + number(1001) + b"." + START + b"}" + text("little_endian") + pickle.NEWTRUE + b"s."
    for name, keys in {"keys": doubled(60), "list of keys": b"]" + doubled(60) + b"a"}.items():
        (folder / f"legacy {name}.pth").write_bytes(legacy(right, state(ONE), START + keys + b"."))
        paths.append(folder / f"legacy {name}.pth")
    paths += [
        overlapping(folder / "overlapping.pth", 300, 10**6),
        npz(folder / "bomb.npz", {"a.npy": npy((2 * 10**7,), bytes(8 * 10**7))}),
        npz(folder / "bombs.npz", {f"a{i}.npy": npy((10**7,), bytes(4 * 10**7)) for i in range(2)}),
        npz(folder / "promise.npz", {"a.npy": npy((10**12,))}),
        npz(folder / "lzma.npz", {"a.npy": npy((10**7,), bytes(4 * 10**7))}, zipfile.ZIP_LZMA),
        npz(folder / "21,000 parts.npz", {f"{i}.npy": b"" for i in range(21_000)}, zipfile.ZIP_STORED),
        npz(folder / "parts of long names.npz", {f"{i:060000}.npy": b"" for i in range(100)}, zipfile.ZIP_STORED),
        tensors_file(
            folder / "200,000.safetensors",
            b"{"
            + b",".join(b'"w%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_000))
            + b"}",
        ),
        tensors_file(folder / "deep.safetensors", b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}"),
    ]
    shapes = {"patch_embed.proj.weight": (16, 3, 4, 4), "pos_embed": (1, 5, 16), "blocks.0.norm1.weight": (16,)}
    few = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    deep = small_config().to_json()
    deep["model"]["depth"] = 2**31 - 1
    last = folder / "layer 10^9.safetensors"
    safetensors.numpy.save_file(few | {f"blocks.{10**9}.norm1.weight": np.ones(16, np.float32)}, last)
    claims = {"2^31 layers": json.dumps(deep), "deep JSON": "[" * 10**6}
    return [*paths, last, *(claiming(folder / f"{name}.safetensors", few, text) for name, text in claims.items())]


def claiming(path: Path, tensors: dict[str, np.ndarray], config: str) -> Path:
    """A .safetensors file that says that save_torch wrote it with this configuration; its checksum is right."""
    checksum = zlib.crc32(config.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        checksum = zlib.crc32(array.tobytes(), zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), checksum))
    safetensors.numpy.save_file(tensors, path, {"avit_jax": json.dumps({"config": config, "crc32": checksum})})
    return path
