"""ACT for a whole image: against a slow loop over images and layers, its identities, losses and executions."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import ACT, AViT
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.avit_losses import AViTLoss
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from avit_jax.train.objective import distillation_loss, objective_terms
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.every_layer import head_logits, tokens_of_layers
from tests.harness.two_steps import two_steps

COUNT = 9
SPREAD = ACT(gate_scale=1.5, gate_center=1.0)  # images of `pictures` stop after different layers


def pictures(model: AViT, count: int = COUNT) -> np.ndarray:
    shape = (count, *model.config.image_shape, model.config.in_channels)
    return 2 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def acting(rule: Any = SPREAD, **fields: Any) -> AViT:
    return spread_gate(small_config(**NO_RULE | {"depth": 5, "rule": rule} | fields))


def slow(model: AViT, images: np.ndarray) -> list[dict[str, Any]]:
    """Each image alone, layer by layer in float64, straight from the equations."""
    rule, layers = model.config.halting, tokens_of_layers(model, images)
    found = []
    for image in range(len(images)):
        total, value, scores = 0.0, 0.0, []
        for layer in range(len(layers)):
            tokens = layers[layer, image]
            score = 1 / (1 + math.exp(rule.gate_center - rule.gate_scale * tokens[:, 0].mean()))
            scores.append(score)
            if layer == len(layers) - 1 or total + score >= 1 - rule.halt_epsilon:
                value = value + (1 - total) * tokens
                break
            value = value + score * tokens
            total += score
        found.append({"depth": len(scores), "remainder": 1 - total, "scores": scores, "value": value})
    return found


@pytest.mark.parametrize(
    ("fields", "executions"),
    [
        ({}, (("masked", True), ("packed", True), ("packed", False))),
        ({"distilled": True}, (("packed", True),)),
        ({"pool": "mean_norm"}, (("packed", False),)),
        ({"num_registers": 2}, (("packed", True),)),
    ],
    ids=["class token", "distilled", "mean", "registers"],
)
def test_agrees_with_a_slow_loop_and_packed_execution_too(fields: dict[str, Any], executions: Any) -> None:
    model = acting(**fields)
    images = pictures(model)
    expected = slow(model, images)
    depth = np.array([image["depth"] for image in expected])
    assert len(set(depth)) >= 3, f"the sample must spread over the layers: {depth}"
    output = answers(model, images)
    np.testing.assert_array_equal(output.token_depth, np.repeat(depth[:, None], model.config.num_tokens, 1))
    said = np.stack([head_logits(model, image["value"]) for image in expected], 1)
    np.testing.assert_allclose(output.head_logits, said, atol=1e-5)
    np.testing.assert_allclose(output.logits, said.mean(0), atol=1e-5)
    for image, slowly in enumerate(expected):
        np.testing.assert_allclose(output.ponder_cost[image], slowly["depth"] + slowly["remainder"], atol=1e-5)
        scores = np.zeros(model.config.depth)
        scores[: slowly["depth"]] = slowly["scores"]
        scores[-1] = 0
        same = np.repeat(scores[:, None], model.config.num_tokens, 1)
        np.testing.assert_allclose(output.halting_scores[:, image], same, atol=1e-5)
    for execution, image_exit in executions:
        program = avit_jax.compile(model, COUNT + 2, execution=execution, image_exit=image_exit)(images)
        np.testing.assert_array_equal(program.token_depth, output.token_depth)
        np.testing.assert_allclose(program.head_logits, output.head_logits, atol=1e-5)
        np.testing.assert_allclose(program.ponder_cost, output.ponder_cost, atol=1e-5)
        np.testing.assert_allclose(program.halting_scores, output.halting_scores, atol=1e-5)


def test_without_halts_it_is_the_static_model_and_with_the_first_halt_its_first_layer() -> None:
    model = acting()
    images = pictures(model)
    never = answers(model.with_config(rule=ACT(gate_center=1e6)), images)
    np.testing.assert_array_equal(never.token_depth, model.config.depth)
    np.testing.assert_array_equal(never.ponder_cost, model.config.depth + 1)
    np.testing.assert_allclose(never.logits, answers(model.with_config(**NO_RULE), images).logits, atol=1e-6)
    at_once = answers(model.with_config(rule=ACT(gate_center=-1e6)), images)
    np.testing.assert_array_equal(at_once.token_depth, 1)
    np.testing.assert_array_equal(at_once.ponder_cost, 2)
    first = tokens_of_layers(model, images)[0]
    np.testing.assert_allclose(at_once.logits, [head_logits(model, tokens)[0] for tokens in first], atol=1e-5)


def test_an_images_logits_do_not_depend_on_its_batch() -> None:
    model = acting()
    images = pictures(model)
    together = answers(model, images)
    for image in range(0, COUNT, 4):
        alone = answers(model, images[image : image + 1])
        np.testing.assert_allclose(alone.logits[0], together.logits[image], atol=1e-5)
        np.testing.assert_array_equal(alone.token_depth[0], together.token_depth[image])


def terms_of(model: AViT, images: np.ndarray, settings: AViTLoss, weight: jax.Array | None) -> Any:
    """The terms of the objective, and the gradient of their sum."""
    graphdef, params = nnx.split(model)
    labels = jnp.arange(len(images)) % 5

    def total(params: nnx.State) -> Any:
        output, trace, state = nnx.merge(graphdef, params).forward(images, jax.random.key(0))
        classify = lambda logits: distillation_loss(logits, labels, image_weight=weight)  # noqa: E731
        terms = objective_terms(
            model.config.halting, output.head_logits, trace, state, classify, settings, image_weight=weight
        )
        return sum(terms.values()), terms

    gradient, terms = jax.jit(jax.grad(total, has_aux=True))(params)
    return terms, gradient


def test_the_loss_is_that_of_the_slow_loop() -> None:
    model = acting()
    images, settings = pictures(model), AViTLoss(ponder_weight=0.3, prior_weight=0.7, prior_target_depth=2.5)
    terms, _ = terms_of(model, images, settings, jnp.array([1.0] * 6 + [0.0] * 3))
    expected = slow(model, images)[:6]
    cost = np.mean([image["depth"] + image["remainder"] for image in expected])
    np.testing.assert_allclose(terms["ponder"], 0.3 * cost, rtol=1e-5)
    by_layer = np.mean([image["scores"] + [0.0] * (5 - image["depth"]) for image in expected], 0)
    assert by_layer[-1] > 0, "an image must score in the last layer"
    target = np.exp(-((np.arange(1, 6) - 2.5) ** 2) / 2)
    q, p = by_layer / by_layer.sum(), target / target.sum()
    np.testing.assert_allclose(terms["prior"], 0.7 * (q * np.log(q / p)).sum(), rtol=1e-4)
    logits = np.stack([head_logits(model, image["value"])[0] for image in expected])
    entropy = [math.log(np.exp(row).sum()) - row[image % 5] for image, row in enumerate(logits)]
    np.testing.assert_allclose(terms["classification"], np.mean(entropy), rtol=1e-5)


@pytest.mark.parametrize("rule", [SPREAD, ACT(gate_center=1e6), ACT(gate_center=-1e6), ACT(1e6, 0.0)])
def test_gradients_are_finite_at_extreme_settings(rule: ACT) -> None:
    model = acting(rule)
    _, gradient = terms_of(model, pictures(model), AViTLoss(0.3, 0.7), None)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.isfinite(leaf[...]).all(), path


def test_two_training_steps_follow_the_ponder_cost(tmp_path: Path) -> None:
    metrics, before, after = two_steps(tmp_path, "act(gate_scale=4, gate_center=2)", ponder_weight=50.0)
    assert all({"classification", "ponder", "prior"} <= step.keys() for step in metrics)
    assert metrics[1]["ponder"] < metrics[0]["ponder"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert jax.tree.structure(before) == jax.tree.structure(after) and "rule_module" not in after


@pytest.mark.parametrize("rule", [SPREAD, AViTGate(4.0, 1.0)])
def test_levels_go_from_one_layer_to_all_of_them(rule: Any) -> None:
    model = acting(rule)
    images = pictures(model)
    at = rule.levels(model, images)
    assert at(0.5) == rule and type(at(0.3)) is type(rule)
    assert at(0.75).gate_center == pytest.approx(rule.gate_center + 4 * math.log(3))
    levels = (0.0, 1e-12, 0.2, 0.4, 0.5, 0.6, 0.8, 1 - 1e-12, 1.0)
    assert all(json.loads(json.dumps(rule_to_json(at(level)))) == rule_to_json(at(level)) for level in levels)
    depths = [
        answers(model.with_config(rule=at(level)), images).token_depth for level in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]
    depths = [float(np.asarray(depth).mean()) for depth in depths]
    assert depths[0] == 1 and depths[-1] == model.config.depth
    assert all(a <= b for a, b in itertools.pairwise(depths)) and len(set(depths)) >= 4, depths


def test_a_model_with_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model = acting()
    avit_jax.save(model, tmp_path / "act")
    loaded = avit_jax.load(tmp_path / "act")
    assert loaded.config == model.config and loaded.config.halting == SPREAD
    images = pictures(model)
    np.testing.assert_array_equal(answers(loaded, images).logits, answers(model, images).logits)


def test_its_text_and_its_json() -> None:
    assert parse_rule("act") == ACT() == ACT(5.0, 10.0, 0.01) and parse_rule("act(gate_center=3)") == ACT(5.0, 3.0)
    assert rule_from_json(json.loads(json.dumps(rule_to_json(SPREAD)))) == SPREAD
    rule = checked(gate_scale=np.float32(0.5), gate_center=np.int64(3), halt_epsilon=np.float64(0.25))
    assert json.loads(json.dumps(rule_to_json(rule))) == rule_to_json(ACT(0.5, 3.0, 0.25))
    assert ACT(2.0, 3.0).describe() == "ACT, gate 2 / 3"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate_scale": "1"}, "gate_scale is '1': it must be a number from"),
        ({"gate_center": True}, "gate_center is True: it must be a number from"),
        ({"gate_center": float("inf")}, "gate_center is inf: it must be a number from"),
        ({"halt_epsilon": None}, "halt_epsilon is None: it must be a number from"),
        ({"halt_epsilon": 0.0}, "halt_epsilon is 0.0: it must lie between 0 and 1"),
        ({"halt_epsilon": 1}, "halt_epsilon is 1.0: it must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(**{"gate_scale": 1.0, "gate_center": 1.0, "halt_epsilon": 0.01} | fields)


def checked(**fields: Any) -> ACT:
    """The rule after its own checks; the tests' type check of the constructor would come before them."""
    rule = object.__new__(ACT)
    for name, value in fields.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule
