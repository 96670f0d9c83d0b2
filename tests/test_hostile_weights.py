"""Weights and configurations from strangers: every file loads or is refused in one short sentence, and costs little."""

import copy
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import avit_jax
from avit_jax import AViTConfig
from avit_jax.checkpoints.convert.weight_files import read_weight_file
from avit_jax.data.sources import load_dataset
from avit_jax.runtime.files import read_json, shown, shown_value
from tests.harness.builders import small_config
from tests.harness.hostile_files import FLOAT, ONE, npy, npz, strange_files, tensors_file
from tests.harness.hostile_pickles import (
    ORDERED,
    START,
    doubled,
    get,
    number,
    numbers,
    put,
    read_in_a_process,
    state,
    storage,
    tensor,
    text,
    write_zip,
)


@pytest.mark.slow
def test_no_file_of_a_stranger_takes_long_or_much_memory_or_the_process(tmp_path: Path) -> None:
    paths = strange_files(tmp_path)
    found = read_in_a_process(paths, timeout=120)
    assert set(found) == set(map(str, paths))
    for path in paths:
        cost = found[str(path)]
        assert cost["error"].startswith(str(path)), cost
        assert len(cost["error"]) < 1000 and cost["error"].isprintable(), cost
        assert cost["seconds"] < 2, (path.name, cost)
        assert cost["bytes"] < 2e8 + path.stat().st_size, (path.name, cost)


def check(path: Path) -> bool:
    """Whether a file loads; where it does not, the sentence is short and printable, and names the file."""
    try:
        read_weight_file(path)
    except ValueError as error:
        sentence = str(error)
        assert sentence.startswith(f"{path} cannot be read as a checkpoint: ")
        assert len(sentence) < 1000 and sentence.isprintable(), sentence
        return False
    return True


PIECES = [
    *(bytes([opcode]) for opcode in b"()]}\x8fNu\x88\x89\x85\x86\x87tsaebR\x81Qq\x00h\x00\x94.\x90\x93"),
    *(put(0), put(1), get(0), get(1), text("a"), text("torch"), text("storage"), text("0"), number(1), number(-1)),
    *(number(2**200), ORDERED, b"ctorch\nSize\n", b"ctorch\nFloatStorage\n", b"cposix\nsystem\n", storage(), ONE),
    *(ONE, text("w") + ONE + b"s", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(doubled(40, "tuple"), doubled(40, "list"), doubled(40, "dict"), pickle.TUPLE1 * 40, numbers((2, 3))),
    *(b"G" + b"\x7f\xf8" + bytes(6), b"I1\n", b"0", b"2", b"ioS\nsystem\n"),
]


@pytest.mark.parametrize("seed", range(4))
def test_random_pickles_load_or_are_refused(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    path = tmp_path / "random.pth"
    loaded = 0
    for _ in range(100):
        program = b"".join(PIECES[i] for i in rng.integers(len(PIECES), size=rng.integers(1, 25)))
        whole = START + pickle.EMPTY_DICT + text("v") + ONE + pickle.SETITEM if rng.random() < 0.7 else START
        loaded += check(write_zip(path, whole + program + pickle.STOP, **FLOAT))
    assert loaded


SMALL: dict[str, Any] = {
    "negative axis.npz": {"a.npy": npy((-1,))},
    "objects.npz": {"a.npy": npy((1,), bytes(8), kind="|O")},
    "2^62 axes.npz": {"a.npy": npy((2**62, 2**62))},
    "brackets.npz": {"a.npy": npy((1,), header="(" * 9000)},
    "minus.npz": {"a.npy": npy((1,), header="-" * 9000 + "1")},
    "text.npz": {"a.npy": b"hello"},
    "long name.npz": {"a" * 60_000 + ".npy": npy((1,), bytes(4))},
    "escape.npz": {"\x1b[2J\n.npy": npy((1,), bytes(4))},
    "10,001 arrays.npz": {f"a{i}.npy": npy((1,), bytes(4)) for i in range(10_001)},
    "shape.safetensors": {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 0]}},
    "nothing.safetensors": {"w": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}},
    "axes.safetensors": {"w": {"dtype": "F32", "shape": [1] * 60, "data_offsets": [0, 4]}},
    "name.safetensors": {"\x1b[2J\n" + "w" * 10**5: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
}


@pytest.mark.parametrize("name", SMALL)
def test_arrays_that_cannot_be_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    npz(path, SMALL[name], 0) if name.endswith(".npz") else tensors_file(path, SMALL[name], bytes(4))
    assert not check(path)


@pytest.mark.parametrize("ours", ["[]", "1", "{}", '{"config":1}', '{"config":"{}"}', '{"config":"1","config":"2"}'])
def test_what_a_file_says_of_itself_is_checked(ours: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.ones(1, np.float32)}, path, {"avit_jax": ours})
    assert not check(path)
    claimed = ORDERED + b")R" + text("w") + ONE + b"s}" + text("_metadata") + b"}" + text("avit_jax") + text(ours)
    assert not check(write_zip(tmp_path / "x.pth", START + claimed + b"ssb.", **FLOAT))


def test_tied_and_broadcast_weights_are_read(tmp_path: Path) -> None:
    """Two names for one tensor, and one that repeats a value: both are in real files."""
    tied = tensor(numbers((2, 3)), numbers((3, 1)), storage(size=number(6)))
    wide = tensor(numbers((50, 3)), numbers((0, 1)), storage(size=number(6)))
    values = np.arange(6, dtype=np.float32)
    path = write_zip(tmp_path / "x.pth", state(tied, tied, wide), **{"data/0": values.tobytes()})
    found = read_weight_file(path).state
    for name in ("w0", "w1"):
        np.testing.assert_array_equal(found[name], values.reshape(2, 3))
    np.testing.assert_array_equal(found["w2"], np.tile(values[:3], (50, 1)))


def test_npz_files_of_every_kind_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a/b": rng.normal(size=(3, 4)).astype(np.float32),
        "columns": np.asfortranarray(rng.normal(size=(3, 4))),
        "scalar": np.float16(2.5),
        "none": np.zeros((0, 3), np.int8),
        "big": rng.integers(0, 9, (2, 3)).astype(">i4"),
    }
    for name, write in {"stored": np.savez, "compressed": np.savez_compressed}.items():
        write(tmp_path / f"{name}.npz", **arrays)
        found = read_weight_file(tmp_path / f"{name}.npz").state
        assert list(found) == list(arrays)
        for key, value in arrays.items():
            np.testing.assert_array_equal(found[key], value)
            assert found[key].dtype == np.asarray(value).dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_data_is_told_in_a_sentence(save: Callable[..., None], tmp_path: Path) -> None:
    path, rng = tmp_path / "data.npz", np.random.default_rng(0)
    images = rng.integers(0, 255, (60, 4, 4), np.uint8)
    save(path, images=images, labels=np.arange(60) % 3, class_names=np.array(["a", "b", "c"]))
    good, refused = path.read_bytes(), 0
    for index in range(600):
        broken = bytearray(good)
        for place in rng.integers(len(good), size=rng.integers(1, 4)):
            broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken[: None if index % 5 else int(rng.integers(1, len(good)))])
        try:
            load_dataset("npz", str(path))
        except ValueError as error:
            assert str(path) in str(error)
            assert len(str(error)) < 1000 and str(error).isprintable()
            refused += 1
    assert refused > 400


def test_safetensors_whose_length_looks_like_a_web_page(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(0x13C).encode()
    path = tensors_file(tmp_path / "x.safetensors", header, np.float32([2]).tobytes())
    assert path.read_bytes()[:1] == b"<"
    assert read_weight_file(path).state["w"] == 2


STRANGE: list[Any] = [
    *(None, True, -1, 0, 1, 3, 2**31, 10**400, -(10**400), 0.5, 1e308, math.nan, math.inf, "", "12", "\x1b[2J" * 999),
    *([], [1], [1, 2, 3], [224, 224], ["a"] * 5, [[]], [None], {}, {"a": 1}, [10**9, 10**9], [1e308] * 3, "float64"),
]


def test_a_configuration_is_right_or_named_wrong() -> None:
    good = small_config(class_names=("a", "b", "c", "d", "e")).to_json()
    refused = 0
    places = [(part, key) for part in ("model", "preprocessing") for key in good[part]]
    for place in [(), ("model",), ("preprocessing",), ("class_names",), ("more",), ("model", "more"), *places]:
        for value in STRANGE:
            parts = copy.deepcopy(good)
            node: Any = parts
            for key in place[:-1]:
                node = node[key]
            if place:
                node[place[-1]] = value
            else:
                parts = value
            try:
                config = AViTConfig.from_json(parts)
            except ValueError as error:
                assert len(str(error)) < 1000 and str(error).isprintable()
                refused += 1
            else:
                assert AViTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert refused > 400
    for part, key in places:
        parts = copy.deepcopy(good)
        del parts[part][key]
        try:
            config = AViTConfig.from_json(parts)
        except ValueError as error:
            assert f"lacks the field {key}" in str(error) or "class_names for num_classes" in str(error)
        else:  # what an older version did not write
            assert getattr(config, key) == getattr(AViTConfig(), key)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("depth", True, "depth is True: it must be a whole number"),
        ("depth", 12.0, r"depth is 12.0: it must be a whole number below 2\^31"),
        ("mlp_ratio", math.nan, r"mlp_ratio is nan: it must be a number up to 10\^9"),
        ("gate_scale", "10", "gate_scale is 10: it must be a number up to .* or null"),
        ("image_size", [16, "a"], "image_size is a list: it must be a whole number .* or a list"),
        ("image_size", [16, 16, 16], "image_size has 3 numbers: give one side, or height and width"),
        ("colour", 1, "model has no field 'colour': known are image_size"),
    ],
)
def test_the_sentence_names_the_field(field: str, value: Any, sentence: str) -> None:
    parts = small_config().to_json()
    parts["model"][field] = value
    with pytest.raises(ValueError, match=sentence):
        AViTConfig.from_json(parts)


def test_images_are_never_resized_to_far_more_than_the_model_sees() -> None:
    parts = small_config().to_json()
    parts["preprocessing"]["crop_fraction"] = 1e-3
    with pytest.raises(ValueError, match=r"crop_fraction is 0.001: it must be at least 0.1 and at most 1"):
        AViTConfig.from_json(parts)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
        (b"\xff\xfe", "utf-8"),
        (b"1" * 5000, "limit"),
        (b'{"a": 1, "a": 2}', "the same key twice"),
        (b'"' + b"a" * 2**22 + b'"', "larger than"),
        (b"{", "Expecting"),
    ],
    ids=["deep", "deep dict", "UTF-16", "long number", "key twice", "long", "cut"],
)
def test_json_that_no_program_wrote(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x.json cannot be read: .*{reason}") as raised:
        read_json(tmp_path / "x.json")
    assert len(str(raised.value)) < 1000


def test_a_folder_that_says_it_is_huge(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[1] / "checkpoints" / "mnist_dense", folder)
    (folder / "digests.json").unlink(missing_ok=True)  # a stranger would write right ones
    good = (folder / "config.json").read_text()
    for changes in ({"embed_dim": 10**9}, {"depth": 10**9}, {"image_size": 10**9, "patch_size": 10**9}):
        config = json.loads(good)
        config["model"].update(changes)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="has shape .* in the checkpoint .* and .*000000000.* in the model"):
            avit_jax.load(folder)


def test_a_folder_of_zeros_is_not_unpacked(tmp_path: Path) -> None:
    config = AViTConfig(image_size=2400, patch_size=4, embed_dim=64, depth=1, num_heads=1)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: avit_jax.AViT(config, rngs=nnx.Rngs(0)))))
    with ocp.StandardCheckpointer() as checkpointer:
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        checkpointer.save(tmp_path / "model" / "params", zeros)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_json()))
    with pytest.raises(
        ValueError, match=r"has \d{4,6} bytes, and its arrays \d{8,9}: weights do not compress that well"
    ):
        avit_jax.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["a" * 250, "x\x1b[2J\n.pth", "\udcff.pth"], ids=["long", "escape", "bytes"])
def test_file_names_are_printed_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint: it is neither") as raised:
        read_weight_file(tmp_path / name)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 1000
    str(raised.value).encode()


@given(st.text(st.characters(), max_size=500), st.integers(10, 300))
def test_any_text_is_shown_in_one_short_line(value: str, limit: int) -> None:
    line = shown(value, limit)
    assert line.isprintable() and len(line) <= limit
    assert line == value or not value.isprintable() or len(value) > limit


def test_any_value_of_json_is_shown_in_one_short_line() -> None:
    for value, line in (
        ("\x1b\n", r"'\x1b\n'"),
        (None, "None"),
        (10**30, "a number of 100 bits"),
        ([1, 2.5], "[1, 2.5]"),
    ):
        assert shown_value(value) == line
    for value in ("\x1b" * 10**6, "\U0010ffff" * 10**6, [10**30], [[1]], [1] * 10**6, {"a": 1}):
        assert shown_value(value).isprintable() and len(shown_value(value)) < 1100


def test_of_other_values_the_type_is_shown() -> None:
    for value in (10**5000, [1] * 10**6, b"x" * 10**6, {"a": 1}, io.BytesIO(), -(2**70)):
        assert len(shown(value)) < 40
    assert (shown(None), shown(True), shown(12), shown(1.5), shown(Path("/a"))) == ("None", "True", "12", "1.5", "/a")
