"""compile(): which execution runs a rule, that all of them agree, and what is said of a choice that does not fit."""

import jax
import numpy as np
import pytest

import avit_jax
from avit_jax import AViT, AViTOutput
from avit_jax.execution.program import fitting_executions
from avit_jax.model.config import AViTConfig
from avit_jax.reduction.tome import ToMe
from tests.harness.builders import small_config, spread_gate

NO_GATE = {"gate_scale": None, "gate_center": None}
CONFIGS = {"avit": small_config(), "dense": small_config(**NO_GATE), "tome": small_config(rule=ToMe(1), **NO_GATE)}
FITTING = {"avit": ["packed", "masked"], "dense": ["masked", "packed"], "tome": ["shrinking"]}


def images_of(config: AViTConfig, count: int) -> np.ndarray:
    shape = (count, *config.image_shape, config.in_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def assert_same(found: AViTOutput, expected: AViTOutput) -> None:
    np.testing.assert_array_equal(found.token_depth, expected.token_depth)
    for name in ("logits", "head_logits", "ponder_cost", "halting_scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_execution_of_a_rule_gives_the_same(name: str) -> None:
    config = CONFIGS[name]
    model, images = spread_gate(config), images_of(config, 4)
    expected = jax.jit(AViT.__call__)(model, images)
    assert list(fitting_executions(config)) == FITTING[name]
    for execution in ("auto", *FITTING[name]):
        program = avit_jax.compile(model, 5, execution=execution, image_exit=False)
        assert_same(program(images), expected)  # four images for five places
        np.testing.assert_allclose(program(images[:1]).logits, expected.logits[:1], atol=2e-5)
        assert program.batch_size == 5 and program.config == config
        exported = jax.export.export(program.jitted)(*program.abstract_arguments)
        assert len(exported.serialize()) > 1000
