"""Attention mass: which patches have the share, and its settings."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax import AttentionMass
from avit_jax.halting.mass import largest
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.stopping_rules import untyped


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.0, [0, 0, 1, 0, 0]),
        (0.49, [0, 0, 1, 0, 0]),  # the one that crosses the share goes on
        (0.5, [0, 0, 1, 0, 0]),
        (0.51, [0, 1, 1, 0, 0]),  # at a tie the lower position comes first
        (0.76, [0, 1, 1, 1, 0]),
        (1.0, [0, 1, 1, 1, 0]),
    ],
)
def test_patches_by_hand(share: float, kept: list[int]) -> None:
    """Shares 0, 1/4, 1/2, 1/4 of the four that are there, in sums that need not be 1."""
    score = jnp.array([[0.0, 0.125, 0.25, 0.125, 0.5]])
    there = jnp.array([[True, True, True, True, False]])
    np.testing.assert_array_equal(largest(score, there, share), [kept])


@pytest.mark.parametrize(
    ("score", "there", "kept"),
    [
        ([0.0, 0.0, 0.0], [True, True, False], [True, True, False]),  # nothing says which are worth less
        ([0.1, 0.0, 0.9], [False, False, False], [False, False, False]),  # the image is finished
        ([1e-3, 5.0, np.nan], [True, False, False], [True, False, False]),
    ],
)
def test_edges(score: list[float], there: list[bool], kept: list[bool]) -> None:
    np.testing.assert_array_equal(largest(jnp.array([score]), jnp.array([there]), 0.3), [kept])


def test_levels_go_from_one_patch_to_the_static_model() -> None:
    model = spread_gate(small_config(**NO_RULE, image_size=32))
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 2)).astype(np.float32)
    rule_at = AttentionMass(0.5, (0, 2)).levels(model, images)
    assert rule_at(0.0) == AttentionMass(0.0, (0, 2)) and rule_at(1.0) == AttentionMass(1.0, (0, 2))
    depth = [
        np.asarray(answers(model.with_config(rule=rule_at(level)), images).token_depth)
        for level in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)
    ]
    np.testing.assert_array_equal((depth[0] == 4).sum(1), 2)  # the class token and one patch
    means = [float(values.mean()) for values in depth]
    assert means == sorted(set(means)) and means[-1] == 4


def test_text_json_and_plain_numbers() -> None:
    assert parse_rule("mass(share=0.9, layers=[3, 6])") == AttentionMass(0.9, (3, 6))
    for rule in (AttentionMass(0.5), AttentionMass(1.0, ())):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    numpy = untyped(AttentionMass, share=np.float32(0.5), layers=(np.int64(3),))
    assert json.dumps(rule_to_json(numpy)) == json.dumps(rule_to_json(AttentionMass(0.5, (3,))))
    assert AttentionMass(0.9).describe() == "attention mass 0.9 in layers (3, 6, 9)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the rule mass lacks the field share"),
        ({"share": 1.5}, "AttentionMass's share is 1.5: give a number from 0 to 1"),
        ({"share": -0.1}, "AttentionMass's share is -0.1"),
        ({"share": True}, "share is True"),
        (
            {"share": 0.5, "layers": [2, 2]},
            r"AttentionMass's layers are \(2, 2\): give whole numbers from 0 in ascending",
        ),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_from_json({"name": "mass"} | settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": AttentionMass(0.5)}, r"AttentionMass's layers are .* last layer is 3: give .* layers=\(1, 2, 3\)"),
        (
            {"rule": AttentionMass(0.5, (1,)), "class_token": False, "pool": "norm_mean"},
            "AttentionMass reads the class token's attention and the model has no class token",
        ),
    ],
)
def test_models_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**fields)
