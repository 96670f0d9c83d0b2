"""The loop: it learns, it stops at the right time, it goes on as if nothing had happened."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import avit_jax
from avit_jax.commands.config_files import load_config
from avit_jax.commands.dry_run import dry_run
from avit_jax.commands.evaluate_checkpoint import evaluate_checkpoint
from avit_jax.commands.run import run
from avit_jax.commands.typed_config import parse
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.data.sources import load_dataset
from avit_jax.evaluate.compare import format_summary
from avit_jax.halting.avit_losses import prior_loss
from avit_jax.report import draw_run
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train import loop as training
from avit_jax.train import setup
from avit_jax.train.clock import TIMES, StepClock
from avit_jax.train.logs import read_metrics
from avit_jax.train.objective import distillation_loss
from avit_jax.train.optim import learning_rate_schedule, make_optimizer, update_average, weight_decay_mask
from avit_jax.train.start import initial_model
from avit_jax.train.state import initial_state, teacher_weights
from avit_jax.train.step import make_train_step
from configs import imagenet_avit, imagenet_deit
from tests.harness.builders import small_config, tiny_experiment, toy_arrays

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    return tiny_experiment(tmp_path / "toy.npz")


def leaves(folder: Path, **options: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(avit_jax.load(folder, **options), nnx.Param))]


def lines_without_times(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(workdir)]


class Killed(Exception):
    """Stands for whatever ends a process."""


def kill_in_step(last: int, start: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a training that is killed in this step, and has to be."""
    checked = training._checked

    def killing(step: int, metrics: Any) -> dict[str, float]:
        if step == last:
            raise Killed
        return checked(step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_checked", killing)
        with pytest.raises(Killed):
            start()


def test_a_run_learns_and_leaves_everything_behind(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avit_jax.commands.run.draw_run", draw_run)
    config.epochs *= 12
    config.eval_every = config.checkpoint_every = 48
    config.optim.ema_decay = config.loss.label_smoothing = 0.0
    workdir = tmp_path / "run"
    summary = run(config, workdir)
    assert summary["avit"]["top1"] > 0.8, "three bright bands are easy"
    assert set(summary) == {"avit", "images", "batch_size", "seconds"}
    row = summary["avit"]
    assert 1 <= row["mean_depth"] <= 3
    assert row["depth_fraction"] == pytest.approx(row["mean_depth"] / 3)
    assert row["top5"] == 1.0
    assert json.loads((workdir / "summary.json").read_text()) == summary
    for name in ("depth_maps.png", "depth_histogram.png", "curves.png"):
        assert (workdir / name).stat().st_size > 5_000
    for name in ("tensorboard", "model/params", "model/config.json", "checkpoints/96/optimizer"):
        assert (workdir / name).exists()
    train = [line for line in read_metrics(workdir) if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(2, 97, 2))
    assert train[-1]["classification"] < 0.5 * train[0]["classification"]
    for line in train:
        assert line["loss"] == pytest.approx(line["classification"] + line["ponder"] + line["prior"], rel=1e-5)


class Whole(NamedTuple):
    """A run that nobody stopped, and the model that it returned."""

    config: ConfigDict
    folder: Path
    model: avit_jax.AViT


@pytest.fixture(scope="module")
def whole(without_pictures: None, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_experiment(folder / "toy.npz")
    config.model.drop_path_rate = 0.3
    return Whole(config, folder / "run", avit_jax.train_model(config, folder / "run"))


def test_a_model_is_trained_from_python_and_a_finished_run_is_not_repeated(
    whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    config, folder, model = whole
    assert model(jnp.zeros((2, 8, 8, 1))).logits.shape == (2, 3)
    untrained = initial_model(parse(config), load_dataset("npz", config.data.path))
    assert not np.array_equal(model.head.kernel[...], untrained.head.kernel[...])
    trained = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    for a, b in zip(trained, leaves(folder / "checkpoints", ema=True), strict=True):
        np.testing.assert_array_equal(a, b)
    first = json.loads((folder / "summary.json").read_text())
    written = (folder / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run(config, folder) == first
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == written
    out = capsys.readouterr().out
    assert "this run is finished" in out
    assert "A-ViT" in out


def test_a_stopped_run_goes_on_bit_for_bit(
    config: ConfigDict, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint, between two, and in the last step."""
    config.model.drop_path_rate = 0.3
    stopped = tmp_path / "stopped"
    for step in (2, 5, 8):
        kill_in_step(step, lambda: run(config, stopped), monkeypatch)
        with (stopped / "metrics.jsonl").open("a") as file:
            file.write('{"split": "train", "st')  # a line that the kill cut short
    run(config, stopped)
    for options in ({}, {"ema": True}):
        pairs = (leaves(folder / "checkpoints", **options) for folder in (whole.folder, stopped))
        for a, b in zip(*pairs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert lines_without_times(whole.folder) == lines_without_times(stopped)
    assert not list((stopped / "checkpoints").glob("damaged-*")), "what was saved fits its digests"


def test_same_seed_same_run_other_seed_another(config: ConfigDict, whole: Whole, tmp_path: Path) -> None:
    config.model.drop_path_rate = 0.3
    run(config, tmp_path / "same")
    assert lines_without_times(tmp_path / "same") == lines_without_times(whole.folder)
    config.seed = 1
    run(config, tmp_path / "other")
    assert lines_without_times(tmp_path / "other") != lines_without_times(whole.folder)


@pytest.mark.slow
def test_training_starts_from_a_static_model_and_reports_it(config: ConfigDict, tmp_path: Path) -> None:
    dense = config.copy_and_resolve_references()
    dense.model.gate_scale = dense.model.gate_center = None
    dense.optim.ema_decay = 0.0
    dense_summary = run(dense, tmp_path / "dense")
    assert set(dense_summary) == {"dense", "images", "batch_size", "seconds"}
    config.init_from = str(tmp_path / "dense" / "model")
    summary = run(config, tmp_path / "avit")
    assert set(summary) == {"dense", "avit", "images", "batch_size", "seconds"}
    assert summary["dense"]["top1"] == dense_summary["dense"]["top1"]
    assert summary["dense"]["gmacs"] >= summary["avit"]["gmacs"]


def test_training_starts_from_a_file_that_knows_nothing_but_weights(config: ConfigDict, tmp_path: Path) -> None:
    dense = config.copy_and_resolve_references()
    dense.model.gate_scale = dense.model.gate_center = None
    data = load_dataset("npz", config.data.path)
    np.savez(tmp_path / "start.npz", **avit_jax.to_torch_state_dict(initial_model(parse(dense), data)))
    config.init_from = str(tmp_path / "start.npz")
    assert set(run(config, tmp_path / "avit")) == {"dense", "avit", "images", "batch_size", "seconds"}
    table = evaluate_checkpoint(dense, tmp_path / "start.npz")
    assert "mean depth         3.00 of 3 layers (100%)" in table


def test_a_checkpoint_of_other_classes_is_not_evaluated(config: ConfigDict, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", **toy_arrays(classes=4))
    other = config.copy_and_resolve_references()
    other.data.path = str(tmp_path / "other.npz")
    state = avit_jax.to_torch_state_dict(initial_model(parse(other), load_dataset("npz", other.data.path)))
    np.savez(tmp_path / "weights.npz", **state)
    with pytest.raises(ValueError, match="has 4 classes and the data 3: evaluate it on the data it was trained for"):
        evaluate_checkpoint(config, tmp_path / "weights.npz")


LOSS_TERMS = ("classification", "ponder", "prior", "gradient_norm")


@pytest.mark.parametrize("term", LOSS_TERMS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(term: str, value: float) -> None:
    metrics = dict.fromkeys(("loss", *LOSS_TERMS), jnp.ones(()))
    assert training._checked(7, metrics)["loss"] == 1
    with pytest.raises(
        FloatingPointError, match=f"the {term.replace('_', ' ')} is {value} at step 7: training stopped"
    ):
        training._checked(7, metrics | {term: jnp.asarray(value)})


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = setup.make_train_step

    def poisoned(*arguments: Any) -> Any:
        step = make(*arguments)

        def poisoned_step(*arguments: Any) -> Any:
            state, metrics = step(*arguments)
            return state, metrics | {"ponder": jnp.where(state.step == 6, jnp.nan, metrics["ponder"])}

        return jax.jit(poisoned_step)

    monkeypatch.setattr(setup, "make_train_step", poisoned)
    with pytest.raises(FloatingPointError, match="the ponder is nan at step 6"):
        run(config, tmp_path / "run")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path / "run"))


def test_a_learning_rate_beyond_reason_stops_the_run(config: ConfigDict, tmp_path: Path) -> None:
    config.optim.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d+"):
        run(config, tmp_path / "run")


def test_a_run_killed_while_it_saved_its_model_writes_it_again(whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "model").rename(tmp_path / "run" / "model.partial")
    (tmp_path / "run" / "model.partial" / "config.json").unlink()
    run(whole.config, tmp_path / "run")
    for a, b in zip(leaves(whole.folder / "model"), leaves(tmp_path / "run" / "model"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_refused_start_does_not_claim_the_folder(config: ConfigDict, tmp_path: Path) -> None:
    config.batch_size = 500
    with pytest.raises(ValueError, match="config.batch_size 500 is larger"):
        run(config, tmp_path / "run")
    config.batch_size = 12
    assert "avit" in run(config, tmp_path / "run")


def test_the_table_shows_the_summarys_figures() -> None:
    row = {"top1": 0.12, "top5": 0.34, "gmacs": 0.0567, "images_per_second": 89.0}
    depths = {"mean_depth": 4.5, "depth_fraction": 0.375, "depth_std_tokens": 1.25, "depth_std_images": 0.75}
    summary = {"images": 77, "batch_size": 11, "seconds": 66.0, "dense": row, "avit": row | depths | {"top1": 0.98}}
    header, dense, avit, *notes = format_summary(summary).splitlines()
    assert header.split() == ["top-1", "top-5", "mean", "depth", "GMACs/image", "images/s"]
    assert dense.split() == ["dense", "12.00%", "34.00%", "all", "0.0567", "89"]
    assert avit.split() == ["A-ViT", "98.00%", "34.00%", "4.50", "0.0567", "89"]
    text = " ".join(notes)
    for part in ("38% of its layers", "1.25 layers between", "0.75 between images", "77 test", "66 s"):
        assert part in text
    assert "A-ViT by packed execution" in text
    del summary["avit"]
    assert "packed" not in format_summary(summary), "nothing was packed"


def test_a_dry_run_forgives_missing_data_and_nothing_else(config: ConfigDict) -> None:
    assert "data      87 training, 9 validation, 24 test images" in "\n".join(dry_run(config))
    config.model.num_classes = 4
    with pytest.raises(ValueError, match="config.model.num_classes is 4 and the data say 3"):
        list(dry_run(config))
    config.data.path = "missing.npz"
    config.model.update({"image_size": 8, "in_channels": 1})  # the data cannot say them now
    account = "\n".join(dry_run(config))
    assert "cannot be read here (config.data.path 'missing.npz' is not a file" in account
    assert "4 classes" in account


def test_another_config_in_the_same_folder_is_refused(whole: Whole) -> None:
    config = whole.config.copy_and_resolve_references()
    config.loss.ponder_weight = 0.5
    with pytest.raises(ValueError, match=r"holds a run with config\.loss\.ponder_weight=.*, this one has 0\.5"):
        run(config, whole.folder)
    with pytest.raises(ValueError, match="holds a run already"):
        run(config, whole.folder, resume=False)


def test_the_model_follows_the_data_and_must_not_contradict_them(config: ConfigDict, tmp_path: Path) -> None:
    dataset = load_dataset("npz", config.data.path)
    found = initial_model(parse(config), dataset).config
    assert (found.image_size, found.in_channels, found.num_classes, found.class_names) == (8, 1, 3, ("0", "1", "2"))
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(found.preprocessing.mean, pixels.mean(), atol=1e-4)
    np.testing.assert_allclose(found.preprocessing.std, pixels.std(), atol=1e-4)
    config.model.num_classes = 4
    with pytest.raises(ValueError, match="config.model.num_classes is 4 and the data say 3"):
        initial_model(parse(config), dataset)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_is_followed(config: ConfigDict, kind: str) -> None:
    """The first step's classification term, against the loss of the teacher's own output."""
    dataset = load_dataset("npz", config.data.path)
    student = initial_model(parse(config), dataset)
    config.seed = 5
    teacher = initial_model(parse(config), dataset)
    teacher.head.kernel[...] = 50 * teacher.head.kernel[...]  # decided, unlike the student
    config.teacher = "given to the step"
    config.loss.update({"distillation": kind, "distillation_weight": 0.7, "distillation_temperature": 2.0})
    metrics, batch = first_step(config, student, teacher)
    expected = distillation_loss(
        student(batch["image"]).head_logits,
        batch["label"],
        teacher(batch["image"]).logits,
        kind=kind,
        weight=0.7,
        temperature=2.0,
        label_smoothing=config.loss.label_smoothing,
    )
    np.testing.assert_allclose(metrics["classification"], expected, rtol=1e-4)


def test_a_teacher_that_does_not_fit_is_refused(config: ConfigDict, tmp_path: Path) -> None:
    avit_jax.save(avit_jax.AViT(small_config(), rngs=nnx.Rngs(0)), tmp_path / "other")
    config.teacher, config.loss.distillation = str(tmp_path / "other"), "hard"
    with pytest.raises(ValueError, match=r"the teacher .*other has image_shape \(12, 8\) and the student \(8, 8\)"):
        run(config, tmp_path / "run")


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of a profiler that writes nothing."""
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


@pytest.mark.parametrize(
    ("profile", "steps", "said"),
    [
        ("7:2", range(1, 10), "trace of steps 7 to 8: "),
        ("7:5", range(1, 9), "trace of steps 7 to 8: "),
        ("7:5", range(8, 9), "nothing was profiled: config.profile begins at step 7 and this process ran steps 8 to 8"),
        ("30:2", range(1, 9), "nothing was profiled: config.profile begins at step 30 and this process ran steps 1 to"),
        ("7:5", (), "nothing was profiled: config.profile begins at step 7 and this process ran no step"),
        ("", range(1, 9), ""),
    ],
)
def test_a_run_says_what_it_traced(
    profile: str,
    steps: Sequence[int],
    said: str,
    profiler: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mesh = training_mesh(MeshSettings(), 12)
    with contextlib.closing(StepClock(small_config(), mesh, tmp_path, batch_size=12, profile=profile)) as clock:
        for step in steps:
            clock.trace(step)
    assert profiler == (["start", "stop"] if said.startswith("trace") else [])
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)


def test_a_trace_is_written_if_the_run_breaks_off(
    config: ConfigDict,
    profiler: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config.profile = "3:4"
    kill_in_step(4, lambda: run(config, tmp_path / "run"), monkeypatch)
    assert profiler == ["start", "stop"]
    assert "trace of steps 3 to 4: " in capsys.readouterr().err


def optimizer_of(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    return make_optimizer(
        parse(config).optim, learning_rate_schedule(parse(config).optim, steps, epochs=1.0, batch_size=12)
    )


def first_step(
    config: ConfigDict, model: avit_jax.AViT, teacher: avit_jax.AViT | None = None, **more: Any
) -> tuple[Any, Any]:
    """The metrics of one step, and its batch. more: of the batch."""
    optimizer, mesh = optimizer_of(config, 8), training_mesh(MeshSettings(), 12)
    state = initial_state(model, optimizer, config.optim.ema_decay, mesh)
    graphdefs = [nnx.graphdef(model), None if teacher is None else nnx.graphdef(teacher)]
    step = make_train_step(graphdefs[0], optimizer, parse(config).step, mesh, state, graphdefs[1])
    batch = {"image": jnp.ones((12, 8, 8, 1)) * jnp.arange(12)[:, None, None, None] / 12, "label": jnp.arange(12) % 3}
    batch |= more
    return step(state, batch, teacher_weights(teacher, mesh))[1], batch


def test_learning_rate_warms_up_and_decays_to_its_end(config: ConfigDict) -> None:
    config.optim.update({"learning_rate": 0.4, "final_learning_rate": 0.1, "warmup_steps": 4})
    schedule = learning_rate_schedule(parse(config).optim, 12, epochs=1.0, batch_size=12)
    found = [float(schedule(step)) for step in (0, 2, 4, 8, 12, 50)]
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.25, 0.1, 0.1], atol=1e-6)
    with pytest.raises(ValueError, match="config.optim.warmup_steps 4 is not below the 4 steps"):
        learning_rate_schedule(parse(config).optim, 4, epochs=1.0, batch_size=12)


@pytest.mark.parametrize("left_out", [None, (), (0, 3, 7, 9), (0, 3, 6, 9)])
def test_a_batch_in_parts_has_the_whole_batchs_gradient(config: ConfigDict, left_out: tuple[int, ...] | None) -> None:
    """Also if the parts have different numbers of images that count, or one of them none."""
    config.loss.prior_weight = 0.0  # the one term that is no mean over images
    model = initial_model(parse(config), load_dataset("npz", config.data.path))
    weight = {} if left_out is None else {"weight": jnp.ones(12).at[jnp.array(left_out, int)].set(0)}
    whole, _ = first_step(config, model, **weight)
    config.accumulation = 3
    parts, _ = first_step(config, model, **weight)
    for name in ("loss", "classification", "ponder", "accuracy", "mean_depth", "gradient_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5)


@pytest.mark.parametrize("module", [imagenet_deit, imagenet_avit])
def test_the_imagenet_configs_hold_deits_published_settings(module: ModuleType) -> None:
    """arXiv 2012.12877, table 9, and its repository's defaults; every key can be set on the command line."""
    config = module.get_config("tiny")
    augment, optim = AugmentSettings.from_config(dict(config.augment)), config.optim
    assert augment == AugmentSettings(
        crop_scale=(0.08, 1.0),
        flip=0.5,
        randaugment="rand-m9-mstd0.5-inc1",
        color_jitter=0.3,
        erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
    )
    assert DataSettings.from_config(dict(config.data)).repeated_augmentation == 3
    assert set(config.data) == {field.name for field in dataclasses.fields(DataSettings)}
    assert set(config.augment) == {field.name for field in dataclasses.fields(AugmentSettings)}
    assert (optim.learning_rate, optim.reference_batch, optim.weight_decay) == (5e-4, 512, 0.05)
    assert (optim.beta1, optim.beta2, optim.ema_decay, optim.clip_norm) == (0.9, 0.999, 0.99996, 0)
    assert (optim.warmup_epochs, optim.warmup_learning_rate, optim.final_learning_rate) == (5, 1e-6, 1e-5)
    assert (config.loss.label_smoothing, config.model.drop_path_rate) == (0.1, 0.1)


def test_the_learning_rate_by_epoch_is_timms() -> None:
    """configs/imagenet_avit.py:tiny at batch 1024, against recorded values: constant within each of 100 epochs."""
    config = imagenet_avit.get_config("tiny")
    schedule = learning_rate_schedule(parse(config).optim, 100 * 1251, epochs=config.epochs, batch_size=1024)
    recorded = json.loads((Path(__file__).parent / "data" / "timm_schedule.json").read_text())
    for place in (0, 625, 1250):
        found = jax.vmap(schedule)(1251 * jnp.arange(100) + place)
        np.testing.assert_allclose(found, recorded, rtol=2e-6)


def test_no_epochs_are_one_step_at_the_peak(config: ConfigDict) -> None:
    config.optim.update({"learning_rate": 0.4, "warmup_steps": 0, "schedule": "epoch"})
    assert parse(config).steps(87) == 8 and dataclasses.replace(parse(config), epochs=0.0).steps(87) == 1
    schedule = learning_rate_schedule(parse(config).optim, 1, epochs=0.0, batch_size=12)
    assert float(schedule(0)) == pytest.approx(0.4)
    config.optim.warmup_epochs = 1
    with pytest.raises(ValueError, match="config.optim.warmup_epochs 1 is not below config.epochs 0.0: lower"):
        learning_rate_schedule(parse(config).optim, 1, epochs=0.0, batch_size=12)


@pytest.mark.parametrize("steps", [8, 131, 12_500, 12_549])
def test_epoch_schedule_reaches_its_end_for_any_number_of_images(steps: int) -> None:
    """Fewer than one step an epoch, one and a third, 125, and 125.49: the rate falls to the last epoch's, never up."""
    config = load_config("folder:dense,pictures")
    schedule = learning_rate_schedule(parse(config).optim, steps, epochs=100.0, batch_size=32)
    rates = [float(schedule(step)) for step in sorted({0, steps // 20, steps // 10, steps // 2, steps - 2, steps - 1})]
    last_epoch = math.floor((steps - 1) * 100 / steps)
    peak, final = config.optim.learning_rate, config.optim.final_learning_rate
    expected = final + (peak - final) * (1 + math.cos(math.pi * last_epoch / 100)) / 2
    assert rates[-1] == pytest.approx(expected, rel=1e-4)
    assert rates[-3] > rates[-2] >= rates[-1]


def test_the_optimizer_clips_and_decays_kernels_alone(config: ConfigDict) -> None:
    config.optim.update({"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.5, "clip_norm": 1.0})
    optimizer = optimizer_of(config, 10)
    params = {"kernel": jnp.full(4, 2.0), "bias": jnp.full(4, 2.0)}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    _, state = optimizer.update(jax.tree.map(lambda x: 100 * x, params), optimizer.init(params), params)
    moment = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moment)) == pytest.approx((1 - config.optim.beta1) * 1.0, rel=1e-5)


def test_the_moving_average_follows_the_weights() -> None:
    average = update_average({"a": jnp.asarray(1.0)}, {"a": jnp.asarray(5.0)}, 0.75)
    assert float(average["a"]) == pytest.approx(0.75 * 1 + 0.25 * 5)


def test_weight_decay_reaches_linear_kernels_alone() -> None:
    params = nnx.state(avit_jax.AViT(small_config(distilled=True), rngs=nnx.Rngs(0)), nnx.Param)
    mask = weight_decay_mask(params)
    decayed = {"/".join(map(str, path)) for path, leaf in jax.tree_util.tree_leaves_with_path(mask) if leaf}
    names = {path[-1] for path, variable in nnx.to_flat_state(params)}
    assert names == {"kernel", "bias", "scale", "cls_token", "dist_token", "pos_embed"}
    assert len(decayed) == 7, "patch_embed, qkv, proj, fc1, fc2, head, head_dist"
    assert all("kernel" in name for name in decayed)


def test_the_step_minimises_the_total_loss(config: ConfigDict) -> None:
    """Metrics and update of a step against the loss written out here and Adam called by hand."""
    config.optim.update({"weight_decay": 0.0, "clip_norm": 1e9, "ema_decay": 0.0, "warmup_steps": 0})
    dataset = load_dataset("npz", config.data.path)
    model = initial_model(parse(config), dataset)
    graphdef, params = nnx.split(model)
    optimizer, mesh = optimizer_of(config, 8), training_mesh(MeshSettings(), 12)
    state = initial_state(model, optimizer, 0.0, mesh)
    metrics, batch = first_step(config, model)

    def loss(params: nnx.State) -> jax.Array:
        output = nnx.merge(graphdef, params)(batch["image"])
        soft = jax.nn.one_hot(batch["label"], 3) * (1 - config.loss.label_smoothing) + config.loss.label_smoothing / 3
        classification = -(soft * jax.nn.log_softmax(output.logits)).sum(-1).mean()
        ponder = config.loss.ponder_weight * output.ponder_cost.mean()
        prior = prior_loss(output.halting_scores.mean((1, 2)), "kl", config.loss.prior_target_depth)
        return classification + ponder + config.loss.prior_weight * prior

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    state, _ = make_train_step(graphdef, optimizer, parse(config).step, mesh, state)(state, batch, None)
    # Adam's first step is the learning rate times the gradient's sign: look where the sign is beyond rounding.
    for before, after, slope in zip(*map(jax.tree.leaves, (params, state.params, gradient)), strict=True):
        clear = np.abs(slope) > 1e-5
        np.testing.assert_allclose(
            np.asarray(after - before)[clear], -config.optim.learning_rate * np.sign(slope)[clear], rtol=0.01
        )
