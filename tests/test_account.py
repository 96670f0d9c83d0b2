"""A stopped run goes on with the data it began with, or not at all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avit_jax.data.account import check_data, data_account
from avit_jax.data.folder import load_folder
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import load_dataset
from avit_jax.runtime.files import write_json
from tests.harness.builders import toy_arrays


def begun(workdir: Path, account: dict[str, object]) -> Path:
    """A run's folder with a checkpoint that began with these data."""
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    write_json(workdir / "train_config.json", {"data": account})
    return workdir


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (toy_arrays(count=60), "training images 42, not 87"),
        (toy_arrays(seed=1), "the checksum differs"),
        (toy_arrays() | {"class_names": np.asarray(["0", "2", "1"])}, "class 1 is '2', not '1'"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, changed: dict[str, np.ndarray], difference: str) -> None:
    """The file's path may change, what it holds may not."""
    np.savez(tmp_path / "toy.npz", **toy_arrays())
    account = data_account(load_dataset("npz", str(tmp_path / "toy.npz")))
    run = begun(tmp_path / "run", account)
    (tmp_path / "toy.npz").rename(tmp_path / "moved.npz")
    check_data(data_account(load_dataset("npz", str(tmp_path / "moved.npz"))), run)
    np.savez(tmp_path / "other.npz", **changed)
    with pytest.raises(
        ValueError, match=f"config.data.path names different data from those that the run .*: {difference}; give"
    ):
        check_data(data_account(load_dataset("npz", str(tmp_path / "other.npz"))), run)


def test_other_test_images_are_refused(tmp_path: Path) -> None:
    accounts = []
    for seed in (5, 6):
        test = toy_arrays(count=12, seed=seed)
        arrays = toy_arrays() | {f"test_{name}": values for name, values in test.items()}
        np.savez(tmp_path / "toy.npz", **arrays)
        accounts.append(data_account(load_dataset("npz", str(tmp_path / "toy.npz"))))
    with pytest.raises(ValueError, match="the checksums of validation and test differ;"):
        check_data(accounts[1], begun(tmp_path / "run", accounts[0]))


def swap(a: Path, b: Path) -> None:
    """Each takes the other's name."""
    a.rename(a.with_name("between"))
    b.rename(a)
    a.with_name("between").rename(b)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a class renamed": (
        lambda root: [(root / part / "cat").rename(root / part / "wolf") for part in ("train", "val")],
        "class 0 is 'dog', not 'cat'",
    ),
    "two classes swapped, files named alike": (
        lambda root: [swap(root / part / "cat", root / part / "dog") for part in ("train", "val")],
        "the checksum of some training files differs",
    ),
    "a file moved between classes": (
        lambda root: (root / "train/cat/1.png").rename(root / "train/dog/x.png"),
        "the checksums of files and labels differ",
    ),
    "a file renamed in val": (
        lambda root: (root / "val/cat/1.png").rename(root / "val/cat/x.png"),
        "the checksums of files and labels differ",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_class_folders_that_changed_are_refused(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                (root / part / name / f"{number}.png").write_text(f"{part} {name} {number}")
    run = begun(tmp_path / "run", data_account(load_folder(DataSettings("folder", str(root)))))
    root = root.rename(tmp_path / "moved")
    check_data(data_account(load_folder(DataSettings("folder", str(root)))), run)
    act, difference = CHANGES[change]
    act(root)
    with pytest.raises(ValueError, match=difference):
        check_data(data_account(load_folder(DataSettings("folder", str(root)))), run)


@pytest.mark.parametrize("cache", ["no home folder", "a file is in the way"])
def test_without_a_place_for_the_list_of_files_a_folder_is_read(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache == "no home folder":
        monkeypatch.setattr(Path, "home", no_home)
        monkeypatch.setattr(Path, "expanduser", lambda path: no_home() if path.parts[:1] == ("~",) else path)
        with pytest.raises(ValueError, match="'~/pictures' begins with ~ and there is no home folder"):
            load_folder(DataSettings("folder", "~/pictures"))
    else:
        (tmp_path / "cache").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "1.png").write_text("")
    assert load_folder(DataSettings("folder", str(tmp_path))).class_names == ("cat",)


def test_a_run_from_before_goes_on_and_a_damaged_account_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", **toy_arrays())
    account = data_account(load_dataset("npz", str(tmp_path / "toy.npz")))
    old = {name: account[name] for name in ("training images", "validation images", "classes", "checksum")}
    run = begun(tmp_path / "run", old)
    check_data(account, run)
    write_json(run / "train_config.json", {"data": 3})
    with pytest.raises(ValueError, match=r"train_config.json is damaged"):
        check_data(account, run)
