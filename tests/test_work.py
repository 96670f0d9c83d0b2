"""Work against DeiT's published figures and a loop over tokens."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, PackedPlan
from avit_jax.execution.plan import layer_loads, padded_loads
from avit_jax.execution.work import image_gmacs, last_block_macs, packed_gmacs, shrinking_gmacs, whole_gmacs
from avit_jax.reduction.mctf import MCTF
from avit_jax.reduction.tome import ToMe
from tests.harness.builders import small_config


@pytest.mark.parametrize(("size", "published"), [("tiny", 1.25), ("small", 4.6), ("base", 17.6)])
def test_dense_work_is_deits(size: str, published: float) -> None:
    config = avit_jax.PRESETS[f"deit_{size}_patch16_224"]
    depth = jnp.full((2, config.num_tokens), config.depth, jnp.int32)
    np.testing.assert_allclose(image_gmacs(config, depth), published, atol=0.05)


def test_work_is_the_sum_over_layers_of_what_is_active() -> None:
    config = avit_jax.PRESETS["avit_tiny_distilled_patch16_224"]
    depth = np.random.default_rng(0).integers(1, 13, (3, config.num_tokens)).astype(np.int32)
    d = config.embed_dim
    for image, found in zip(depth, image_gmacs(config, jnp.asarray(depth)), strict=True):
        total = 196 * 16 * 16 * 3 * d + 2 * d * 1000
        for layer in range(1, 13):
            n = int((image >= layer).sum())
            qkv, scores, mixing, projection, mlp = n * d * 3 * d, n * n * d, n * n * d, n * d * d, 2 * n * d * 4 * d
            total += qkv + scores + mixing + projection + mlp
        np.testing.assert_allclose(found, total / 1e9, rtol=1e-6)


def test_xlas_own_count_of_an_unrolled_model_agrees() -> None:
    """XLA counts two operations a multiply-add, and element-wise work besides, which is small for wide models."""
    config = avit_jax.AViTConfig(image_size=64, patch_size=16, embed_dim=256, num_heads=4, depth=2, num_classes=10)
    model = avit_jax.AViT(config, rngs=nnx.Rngs(0))
    blocks, stacked = nnx.split(model.blocks)

    def forward(images: jax.Array) -> jax.Array:
        x = model.embed(images)
        for layer in range(config.depth):
            x = nnx.merge(blocks, jax.tree.map(lambda p, layer=layer: p[layer], stacked))(x)
        return model.head(model.norm(x[:, 0]))

    counted = jax.jit(forward).lower(jnp.zeros((1, 64, 64, 3))).compile().cost_analysis()["flops"] / 2e9
    depth = jnp.full((1, config.num_tokens), config.depth, jnp.int32)
    np.testing.assert_allclose(counted, image_gmacs(config, depth)[0], rtol=0.02)


def multiply_adds(jaxpr: Any) -> int:
    """Those of every matrix product in a traced program, scans unrolled; the products of merging are left out."""
    total = 0
    for equation in jaxpr.eqns:
        parameters = equation.params
        if equation.primitive.name == "dot_general":
            highest = jax.lax.Precision.HIGHEST  # of ToMe's matching and its sums alone
            if parameters["precision"] not in (highest, (highest, highest)):
                (contracted, _), _ = parameters["dimension_numbers"]
                shape = equation.invars[0].aval.shape
                total += math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        times = parameters.get("length", 1)
        inner = [value for value in parameters.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
        inner += parameters.get("branches", ())[-1:]  # what other platforms than a TPU run
        total += times * sum(multiply_adds(getattr(part, "jaxpr", part)) for part in inner)
    return total


@pytest.mark.parametrize(
    "fields",
    [
        {"gate_scale": None, "gate_center": None},
        {"distilled": True, "num_registers": 2},
        {"pool": "token_and_mean"},
        {"rule": ToMe(2)},
        {"rule": ToMe((0, 2, 0, 1)), "distilled": True},
        {"rule": ToMe(1), "pool": "norm_mean", "class_token": False},
        {"rule": MCTF(1)},
        {"rule": MCTF(0.3, (0, 2)), "distilled": True},
    ],
)
def test_the_products_of_the_traced_program_are_what_is_counted(fields: dict[str, Any]) -> None:
    config = small_config(image_size=(20, 12), **fields)
    program = avit_jax.compile(AViT(config, rngs=nnx.Rngs(0)), 2, execution="auto" if config.reduction else "masked")
    traced = jax.make_jaxpr(program.jitted)(*program.abstract_arguments)
    depth = np.full((2, config.num_tokens), config.depth, np.int32)
    own = 0
    if config.reduction is not None:
        # With a class token ToMe merges nothing in the last layer.
        skips_last = config.pool == "token" and isinstance(config.reduction, ToMe)
        own = sum(config.reduction.matching_macs(config)[: -1 if skips_last else None])
    assert program.executed(depth, 2).gmacs == pytest.approx((multiply_adds(traced.jaxpr) / 2 + own) / 1e9, rel=1e-6)


@pytest.mark.parametrize(("size", "published"), [("small", 2.594), ("tiny", 0.705)])
def test_a_rule_before_the_values_counts_what_mctfs_paper_counts(size: str, published: float) -> None:
    """DeiT-S with r = 16 is 2.60 there and DeiT-T 0.71, with the matching."""
    config = dataclasses.replace(avit_jax.PRESETS[f"deit_{size}_patch16_224"], rule=MCTF(16))
    found = shrinking_gmacs(config, short_last_layer=False) + sum(MCTF(16).matching_macs(config)) / 1e9
    np.testing.assert_allclose(found, published, atol=5e-4)
    assert shrinking_gmacs(config, short_last_layer=True) == shrinking_gmacs(config, short_last_layer=False)


def test_a_reduction_counts_the_whole_last_layer_by_the_papers_convention() -> None:
    """DeiT-S with r = 13 is 2.7 in ToMe's paper."""
    config = avit_jax.PRESETS["deit_small_patch16_224"]
    config = dataclasses.replace(config, rule=ToMe(13))
    found = image_gmacs(config, jnp.ones((3, config.num_tokens), jnp.int32))
    np.testing.assert_allclose(found, 2.703, atol=5e-4)
    assert shrinking_gmacs(config, short_last_layer=True) < found[0] < whole_gmacs(config)
    nothing = dataclasses.replace(config, rule=ToMe(0))
    assert shrinking_gmacs(nothing, short_last_layer=False) == pytest.approx(whole_gmacs(config), rel=1e-6)


def test_the_last_block_counts_what_special_tokens_read() -> None:
    n, d, m, special = 7, 16, 40, 2
    keys_and_values = n * d * 2 * d
    query_and_projection, attention, mlp = special * d * 2 * d, 2 * special * n * d, special * 2 * d * m
    total = keys_and_values + query_and_projection + attention + mlp
    assert last_block_macs(np.array([7.0]), special, d, m) == [total]
    assert last_block_macs(np.array([0.0]), special, d, m) == [0]


def test_executed_work_is_the_sum_over_groups_of_their_capacities() -> None:
    config = small_config(depth=2)
    plan = PackedPlan(7, 2, (4, 7))
    loads = np.array([[[7, 3, 0], [4, 1, 0]]])  # one batch of two real images, one empty
    # Sorted and padded to four images: layer 1 has groups (0, 0) and (3, 7), layer 2 (0, 0) and (1, 4).
    np.testing.assert_array_equal(padded_loads(loads, plan), [[[0, 7], [0, 4]]])
    first = 2 * (7 * (4 * 16**2 + 2 * 16 * 64) + 2 * 7 * 7 * 16)
    last = 2 * (4 * 2 * 16**2 + 2 * 16**2 + 2 * 16 * 64 + 2 * 4 * 16)
    rest = 6 * 4 * 4 * 2 * 16 + 16 * 5
    found = packed_gmacs(config, padded_loads(loads, plan), plan.group_size, images=2)
    assert found == pytest.approx(((first + last) / 2 + rest) / 1e9, rel=1e-6)


def test_loads_follow_the_exit_of_images() -> None:
    depth = np.array([[2, 1, 4, 3], [3, 1, 1, 1]])
    three = small_config(image_size=(12, 4))
    np.testing.assert_array_equal(layer_loads(depth, three, image_exit=True), [[4, 4], [3, 1], [0, 1], [0, 0]])
    # Without exit the special token keeps its slot beside the others.
    np.testing.assert_array_equal(layer_loads(depth, three, image_exit=False), [[4, 4], [3, 1], [3, 1], [2, 0]])
    # A register is no patch: it goes with the image and keeps no slot.
    registers = small_config(image_size=(8, 4), num_registers=1)
    np.testing.assert_array_equal(layer_loads(depth, registers, image_exit=True), [[4, 4], [3, 1], [0, 1], [0, 0]])
    np.testing.assert_array_equal(layer_loads(depth, registers, image_exit=False), [[4, 4], [3, 1], [3, 1], [2, 0]])
    # Heads on the mean read the patches: the image goes on with the last of them, the class token alone does not count.
    mean = small_config(image_size=(12, 4), pool="norm_mean")
    np.testing.assert_array_equal(layer_loads(depth, mean, image_exit=True), [[4, 4], [3, 0], [2, 0], [1, 0]])
    np.testing.assert_array_equal(layer_loads(depth, mean, image_exit=False), [[4, 4], [3, 1], [2, 1], [1, 0]])


@pytest.mark.parametrize(
    ("fields", "heads", "special", "read"),
    [
        ({"num_registers": 3}, 16 * 5, 4, 1),
        ({"distilled": True, "num_registers": 1}, 2 * 16 * 5, 3, 2),
        ({"pool": "norm_mean", "class_token": False}, 16 * 5, 0, None),
        ({"pool": "token_and_mean"}, 2 * 16 * 5, 1, None),
        ({"num_classes": 0}, 0, 1, 1),
    ],
)
def test_work_of_registers_and_of_heads_on_the_mean(
    fields: dict[str, object], heads: int, special: int, read: int | None
) -> None:
    config = small_config(depth=2, **fields)
    tokens = special + 6
    assert config.num_tokens == tokens
    block = tokens * (4 * 16**2 + 2 * 16 * 64) + 2 * tokens**2 * 16
    embedding = 6 * 4 * 4 * 2 * 16
    found = image_gmacs(config, jnp.full((1, tokens), 2, jnp.int32))
    np.testing.assert_allclose(found, (2 * block + embedding + heads) / 1e9, rtol=1e-6)
    last = block
    if read is not None:  # of the last block only what the heads read
        last = tokens * 2 * 16**2 + read * (2 * 16**2 + 2 * 16 * 64 + 2 * tokens * 16)
    plan = PackedPlan(tokens, 1, (tokens,))
    executed = packed_gmacs(config, padded_loads(np.full((1, 2, 1), tokens), plan), 1, 1)
    assert executed == pytest.approx((block + last + embedding + heads) / 1e9, rel=1e-6)
