"""Attention by a fused kernel: a NumPy loop, every execution with and without it, and where programs for a GPU have it.

There is no GPU here. The numbers are those of jax.nn.dot_product_attention without the kernel, and programs for a GPU
are lowered, not run.
"""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, AViTConfig, AViTOutput, DynamicViT, EViT, PackedPlan, PlannedPlan, ToMe
from avit_jax.execution.packed import packed_program
from avit_jax.execution.planned_model import planned_program
from avit_jax.execution.stages import Stage
from avit_jax.model import attention, fused
from avit_jax.model.config import NO_RULE
from avit_jax.model.fused import fused_attention
from avit_jax.model.vit import model_of_shapes
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train.optim import OptimSettings, learning_rate_schedule, make_optimizer
from avit_jax.train.settings import StepSettings
from avit_jax.train.state import TrainState
from avit_jax.train.step import build_train_step
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.halting_patterns import drawn_images, drawn_model

# Any keys, none, one that is not the first, and all.
MASKS = np.array([[1, 0, 1, 1, 0, 0, 1], [0] * 7, [0, 0, 0, 0, 1, 0, 0], [1] * 7], bool)


def drawn(queries: int, dtype: Any) -> list[jax.Array]:
    """Query, key and value of four images with two heads."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(2 * rng.normal(size=(4, 2, n, 8)), dtype) for n in (queries, 7, 7)]


def by_hand(query: Any, key: Any, value: Any, masks: np.ndarray) -> np.ndarray:
    """Each query of each head alone: [b q h c]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, heads, queries, width = query.shape
    mixed = np.zeros((batch, queries, heads, width))
    for b, q, h in np.ndindex(batch, queries, heads):
        there = np.flatnonzero(masks[b])
        weights = np.exp([query[b, h, q] @ key[b, h, n] / width**0.5 for n in there])
        mixed[b, q, h] = sum(w * value[b, h, n] for w, n in zip(weights, there, strict=True)) / weights.sum()
    return mixed


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("queries", [2, 7])
def test_a_tpu_hides_keys_by_a_channel(dtype: str, tolerance: float, queries: int) -> None:
    """Weights are those of masked scores, for an image without any key too. A TPU has it, but not in training."""
    query, key, value = drawn(queries, dtype)
    for seen in (jnp.asarray(MASKS), None):
        ours = jax.nn.softmax(attention._scores_with_a_channel(query, key, seen))
        np.testing.assert_allclose(ours, jax.nn.softmax(attention._scores_with_a_mask(query, key, seen)), atol=1e-6)

        def mixed(*arrays: jax.Array, seen: Any = seen) -> jax.Array:
            weights, total = attention._attention_weights(*arrays[:2], seen)
            return jnp.matmul(weights / total, arrays[2].astype(jnp.float32)).sum()

        def hand(*arrays: jax.Array, seen: Any = seen) -> jax.Array:
            scores = jnp.matmul(arrays[0] * 8**-0.5, arrays[1].swapaxes(2, 3), preferred_element_type=jnp.float32)
            scores = scores if seen is None else jnp.where(seen[:, None, None], scores, -1e9)
            return jnp.matmul(jax.nn.softmax(scores), arrays[2].astype(jnp.float32)).sum()

        found, expected = (jax.grad(f, (0, 1, 2))(query, key, value) for f in (mixed, hand))
        for a, b in zip(found, expected, strict=True):
            a, b = (np.asarray(x, np.float32)[[0, 2, 3]] for x in (a, b))  # without keys no gradient means anything
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())
        for run, on_a_tpu in ((mixed, True), (jax.grad(mixed), False)):
            for platform in ("cpu", "cuda", "tpu"):
                program = jax.jit(run).trace(query, key, value).lower(lowering_platforms=(platform,)).as_text()
                assert ("x9x" in program) == (on_a_tpu and platform == "tpu"), platform


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("queries", [2, 7])
def test_the_values_of_each_query_by_hand(dtype: str, tolerance: float, queries: int) -> None:
    arrays = drawn(queries, dtype)
    for mass, masks in ((jnp.asarray(MASKS), MASKS), (None, np.ones_like(MASKS))):
        found = np.asarray(fused_attention(*arrays, mass, "xla"), np.float64)
        seen = masks | (~masks.any(1, keepdims=True) & (np.arange(7) == 0))
        expected = by_hand(*arrays, seen).reshape(found.shape)
        np.testing.assert_allclose(found, expected, atol=tolerance * float(np.abs(arrays[2]).max()))


def test_keys_that_are_not_there_have_no_gradient() -> None:
    arrays = drawn(7, "float32")

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sin(fused_attention(*arrays, jnp.asarray(MASKS), "xla")).sum()

    _, of_key, of_value = jax.grad(loss, (0, 1, 2))(*arrays)
    for gradient in (of_key, of_value):
        seen = np.abs(gradient).max((1, 3)) > 0
        known = MASKS.sum(1) > 1  # a query gives a single key the weight 1, whatever its score
        np.testing.assert_array_equal(seen[known], MASKS[known])
    direction = [jnp.asarray(np.random.default_rng(1).normal(size=x.shape), "float32") for x in arrays]
    step = 1e-2
    there, back = (loss(*(x + s * d for x, d in zip(arrays, direction, strict=True))) for s in (step, -step))
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.grad(loss, (0, 1, 2))(*arrays), direction, strict=True))
    assert slope == pytest.approx(float(there - back) / 2 / step, rel=2e-3)


MODELS: dict[str, dict[str, Any]] = {
    "avit": {},
    "distilled": {"distilled": True},
    "heads on a mean, with registers": {"pool": "norm_mean", "num_registers": 2},
}
# Patches that stop at once, after the class token (layer 3), and in the middle of a stage.
DEPTHS = np.array([[1, 1, 1, 1, 1, 1], [4, 1, 4, 2, 3, 1], [2, 4, 3, 3, 1, 4]])


def roomy(config: AViTConfig, batch_size: int = 5) -> PlannedPlan:
    """Two stages with room for every token: groups of two images, and a row that is left over."""
    stages = tuple(Stage(first, (config.num_tokens,) * 3) for first in (0, 2))
    return PlannedPlan(config.num_tokens, config.depth, batch_size, 2, stages)


@pytest.mark.parametrize("name", MODELS)
def test_masked_execution_gives_the_same(name: str) -> None:
    plain = drawn_model(small_config(**MODELS[name], attention="plain"))
    expected = answers(plain, drawn_images(DEPTHS))
    assert len(np.unique(expected.token_depth)) >= 3
    assert_same(answers(plain.with_config(attention="xla"), drawn_images(DEPTHS)), expected, 1e-6)


@pytest.mark.parametrize("execution", ["packed", "planned"])
def test_executions_that_remove_tokens_give_the_same(execution: str) -> None:
    """Three images for five places. The class token outlives the distillation token, and many patches both."""
    plain = drawn_model(small_config(distilled=True, attention="plain"))
    plan = PackedPlan(8, 2, (4, 8)) if execution == "packed" else roomy(plain.config)
    found, expected = (
        avit_jax.compile(plain.with_config(attention=name), 5, execution=execution, plan=plan, image_exit=False)(
            drawn_images(DEPTHS)
        )
        for name in ("xla", "plain")
    )
    assert_same(found, expected, 1e-6)


def test_models_without_a_rule_and_merging_ones_give_the_same() -> None:
    for rule in (None, ToMe(2, proportional=False)):
        plain = spread_gate(small_config(**NO_RULE | {"rule": rule}, attention="plain"))
        images = np.random.default_rng(3).normal(size=(3, 12, 8, 2)).astype(np.float32)
        assert_same(answers(plain.with_config(attention="xla"), images), answers(plain, images), 1e-6)


def assert_same(found: AViTOutput, expected: AViTOutput, tolerance: float) -> None:
    np.testing.assert_array_equal(found.token_depth, expected.token_depth)
    for field in ("logits", "head_logits", "ponder_cost", "halting_scores"):
        a, b = getattr(found, field), getattr(expected, field)
        np.testing.assert_allclose(a, b, atol=tolerance * max(float(np.abs(b).max()), 1), err_msg=field)


def test_bfloat16_differs_by_its_rounding() -> None:
    """Images draw the depths, so that rounding moves no token across a threshold."""
    exact, half = (drawn_model(small_config(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    expected = answers(exact, drawn_images(DEPTHS)).logits
    plain, kernel = (
        answers(half.with_config(attention=name), drawn_images(DEPTHS)).logits for name in ("plain", "xla")
    )
    rounding = float(np.abs(plain - expected).max())
    assert 0 < np.abs(kernel - expected).max() < 2 * rounding


def test_training_gives_the_same_gradient() -> None:
    """Masked, with images whose tokens have all halted, and an odd number of tokens."""
    plain, images = drawn_model(small_config(attention="plain")), drawn_images(DEPTHS)

    def gradient(model: AViT) -> Any:
        graphdef, params = nnx.split(model)

        def loss(params: Any) -> jax.Array:
            output = nnx.merge(graphdef, params)(images, deterministic=False, rngs=nnx.Rngs(dropout=0))
            return jnp.sin(output.logits).sum() + output.ponder_cost.mean()

        return jax.jit(jax.grad(loss))(params)

    expected, found = (gradient(plain.with_config(attention=name)) for name in ("plain", "xla"))
    norm = float(jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(expected))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * norm), found, expected)


# Programs for a GPU


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU: lowering asks for cuDNN's version, and the choice for the device."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(attention, "cudnn_is_here", lambda: True)


def kernels(function: Any, *arguments: Any) -> tuple[int, int]:
    """cuDNN's kernels for attention in a program for CUDA: forward, and backward."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$fmhaSoftmax(\w*)", text)
    assert set(calls) <= {"", "Backward"}, "no bias, no dropout"
    assert len(re.findall(r"mask_type[^,]*PADDING", text)) == len(calls), "all know the number of keys"
    return calls.count(""), calls.count("Backward")


def shapes(config: AViTConfig) -> tuple[nnx.GraphDef, Any, jax.ShapeDtypeStruct]:
    graphdef, params = nnx.split(model_of_shapes(config))
    return graphdef, params, jax.ShapeDtypeStruct((5, 12, 8, 2), "float32")


def forward_kernels(config: AViTConfig) -> int:
    graphdef, params, images = shapes(config)
    forward, backward = kernels(lambda params, images: nnx.merge(graphdef, params)(images), params, images)
    assert not backward
    return forward


def step_kernels(config: AViTConfig, plan: PlannedPlan | None = None) -> tuple[int, int]:
    """Of a training step."""
    graphdef, params, images = shapes(config)
    optimizer = make_optimizer(OptimSettings(), learning_rate_schedule(OptimSettings(), 1000, epochs=1.0, batch_size=5))
    state = TrainState(jax.ShapeDtypeStruct((), "int32"), params, None, jax.eval_shape(optimizer.init, params))
    mesh = training_mesh(MeshSettings(), 1)
    step = build_train_step(graphdef, optimizer, StepSettings(counts=True), mesh, None, plan)
    batch = {"image": images, "label": jax.ShapeDtypeStruct((5,), "int32")}
    return kernels(step, state, batch, None)


HALF = {"dtype": "bfloat16"}


def test_programs_for_a_gpu_have_the_kernel(on_a_gpu: None) -> None:
    """Layers are scanned: a program has one kernel for all of them, and one for each group and capacity."""
    gated, dense = small_config(**HALF), small_config(**HALF, **NO_RULE)
    assert forward_kernels(gated) == forward_kernels(dense) == 1
    assert forward_kernels(small_config(**HALF, **NO_RULE | {"rule": ToMe(1)})) == 1, "until tokens have sizes"
    graphdef, params, images = shapes(gated)
    count = jax.ShapeDtypeStruct((), "int32")
    packed = packed_program(graphdef, PackedPlan(7, 2, (2, 4, 7)), False, None)
    # All layers but the last, and the last, each with three capacities.
    assert kernels(packed, params, images, count) == (6, 0)
    planned = planned_program(graphdef, roomy(gated), False, None)
    # Two stages, each of three groups with the same places, which run as one; the fallback has one capacity twice.
    assert kernels(planned, params, images, count) == (4, 0)
    apart = dataclasses.replace(roomy(gated), stages=(Stage(0, (7, 7, 7)), Stage(2, (3, 5, 7))))
    planned = planned_program(graphdef, apart, False, None)
    assert kernels(planned, params, images, count) == (6, 0)


def test_training_steps_for_a_gpu_have_it_in_both_directions(on_a_gpu: None) -> None:
    gated = small_config(**HALF)
    assert step_kernels(small_config(**HALF, **NO_RULE)) == step_kernels(gated) == (1, 1)
    # Two stages, each of groups that run as one, and the fallback, which computes its forward pass twice (remat).
    assert step_kernels(gated, roomy(gated)) == (2 + 2, 2 + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "float32"},
        HALF | {"attention": "plain"},
        HALF | {"embed_dim": 24},  # heads of 12
        HALF | NO_RULE | {"rule": EViT(0.7, (0, 1, 2, 3))},  # reads the class token's attention
    ],
)
def test_programs_without_the_kernel(on_a_gpu: None, fields: dict[str, Any]) -> None:
    assert forward_kernels(small_config(**fields)) == 0


def test_keys_that_count_by_a_number_have_no_kernel(on_a_gpu: None) -> None:
    """DynamicViT's training draws the mass of each key; at inference patches are there or not."""
    config = small_config(**HALF, **NO_RULE | {"rule": DynamicViT(0.7, (1,))})
    graphdef, params, images = shapes(config)

    def trained(params: Any, images: jax.Array) -> Any:
        return nnx.merge(graphdef, params)(images, deterministic=False, rngs=nnx.Rngs(dropout=0))

    assert kernels(trained, params, images) == (0, 0)
    assert forward_kernels(config) > 0


def test_without_a_gpu_nothing_is_asked_of_cudnn() -> None:
    assert forward_kernels(small_config(**HALF, num_classes=6)) == 0


@pytest.mark.parametrize(
    ("device", "is_one"),
    [
        ({"compute_capability": "8.0"}, True),
        ({"compute_capability": "10.3"}, True),
        ({"compute_capability": "7.5"}, False),  # Turing
        ({"compute_capability": "gfx90a"}, False),  # AMD
        ({}, False),  # CPU, TPU
    ],
)
def test_which_devices_have_it(device: dict[str, str], is_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_devices", lambda **_: [SimpleNamespace(**device)])
    assert fused.cudnn_is_here() == is_one


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attention": "flash"}, "attention 'flash' is unknown: choose one of auto, plain, cudnn, xla"),
        ({"attention": "cudnn"}, "needs dtype bfloat16 .* and this is float32 with heads of 8: choose"),
        ({"attention": "cudnn", "dtype": "bfloat16", "embed_dim": 24}, "and this is bfloat16 with heads of 12"),
    ],
)
def test_settings_that_cannot_work(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small_config(**fields)


def test_a_checkpoint_from_before_the_setting_is_auto() -> None:
    parts = small_config(attention="plain").to_json()
    assert AViTConfig.from_json(parts).attention == "plain"
    del parts["model"]["attention"]
    assert AViTConfig.from_json(parts).attention == "auto"
