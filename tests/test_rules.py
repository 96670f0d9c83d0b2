"""Rules by name: as JSON in config.json, as text on the command line, and in AViTConfig."""

import dataclasses
import json
from typing import Any

import pytest

from avit_jax import AViTConfig
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.halting.rule import Halting
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.groups import Reduction
from avit_jax.reduction.tome import ToMe
from avit_jax.rules import RULES, parse_rule, rule_from_json, rule_to_json
from tests.harness.builders import small_config

NO_GATE: dict[str, Any] = {"gate_scale": None, "gate_center": None}


def through_json(model_config: AViTConfig) -> AViTConfig:
    return AViTConfig.from_json(json.loads(json.dumps(model_config.to_json())))


def test_the_gate_of_a_configuration_is_its_rule() -> None:
    config = small_config(halt_epsilon=0.02)
    assert config.rule is None and config.halts and config.reduction is None
    assert config.halting == AViTGate(4.0, 1.0, 0.02)
    static = small_config(**NO_GATE)
    assert static.halting is None and not static.halts


def test_a_gate_given_as_a_rule_moves_to_its_fields() -> None:
    given = small_config(**NO_GATE, rule=AViTGate(4.0, 1.0, 0.02))
    assert given == small_config(halt_epsilon=0.02) and hash(given) == hash(small_config(halt_epsilon=0.02))


def test_config_json_names_the_rule() -> None:
    assert small_config().to_json()["model"]["rule"] == {"name": "avit"}
    assert small_config(**NO_GATE).to_json()["model"]["rule"] is None
    for config in (small_config(), small_config(**NO_GATE)):
        assert through_json(config) == config


@pytest.mark.parametrize("fields", [{}, NO_GATE])
def test_files_from_before_there_were_several_rules(fields: dict[str, Any]) -> None:
    config = small_config(**fields)
    parts = config.to_json()
    del parts["model"]["rule"]
    assert AViTConfig.from_json(parts) == config


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("avit", "rule is avit: it must be a JSON object with a name, or null"),
        ([], "rule is a list: it must be a JSON object"),
        ({}, f"there is no rule None: known are {', '.join(sorted(RULES))}"),
        ({"name": ["avit"]}, "there is no rule a list"),
        ({"name": "\x1b[2Jevil"}, r"there is no rule '\\x1b\[2Jevil'"),
        ({"name": "__class__"}, "there is no rule '__class__'"),
        ({"name": "avit", "gate_scale": 1.0}, "the rule avit lacks the field gate_center"),
        ({"name": "avit", "gate_scale": "1", "gate_center": 1.0}, "gate_scale is 1: it must be a number"),
        ({"name": "avit", "gate_scale": float("nan"), "gate_center": 1.0}, "gate_scale is nan: it must be a number"),
        ({"name": "avit", "gate_scale": 1, "gate_center": 1, "halt_epsilon": 2}, "halt_epsilon is 2.0: it must lie"),
        ({"name": "avit", "gate_scale": 1, "gate_center": 1, "x": 2}, "the rule avit has no field 'x'"),
    ],
)
def test_hostile_json_is_refused(rule: Any, message: str) -> None:
    parts = small_config().to_json()
    parts["model"]["rule"] = rule
    with pytest.raises(ValueError, match=message):
        AViTConfig.from_json(parts)


def test_a_named_gate_needs_its_numbers() -> None:
    parts = small_config(**NO_GATE).to_json()
    parts["model"]["rule"] = {"name": "avit"}
    with pytest.raises(ValueError, match="the rule is avit and gate_scale is null"):
        AViTConfig.from_json(parts)


def test_a_rule_as_text() -> None:
    assert parse_rule(" avit(gate_scale=10, gate_center=-3e1) ") == AViTGate(10.0, -30.0)
    assert parse_rule("confidence(threshold=0.9, own_heads=True)") == ConfidenceExit(0.9, own_heads=True)
    assert parse_rule("tome(r=8)") == ToMe(8) and parse_rule("tome(r=(2, 1))") == ToMe((2, 1)) == parse_rule(
        "tome(r=[2, 1])"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("avit", "the rule avit lacks the field gate_scale"),
        ("avit(10, 30)", r"'avit\(10, 30\)' is not a rule: write NAME\(setting=value"),
        ("avit(**{})", "is not a rule"),
        ("avit(gate_scale=open('x'))", "is not a rule"),
        ("avit(name='tome')", "is not a rule"),
        ("avit(gate_scale=1", "is not a rule"),
        ("a.b(c=1)", "is not a rule"),
        ("", "'' is not a rule"),
        ("-" * 900 + "1", "is not a rule"),
        ("(" * 900, "is not a rule"),
        ("-" * 9900 + "1", "is not a rule"),
        ("(" * 9900, "is not a rule"),
        (f"tome(r={'[' * 4900}{']' * 4900})", "is not a rule"),
        (f"tome(r={'1+' * 4900}1)", "is not a rule"),
        ("a" * 10_001, "a rule of 10001 characters is too long"),
        ("halt(x=1)", f"there is no rule 'halt': known are {', '.join(sorted(RULES))}"),
        ("avit(gate_scale=1, gate_center=2, gate=3)", "the rule avit has no field 'gate'"),
    ],
)
def test_text_that_is_no_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rule(text)


def test_every_rule_is_a_frozen_dataclass_that_json_gives_back() -> None:
    for name, kind in RULES.items():
        assert kind.name == name and dataclasses.is_dataclass(kind)
    for rule in (AViTGate(4.0, 1.0), ConfidenceExit(0.5, own_heads=True), ToMe(3), ToMe((1, 0, 2), proportional=False)):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule


@pytest.mark.parametrize(("base", "member"), [(Halting, "advance"), (Reduction, "counts"), (Reduction, "describe")])
def test_a_rule_without_a_member_that_has_no_default(base: Any, member: str) -> None:
    with pytest.raises(TypeError, match=f"abstract .*{member}"):
        type("Unfinished", (base,), {})()


@pytest.mark.parametrize("depth", [1, 4])
def test_every_neutral_rule_fits_a_model_of_any_depth(depth: int) -> None:
    neutral = [kind(**kind.neutral) for kind in RULES.values() if kind.neutral is not None]
    assert len(neutral) > 8
    for rule in neutral:
        assert small_config(**NO_GATE, depth=depth, rule=rule).rule_in_force == rule


@pytest.mark.parametrize("rule", [ConfidenceExit(0.5, first_layer=1), ToMe((1, 0, 2, 0)), DynamicViT(0.7, (1, 2))])
def test_a_rule_goes_through_config_json_and_wins_over_the_gate(rule: Any) -> None:
    config = small_config(rule=rule)
    assert through_json(config) == config
    assert rule in (config.halting, config.reduction) and config.halts == isinstance(rule, ConfidenceExit)
