"""How packed and masked models are called from Python: inside JAX's transformations, exported, with odd arguments."""

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, AViTOutput, PackedModel, PackedPlan, compile_packed
from tests.harness.builders import small_config, spread_gate

IMAGES = np.random.default_rng(3).normal(size=(3, 12, 8, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def spread() -> tuple[AViT, PackedModel]:
    model = spread_gate(small_config())
    return model, compile_packed(model, 3, PackedPlan(7, 2, (4, 7)))


def assert_equal(found: AViTOutput, expected: AViTOutput, tolerance: float = 0.0) -> None:
    for field in dataclasses.fields(AViTOutput):
        np.testing.assert_allclose(getattr(found, field.name), getattr(expected, field.name), rtol=0, atol=tolerance)


def test_packed_models_work_under_jit_and_vmap(spread: tuple[AViT, PackedModel]) -> None:
    _, packed = spread
    assert_equal(jax.jit(lambda images: packed(images))(IMAGES), packed(IMAGES), 1e-6)
    assert_equal(jax.jit(lambda images: packed(images))(IMAGES[:2]), packed(IMAGES[:2]), 1e-6)


@pytest.mark.slow
def test_packed_models_work_without_jit(spread: tuple[AViT, PackedModel]) -> None:
    _, packed = spread
    with jax.disable_jit():
        found = packed(IMAGES[:1])
    assert_equal(found, packed(IMAGES[:1]), 1e-5)


def test_no_shape_is_promoted(spread: tuple[AViT, PackedModel]) -> None:
    model, packed = spread
    with jax.numpy_rank_promotion("raise"):
        masked = jax.make_jaxpr(lambda images: model(images))(IMAGES)
        program = jax.make_jaxpr(packed.jitted)(*packed.abstract_arguments)
    assert masked.out_avals[0].shape == program.out_avals[0].shape == (3, 5)


def test_the_packed_program_can_be_exported(spread: tuple[AViT, PackedModel]) -> None:
    _, packed = spread
    written = jax.export.export(packed.jitted)(*packed.abstract_arguments).serialize()
    output = jax.export.deserialize(written).call(packed.params, IMAGES, np.int32(3))
    assert isinstance(output, AViTOutput)
    assert_equal(output, packed(IMAGES), 1e-6)


def test_weights_are_those_of_the_moment_of_compilation(spread: tuple[AViT, PackedModel]) -> None:
    model, packed = spread
    before = packed(IMAGES)
    biases = np.asarray(model.head.bias[...])
    model.head.bias[...] = model.head.bias[...] + 1
    try:
        assert_equal(packed(IMAGES), before)
        assert not np.allclose(model(IMAGES).logits, before.logits, atol=0.5)
    finally:
        model.head.bias[...] = jnp.asarray(biases)


def test_numpy_weights_are_copied() -> None:
    """A NumPy array in a parameter can change where it lies."""
    model = spread_gate(small_config(depth=2))
    bias = np.zeros(5, np.float32)
    model.head.bias.set_value(bias)
    packed = compile_packed(model, 1, PackedPlan(7, 1, (7,)))
    before = packed(IMAGES[:1])
    bias += 1
    assert_equal(packed(IMAGES[:1]), before)


def test_no_images_give_an_empty_output(spread: tuple[AViT, PackedModel]) -> None:
    model, packed = spread
    for output in (model(IMAGES[:0]), packed(IMAGES[:0])):
        assert output.logits.shape == (0, 5)
        assert output.head_logits.shape == (1, 0, 5)
        assert output.token_depth.shape == output.ponder_cost.shape == (0, 7)
        assert output.halting_scores.shape == (4, 0, 7)


class Tensor:
    """As torch's: a shape and a type of its own."""

    shape = (1, 2, 12, 8)
    dtype = "torch.float32"


@pytest.mark.parametrize("images", [Tensor(), [[0.0]], None])
def test_what_is_no_array_is_refused_with_its_name(spread: tuple[AViT, PackedModel], images: Any) -> None:
    model, packed = spread
    kind = type(images).__qualname__
    for model_or_packed in (model, packed):
        call = inspect.unwrap(type(model_or_packed).__call__)  # the tests' own check of types stands before it
        with pytest.raises(
            ValueError, match=rf"as a NumPy or JAX array, .* but this is a (.*\.)?{kind}: use np.asarray"
        ):
            call(model_or_packed, images)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"group_size": 2.0}, "group_size is 2.0: it must be at least 1, at most 1,048,576, and a whole number"),
        ({"group_size": float("nan")}, "group_size is nan: "),
        ({"group_size": True}, "group_size is True: "),
        ({"group_size": "2"}, "group_size is a str: "),
        ({"group_size": 10**12}, "group_size is 1000000000000: "),
        ({"group_size": 10**5000}, "group_size is a number of 20 digits or more: "),
        ({"num_tokens": 10**12, "capacities": (10**12,)}, "num_tokens is 1000000000000: "),
        ({"capacities": (float("nan"), 7)}, "a capacity is nan: "),
        ({"capacities": 7}, "capacities are a int: give a tuple"),
        ({"capacities": ()}, r"capacities are \(\): they must rise"),
        ({"capacities": tuple(range(1, 5000))}, r"capacities are \(1, 2, 3, 4, 5, 6, 7, 8, ...\): they must rise"),
    ],
)
def test_plans_are_whole_numbers(fields: dict[str, Any], reason: str) -> None:
    plan = object.__new__(PackedPlan)  # past the tests' own check of types
    for name, value in ({"num_tokens": 7, "group_size": 2, "capacities": (3, 7)} | fields).items():
        object.__setattr__(plan, name, value)
    with pytest.raises(ValueError, match=reason):
        inspect.unwrap(PackedPlan.__post_init__)(plan)


def test_a_group_has_no_more_images_than_the_batch() -> None:
    """A plan may say a million: the program would need the memory of a million images."""
    packed = compile_packed(AViT(small_config(depth=2), rngs=nnx.Rngs(0)), 2, PackedPlan(7, 2**20, (7,)))
    assert packed.plan.group_size == 2
    assert packed(IMAGES[:2]).logits.shape == (2, 5)


def test_a_model_that_halts_nowhere_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    def packed(**gate: float | None) -> PackedModel:
        return compile_packed(AViT(small_config(depth=2, **gate), rngs=nnx.Rngs(0)), 2, PackedPlan(7, 2, (7,)))

    silent = packed(gate_center=60.0)
    silent(IMAGES[:0])
    assert capsys.readouterr().out == ""
    silent(IMAGES[:2])
    said = capsys.readouterr().out
    assert "no token of the first images halted before the last layer; avit_jax.start_gate(" in said
    assert said.count("\n") == 1
    silent(IMAGES[:2])
    assert capsys.readouterr().out == ""
    packed(gate_scale=None, gate_center=None)(IMAGES[:2])
    packed(gate_center=-60.0)(IMAGES[:2])
    assert capsys.readouterr().out == ""


def test_the_types_and_the_version_are_published() -> None:
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", avit_jax.__version__)
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "avit_jax.__version__"}
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["avit_jax"]
    assert (root / "avit_jax" / "py.typed").exists()
