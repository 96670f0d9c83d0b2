"""The loop: it learns, it stops at the right time, it goes on as if nothing had happened."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import avit_jax
from avit_jax import training
from avit_jax.experiment import initial_model, run
from avit_jax.logs import read_metrics
from avit_jax.optim import make_optimizer, weight_decay_mask
from tests.builders import small_config, tiny_experiment


@pytest.fixture
def config(tmp_path: Path) -> ConfigDict:
    return tiny_experiment(tmp_path / "toy.npz")


def leaves(folder: Path, **options: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(avit_jax.load(folder, **options), nnx.Param))]


def lines_without_times(workdir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_metrics(workdir)]


class Killed(Exception):
    """Stands for whatever ends a process."""


def test_a_run_learns_and_leaves_everything_behind(config: ConfigDict, tmp_path: Path) -> None:
    config.epochs *= 12
    config.optim.ema_decay = 0.0
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


def test_a_finished_run_is_not_repeated(config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = run(config, tmp_path / "run")
    written = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert run(config, tmp_path / "run") == first
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == written
    out = capsys.readouterr().out
    assert "this run is finished" in out
    assert "A-ViT" in out


@pytest.mark.parametrize("killed_at", [2, 5, 8])
def test_a_stopped_run_goes_on_bit_for_bit(
    config: ConfigDict, tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.model.drop_path_rate = 0.3
    run(config, tmp_path / "whole")
    checked = training._checked

    def killing(step: int, metrics: Any) -> dict[str, float]:
        if step == killed_at:
            raise Killed
        return checked(step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_checked", killing)
        with pytest.raises(Killed):
            run(config, tmp_path / "stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "st')  # a line that the kill cut short
    run(config, tmp_path / "stopped")
    for options in ({}, {"ema": True}):
        for a, b in zip(
            leaves(tmp_path / "whole" / "checkpoints", **options),
            leaves(tmp_path / "stopped" / "checkpoints", **options),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    assert lines_without_times(tmp_path / "whole") == lines_without_times(tmp_path / "stopped")


def test_same_seed_same_run_other_seed_another(config: ConfigDict, tmp_path: Path) -> None:
    run(config, tmp_path / "a")
    run(config, tmp_path / "b")
    assert lines_without_times(tmp_path / "a") == lines_without_times(tmp_path / "b")
    config.seed = 1
    run(config, tmp_path / "c")
    assert lines_without_times(tmp_path / "a") != lines_without_times(tmp_path / "c")


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


@pytest.mark.parametrize("term", training.LOSS_TERMS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(term: str, value: float) -> None:
    metrics = dict.fromkeys(("loss", *training.LOSS_TERMS), jnp.ones(()))
    assert training._checked(7, metrics)["loss"] == 1
    with pytest.raises(
        FloatingPointError, match=f"the {term.replace('_', ' ')} is {value} at step 7: training stopped"
    ):
        training._checked(7, metrics | {term: jnp.asarray(value)})


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = training.make_train_step

    def poisoned(*arguments: Any) -> Any:
        step = make(*arguments)

        def poisoned_step(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch)
            return state, metrics | {"ponder": jnp.where(state.step == 6, jnp.nan, metrics["ponder"])}

        return poisoned_step

    monkeypatch.setattr(training, "make_train_step", poisoned)
    with pytest.raises(FloatingPointError, match="the ponder is nan at step 6"):
        run(config, tmp_path / "run")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path / "run"))


def test_a_learning_rate_beyond_reason_stops_the_run(config: ConfigDict, tmp_path: Path) -> None:
    config.optim.learning_rate = 1e30
    with pytest.raises(FloatingPointError, match=r"is (nan|inf) at step \d+"):
        run(config, tmp_path / "run")


def test_another_config_in_the_same_folder_is_refused(config: ConfigDict, tmp_path: Path) -> None:
    run(config, tmp_path / "run")
    config.loss.ponder_weight = 0.5
    with pytest.raises(ValueError, match=r"holds a run with config.loss.ponder_weight=.*, this one has 0.5"):
        run(config, tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        run(config, tmp_path / "run", resume=False)


def test_the_model_follows_the_data_and_must_not_contradict_them(config: ConfigDict, tmp_path: Path) -> None:
    from avit_jax.data.sources import load_dataset

    dataset = load_dataset("npz", config.data.path)
    found = initial_model(config, dataset).config
    assert (found.image_size, found.in_channels, found.num_classes, found.class_names) == (8, 1, 3, ("0", "1", "2"))
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(found.preprocessing.mean, pixels.mean(), atol=1e-4)
    np.testing.assert_allclose(found.preprocessing.std, pixels.std(), atol=1e-4)
    config.model.num_classes = 4
    with pytest.raises(ValueError, match="config.model.num_classes is 4 and the data say 3"):
        initial_model(config, dataset)


def test_a_teacher_is_followed(config: ConfigDict, tmp_path: Path) -> None:
    run(config, tmp_path / "teacher")
    config.teacher = str(tmp_path / "teacher" / "model")
    config.loss.distillation = "soft"
    config.loss.distillation_weight = 1.0
    config.loss.ponder_weight = config.loss.prior_weight = 0.0
    config.init_from = config.teacher
    config.augment.translate = 0.0
    config.optim.learning_rate = 1e-9
    config.optim.final_learning_rate = 0.0
    run(config, tmp_path / "student")
    first = read_metrics(tmp_path / "student")[0]
    assert abs(first["classification"]) < 1e-5, "a student equal to its teacher has no divergence"


def test_weight_decay_reaches_linear_kernels_alone() -> None:
    params = nnx.state(avit_jax.AViT(small_config(distilled=True), rngs=nnx.Rngs(0)), nnx.Param)
    mask = weight_decay_mask(params)
    decayed = {"/".join(map(str, path)) for path, leaf in jax.tree_util.tree_leaves_with_path(mask) if leaf}
    names = {path[-1] for path, variable in nnx.to_flat_state(params)}
    assert names == {"kernel", "bias", "scale", "cls_token", "dist_token", "pos_embed"}
    assert len(decayed) == 7, "patch_embed, qkv, proj, fc1, fc2, head, head_dist"
    assert all("kernel" in name for name in decayed)


def test_the_step_is_adamw_on_the_total_loss(config: ConfigDict) -> None:
    """Two steps against optax called by hand on the same gradients, without mask, clipping or averages in play."""
    from avit_jax.data.sources import load_dataset

    config.optim.update({"weight_decay": 0.0, "clip_norm": 1e9, "ema_decay": 0.0})
    dataset = load_dataset("npz", config.data.path)
    model = initial_model(config, dataset)
    graphdef, params = nnx.split(model)
    optimizer = make_optimizer(config.optim, steps=8)
    sharding = training.replicated(training.data_mesh(12))
    state = training.initial_state(model, optimizer, 0.0, sharding)
    step = training.make_train_step(graphdef, optimizer, config)
    batch = {"image": jnp.ones((12, 8, 8, 1)) * jnp.arange(12)[:, None, None, None] / 12, "label": jnp.arange(12) % 3}

    def loss(params: nnx.State) -> jax.Array:
        from avit_jax import losses

        output = nnx.merge(graphdef, params)(batch["image"])
        ponder, prior = losses.halting_losses(
            output.halting_scores,
            output.ponder_cost,
            ponder_weight=config.loss.ponder_weight,
            prior_weight=config.loss.prior_weight,
            prior=config.loss.prior,
            prior_target_depth=config.loss.prior_target_depth,
        )
        return losses.classification_loss(output.logits, batch["label"], config.loss.label_smoothing) + ponder + prior

    by_hand = optax.adam(training.learning_rate_schedule(config.optim, 8), b2=config.optim.beta2)
    by_hand_state = by_hand.init(params)
    for _ in range(2):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, by_hand_state = by_hand.update(gradient, by_hand_state)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(gradient), rtol=1e-4)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam turns rounding noise in tiny gradients into whole updates
    assert dataclasses.is_dataclass(state)
