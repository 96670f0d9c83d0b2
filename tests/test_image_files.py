"""Images on disk: folders by class, what is wrong with files, and batches that do not depend on who makes them."""

import dataclasses
import io
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from avit_jax import AViT, AViTConfig, preprocess
from avit_jax.data import folder as folder_module
from avit_jax.data.decode import BadImage, decode
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import RepeatedRows, TrainingBatches, evaluation_batches, training_batches
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import Dataset
from avit_jax.evaluate.figures import evaluate

MODEL = AViTConfig(image_size=16, patch_size=8, num_classes=3)
FULL = AugmentSettings(crop_scale=(0.08, 1.0), flip=0.5, randaugment="rand-m9-mstd0.5-inc1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photograph(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def image_folder(root: Path, train: int = 8, val: int = 3, classes: tuple[str, ...] = ("cat", "dog", "eel")) -> Path:
    """JPEGs in train/CLASS and val/CLASS, all different."""
    for purpose, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            (root / purpose / name).mkdir(parents=True)
            for i in range(count):
                seed = 1000 * number + 2 * i + (purpose == "val")
                photograph(seed).save(root / purpose / name / f"{name}_{i}.JPEG", quality=95)
    return root


def opened(root: Path, **settings: object) -> Dataset:
    return open_dataset(DataSettings(source="folder", path=str(root), **settings))


def stream(root: Path, batch_size: int = 6, processes: tuple[int, int] = (0, 1), **settings: object) -> TrainingBatches:
    return training_batches(
        opened(root, **settings).train,
        MODEL,
        batch_size=batch_size,
        seed=3,
        augment=FULL,
        process_index=processes[0],
        process_count=processes[1],
    )


def taken(batches: TrainingBatches, count: int) -> list[dict[str, np.ndarray]]:
    found = [next(batches) for _ in range(count)]
    batches.close()
    return found


def assert_same(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_classes_are_sorted_folders_as_in_pytorchs_imagefolder(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", classes=("eel", "Dog", "cat"))
    dataset = opened(root)
    assert dataset.class_names == ("Dog", "cat", "eel")
    assert [len(part) for part in (dataset.train, dataset.val, dataset.test)] == [24, 9, 9]
    assert dataset.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert dataset.train.name(8) == str(root / "train/cat/cat_0.JPEG")
    element = dataset.train[8]
    assert decode(element["image"], str).tobytes() == Image.open(root / "train/cat/cat_0.JPEG").tobytes()


def test_the_list_of_files_is_cached_until_a_folder_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    listed = []
    list_files = folder_module._list_files
    monkeypatch.setattr(folder_module, "_list_files", lambda folder: listed.append(folder.name) or list_files(folder))
    assert len(opened(root).train) == len(opened(root).train) == 24
    assert listed == ["train", "val"], "the second time nothing is listed"
    photograph(77).save(root / "train/dog/new.png")
    assert len(opened(root).train) == 25
    assert listed == ["train", "val", "train"]
    (root / "val/dog/dog_0.JPEG").unlink()
    assert len(opened(root).val) == 8
    for file in (tmp_path / "cache/avit_jax").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert len(opened(root).train) == 25, "a damaged cache is made again"


def test_folders_that_are_not_what_they_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="config.data.path '.*nothing' is not a folder"):
        opened(tmp_path / "nothing")
    root = image_folder(tmp_path / "set")
    (root / "val/zebra").mkdir()
    with pytest.raises(ValueError, match="class folder .*val/zebra holds no images"):
        opened(root)
    photograph(0).save(root / "val/zebra/z.png")
    with pytest.raises(ValueError, match="val/zebra is a class that .*train lacks"):
        opened(root)
    (root / "val/zebra/z.png").rename(root / "val/eel/z.txt")
    (root / "val/zebra").rmdir()
    opened(root)
    assert (
        "1 files are left out, because their names are not those of images; the first: eel/z.txt"
        in capsys.readouterr().out
    )
    (root / "val").rename(root / "valid")
    with pytest.raises(ValueError, match="has no folder val/"):
        opened(root)
    (root / "ILSVRC2012_img_val.tar").touch()
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val.tar is still packed"):
        opened(root)
    (root / "dataset_info.json").touch()
    with pytest.raises(ValueError, match="config.data.source='tfds'"):
        opened(root)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    """Through a file: a grey ramp keeps its levels in every mode that can hold them."""
    ramp = np.repeat(np.arange(0, 256, 16, dtype=np.uint8)[:, None], 16, axis=1)
    grey = Image.fromarray(ramp)
    if mode in ("I;16", "I"):
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
        picture = picture.convert("I") if mode == "I" else picture
    else:
        picture = grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else grey.convert(mode)
    stream, kind = io.BytesIO(), {"CMYK": "TIFF", "YCbCr": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    picture.save(stream, kind)
    found = np.asarray(decode(stream.getvalue(), str))
    assert found.shape == (16, 16, 3)
    if mode != "1":
        np.testing.assert_allclose(found, np.stack([ramp] * 3, -1), atol=1)


def test_transparent_palettes_and_rotation_tags_are_pytorchs(recwarn: pytest.WarningsRecorder) -> None:
    """The oracle is what torchvision's loader does: Image.open(file).convert('RGB'), with its warning."""
    palette = photograph(1).quantize(8)
    turned = Image.Exif()
    turned[0x0112] = 6
    for picture, options in ((palette, {"transparency": bytes(range(8))}), (photograph(2), {"exif": turned})):
        stream = io.BytesIO()
        picture.save(stream, "PNG", **options)
        found = decode(stream.getvalue(), str)
        recwarn.clear()
        with Image.open(stream) as opened_again:
            expected = opened_again.convert("RGBA").convert("RGB")
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert found.size == (40, 30)


def bad_files() -> dict[str, tuple[bytes, str]]:
    whole, bomb = io.BytesIO(), io.BytesIO()
    photograph(0, (400, 300)).save(whole, "JPEG")
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    return {
        "empty": (b"", "is empty"),
        "text": (b"this is no picture", "is not an image that Pillow can read"),
        "cut": (whole.getvalue()[:3000], "cannot be read .*truncated"),
        "bomb": (bomb.getvalue(), "has more than 89 megapixels"),
    }


@pytest.mark.parametrize(
    ("kind", "workers"), [("empty", 0), ("text", 0), ("cut", 0), ("bomb", 0), ("gone", 0), ("text", 1)]
)
def test_a_bad_image_is_named(tmp_path: Path, kind: str, workers: int) -> None:
    root = image_folder(tmp_path / "set")
    file = root / "train/dog/dog_3.JPEG"
    batches = stream(root, workers=workers)
    reason = "cannot be read .*No such file"
    if kind == "gone":
        file.unlink()
    else:
        content, reason = bad_files()[kind]
        file.write_bytes(content)
    with pytest.raises(BadImage, match=rf"train/dog/dog_3.JPEG {reason}"):
        taken(batches, 4)
    (root / "val/cat/cat_1.JPEG").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"val/cat/cat_1.JPEG is not an image"):
        list(evaluation_batches(opened(root).val, MODEL, 4))


def test_a_skipped_image_keeps_its_slot(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", train=34, val=34)
    whole = taken(stream(root, on_bad_image="skip"), 20)
    for purpose in ("train", "val"):
        (root / purpose / "dog/dog_3.JPEG").write_bytes(b"no picture")
    batches = stream(root, on_bad_image="skip")
    found = [next(batches) for _ in range(20)]
    split = opened(root).train
    bad = next(i for i in range(102) if split.name(i).endswith("dog_3.JPEG"))
    assert batches.get_state() == {"next_index": 20, "bad": [bad]}
    slots = [(b, row) for b, batch in enumerate(found) for row in np.flatnonzero(batch["weight"] == 0)]
    assert 1 <= len(slots) <= 2, "once an epoch; 20 batches of 6 are more than one"
    for b, row in slots:
        found[b]["weight"][row], found[b]["image"][row] = 1, whole[b]["image"][row]
    assert_same(found, whole)
    resumed = stream(root, on_bad_image="skip")
    resumed.set_state(batches.get_state())
    assert_same(taken(resumed, 2), [next(batches) for _ in range(2)])
    weights = np.concatenate([b["weight"] for b in evaluation_batches(opened(root, on_bad_image="skip").val, MODEL, 8)])
    assert weights.sum() == 101


def test_more_than_one_percent_of_bad_images_stop_the_run(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", train=34)
    for name in ("dog_3", "dog_4"):
        (root / f"train/dog/{name}.JPEG").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"2 of 102 images are bad, more than 1%; one of them: .*dog_\d.JPEG is not"):
        taken(stream(root, on_bad_image="skip"), 17)
    (root / "train/dog/dog_4.JPEG").write_bytes((root / "train/dog/dog_5.JPEG").read_bytes())
    taken(stream(root, on_bad_image="skip"), 17)
    # Of two processes one meets it in the first epoch: two percent of what comes by there.
    with pytest.raises(ValueError, match=r"1 of 51 images are bad, more than 1%"):
        [taken(stream(root, processes=(process, 2), on_bad_image="skip"), 17) for process in range(2)]


def test_a_label_that_the_model_does_not_know(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set", classes=("a", "b", "c", "d"))
    with pytest.raises(ValueError, match=r"train/d/d_\d.JPEG has label 3 and the model has 3 classes"):
        taken(stream(root), 5)


def test_batches_are_the_same_whoever_makes_them(tmp_path: Path) -> None:
    """One thread, three threads, two worker processes; one host or two; from the start or entered at batch 3."""
    root = image_folder(tmp_path / "set")
    expected = taken(stream(root, threads=1), 6)
    assert expected[0]["image"].dtype == np.uint8
    assert expected[0]["image"].shape == (6, 16, 16, 3)
    assert_same(taken(stream(root, threads=3), 6), expected)
    entered = stream(root, workers=2)
    entered.set_state({"next_index": 3})
    assert_same([next(entered) for _ in range(2)], expected[3:5])
    resumed = stream(root, threads=1)
    resumed.set_state(entered.get_state())
    entered.close()
    assert_same(taken(resumed, 1), expected[5:])
    shares = [taken(stream(root, processes=(p, 2)), 6) for p in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*shares, strict=True)]
    assert_same(joined, expected)
    epoch = np.concatenate([batch["label"] for batch in expected[:4]])
    assert np.bincount(epoch).tolist() == [8, 8, 8]


def test_a_resumed_stream_may_have_other_workers(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    batches = stream(root, threads=3)
    for _ in range(5):
        next(batches)
    state = batches.get_state()
    expected = taken(batches, 3)
    resumed = stream(root, threads=1)
    next(resumed)
    resumed.set_state(state)
    assert_same(taken(resumed, 3), expected)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_validation_sees_every_image_once_over_all_processes(tmp_path: Path, processes: int, threads: int) -> None:
    root = image_folder(tmp_path / "set", val=7)
    split = opened(root, threads=threads).val
    shares = [
        list(evaluation_batches(split, MODEL, 8, process_index=p, process_count=processes)) for p in range(processes)
    ]
    assert {len(share) for share in shares} == {3}, "21 images: every process has the same number of batches"
    rows = [{name: np.concatenate([share[b][name] for share in shares]) for name in shares[0][b]} for b in range(3)]
    weight = np.concatenate([row["weight"] for row in rows])
    assert weight.tolist() == [1] * 21 + [0] * 3
    images = np.concatenate([row["image"] for row in rows])[weight > 0]
    expected = preprocess([Image.open(split.name(i)) for i in range(21)], MODEL)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(normalize(images, MODEL), expected)
    assert np.concatenate([row["label"] for row in rows])[weight > 0].tolist() == split.labels.tolist()


def test_evaluation_normalises_images_from_disk(tmp_path: Path) -> None:
    split = opened(image_folder(tmp_path / "set", val=7)).val
    model = AViT(dataclasses.replace(MODEL, embed_dim=16, num_heads=2, depth=2), rngs=nnx.Rngs(0))
    found = evaluate(model, split, 8).per_image
    output = model(preprocess([Image.open(split.name(i)) for i in range(21)], MODEL))
    expected = jax.nn.softmax(output.logits).max(-1)
    assert np.ptp(expected) > 1e-4, "the images differ"
    np.testing.assert_allclose(found.confidence, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.prediction, output.logits.argmax(-1))


@pytest.mark.parametrize("batch_size", [6, 8, 16, 100, 128])
def test_repeated_augmentation_shows_each_image_three_times(batch_size: int) -> None:
    rows = RepeatedRows(3, batch_size)
    images = np.array([rows(i) for i in range(3 * batch_size)])
    assert np.bincount(images).tolist() == [3] * batch_size
    assert (images[::2] != images[1::2]).all(), "no image is mixed with itself"
    assert len(set(images[:batch_size])) == -(-batch_size // 3), "copies are in one batch"


def test_repeated_images_are_augmented_anew(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    found = taken(stream(root, batch_size=6, repeated_augmentation=3), 1)[0]
    assert found["label"][[0, 2, 4]].tolist() == [found["label"][0]] * 3
    assert not np.array_equal(found["image"][0], found["image"][2])


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        (DataSettings, {"wrokers": 2}, "config.data has no key 'wrokers': did you mean 'workers'"),
        (DataSettings, {"on_bad_image": "ignore"}, "on_bad_image 'ignore' is unknown: choose 'raise' or 'skip'"),
        (DataSettings, {"crop_fraction": 0.0}, "crop_fraction is 0.0: it must be at least 0.1"),
        (DataSettings, {"repeated_augmentation": 0}, "repeated_augmentation is 0: it must be at least 1"),
        (AugmentSettings, {"crop_scale": [0.5, 0.1]}, "crop_scale is .* it must be .least, most."),
        (AugmentSettings, {"crop_scale": [0.5, 1.5]}, "crop_scale is .* at most 1, the whole image"),
        (AugmentSettings, {"flip": 1.5}, "flip is 1.5: it must be a probability"),
        (AugmentSettings, {"mixup": -1.0}, "mixup is -1.0: it must be at least 0"),
    ],
)
def test_settings_that_cannot_be(section: type, change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        section.from_config(change)


def test_a_source_that_is_unknown() -> None:
    with pytest.raises(ValueError, match="config.data.source 'foldr' is unknown: did you mean 'folder'"):
        open_dataset(DataSettings(source="foldr"))
