"""A run that is asked to stop during validation, or after its last checkpoint, stops and loses nothing."""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.runtime.files import write_json
from avit_jax.runtime.signals import StopRequest
from avit_jax.train import loop as training
from avit_jax.train import validation
from avit_jax.train.display import Display
from avit_jax.train.logs import read_metrics
from avit_jax.train.loop import Stopped
from avit_jax.train.run_folder import check_folder
from avit_jax.train.start import initial_model
from tests.harness.arrays import read_npz
from tests.harness.builders import tiny_experiment
from tests.test_training import Killed, leaves, lines_without_times


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    """Evaluates after steps 4 and 8, moving average and raw weights, and both once more at the end."""
    config = tiny_experiment(tmp_path_factory.mktemp("data") / "toy.npz")
    config.eval_batch_size = 2  # 9 images: 5 batches
    config.optim.compare_ema = True
    return config


def train(config: ConfigDict, workdir: Path) -> list[np.ndarray]:
    """Train as train.py does, without the measurements and pictures at the end; the weights."""
    settings = parse(config)
    dataset = open_dataset(settings.data)
    model = initial_model(settings, dataset)
    training.train(settings, dataset, model, workdir)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]


@pytest.fixture(scope="module")
def whole(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped; said.txt holds what it printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        weights = train(config, workdir)
    np.savez(workdir / "weights.npz", *weights)
    (workdir / "said.txt").write_text(said.getvalue())
    return workdir


def stop_in_evaluation(monkeypatch: pytest.MonkeyPatch, wanted: int) -> list[int]:
    """SIGTERM before the second batch of the wanted evaluation; the list grows by that evaluation's batches."""
    evaluate, count, batches = validation.evaluate, 0, []

    def watched(*arguments: Any, before_batch: Callable[[], None]) -> Any:
        nonlocal count
        count += 1
        own = count

        def before() -> None:
            if own == wanted:
                batches.append(len(batches))
                if len(batches) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            before_batch()

        return evaluate(*arguments, before_batch=before)

    monkeypatch.setattr(validation, "evaluate", watched)
    return batches


def kill_at(monkeypatch: pytest.MonkeyPatch, wanted: int) -> None:
    checked = training._checked

    def killing(step: int, metrics: Any) -> Any:
        if step == wanted:
            raise Killed
        return checked(step, metrics)

    monkeypatch.setattr(training, "_checked", killing)


def check_weights(whole: Path, weights: list[np.ndarray]) -> None:
    expected = read_npz(whole / "weights.npz")
    assert len(expected) == len(weights)
    for a, b in zip(expected.values(), weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("evaluation", "step"), [(1, 4), (4, 8), (6, 8)])
def test_a_run_stopped_while_it_validates_goes_on_bit_for_bit(
    config: ConfigDict, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: int, step: int
) -> None:
    """During the first validation, during the raw weights' after the last step, and when the better ones are chosen."""
    with monkeypatch.context() as patch:
        batches = stop_in_evaluation(patch, evaluation)
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step} of 8; .* the same command goes on"):
            train(config, tmp_path / "run")
    assert batches == [0, 1], "the other three batches are not evaluated"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[-1].name == str(step)
    if step == 4:
        # It validates again, and is killed before its next checkpoint: the lines of that validation are not doubled.
        with monkeypatch.context() as patch:
            kill_at(patch, 5)
            with pytest.raises(Killed):
                train(config, tmp_path / "run")
        assert [line["split"] for line in read_metrics(tmp_path / "run") if line["step"] == 4][1:] == ["val", "val_raw"]
    check_weights(whole, train(config, tmp_path / "run"))
    assert lines_without_times(whole) == lines_without_times(tmp_path / "run")
    for ema in (False, True):
        for a, b in zip(*(leaves(path, ema=ema) for path in (whole, tmp_path / "run")), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not list((tmp_path / "run" / "checkpoints").glob("damaged-*"))


def test_what_may_change_in_a_resumed_run_leaves_its_weights(
    config: ConfigDict, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """log_every, eval_every and eval_batch_size change the log, and that is said."""
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, 1)
        with pytest.raises(Stopped):
            train(config, tmp_path / "run")
    write_json(tmp_path / "run" / "train_config.json", {"config": parse(config).to_config()})
    changed = config.copy_and_resolve_references()
    changed.log_every, changed.eval_batch_size, changed.eval_every = 3, 5, 5
    capsys.readouterr()
    check_folder(parse(changed), tmp_path / "run", resume=True)
    check_weights(whole, train(changed, tmp_path / "run"))
    said = capsys.readouterr().out
    for line in ("config.log_every was 2 and is now 3: the log changes", "eval_batch_size was 2", "eval_every was 4"):
        assert line in said
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["split"] == "train"] == [2, 4, 6, 8]
    assert [line["step"] for line in lines if line["split"] == "val"] == [4, 5, 8]


def test_a_signal_after_the_last_look_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    monkeypatch.setattr(signal, "SIG_DFL", lambda number, _: got.append(number))
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with StopRequest():
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == []
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_run_says_while_it_trains(config: ConfigDict, whole: Path) -> None:
    said = (whole / "said.txt").read_bytes().decode()
    assert "\r" not in said, "no bar where output is no terminal"
    opening, *lines = said.splitlines()
    parameters = sum(leaf.size for leaf in leaves(whole))
    assert opening == (
        f"training A-ViT: 3 layers of width 16, {parameters:,} parameters; 87 images in 3 classes (npz, "
        f"{config.data.path}); 8 steps of 12 images; writes to {whole}"
    )
    found = [line.split(":")[0] for line in lines if " of 8: loss" in line]
    assert found == [f"step {step} of 8" for step in (2, 4, 6, 8)]
    logged = {(line["split"], line["step"]): line for line in read_metrics(whole)}
    for step in (4, 8):
        val, raw = logged["val", step], logged["val_raw", step]
        assert (
            f"step {step} of 8: validation top-1 {val['accuracy']:.2%} (raw weights {raw['accuracy']:.2%}), "
            f"mean depth {val['mean_depth']:.2f} of 3 layers"
        ) in lines


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("process", [0, 1])
def test_a_terminal_gets_a_bar_and_one_process_speaks(
    monkeypatch: pytest.MonkeyPatch, process: int, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("jax.process_index", lambda: process)
    with Display(steps=8, batch_size=4) as display:
        display.start(3)
        display.at(4)
        display.means(4, {"loss": 0.5, "accuracy": 0.25, "mean_depth": 2.0, "images_per_second": 9.0})
        display.say("a line")
    assert ("4/8" in screen.getvalue()) == ("loss=0.500" in screen.getvalue()) == (process == 0)
    assert capsys.readouterr().out == "a line\n" * (process == 0)


def test_a_damaged_line_of_the_log_costs_that_line_alone(tmp_path: Path) -> None:
    lines = ['{"split": "train", "step": 1}', "{broken", "[1]", '{"step": 2}', '{"split": "val", "step": 3}', '{"sp']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 3]


def test_a_damaged_account_of_a_run_is_a_sentence(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    for content in ([], {"config": 3}):
        write_json(tmp_path / "run" / "train_config.json", content)
        with pytest.raises(ValueError, match="train_config.json is damaged: it has no table 'config'"):
            check_folder(parse(config), tmp_path / "run", resume=True)
