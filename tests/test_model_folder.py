"""Models on disk: what comes back is what went in, or a sentence that says what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, Preprocessing
from avit_jax.checkpoints.model_folder import checkpoint_steps
from avit_jax.checkpoints.run_checkpoints import RunCheckpoints
from tests.harness.builders import small_config, spread_gate


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    config = small_config(class_names=tuple("abcde"), preprocessing=Preprocessing((0.1, 0.2), (0.3, 0.4), 0.9))
    avit_jax.save(spread_gate(config), tmp_path / "model")
    return tmp_path / "model"


def test_what_comes_back_is_what_went_in(saved: Path, images: jax.Array) -> None:
    original, restored = spread_gate(small_config()), avit_jax.load(saved)
    for a, b in zip(jax.tree.leaves(nnx.state(original)), jax.tree.leaves(nnx.state(restored)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(original(images).logits, restored(images).logits)
    assert restored.config.class_names == tuple("abcde")
    assert restored.config.preprocessing == Preprocessing((0.1, 0.2), (0.3, 0.4), 0.9)
    assert restored.config.image_size == (12, 8)


def test_no_file_names_the_folder_in_which_it_was_written(saved: Path) -> None:
    files = [file for file in saved.rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        assert str(saved.parent).encode() not in file.read_bytes(), file


def test_overrides_change_the_gate_and_leave_the_weights(saved: Path, images: jax.Array) -> None:
    dense = avit_jax.load(saved, gate_scale=None, gate_center=None)
    np.testing.assert_array_equal(dense(images).token_depth, 4)
    other = avit_jax.load(saved, gate_center=-60.0)
    np.testing.assert_array_equal(other(images).token_depth, 1)


def test_nothing_is_overwritten(saved: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        avit_jax.save(AViT(small_config(), rngs=nnx.Rngs(0)), saved)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (
            {"embed_dim": 32},
            r"blocks.attn.proj.bias has shape \(4, 16\) in the checkpoint and \(4, 32\) in the model",
        ),
        ({"depth": 5}, r"has shape \(4, 16\) in the checkpoint and \(5, 16\) in the model"),
        ({"distilled": True}, r"unused none, unfilled \['dist_token', 'head_dist.bias', 'head_dist.kernel'\]"),
        ({"num_heads": 4}, "num_heads is 2 in the checkpoint .* and 4 in the model"),
        ({"gate_centre": 4}, "no field 'gate_centre': did you mean 'gate_center'"),
    ],
)
def test_another_architecture_names_parameter_and_shapes(
    saved: Path, overrides: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        avit_jax.load(saved, **overrides)


def test_parameters_on_one_side_alone_are_listed(saved: Path) -> None:
    # Same shapes everywhere, but no qkv bias in the model.
    with pytest.raises(ValueError, match=r"unused \['blocks.attn.qkv.bias'\], unfilled none"):
        avit_jax.load(saved, qkv_bias=False)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint at .*nothing: the folder is missing"):
        avit_jax.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no finished checkpoint"):
        avit_jax.load(tmp_path / "empty")


@pytest.mark.parametrize("part", ["params", "config.json"])
def test_a_half_written_folder_names_what_is_missing(saved: Path, part: str) -> None:
    shutil.rmtree(saved / part) if (saved / part).is_dir() else (saved / part).unlink()
    with pytest.raises(ValueError, match=f"is incomplete: {part} is missing"):
        avit_jax.load(saved)


def test_every_missing_or_cut_file_is_an_error_and_never_wrong_weights(saved: Path, tmp_path: Path) -> None:
    original = jax.tree.leaves(nnx.state(avit_jax.load(saved)))
    files = [path.relative_to(saved) for path in saved.rglob("*") if path.is_file()]
    failed = 0
    for name in files:
        for cut in (False, True):
            broken = tmp_path / "broken"
            shutil.copytree(saved, broken)
            if cut:
                content = (broken / name).read_bytes()
                (broken / name).write_bytes(content[: len(content) // 2])
            else:
                (broken / name).unlink()
            try:
                restored = jax.tree.leaves(nnx.state(avit_jax.load(broken)))
            except ValueError as error:
                assert str(broken) in str(error)
                failed += 1
            else:  # files that the weights do not need
                for a, b in zip(original, restored, strict=True):
                    np.testing.assert_array_equal(a, b)
            shutil.rmtree(broken)
    assert failed >= 4


def test_a_preset_does_not_apply_to_a_folder(saved: Path) -> None:
    with pytest.raises(ValueError, match="carries its own configuration"):
        avit_jax.load(saved, preset="avit_tiny_patch16_224")
    with pytest.raises(ValueError, match="no moving average"):
        avit_jax.load(saved, ema=True)


def test_a_config_with_an_unknown_field_is_named(saved: Path) -> None:
    parts = json.loads((saved / "config.json").read_text())
    parts["model"]["colour"] = 3
    (saved / "config.json").write_text(json.dumps(parts))
    with pytest.raises(ValueError, match="no field 'colour'"):
        avit_jax.load(saved)


def test_another_size_and_other_classes_are_fitted_and_said(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = avit_jax.load(saved, image_size=16, num_classes=3)
    assert (other.pos_embed.shape, other.head.kernel.shape) == ((1, 17, 16), (16, 3))
    assert other.config.class_names is None
    said = capsys.readouterr().out
    assert "pos_embed was resized from 3x2 to 4x4 patches" in said
    assert "the head is new and untrained: the checkpoint has 5 classes, the model 3 classes" in said
    np.testing.assert_array_equal(other.blocks.mlp.fc1.kernel[...], avit_jax.load(saved).blocks.mlp.fc1.kernel[...])


ITEMS = ("model", "ema", "optimizer")


def write_steps(folder: Path, top1: dict[int, float], **kept: int) -> None:
    """A run's checkpoints whose arrays hold the step."""
    with RunCheckpoints(folder, **kept) as checkpoints:
        for step, value in top1.items():
            items = {name: {"weights": jnp.full((3, 2), step, jnp.float32)} for name in ITEMS}
            checkpoints.save(step, items, {"step": step}, {"next_index": step}, small_config(), value)
            checkpoints.wait()


def test_the_last_the_best_and_every_nth_are_kept(tmp_path: Path) -> None:
    top1 = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.8, 5: 0.7, 6: 0.2, 7: 0.4}
    write_steps(tmp_path / "run", top1, keep=1, every=3, best=2)
    assert [step.name for step in checkpoint_steps(tmp_path / "run")] == ["2", "3", "4", "6", "7"]


def test_a_checkpoint_long_after_the_last_line_of_the_log_is_read_back(tmp_path: Path) -> None:
    """Its metrics since that line are larger than any JSON of strangers may be."""
    window = [{"halting_by_layer": [1 / 3] * 12, "loss": 2 / 3} for _ in range(20_000)]
    items = {"model": {"weights": jnp.ones((3, 2))}}
    with RunCheckpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, items, {"window": window}, {}, small_config(), 0.0)
        checkpoints.wait()
        found = checkpoints.restore_newest(items)
    assert found is not None
    assert found.progress == {"window": window}


def test_whatever_is_damaged_the_run_goes_back_and_nothing_is_deleted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every item gone; every file of an array item, or of JSON, cut or gone."""
    whole = tmp_path / "whole"
    write_steps(whole, {1: 0.0, 2: 0.0}, keep=2)
    parts = [Path(name) for name in (*ITEMS, "step", "data")]
    parts += [
        path.relative_to(whole / "2") for name in ("model", "step", "data") for path in (whole / "2" / name).rglob("*")
    ]
    target = {name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS}
    went_back = set()
    for number, (part, cut) in enumerate((part, cut) for part in parts for cut in (False, True)):
        run = tmp_path / str(number)
        shutil.copytree(whole, run)
        damaged = run / "2" / part
        if cut and damaged.is_dir():
            continue
        if cut:
            damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        else:
            shutil.rmtree(damaged) if damaged.is_dir() else damaged.unlink()
        files = sum(path.is_file() for path in run.rglob("*"))
        with RunCheckpoints(run, keep=2) as checkpoints:
            found = checkpoints.restore_newest(target)
        assert found is not None
        assert (found.progress, found.data) == ({"step": found.step}, {"next_index": found.step})
        for name in ITEMS:
            np.testing.assert_array_equal(found.items[name]["weights"], found.step)
        if found.step == 1:
            went_back.add(str(part))
            assert f"{run / '2' / part.parts[0]}" in capsys.readouterr().out
            assert (run / "damaged-2").is_dir()
        assert sum(path.is_file() for path in run.rglob("*")) == files
    assert went_back >= {*ITEMS, "step", "data", "step/metadata", "data/metadata", "model/manifest.ocdbt"}
    assert any(name.startswith("model/d/") for name in went_back)
