"""PonderNet: against slow loops over images and layers, its identities, its losses and its executions."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

import avit_jax
from avit_jax import AViT, PonderNet
from avit_jax.halting.pondernet import PonderNetLoss, log_exit_probabilities, log_geometric
from avit_jax.halting.rule import State
from avit_jax.model.config import NO_RULE
from avit_jax.model.seen import Seen, of_tokens
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from avit_jax.train.objective import distillation_loss, objective_terms
from tests.harness.arrays import read_npz
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.every_layer import head_logits, tokens_of_layers
from tests.harness.two_steps import two_steps

RECORDED = read_npz(Path(__file__).parent / "data/methods/ponder-leftover.npz")
COUNT = 9
RULE = PonderNet(0.3)
PACKED: dict[str, Any] = {"execution": "packed"}
WITHOUT_EXIT: dict[str, Any] = PACKED | {"image_exit": False}


def pictures(model: AViT, count: int = COUNT) -> np.ndarray:
    shape = (count, *model.config.image_shape, model.config.in_channels)
    return 2 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pondering(rule: Any = RULE, **fields: Any) -> AViT:
    """A model whose images leave at different layers; its unit reads all channels."""
    model = spread_gate(small_config(**NO_RULE | {"depth": 5, "rule": rule} | fields))
    model.rule_module.kernel[...] = 0.5 * jax.random.normal(jax.random.key(3), model.rule_module.kernel.shape)
    return model


def slow(model: AViT, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p [images, layers] and the logits of every layer [images, layers, heads, classes], one coin after another."""
    layers = tokens_of_layers(model, images)
    u, b = (np.asarray(param[...], np.float64) for param in (model.rule_module.kernel, model.rule_module.bias))
    p = np.zeros((len(images), len(layers)))
    for image in range(len(images)):
        there = 1.0
        for layer in range(len(layers)):
            leaves = 1 / (1 + math.exp(-(layers[layer, image, 0] @ u + b))) if layer < len(layers) - 1 else 1.0
            p[image, layer] = there * leaves
            there *= 1 - leaves
    said = [[head_logits(model, layers[layer, image]) for layer in range(len(layers))] for image in range(len(images))]
    return p, np.array(said)


@pytest.mark.parametrize(
    ("fields", "execution"),
    [
        ({}, PACKED),
        ({"distilled": True}, WITHOUT_EXIT),
        ({"pool": "mean_norm"}, PACKED),
        ({"num_registers": 2}, WITHOUT_EXIT),
    ],
    ids=["class token", "distilled", "mean", "registers"],
)
def test_agrees_with_a_slow_loop_and_packed_execution_too(fields: dict[str, Any], execution: dict[str, Any]) -> None:
    model = pondering(**fields)
    images = pictures(model)
    p, said = slow(model, images)
    np.testing.assert_allclose(p.sum(1), 1)
    depth = 1 + (np.cumsum(p, 1) >= 0.5).argmax(1)
    assert len(set(depth)) >= 3, f"the sample must spread over the layers: {depth}"
    output = answers(model, images)
    np.testing.assert_array_equal(output.token_depth, np.repeat(depth[:, None], model.config.num_tokens, 1))
    expected = said[np.arange(COUNT), depth - 1].swapaxes(0, 1)
    np.testing.assert_allclose(output.head_logits, expected, atol=1e-5)
    np.testing.assert_allclose(output.logits, expected.mean(0), atol=1e-5)
    np.testing.assert_array_equal(output.ponder_cost, output.token_depth + 1)
    assert_executions_agree(model, images, execution)
    macs = model.config.halting.extra_macs(model.config, jnp.asarray(output.token_depth))
    np.testing.assert_array_equal(macs, 16 * np.minimum(depth, 4))


def assert_executions_agree(model: AViT, images: np.ndarray, *executions: dict[str, Any]) -> None:
    output = answers(model, images)
    for execution in executions:
        program = avit_jax.compile(model, COUNT + 2, **execution)(images)
        np.testing.assert_array_equal(program.token_depth, output.token_depth)
        np.testing.assert_allclose(program.head_logits, output.head_logits, atol=1e-5)


def test_sampled_exits_are_the_same_in_every_execution_and_batch() -> None:
    model = pondering(PonderNet(0.3, sampled=True))
    images = pictures(model)
    together = answers(model, images)
    depth = np.asarray(together.token_depth[:, 0])
    assert len(set(depth)) >= 3 and not np.array_equal(depth, answers(pondering(), images).token_depth[:, 0])
    _, said = slow(model, images)
    np.testing.assert_allclose(together.logits, said[np.arange(COUNT), depth - 1, 0], atol=1e-5)
    assert_executions_agree(model, images, {"execution": "masked"}, PACKED, WITHOUT_EXIT)
    backwards = answers(model, images[::-1])
    np.testing.assert_array_equal(backwards.token_depth[::-1], together.token_depth)
    np.testing.assert_allclose(backwards.logits[::-1], together.logits, atol=1e-5)
    for image in range(0, COUNT, 4):
        alone = answers(model, images[image : image + 1])
        np.testing.assert_array_equal(alone.token_depth[0], together.token_depth[image])
        np.testing.assert_allclose(alone.logits[0], together.logits[image], atol=1e-5)


def test_an_images_logits_do_not_depend_on_its_batch() -> None:
    model = pondering()
    images = pictures(model)
    together = answers(model, images)
    for image in range(0, COUNT, 4):
        alone = answers(model, images[image : image + 1])
        np.testing.assert_allclose(alone.logits[0], together.logits[image], atol=1e-5)


def depths(rule: PonderNet, lambda_logit: np.ndarray, draw: Any = None) -> np.ndarray:
    """How many layers each image takes, from logit(lambda) [layers, images], without a model."""
    config = small_config(rule=rule)
    state: State = rule.initial(lambda_logit.shape[1], config, draw)
    logits = jnp.zeros((1, lambda_logit.shape[1], 5))
    for layer, row in enumerate(lambda_logit):
        tokens = jnp.broadcast_to(jnp.asarray(row, jnp.float32)[:, None, None], (len(row), 7, 16))
        seen = Seen(logits=logits, **of_tokens(tokens, 1))
        last = layer == len(lambda_logit) - 1
        state, _ = rule.advance(state, seen, layer=layer, is_last=last, module=lambda tokens: tokens[:, 0])
    assert not np.any(state.active)
    return np.asarray(state.token_depth[:, 0])


def test_sampled_exits_have_the_law_of_coins() -> None:
    count, lambdas = 20_000, np.array([0.1, 0.3, 0.05, 0.6, 0.2, 0.0])
    logits = np.repeat(scipy.special.logit(np.maximum(lambdas, 1e-3))[:, None], count, 1)
    keys = jax.random.split(jax.random.key(0), count)
    found = np.bincount(depths(PonderNet(sampled=True), logits, keys), minlength=7)[1:] / count
    p = [lam * np.prod(1 - lambdas[:layer]) for layer, lam in enumerate([*lambdas[:-1], 1.0])]
    np.testing.assert_allclose(found, p, atol=4 * 0.5 / math.sqrt(count))
    assert np.abs(found - np.mean(p)).max() > 0.05, "a law that a uniform draw of layers would not have"


@pytest.mark.parametrize(
    ("threshold", "logits", "layers"),
    [
        (0.0, [-50.0] * 6, 1),
        (1.0, [0.0] * 6, 6),
        (1.0, [0.0, 200.0, 0.0, 0.0, 0.0, 0.0], 2),  # nothing is left after it, so p is 0 from there on
        (0.5, [-3.0] * 6, 6),
        (0.7, [0.0] * 6, 2),
        (0.8, [0.0] * 6, 3),
    ],
)
def test_the_exit_is_the_first_layer_where_p_adds_up(threshold: float, logits: list[float], layers: int) -> None:
    assert depths(PonderNet(threshold=threshold), np.array(logits)[:, None]).tolist() == [layers]


def test_p_is_that_of_the_published_code() -> None:
    lambdas = RECORDED["lam"].astype(np.float64)
    last = np.array([[7.0] * lambdas.shape[1]])  # of no effect: lambda is 1 there
    logits = np.concatenate([scipy.special.logit(lambdas[:-1]), last])
    p = np.exp(log_exit_probabilities(jnp.asarray(logits, jnp.float32)))
    np.testing.assert_allclose(p, RECORDED["p"], atol=1e-6)
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-6)
    # The published regularisation has the other direction, clips p, does not truncate p_G, and divides by layers.
    prior = 0.1 * 0.9 ** np.arange(12)
    prior[:-1] = np.exp(log_geometric(0.1, 12))[:-1]
    published = (prior[:, None] * (np.log(prior)[:, None] - np.log(np.clip(p, 0.01, 0.99)))).sum() / 12
    np.testing.assert_allclose(published, RECORDED["official_regularization"], atol=1e-6)


@pytest.mark.parametrize(("lambda_p", "mean"), [(0.02, 10.8), (0.1, 7.2), (0.2, 4.7), (1e-9, 12.0), (1 - 1e-9, 1.0)])
def test_a_constant_lambda_is_the_truncated_geometric_law(lambda_p: float, mean: float) -> None:
    prior = np.exp(log_geometric(lambda_p, 12))
    np.testing.assert_allclose(prior.sum(), 1, atol=1e-6)
    assert (prior * np.arange(1, 13)).sum() == pytest.approx(mean, abs=0.05)
    constant = jnp.full((12, 2), scipy.special.logit(lambda_p))
    np.testing.assert_allclose(np.exp(log_exit_probabilities(constant)), np.repeat(prior[:, None], 2, 1), atol=1e-6)


def test_a_new_unit_leaves_with_the_law_of_the_prior() -> None:
    model = AViT(small_config(rule=PonderNet(0.2)), rngs=nnx.Rngs(0))
    unit = model.rule_module
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(unit))) == 16 + 1
    tokens = jax.random.normal(jax.random.key(0), (3, 16))
    np.testing.assert_allclose(jax.nn.sigmoid(unit(tokens)), 0.2, rtol=1e-6)


def terms_of(model: AViT, images: np.ndarray, weight: Any) -> Any:
    """The terms of the objective, and the gradient of their sum."""
    return _terms(*nnx.split(model), images, weight)


@functools.partial(jax.jit, static_argnums=0)
def _terms(graphdef: nnx.GraphDef, params: nnx.State, images: jax.Array, weight: Any) -> Any:
    labels = jnp.arange(len(images)) % 5

    def classify(logits: jax.Array, share: jax.Array | None = None) -> jax.Array:
        return distillation_loss(logits, labels, image_weight=weight, share=share)

    def total(params: nnx.State) -> Any:
        model = nnx.merge(graphdef, params)
        output, trace, state = model.forward(images, jax.random.key(0))
        terms = objective_terms(
            model.config.halting, output.head_logits, trace, state, classify, PonderNetLoss(0.25), image_weight=weight
        )
        return sum(terms.values()), terms

    gradient, terms = jax.grad(total, has_aux=True)(params)
    return terms, gradient


@pytest.mark.parametrize(
    ("rule", "distilled"),
    [(RULE, False), (PonderNet(0.3, threshold=0.0), True), (PonderNet(0.3, sampled=True), False)],
)
def test_the_loss_is_that_of_the_slow_loop(rule: PonderNet, distilled: bool) -> None:
    """All layers count, wherever the images would leave."""
    model = pondering(rule, distilled=distilled)
    images = pictures(model)
    terms, _ = terms_of(model, images, jnp.array([1.0] * 6 + [0.0] * 3))
    p, said = slow(model, images)
    prior = [0.3, 0.3 * 0.7, 0.3 * 0.7**2, 0.3 * 0.7**3, 0.7**4]
    classification, divergence = 0.0, 0.0
    for image in range(6):
        for layer in range(5):
            entropy = -scipy.special.log_softmax(said[image, layer].mean(0))[image % 5]
            classification += p[image, layer] * entropy / 6
            divergence += p[image, layer] * math.log(p[image, layer] / prior[layer]) / 6
    assert terms.keys() == {"classification", "geometric"}
    np.testing.assert_allclose(terms["classification"], classification, rtol=1e-5)
    np.testing.assert_allclose(terms["geometric"], 0.25 * divergence, rtol=1e-4)


@pytest.mark.parametrize(
    ("lambda_p", "bias"), [(0.1, 1e4), (0.1, -1e4), (1e-30, 0.0), (1 - 1e-16, 0.0), (1e-30, 1e4), (1 - 1e-16, -1e4)]
)
def test_gradients_are_finite_at_extreme_settings(lambda_p: float, bias: float) -> None:
    model = pondering(PonderNet(lambda_p))
    model.rule_module.bias[...] = jnp.asarray(bias)
    terms, gradient = terms_of(model, pictures(model), None)
    assert all(np.isfinite(term) for term in terms.values())
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.isfinite(leaf[...]).all(), path


def test_every_parameter_learns() -> None:
    model = pondering()
    _, gradient = terms_of(model, pictures(model), jnp.ones(COUNT))
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.abs(leaf[...]).max() > 0, path


def test_two_training_steps_follow_the_prior(tmp_path: Path) -> None:
    metrics, before, after = two_steps(tmp_path, "pondernet(lambda_p=0.3)", geometric_weight=0.5)
    assert all({"classification", "geometric"} <= step.keys() for step in metrics)
    np.testing.assert_allclose(metrics[0]["geometric"], 0, atol=1e-6)  # the unit starts at the prior
    np.testing.assert_allclose(before["rule_module"]["bias"], math.log(0.3 / 0.7), rtol=1e-6)
    assert not before["rule_module"]["kernel"].any() and np.abs(after["rule_module"]["kernel"]).min() > 0
    assert metrics[1]["geometric"] > 0 and metrics[1]["loss"] < metrics[0]["loss"] + 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_levels_are_thresholds_from_one_layer_to_all_of_them() -> None:
    model = pondering()
    images = pictures(model)
    at = model.config.halting.levels(model, images)
    found = [answers(model.with_config(rule=at(level)), images).token_depth for level in (0.0, 0.3, 0.6, 1.0)]
    found = [float(np.asarray(depth).mean()) for depth in found]
    assert found[0] == 1 and found == sorted(set(found)) and found[-1] == 5
    np.testing.assert_array_equal(
        model.with_config(rule=at(0.3)).rule_module.kernel[...], model.rule_module.kernel[...]
    )
    with pytest.raises(ValueError, match=r"sampled exits have no threshold to choose: give PonderNet\(sampled=False\)"):
        PonderNet(sampled=True).levels(model, images)


def test_the_unit_is_saved_and_loaded(tmp_path: Path) -> None:
    model = pondering()
    images = pictures(model)
    avit_jax.save(model, tmp_path / "pondering")
    loaded = avit_jax.load(tmp_path / "pondering")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded.rule_module.kernel[...], model.rule_module.kernel[...])
    np.testing.assert_array_equal(answers(loaded, images).logits, answers(model, images).logits)
    later = avit_jax.load(tmp_path / "pondering", rule=PonderNet(0.3, threshold=1.0))
    np.testing.assert_array_equal(answers(later, images).token_depth, 5)
    assert avit_jax.load(tmp_path / "pondering", rule=None).rule_module is None


def test_its_text_and_its_json() -> None:
    rule = PonderNet(0.2, 0.75, sampled=True)
    assert parse_rule("pondernet(lambda_p=0.2, threshold=0.75, sampled=True)") == rule
    assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    given = checked(lambda_p=np.float32(0.5), threshold=np.int64(1))
    assert json.loads(json.dumps(rule_to_json(given))) == rule_to_json(PonderNet(0.5, 1.0))
    assert rule.describe() == "PonderNet, prior 0.2, sampled"
    assert PonderNet().describe() == "PonderNet, prior 0.1, exit at 0.5"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambda_p": 0.0}, "lambda_p is 0.0: it must be a number above 0 and below 1"),
        ({"lambda_p": 1}, "lambda_p is 1: it must be a number above 0"),
        ({"lambda_p": float("nan")}, "lambda_p is nan: it must be"),
        ({"lambda_p": True}, "lambda_p is True: it must be a number"),
        ({"threshold": 1.5}, "threshold is 1.5: it must be a number from 0 to 1"),
        ({"threshold": "0.5"}, "threshold is '0.5': it must be a number"),
        ({"sampled": 1}, "sampled is 1: give True or False"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(**fields)


def test_a_model_without_a_class_token_or_head_is_refused() -> None:
    with pytest.raises(ValueError, match="PonderNet reads the class token and the model has none"):
        small_config(rule=PonderNet(), class_token=False, pool="mean_norm")
    with pytest.raises(ValueError, match="PonderNet needs class logits and num_classes is 0"):
        small_config(rule=PonderNet(), num_classes=0)


def checked(**fields: Any) -> PonderNet:
    """The rule after its own checks; the tests' type check of the constructor would come before them."""
    rule = object.__new__(PonderNet)
    for name, value in ({"lambda_p": 0.1, "threshold": 0.5, "sampled": False} | fields).items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule
