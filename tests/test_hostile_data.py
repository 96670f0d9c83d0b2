"""Data sets from strangers: labels, archives, folders, their cached lists, and workers whose parent is killed."""

import contextlib
import gzip
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from avit_jax.data.folder_index import cache_file
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import load_dataset
from tests.harness.builders import toy_arrays
from tests.test_hostile_images import mutated
from tests.test_image_files import image_folder, opened, own_cache, photograph
from tests.test_pipeline import idx_folder

__all__ = ["own_cache"]  # a fixture: every test here has a cache of its own


@pytest.mark.parametrize(
    ("labels", "names", "reason"),
    [
        (np.arange(60) % 3 + 1, (), r"labels count from 1 to 3: they must start at 0, so write labels - 1"),
        (np.arange(60) % 3 + 1, ("a", "b", "c"), r"labels go from 1 to 3 for 3 classes: .* 0..2, so write labels - 1"),
        (np.arange(60) % 3 + 2**32, (), r"labels go up to 4294967298 for 60 images"),
        (np.arange(60) % 3 + 2**32, ("a", "b", "c"), r"labels go from 4294967296 to 4294967298 for 3 classes"),
        (np.where(np.arange(60) == 7, 10**9, np.arange(60) % 3), (), r"labels go up to 1000000000 for 60 images"),
        (np.arange(60).astype(np.uint64) % np.uint64(3) + np.uint64(2**63), (), r"labels go up to 9223372036854775810"),
        (np.arange(60) % 3 - 5, (), r"labels go from -5 to -3"),
        (np.arange(60) % 3 / 1.0, (), r"labels is float64 \(60,\): it must be whole numbers"),
        (np.arange(60) % 2 == 0, (), r"labels is bool \(60,\): it must be whole numbers"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path: Path, labels: np.ndarray, names: tuple[str, ...], reason: str) -> None:
    arrays = toy_arrays(60) | {"labels": labels} | ({"class_names": np.array(names)} if names else {})
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ValueError, match=rf"mine.npz: {reason}"):
        load_dataset("npz", str(tmp_path / "mine.npz"))


def test_test_labels_do_not_wrap_either(tmp_path: Path) -> None:
    wrapped = toy_arrays(9)["labels"] + 2**32
    np.savez(tmp_path / "mine.npz", **toy_arrays(60), test_images=toy_arrays(9)["images"], test_labels=wrapped)
    with pytest.raises(ValueError, match="test_labels go from 4294967296 to 4294967298 for 3 classes"):
        load_dataset("npz", str(tmp_path / "mine.npz"))


def test_a_class_without_an_example_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.array([0, 1, 3])[np.arange(60) % 3]
    np.savez(tmp_path / "mine.npz", images=toy_arrays(60)["images"], labels=labels)
    assert len(load_dataset("npz", str(tmp_path / "mine.npz")).class_names) == 4
    assert "mine.npz: labels: 1 of 4 classes have no example: 2\n" in capsys.readouterr().out
    names = np.array(["background", "x", "y", "z\x1b[2J"])
    np.savez(
        tmp_path / "named.npz",
        images=toy_arrays(60)["images"],
        labels=labels[labels < 3].repeat(2)[:60],
        class_names=names,
    )
    load_dataset("npz", str(tmp_path / "named.npz"))
    assert r"2 of 4 classes have no example: y, z\x1b[2J" in capsys.readouterr().out


def test_idx_labels_from_one_need_names(tmp_path: Path) -> None:
    """EMNIST's letters are counted so."""
    labels = b"\0\0\x08\x01\0\0\0\x3c" + bytes(i % 3 + 1 for i in range(60))
    folder = str(idx_folder(tmp_path / "idx", compressed=True, train_labels_idx1=labels))
    with pytest.raises(ValueError, match="train labels count from 1 to 3: .*or give class_names, 4 of them"):
        load_dataset("idx", folder)
    assert load_dataset("idx", folder, ["none", "a", "b", "c"]).class_names[0] == "none"


def bombs() -> dict[str, bytes]:
    zeros = np.zeros((300_000, 28, 28), np.uint8)
    found = {}
    for name, arrays in {
        "zeros": {"images": zeros, "labels": np.zeros(300_000, np.uint8)},
        "objects": {"images": toy_arrays(60)["images"], "labels": np.array([{}] * 60, dtype=object)},
        "nothing": {"images": np.zeros((10**15, 0, 8), np.uint8), "labels": np.zeros(3, int)},
    }.items():
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        found[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return found | {"array": stream.getvalue(), "pickle": b"\x80\x04N.", "empty": b"PK\x05\x06" + bytes(18)}


def test_archives_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    for name, content in bombs().items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.npz") as caught:
            load_dataset("npz", str(path))
        assert str(caught.value).isprintable()
        if name == "zeros":
            assert "its arrays take 236 MB and the file 0.2 MB" in str(caught.value)
    folder = idx_folder(tmp_path / "idx", compressed=True)
    huge = b"\0\0\x08\x03" + (300_000).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(huge + bytes(300_000 * 784)))
    with pytest.raises(
        ValueError, match=r"train-images-idx3-ubyte.gz declares the shape \(300000, 28, 28\) and has \d+ bytes"
    ):
        load_dataset("idx", str(folder))


def test_damaged_archives_are_named_in_one_sentence(tmp_path: Path) -> None:
    seeds, path, refused = [], tmp_path / "mine.npz", 0
    more = {"test_images": toy_arrays(9)["images"], "test_labels": toy_arrays(9)["labels"]}
    for write in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        write(stream, **toy_arrays(60), **more, class_names=np.array(["a", "b", "c"]))
        seeds.append(stream.getvalue())
    for content in mutated(seeds, 300):
        path.write_bytes(content)
        try:
            load_dataset("npz", str(path))
        except ValueError as error:
            assert "mine.npz" in str(error) and str(error).isprintable()
            refused += 1
    assert refused > 250


def test_each_real_folder_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "set")
    (root / "train/cat/again").symlink_to("../cat")
    (root / "train/cat/up").symlink_to("../..")
    (root / "train/cat/val").symlink_to("../../val")
    (root / "train/dog/self").symlink_to("self")
    (root / "train/dog/inner").mkdir()
    photograph(99).save(root / "train/dog/inner/one.png")
    (root / "train/dog/link").symlink_to("inner")
    os.mkfifo(root / "train/dog/pipe.jpg")
    train = opened(root).train
    assert np.bincount(train.labels).tolist() == [8, 9, 8]
    assert "5 links to folders that were already read, or files that are not regular files" in capsys.readouterr().out


def test_links_into_another_class_are_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "set")
    link = root / "train/cat/more"
    link.symlink_to("../dog")
    with pytest.raises(ValueError, match="train/cat/more leads to images of the class dog"):
        opened(root)
    link.unlink()
    (root / "train/dog2").symlink_to("dog")
    with pytest.raises(ValueError, match="class folder .*train/dog2 is a link to the same folder as dog"):
        opened(root)
    (root / "train/dog2").unlink()
    (root / "store").mkdir()
    (root / "train/dog").rename(root / "store/dog")
    (root / "train/dog").symlink_to("../store/dog")
    assert len(opened(root).train) == 24, "a class may lie elsewhere"


def test_strange_names_are_labelled_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("a\x1b[2J", "b\nc", os.fsdecode(b"d\xff"), "e" * 250)
    root = image_folder(tmp_path / "set", classes=classes[:3])
    for purpose in ("train", "val"):
        (root / purpose / classes[3]).mkdir()
        photograph(5).save(root / purpose / classes[3] / ("x" * 246 + ".png"))
    (root / "train" / classes[0] / "n\x1b.txt").touch()
    for _ in range(2):  # listed, then from the cache
        dataset = opened(root)
        assert dataset.class_names == tuple(sorted(classes))
        for index, label in enumerate(dataset.train.labels):
            assert Path(dataset.train.name(index)).parent.name == dataset.class_names[label]
            assert dataset.train[index]["image"].is_file()
        said = capsys.readouterr().out
        assert said.rstrip("\n").isprintable() and r"n\x1b.txt" in said


@pytest.mark.parametrize("kind", ["types", "pickle", "outside", "absolute", "compressed", "pipe", "text", "labels"])
def test_a_cached_list_is_checked_before_it_is_believed(tmp_path: Path, kind: str) -> None:
    root = image_folder(tmp_path / "set")
    opened(root)
    cache = cache_file(root / "train")
    with np.load(cache) as file:
        arrays = dict(file)
    about = json.loads(str(arrays["about"]))
    save = np.savez_compressed if kind == "compressed" else np.savez
    if kind == "types":
        arrays["about"] = np.asarray(json.dumps(about | {"class_names": [1, None, {}], "ignored": 5}))
    elif kind == "pickle":
        arrays["files"] = np.array([object()] * 24)
    elif kind in ("outside", "absolute"):
        arrays["files"] = np.array([b"/etc/passwd" if kind == "absolute" else b"cat/../../../secret.png"] * 24)
    elif kind == "compressed":
        arrays["more"] = np.zeros(10**6)
    elif kind == "labels":
        arrays["labels"] = arrays["labels"] + 1
    save(cache, **arrays)
    if kind in ("pipe", "text"):
        cache.unlink()
        os.mkfifo(cache) if kind == "pipe" else cache.write_text("[]")
    train = opened(root).train
    assert (len(train), train.labels.max()) == (24, 2)
    assert train.name(0) == str(root / "train/cat/cat_0.JPEG")
    assert zipfile.is_zipfile(cache), "it is made again"


def test_a_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "set")
    monkeypatch.delenv("XDG_CACHE_HOME")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert len(opened(root).train) == 24
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(opened(root).train) == 24
    monkeypatch.setattr(Path, "expanduser", lambda self: no_home())
    with pytest.raises(ValueError, match="'~/x' begins with ~ and there is no home folder"):
        DataSettings(source="folder", path="~/x") and opened(Path("~/x"))


@pytest.mark.parametrize(
    ("section", "change", "reason"),
    [
        (DataSettings, {"mean": ""}, "config.data.mean is '': it must be a list of finite numbers"),
        (DataSettings, {"mean": ("",)}, r"config.data.mean is \('',\): it must be a list of finite numbers"),
        (DataSettings, {"mean": 0.5}, "config.data.mean is 0.5: it must be a list"),
        (DataSettings, {"std": [0.5, float("nan")]}, "config.data.std is .*nan.*: it must be a list of finite numbers"),
        (DataSettings, {"std": [0.0]}, r"config.data.std is \(0.0,\): it must be above 0"),
        (DataSettings, {"workers": 1.5}, "config.data.workers is 1.5: it must be a whole number"),
        (DataSettings, {"workers": 10**9}, "config.data.workers is 1000000000: it must be 0 .threads."),
        (DataSettings, {"threads": None}, "config.data.threads is None: it must be a whole number"),
        (DataSettings, {"path": 5}, "config.data.path is 5: it must be text"),
        (DataSettings, {"class_names": [1, 2]}, "config.data.class_names is .*: it must be a list of names"),
        (DataSettings, {"crop_fraction": 0.01}, "config.data.crop_fraction is 0.01: .* at least 0.1"),
        (DataSettings, {"crop_fraction": "0.9"}, "config.data.crop_fraction is '0.9': it must be a finite number"),
        (AugmentSettings, {"rotate": float("inf")}, "config.augment.rotate is inf: it must be a finite number"),
        (AugmentSettings, {"flip": True}, "config.augment.flip is True: it must be a finite number"),
    ],
)
def test_settings_of_the_wrong_type(section: type, change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        section.from_config(change)


START = """
import multiprocessing, sys, time
from avit_jax import AViTConfig
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import training_batches
from avit_jax.data.settings import AugmentSettings, DataSettings

if __name__ == "__main__":
    split = open_dataset(DataSettings(source="folder", path=sys.argv[1], workers=2)).train
    model = AViTConfig(image_size=16, patch_size=8, num_classes=3)
    batches = training_batches(split, model, batch_size=6, seed=0, augment=AugmentSettings(flip=0.5))
    next(batches)
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux whether a process runs")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(START)
    command = [sys.executable, str(tmp_path / "start.py"), str(image_folder(tmp_path / "set"))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2 and all(map(is_running, workers))
        parent.kill()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))
