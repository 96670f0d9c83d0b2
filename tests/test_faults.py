"""What ends a run from outside: it stops cleanly, or goes on from the last whole checkpoint."""

import os
import shutil
import signal
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.commands import command_line as cli
from avit_jax.commands.run import run
from avit_jax.commands.typed_config import parse
from avit_jax.runtime.mesh import MeshSettings, state_shardings, training_mesh
from avit_jax.runtime.signals import FolderLock
from avit_jax.train import loop as training
from avit_jax.train.logs import read_metrics
from avit_jax.train.loop import Stopped
from configs import mnist_avit
from tests.harness.builders import tiny_experiment
from tests.test_training import leaves, lines_without_times

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    return tiny_experiment(tmp_path / "toy.npz")


@pytest.fixture(scope="module")
def whole(without_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that met no fault."""
    folder = tmp_path_factory.mktemp("whole")
    run(tiny_experiment(folder / "toy.npz"), folder / "run")
    return folder / "run"


def at_step(monkeypatch: pytest.MonkeyPatch, wanted: int, act: Any) -> None:
    """Call act(metrics) when the metrics of a step are read."""
    checked = training._checked

    def acting(step: int, metrics: Any) -> Any:
        return checked(step, act(metrics) if step == wanted else metrics)

    monkeypatch.setattr(training, "_checked", acting)


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_bit_for_bit(
    config: ConfigDict, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(metrics: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    with monkeypatch.context() as patch:
        at_step(patch, 4, asked)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step . of 8; .* the same command goes on"):
            run(config, tmp_path / "stopped")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint_steps(tmp_path / "stopped" / "checkpoints")[-1].name in ("4", "5")
    run(config, tmp_path / "stopped")
    assert lines_without_times(whole) == lines_without_times(tmp_path / "stopped")
    for a, b in zip(*(leaves(folder / "checkpoints") for folder in (whole, tmp_path / "stopped")), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_passed_over(
    config: ConfigDict, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir = tmp_path / "damaged"
    shutil.copytree(whole, workdir)
    config.data.path = str(whole.parent / "toy.npz")
    (workdir / "summary.json").unlink()
    older, newest = checkpoint_steps(workdir / "checkpoints")
    shutil.rmtree(newest / "optimizer")
    run(config, workdir)
    said = capsys.readouterr().out
    assert f"{newest / 'optimizer'} is incomplete or damaged" in said
    assert f"going on from step {older.name} of 8" in said
    assert (workdir / "checkpoints" / f"damaged-{newest.name}" / "model").is_dir()
    assert lines_without_times(whole) == lines_without_times(workdir)


def test_a_second_run_in_the_folder_is_refused(config: ConfigDict, tmp_path: Path) -> None:
    with FolderLock(tmp_path / "run"), pytest.raises(ValueError, match="another run is at work in .*run: wait"):
        run(config, tmp_path / "run")


def test_a_loss_that_is_not_finite_rolls_back_once(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.on_nan = "roll back"

    def broken(metrics: Any) -> Any:
        return metrics | {"ponder": np.float32(np.nan)}

    with monkeypatch.context() as patch:
        at_step(patch, 5, broken)
        with pytest.raises(FloatingPointError, match="the ponder is nan at step 5"):
            run(config, tmp_path / "twice")  # the same step is broken again after the roll-back
    assert "rolled back to step 3; the data up to step 6 are skipped" in capsys.readouterr().out
    run(config, tmp_path / "twice")
    assert [line["step"] for line in read_metrics(tmp_path / "twice") if line["split"] == "train"] == [2, 4, 6, 8]


def test_a_folder_that_is_a_file(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("no folder")
    with pytest.raises((ValueError, OSError), match="checkpoints"):
        run(config, tmp_path / "run")


def test_the_mesh_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"data=3, fsdp=2 and there are {count} devices: their product"):
        training_mesh(MeshSettings(3, 2), 12)
    with pytest.raises(ValueError, match=f"data=-1, fsdp={count + 1} and there are {count} devices: their product"):
        training_mesh(MeshSettings(-1, count + 1), 12)
    with pytest.raises(ValueError, match="give numbers of devices, or data=-1"):
        MeshSettings(0, 1)


def test_state_is_split_along_its_longest_axis_but_never_over_layers() -> None:
    mesh = jax.sharding.AbstractMesh((1, 4), ("data", "fsdp"))
    tree = {
        "blocks": {"kernel": jax.ShapeDtypeStruct((12, 8, 32), np.float32)},
        "head": {"kernel": jax.ShapeDtypeStruct((16, 6), np.float32)},
        "bias": jax.ShapeDtypeStruct((7,), np.float32),
    }
    specs = jax.tree.map(lambda sharding: tuple(sharding.spec), state_shardings(mesh, tree))
    assert specs["blocks"]["kernel"] == (None, None, "fsdp")
    assert specs["head"]["kernel"] == ("fsdp",)
    assert specs["bias"] == ()


def test_a_thread_that_waits_does_not_hold_a_process_that_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax's threads wait ten minutes for the rest of a save that the disk refused."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        cli._leave_waiting_threads()
        assert ended == [1]
    finally:
        go.set()
        thread.join()


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("loss.prior_deviation", 0.0, "it must be above 0"),
        ("loss.prior_weight", float("nan"), "it must be at least 0"),
        ("loss.distillation_weight", 1.5, "it must be at most 1"),
        ("optim.ema_decay", 1.0, "it must be below 1"),
        ("loss.prior", "bell", "choose 'official' or 'kl'"),
    ],
)
def test_numbers_that_no_run_can_work_with_are_refused(key: str, value: float | str, sentence: str) -> None:
    config = mnist_avit.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"config.{key} .*{value}.*{sentence}"):
        parse(config)


def test_the_other_reads_of_a_damaged_checkpoint_show_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Orbax raises of the first that fails, and leaves the others to Python's collector."""
    source = (
        "import asyncio\nasync def read():\n  try:\n    await asyncio.sleep(0)\n  finally:\n    raise OSError('read')"
    )
    monkeypatch.setattr("sys.unraisablehook", cli._unraisable)
    for package in ("orbax", "numpy"):
        scope: dict[str, Any] = {}
        exec(compile(source, f"/site-packages/{package}/reading.py", "exec"), scope)
        reading = scope["read"]()
        reading.send(None)
        del reading
        assert ("OSError: read" in capsys.readouterr().err) == (package == "numpy")


def test_what_orbax_had_still_to_do_shows_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is given up on a full disk leaves coroutines that never began; other warnings are shown."""

    async def waiting() -> None:
        pass

    monkeypatch.setattr("sys.unraisablehook", cli._unraisable)  # and back, at the end
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        cli._quiet_orbax()
        waiting()
        warnings.warn("a warning of another kind", RuntimeWarning, stacklevel=1)
    assert [str(warning.message) for warning in found] == ["a warning of another kind"]
