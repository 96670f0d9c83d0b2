"""Files of weights: what torch.save wrote comes back, and no file, however broken or hostile, does anything else."""

import io
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import ml_dtypes
import numpy as np
import pytest

import avit_jax
from avit_jax.checkpoints.convert.torch_file import read_torch_file
from avit_jax.checkpoints.convert.weight_files import read_config, read_weight_file
from tests.harness.arrays import read_npz

DATA = Path(__file__).parent / "data"
FORMATS = ("torch_zip", "torch_legacy", "torch_protocol4")


@pytest.mark.parametrize("name", FORMATS)
def test_every_type_and_layout_of_tensor_comes_back(name: str) -> None:
    expected = read_npz(DATA / "torch_values.npz")
    state = read_weight_file(DATA / f"{name}.pth").state
    assert list(state) == list(expected)
    for key, value in expected.items():
        np.testing.assert_array_equal(np.asarray(state[key], np.float32), value, err_msg=key)
    types = {key: value.dtype for key, value in state.items()}
    assert types["bfloat16"] == ml_dtypes.bfloat16
    assert (types["float16"], types["float64"], types["int64"]) == (np.float16, np.float64, np.int64)


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_around_the_weights_is_plain_data(name: str) -> None:
    content = read_torch_file(DATA / f"{name}.pth")
    assert content["epoch"] == 3
    assert content["args"].attributes == {"lr": 1e-3, "betas": (0.9, 0.999), "name": "x", "none": None}
    assert list(content["ordered"]) == ["weight", "bias"]
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.01


def zip_with(folder: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, **parts: bytes) -> Path:
    path = folder / "file.pth"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
    return path


class Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def tensor_pickle(shape: tuple[int, ...], strides: tuple[int, ...], size: int = 1, key: str = "0") -> bytes:
    """{"w": a float32 tensor of that shape}, opcode by opcode."""

    def number(value: int) -> bytes:
        return pickle.LONG1 + bytes([16]) + value.to_bytes(16, "little", signed=True)

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def numbers(values: tuple[int, ...]) -> bytes:
        return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

    storage = pickle.MARK + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(size)
    storage += pickle.TUPLE + pickle.BINPERSID
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.MARK + storage + number(0) + numbers(shape)
    tensor += numbers(strides) + pickle.NEWFALSE + pickle.EMPTY_DICT + pickle.TUPLE + pickle.REDUCE
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + text("w") + tensor + pickle.SETITEM + pickle.STOP


def test_the_pickle_of_these_tests_is_a_good_one(tmp_path: Path) -> None:
    path = zip_with(tmp_path, tensor_pickle((2,), (1,), 2), **{"data/0": np.float32([1, 2]).tobytes()})
    np.testing.assert_array_equal(read_weight_file(path).state["w"], [1, 2])


CYCLE = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.BINPUT + b"\0" + pickle.BINUNICODE + b"\5\0\0\0model"
CYCLE += pickle.BINGET + b"\0" + pickle.SETITEM + pickle.STOP
HOSTILE = {
    "runs a command": (pickle.dumps({"model": Attack(os.system, "touch {}/harm")}, 2), "it asks for (posix|nt).system"),
    "evaluates": (pickle.dumps(Attack(eval, "1 + 1"), 4), "it asks for builtins.eval"),
    "imports numpy": (pickle.dumps(np.zeros(3), 2), "it asks for numpy"),
    "an object of its own": (pickle.dumps(io.BytesIO(b"x"), 2), "it asks for _io.BytesIO"),
    "a cycle": (CYCLE, "changes a container that is part of another one, or of itself"),
    "a tensor of 10^15 values": (tensor_pickle((10**15,), (0,)), "its tensors repeat their storages"),
    "a tensor beyond its storage": (tensor_pickle((2,), (1,)), "reaches beyond its storage of 1 values"),
    "a negative size": (tensor_pickle((-1,), (1,)), "in place of a size"),
    "another storage size": (tensor_pickle((3,), (1,), 3), "has 1 values, but 3 were declared"),
    "a path out of the file": (tensor_pickle((1,), (1,), key="../../../../etc/passwd"), "its part .*passwd is missing"),
    "a memo of 16 GB": (pickle.PROTO + b"\x02" + pickle.NONE + pickle.LONG_BINPUT + b"\xff" * 4 + pickle.STOP, "holds a None"),
    "bytes of 4 GB": (pickle.PROTO + b"\x04" + pickle.BINBYTES + b"\xff" * 4 + pickle.STOP, "expected 4294967295 bytes"),
    "a bytearray of 2^62": (pickle.PROTO + b"\x05" + pickle.BYTEARRAY8 + b"\0" * 7 + b"\x40", "expected 46116860"),
    "attributes for a function": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor\n}b.", "a _Name is given attributes"),
    "an end without a beginning": (pickle.STOP, "damaged"),
    "a stack of nothing": (pickle.PROTO + b"\x02" + pickle.APPENDS + pickle.STOP, "damaged"),
    "no pickle": (b"hello", "opcode|pickle"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_does_nothing_and_is_refused_at_once(name: str, tmp_path: Path) -> None:
    pickled, reason = HOSTILE[name]
    pickled = pickled.replace(b"{}", bytes(tmp_path))
    path = zip_with(tmp_path, pickled, **{"data/0": np.float32([1]).tobytes()})
    began = time.monotonic()
    with pytest.raises(ValueError, match=rf"(?s)file.pth cannot be read as a checkpoint: .*{reason}"):
        read_weight_file(path)
    assert time.monotonic() - began < 1
    assert [p.name for p in tmp_path.iterdir()] == ["file.pth"]


def test_a_compressed_part_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = zip_with(tmp_path, bytes(10**8), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its part data.pkl is compressed"):
        read_weight_file(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "it is a web page"),
        (b"\x89HDF\r\n\x1a\n", "it is HDF5"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PK\x03\x04 and then nothing", "neither a zip file"),
        (b"just some text that someone put there", "neither a zip file"),
        (pickle.dumps({"a": 1}), "torch.save did not write it"),
        (struct.pack("<Q", 30) + b"{" + b"x" * 40, "header|key|expected"),
    ],
)
def test_a_file_that_is_no_checkpoint_says_what_it_looks_like(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x.pth cannot be read as a checkpoint: .*({reason})"):
        read_weight_file(tmp_path / "x.pth")
    assert read_config(tmp_path / "x.pth") is None


def test_wrappers_and_averages(tmp_path: Path) -> None:
    path = DATA / "torch_zip.pth"
    assert "float32" in read_weight_file(path).state
    with pytest.raises(ValueError, match="has model and no moving average: leave ema out"):
        read_weight_file(path, ema=True)


def flips(content: bytes, count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        broken = bytearray(content)
        kind = rng.integers(4)
        # Half of the flips near the ends, where pickles, headers and directories are.
        where = int(rng.integers(len(broken))) if kind < 2 else int(rng.integers(3000)) * int(rng.choice([1, -1]))
        if kind == 0:
            del broken[where:]
        else:
            broken[where % len(broken)] ^= 1 << int(rng.integers(8))
        result.append(bytes(broken))
    return result


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Of a million small calls checking shapes and types takes four fifths of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", ["golden.pth", "legacy", "protocol4", "safetensors", "npz"])
def test_flipped_bits_and_cut_files_give_the_right_tensors_or_an_error(kind: str, tmp_path: Path) -> None:
    source = {"golden.pth": "micro-5-50", "legacy": "torch_legacy", "protocol4": "torch_protocol4"}.get(kind)
    original = DATA / f"{source}.pth"
    if kind == "npz":
        original = DATA / "torch_values.npz"
    elif source is None:
        original = tmp_path / "original.safetensors"
        golden = avit_jax.load(DATA / "micro-5-50.pth", num_heads=2, gate_scale=5.0, gate_center=50.0)
        avit_jax.save_torch(golden, original)
    expected = read_weight_file(original).state
    path, refused = tmp_path / "broken", 0
    for content in flips(original.read_bytes(), 700, seed=len(kind)):
        path.write_bytes(content)
        try:
            state = read_weight_file(path).state
        except ValueError as error:
            assert str(error).startswith(f"{path} cannot be read as a checkpoint: ")
            refused += 1
            continue
        if kind == "legacy":  # that format has no checksum: what can be asked for is that it ends
            continue
        assert state.keys() == expected.keys()
        assert all(np.array_equal(state[name], value) for name, value in expected.items())
    assert refused > 300
