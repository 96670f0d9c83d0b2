"""A person's own pictures: every kind of file is read or named, and each gets its own answer."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import avit_jax
from avit_jax import Preprocessing
from avit_jax.commands.predict_images import find_images, predict_checkpoint, predict_files, read_class_names
from avit_jax.data.decode import BadImage, decode
from avit_jax.data.preprocessing import denormalize, normalize
from avit_jax.execution.compiled import predict
from avit_jax.runtime.files import writable_folder
from tests.harness.builders import small_config, spread_gate

CONFIG = small_config(
    in_channels=1, class_names=("a", "b", "c", "d", "e"), preprocessing=Preprocessing((0.5,), (0.2,), crop_fraction=1.0)
)
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8), dtype=np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "inside").mkdir(parents=True)
    grey = Image.fromarray(PIXELS)
    grey.save(folder / "grey.png")
    grey.convert("RGBA").save(folder / "rgba.png")
    grey.convert("P").save(folder / "palette.png")
    Image.fromarray(PIXELS.astype(np.uint16) * 257).save(folder / "deep.png")
    grey.convert("RGB").save(folder / "inside" / "colour.png")
    (folder / "cut.png").write_bytes((folder / "grey.png").read_bytes()[:80])
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden").write_text("")
    return folder


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_every_file_has_its_line(pictures: Path, tmp_path: Path, execution: str) -> None:
    model, out = spread_gate(CONFIG), tmp_path / "out"
    files, root = find_images(pictures)
    *lines, total, where = predict_files(model, files, root, out, execution)
    output = predict(model, normalize(PIXELS[None, ..., None], CONFIG))
    p = np.exp(output.logits[0]) / np.exp(output.logits[0]).sum()
    depth = np.asarray(output.token_depth).mean()
    said = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if not line.startswith("unreadable: ")}
    bad = {line.split()[1]: line for line in lines if line.startswith("unreadable: ")}
    expected = f"{'abcde'[p.argmax()]} {p.max():.1%} depth {depth:.2f} of 4"
    readable = ["deep.png", "grey.png", "inside/colour.png", "palette.png", "rgba.png"]
    assert {name: said[name] for name in readable} == dict.fromkeys(readable, expected)
    assert (
        "is empty" in bad["empty.jpg"] and "not an image that Pillow can read" in bad["notes.txt"] and "cut.png" in bad
    )
    assert len(said) == 5 and len(bad) == 3
    assert total == "5 images, no labels: no accuracy; 3 unreadable: cut.png, empty.jpg, notes.txt"
    assert str(out) in where
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*.png")) == [f"{name}.depth.png" for name in readable]


def test_one_file_and_a_model_that_never_halts(pictures: Path) -> None:
    files, root = find_images(pictures / "grey.png")
    model = spread_gate(
        small_config(in_channels=1, gate_scale=None, gate_center=None, preprocessing=CONFIG.preprocessing)
    )
    line, total, where = predict_files(model, files, root, None, "packed")
    assert line.startswith("grey.png  ") and line.endswith("depth 4.00 of 4")
    assert total == "1 image, no labels: no accuracy"
    assert where == "the model never halts: there are no depths to draw"


def test_pictures_are_upright(tmp_path: Path) -> None:
    model = spread_gate(small_config(in_channels=1, image_size=12, preprocessing=CONFIG.preprocessing))
    square = np.pad(PIXELS, ((0, 0), (0, 4)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be rotated by 90 degrees clockwise
    Image.fromarray(square).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(square, -1)).save(tmp_path / "upright.png")
    files, root = find_images(tmp_path)
    turned, upright, *_ = (line.split()[1:] for line in predict_files(model, files, root, None, "masked"))
    assert turned == upright
    pixels = PIXELS[None, ..., None]
    np.testing.assert_array_equal(denormalize(normalize(pixels, CONFIG), CONFIG), pixels)


def test_what_cannot_be_done_is_said(pictures: Path, tmp_path: Path) -> None:
    model = spread_gate(CONFIG)
    with pytest.raises(ValueError, match="none of the 1 files is an image that can be read: notes.txt"):
        list(predict_files(model, [pictures / "notes.txt"], pictures, None, "masked"))
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        list(predict_checkpoint("nowhere", tmp_path / "missing"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="the folder is empty"):
        list(predict_checkpoint("nowhere", tmp_path / "bare"))
    with pytest.raises(ValueError, match="--sweep compares models on a data set"):
        list(predict_checkpoint("nowhere", pictures, sweep="gate_center:1"))
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n\n")
    with pytest.raises(ValueError, match="names.txt has 2 names and the model 5 classes"):
        read_class_names(names, CONFIG)
    names.write_text("v\nw\nx\ny\nz\n")
    assert read_class_names(names, CONFIG) == ("v", "w", "x", "y", "z")
    with pytest.raises(ValueError, match="cannot be written to"):
        writable_folder(names / "below")


def test_a_checkpoint_knows_itself(pictures: Path, tmp_path: Path) -> None:
    avit_jax.save(spread_gate(CONFIG), tmp_path / "model")
    names = tmp_path / "names.txt"
    names.write_text("v\nw\nx\ny\nz\n")
    line, *_ = predict_checkpoint(tmp_path / "model", pictures / "grey.png", folder=tmp_path / "o", class_names=names)
    assert line.split()[1] in "vwxyz"
    assert (tmp_path / "o" / "grey.png.depth.png").exists()


def test_pipes_and_dangling_links_are_counted_as_unreadable(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    files, _ = find_images(tmp_path)
    assert [file.name for file in files] == ["gone.png", "pipe.png"]
    for file in files:
        with pytest.raises(BadImage, match=file.name):
            decode(file, file.name)
