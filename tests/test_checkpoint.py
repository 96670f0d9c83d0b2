"""Models on disk: what comes back is what went in, or a sentence that says what is wrong."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, Preprocessing
from tests.builders import small_config, spread_gate


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
