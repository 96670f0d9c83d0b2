"""Figures against NumPy on the whole data set at once, and what the pictures show."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, Gates, Preprocessing, RandomPatches
from avit_jax.commands.evaluate_checkpoint import format_evaluation
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.evaluate.timing import images_per_second
from avit_jax.execution.program import choose
from avit_jax.execution.work import image_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.report import depth_map, draw_curves, draw_depth_histogram, draw_depth_maps, numbers
from avit_jax.runtime.mesh import data_mesh
from tests.harness.builders import small_config, spread_gate

TWO = Preprocessing((0.5, 0.4), (0.2, 0.3))


@pytest.fixture
def halting_model() -> AViT:
    return spread_gate(small_config(num_classes=7, preprocessing=TWO))


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (11, 12, 8, 2)).astype(np.uint8), rng.integers(0, 7, 11).astype(np.int32))


@pytest.mark.parametrize("batch_size", [4, 11, 16])
def test_figures_are_those_of_the_whole_set_whatever_the_batch(
    halting_model: AViT, split: Split, batch_size: int
) -> None:
    found = evaluate(halting_model, split, batch_size)
    output = halting_model(jnp.asarray(normalize(split.images, halting_model.config)))
    logits, depth = np.asarray(output.logits, np.float64), np.asarray(output.token_depth)
    order = np.argsort(-logits, axis=1)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert found.images == 11
    assert found.top1 == pytest.approx((order[:, 0] == split.labels).mean())
    assert found.top5 == pytest.approx((order[:, :5] == split.labels[:, None]).any(1).mean())
    assert found.loss == pytest.approx(-log_p[np.arange(11), split.labels].mean(), rel=1e-5)
    assert found.mean_depth == pytest.approx(depth.mean(), rel=1e-6)
    assert found.depth_fraction == pytest.approx(depth.mean() / 4, rel=1e-6)
    assert found.depth_std_tokens == pytest.approx(depth.std(1).mean(), rel=1e-5)
    assert found.depth_std_images == pytest.approx(depth.mean(1).std(), rel=1e-5)
    assert found.class_token_depth == pytest.approx(depth[:, 0].mean(), rel=1e-6)
    histogram = np.bincount(depth.ravel(), minlength=5)[1:] / depth.size
    np.testing.assert_allclose(found.depth_histogram, histogram, rtol=1e-5)
    gmacs = np.asarray(image_gmacs(halting_model.config, output.token_depth))
    assert found.gmacs == pytest.approx(gmacs.mean(), rel=1e-5)
    np.testing.assert_allclose(found.image_depths, depth.mean(1), rtol=1e-6)
    assert found.depth_std_tokens > 0.2, "the sample must vary"


def test_tokens_of_no_layer_count_in_every_share(split: Split) -> None:
    """Dropped before the first layer, or off in every layer under gates."""
    dropped = spread_gate(small_config(num_classes=7, preprocessing=TWO, **NO_RULE | {"rule": RandomPatches(0.5)}))
    found = evaluate(dropped, split, 4, "packed")
    share = 4 / 7  # the class token and 3 of 6 patches
    assert found.depth_histogram == pytest.approx((0, 0, 0, share)) and found.mean_depth == pytest.approx(4 * share)
    assert found.computed_by_layer == pytest.approx((share,) * 4)
    shown = format_evaluation(found, dropped.config, choose(dropped.config)).splitlines()
    assert shown[-5:-3] == [f"{0:5}  {1 - share:6.1%}  {'#' * 30}", f"{1:5}  {0:6.1%}  "]
    assert numbers.summary(found, dropped.config)["never_computed"] == pytest.approx(1 - share)
    rule = Gates(token_bias=0.0, bias=0.0)
    gated = spread_gate(small_config(num_classes=7, preprocessing=TWO, **NO_RULE | {"rule": rule}))
    own = jax.tree.map(lambda p: 3 * jax.random.normal(jax.random.key(p.size), p.shape), nnx.state(gated.rule_module))
    nnx.update(gated.rule_module, own)
    output = gated(jnp.asarray(normalize(split.images, gated.config)))
    on = np.asarray(output.token_gates).astype(bool) & (np.asarray(output.sublayer_gates).max(-1, keepdims=True) > 0)
    depth = np.asarray(output.token_depth)
    for execution in ("masked", "packed"):
        found = evaluate(gated, split, 4, execution)
        assert found.computed_by_layer == pytest.approx(on.mean((1, 2)).tolist(), rel=1e-6)
        assert found.depth_histogram == pytest.approx([(depth == layer).mean() for layer in range(1, 5)], rel=1e-6)
    assert len(set(found.computed_by_layer)) > 1 and (depth == 0).any()
    assert (np.diff(found.computed_by_layer) > 0).any(), "tokens come back"


def test_packed_execution_has_the_same_figures_and_says_what_it_did(halting_model: AViT, split: Split) -> None:
    masked, packed = evaluate(halting_model, split, 4), evaluate(halting_model, split, 4, "packed")
    for name in ("top1", "top5", "mean_depth", "depth_std_tokens", "depth_histogram", "class_token_depth", "gmacs"):
        assert getattr(packed, name) == pytest.approx(getattr(masked, name), rel=1e-6), name
    assert packed.loss == pytest.approx(masked.loss, rel=1e-5)
    assert masked.executed_depth == halting_model.config.depth
    exited = avit_jax.compile_packed(halting_model, 11)(normalize(split.images, halting_model.config))
    slots = np.asarray(exited.token_depth).astype(float)
    slots[:, 0] = slots.max(1)  # a special token keeps its place while its image has others
    assert packed.executed_depth == pytest.approx(slots.mean())
    assert packed.executed_gmacs < masked.executed_gmacs
    with pytest.raises(ValueError, match="execution 'fast' is unknown: choose one of masked, packed"):
        evaluate(halting_model, split, 4, "fast")


def test_constant_logits_score_nothing(halting_model: AViT, split: Split) -> None:
    halting_model.head.kernel[...] = jnp.zeros_like(halting_model.head.kernel[...])
    found = evaluate(halting_model, split, 4)
    assert found.top1 == found.top5 == 0
    assert found.loss == pytest.approx(np.log(7), rel=1e-6)


def test_nan_logits_score_nothing(halting_model: AViT, split: Split) -> None:
    halting_model.head.bias[...] = jnp.full_like(halting_model.head.bias[...], jnp.nan)
    assert evaluate(halting_model, split, 4).top1 == 0


def test_labels_beyond_the_classes_are_refused(halting_model: AViT, split: Split) -> None:
    beyond = Split(split.images, split.labels + 5)
    with pytest.raises(ValueError, match="labels run from 5 to 11, the model has 7 classes"):
        evaluate(halting_model, beyond, 4)


def test_speeds_are_positive_and_one_for_each_model(halting_model: AViT, split: Split) -> None:
    images = normalize(split.images, halting_model.config)
    mesh = data_mesh(len(images))
    program = avit_jax.compile(halting_model, len(images), execution="masked", mesh=mesh)
    speeds = images_per_second([program] * 2, images, mesh, rounds=5)
    assert len(speeds) == 2
    assert all(speed > 0 for speed in speeds)


@pytest.mark.parametrize("distilled", [False, True])
def test_depth_maps_lie_as_the_images_do(distilled: bool) -> None:
    """A model whose gate sees the patch alone: the one bright patch must show up in its own place."""
    config = small_config(distilled=distilled, gate_scale=1.0, gate_center=0.0)
    model = AViT(config, rngs=avit_jax.model.vit.nnx.Rngs(0))
    # Blocks that add nothing, channel 0 = -100 * mean pixel: bright patches never halt early, dark ones (h = 1/2) do.
    for linear in (model.blocks.attn.proj, model.blocks.mlp.fc2):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    kernel = jnp.zeros_like(model.patch_embed.proj.kernel[...])
    model.patch_embed.proj.kernel[...] = kernel.at[:, 0].set(-100 / kernel.shape[0])
    model.patch_embed.proj.bias[...] = jnp.zeros_like(model.patch_embed.proj.bias[...])
    model.pos_embed[...] = jnp.zeros_like(model.pos_embed[...])
    images = np.zeros((1, 12, 8, 2), np.float32)
    images[0, 8:12, 4:8] = 1  # bottom row, right column
    found = depth_map(np.asarray(model(jnp.asarray(images)).token_depth[0]), config)
    np.testing.assert_array_equal(found, [[2, 2], [2, 2], [2, 4]])


def test_the_easiest_and_the_hardest_images_are_shown(
    halting_model: AViT, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avit_jax.report import pictures

    shown: list[list[int]] = []

    def recording(model: AViT, images: np.ndarray) -> object:
        normalized = normalize(split.images, model.config)
        shown.append([int(np.flatnonzero((normalized == image).all((1, 2, 3)))[0]) for image in images])
        return model(images)

    monkeypatch.setattr(pictures, "predict", recording)
    draw_depth_maps(halting_model, split, np.arange(11.0)[::-1].copy(), tmp_path / "maps.png", columns=3)
    assert shown == [[10, 9, 8], [0, 1, 2]]


def test_pictures_are_drawn(halting_model: AViT, split: Split, tmp_path: Path) -> None:
    found = evaluate(halting_model, split, 4)
    lines = [
        {"split": name, "step": step, "loss": 1 / step, "accuracy": 0.5, "mean_depth": 3.0}
        for step in (1, 2, 3)
        for name in ("train", "val")
    ]
    paths = [
        draw_depth_maps(halting_model, split, found.image_depths, tmp_path / "maps.png"),
        draw_depth_histogram(found, tmp_path / "histogram.png"),
        draw_curves(lines, tmp_path / "curves.png", 4),
    ]
    for path in paths:
        assert path.read_bytes()[:4] == b"\x89PNG"
