"""The gate's start: an exact symmetry of the static model, and depths that follow what the class token looks at."""

import dataclasses
import inspect
import shutil
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import avit_jax
from avit_jax import PRESETS, AViT, AViTConfig
from avit_jax.train.gate_start import free_channel_0, start_gate
from tests.harness.builders import answers, small_config, spread_gate


def static_model(**fields: object) -> AViT:
    """No two channels of any parameter alike."""
    model = spread_gate(small_config(gate_scale=None, gate_center=None, **fields))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        param[...] += 0.1 * jax.random.normal(jax.random.key(len(str(path))), param.shape)
    return model


def with_gate(model: AViT, **gate: float | None) -> AViT:
    other = AViT(dataclasses.replace(model.config, **gate), rngs=nnx.Rngs(0))
    nnx.update(other, jax.tree.map(lambda x: x + 0, nnx.state(model)))
    return other


def residual_stream(model: AViT, images: np.ndarray) -> list[np.ndarray]:
    x = model.embed(jnp.asarray(images))
    stream = [np.asarray(x)]
    graphdef, stacked = nnx.split(model.blocks)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    for layer in range(model.config.depth):
        x = run(jax.tree.map(lambda p, layer=layer: p[layer], stacked), x)
        stream.append(np.asarray(x))
    return stream


def some_images(model_config: AViTConfig, count: int = 32) -> np.ndarray:
    return (
        np.random.default_rng(0)
        .normal(size=(count, *model_config.image_shape, model_config.in_channels))
        .astype(np.float32)
    )


@pytest.mark.parametrize("distilled", [False, True])
def test_freeing_channel_0_leaves_the_static_model_as_it_was(distilled: bool) -> None:
    model = static_model(distilled=distilled)
    images = some_images(model.config)
    before, stream_before = answers(model, images), residual_stream(model, images)
    free_channel_0(model)
    np.testing.assert_allclose(answers(model, images).head_logits, before.head_logits, atol=5e-5)
    for x, was in zip(residual_stream(model, images), stream_before, strict=True):
        np.testing.assert_array_equal(x[..., 0], 0)
        np.testing.assert_allclose(x, was - was[..., :1], atol=1e-4)


@pytest.mark.parametrize("gate", [(5.0, 10.0), (10.0, 30.0), (10.0, 75.0)])
@pytest.mark.parametrize(("distilled", "features"), [(False, "hidden"), (True, "hidden"), (True, "pixels")])
def test_the_start_changes_who_halts_and_nothing_else(
    gate: tuple[float, float], distilled: bool, features: str
) -> None:
    static = static_model(distilled=distilled)
    images = some_images(static.config)
    model = with_gate(static, gate_scale=gate[0], gate_center=gate[1])
    start_gate(model, images, target_depth=3.0, deviation=0.8, features=features)
    output = answers(model, images)
    # 32 * 6 patches on whole layers: the mean can be set in steps of a patch or so.
    assert abs(float(output.token_depth.mean()) - 3.0) < 0.05
    assert len(np.unique(output.token_depth[:, static.config.num_special :])) >= 3
    np.testing.assert_array_equal(output.token_depth[:, : static.config.num_special], static.config.depth)
    # What the head reads is weighed almost whole; scores are sums of numbers near 30, so they are rounded.
    early = output.halting_scores[:-1, :, : static.config.num_special]
    assert early.max() <= static.config.halt_epsilon / 2 * 1.001
    ungated = with_gate(model, gate_scale=None, gate_center=None)
    np.testing.assert_allclose(answers(ungated, images).logits, answers(static, images).logits, atol=2e-4)


def attention_of_class_token(static: AViT, images: np.ndarray) -> list[np.ndarray]:
    """What each patch gets in every layer, mean over heads: [b, p] for each layer."""
    received = []
    graphdef, stacked = nnx.split(static.blocks)
    for layer, x in enumerate(residual_stream(static, images)[:-1]):
        block = nnx.merge(graphdef, jax.tree.map(lambda p, layer=layer: p[layer], stacked))
        qkv = np.asarray(block.attn.qkv(block.norm1(x))).reshape(len(images), 7, 3, 2, 8)
        scores = np.einsum("bhd,bnhd->bhn", qkv[:, 0, 0], qkv[:, :, 1]) / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        received.append(weights[:, :, 1:].mean(1))
    return received


def test_what_the_class_token_looks_at_goes_deeper() -> None:
    static = static_model()
    images = some_images(static.config, 200)
    attention = np.mean(attention_of_class_token(static, images), axis=0)
    model = with_gate(static, gate_scale=5.0, gate_center=10.0)
    start_gate(model, images, target_depth=3.0, deviation=1.0, features="pixels")
    score = np.asarray(answers(model, images).halting_scores[0, :, 1:])
    logit = np.log(score) - np.log1p(-score)
    np.testing.assert_allclose(logit.std(), 2.0, rtol=0.01)  # slope * deviation
    # A linear map of pixels and position, so not all of it; position alone would be left with no more than 0.
    within = attention - attention.mean(0)
    assert np.corrcoef(within.ravel(), (logit - logit.mean(0)).ravel())[0, 1] < -0.3
    assert np.corrcoef(attention.mean(0), logit.mean(0))[0, 1] < -0.99


def test_hidden_units_know_more_than_pixels() -> None:
    """With them the gate follows the ranks of attention in the later layers, also in images it was not fitted to."""
    static = static_model(depth=8)
    images = some_images(static.config, 400)
    attention = np.mean(attention_of_class_token(static, images)[8 // 3 :], axis=0)
    ranks = attention.ravel().argsort().argsort().reshape(attention.shape)
    followed = {}
    for features in ("hidden", "pixels"):
        model = with_gate(static, gate_scale=5.0, gate_center=10.0)
        start_gate(model, images[:300], target_depth=7.0, deviation=0.7, features=features)
        score = np.asarray(answers(model, images[300:]).halting_scores[2, :, 1:], np.float64)
        logit = np.log(score) - np.log1p(-score)
        assert (np.asarray(answers(model, images[300:]).token_depth)[:, 0] == 8).all()
        followed[features] = -np.corrcoef(ranks[300:].ravel(), logit.ravel())[0, 1]
    assert followed["hidden"] > 1.3 * followed["pixels"] > 0.2, followed


def test_images_that_are_all_alike_are_no_trouble() -> None:
    model = with_gate(static_model(), gate_scale=5.0, gate_center=10.0)
    start_gate(model, np.zeros((4, 12, 8, 2), np.float32), target_depth=2.5, deviation=0.5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_gate_that_cannot_be_started_says_why() -> None:
    static = static_model()
    with pytest.raises(ValueError, match="never halts has no gate"):
        start_gate(static, some_images(static.config), target_depth=3.0, deviation=0.5)
    gated = with_gate(static, gate_scale=5.0, gate_center=10.0)
    with pytest.raises(
        ValueError, match=r"target_depth \(config.gate_start\) is 9.0: it must lie between 1 and the 4 layers"
    ):
        start_gate(gated, some_images(static.config), target_depth=9.0, deviation=0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_registers": 2},
        {"pool": "token_and_mean", "num_registers": 1},
        {"pool": "mean_norm"},
        {"pool": "norm_mean", "class_token": False, "num_registers": 1},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_every_architecture_can_be_started(fields: dict[str, object]) -> None:
    static = static_model(**fields)
    images = some_images(static.config)
    model = with_gate(static, gate_scale=10.0, gate_center=30.0)
    start_gate(model, images, target_depth=3.0, deviation=0.8)
    depth = np.asarray(answers(model, images).token_depth)
    assert abs(depth.mean() - 3.0) < 0.05
    assert len(np.unique(depth[:, -6:])) >= 3
    np.testing.assert_array_equal(depth[:, :-6], 4)
    ungated = with_gate(model, gate_scale=None, gate_center=None)
    np.testing.assert_allclose(answers(ungated, images).logits, answers(static, images).logits, atol=2e-4)


def test_without_a_class_token_the_patches_look_at_each_other() -> None:
    static = static_model(pool="norm_mean", class_token=False, num_registers=1)
    images = some_images(static.config, 100)
    received = []
    graphdef, stacked = nnx.split(static.blocks)
    for layer, x in enumerate(residual_stream(static, images)[:-1]):
        block = nnx.merge(graphdef, jax.tree.map(lambda p, layer=layer: p[layer], stacked))
        qkv = np.asarray(block.attn.qkv(block.norm1(x))).reshape(100, 7, 3, 2, 8)
        scores = np.einsum("bqhd,bnhd->bhqn", qkv[:, 1:, 0], qkv[:, :, 1]) / 8**0.5
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        received.append(weights[..., 1:].mean((1, 2)))
    by_position = np.mean(received, axis=(0, 1))
    model = with_gate(static, gate_scale=5.0, gate_center=10.0)
    start_gate(model, images, target_depth=3.0, deviation=1.0, features="pixels")
    score = np.asarray(answers(model, images).halting_scores[0, :, 1:])
    logit = (np.log(score) - np.log1p(-score)).mean(0)
    assert np.corrcoef(by_position, logit)[0, 1] < -0.99


def test_images_that_cannot_be_used_are_refused() -> None:
    model = with_gate(static_model(), gate_scale=5.0, gate_center=10.0)
    images = some_images(model.config, 4)
    for given, reason in (
        (images[:0], "the gate starts from images: give at least one"),
        (np.where(images > 0, images, np.nan), "without NaN or infinity"),
        (images[:, :8], r"their shape is \(4, 8, 8, 2\): resize"),
    ):
        with pytest.raises(ValueError, match=reason):
            start_gate(model, given, target_depth=3.0)
    with pytest.raises(ValueError, match=r"features \(config.gate_start\) is 'edges': choose hidden or pixels"):
        start_gate(model, images, target_depth=3.0, features="edges")
    with pytest.raises(ValueError, match="deviation is -1.0 and slope 2.0: give a deviation of at least 0"):
        start_gate(model, images, target_depth=3.0, deviation=-1.0)


@pytest.mark.slow
def test_the_example_of_the_docstring_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own lines, with a small model under the preset's name and a few pictures."""
    documentation = inspect.getdoc(avit_jax.start_gate)
    assert documentation is not None
    lines = [line for line in documentation.splitlines() if line.startswith("    ") or not line]
    code = textwrap.dedent("\n".join(lines)).split("logit(")[0]
    static = avit_jax.load(Path(__file__).parent / "data" / "micro-10-30.pth", num_heads=3)
    small = dataclasses.replace(static.config, gate_scale=10.0, gate_center=30.0)
    monkeypatch.setitem(PRESETS, "avit_tiny_patch16_224", small)
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).parent / "data" / "micro-10-30.pth", "deit_tiny.pth")
    Path("pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(f"pictures/{number}.jpg")
    code = code.replace("target_depth=9.0", f"target_depth={small.depth - 1.0}")
    capsys.readouterr()
    names: dict[str, object] = {}
    exec(code, names)
    said = capsys.readouterr().out
    assert "weights that were trained without a gate halt no token" in said
    assert abs(float(said.splitlines()[-1]) - (small.depth - 1)) < 0.1
    loaded = avit_jax.load("deit_tiny_halting")
    assert "without a gate" not in capsys.readouterr().out  # this one has a gate
    images, fast = names["images"], names["fast"]
    np.testing.assert_allclose(loaded(images).logits, fast(images).logits, atol=1e-5)


def test_a_folder_without_a_gate_says_so_when_it_gets_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    avit_jax.save(static_model(), tmp_path / "static")
    avit_jax.load(tmp_path / "static")
    assert "gate" not in capsys.readouterr().out
    avit_jax.load(tmp_path / "static", gate_scale=5.0, gate_center=10.0)
    said = capsys.readouterr().out
    assert "the checkpoint has no gate: its weights halt no token" in said
    assert "avit_jax.start_gate(model, images, target_depth=...)" in said
