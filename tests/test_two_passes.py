"""MCTF's training: a second pass that merges fewer tokens, and the terms that compare both."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import avit_jax
from avit_jax import MCTF, AViT
from avit_jax.commands.dry_run import dry_run
from avit_jax.commands.run import run
from avit_jax.commands.typed_config import parse
from avit_jax.execution import shrinking
from avit_jax.model.config import NO_RULE
from avit_jax.model.random_patches import draw_positions
from avit_jax.reduction.groups import Pass
from avit_jax.reduction.two_passes import MCTFLoss, agreement, lighter_merges, pair_losses
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train.second_pass import both_passes
from avit_jax.train.state import initial_state
from avit_jax.train.step import make_train_step
from configs import npz_avit
from tests.harness.builders import small_config, spread_gate, tiny_experiment

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 20, 20, 2)).astype(np.float32)
LABELS = jnp.array([0, 2, 1])


def dense(**fields: Any) -> AViT:
    """25 patches and a class token, two layers, no rule."""
    return spread_gate(small_config(**({"image_size": 20, "depth": 2} | NO_RULE | fields)))


def some_passes(heads: int = 2) -> tuple[Pass, Pass]:
    """Two passes over three images. The first is sure of images 0 and 2 alone."""
    logits = np.zeros((heads, 3, 4), np.float32)
    logits[:, 0, 0] = logits[:, 1, 3] = logits[:, 2, 1] = 2.0
    features = RNG.normal(size=(2, heads, 3, 5)).astype(np.float32)
    first, second = (Pass(jnp.asarray(logits + i), jnp.asarray(features[i])) for i in range(2))
    return first, second


def test_the_second_pass_merges_as_published_where_the_first_merges_16() -> None:
    assert lighter_merges((16,) * 3, MCTFLoss()) == [(r,) * 3 for r in range(8)]


@pytest.mark.parametrize("merges", [(3,), (1, 0, 2), (2, 3, 2, 3, 3, 2, 3, 3, 2, 3, 3), (98, 49, 24)])
def test_the_second_pass_never_merges_more(merges: tuple[int, ...]) -> None:
    """In sum up to 7/16 of the first pass's, and growing; after no layer more than the first pass has merged."""
    found = lighter_merges(merges, MCTFLoss())
    sums = np.array([np.cumsum(lighter) for lighter in found])
    assert not sums[0].any() and (np.diff(sums, axis=0) >= 0).all()
    assert sums[7, -1] == 7 * sum(merges) // 16 and (sums <= 7 / 16 * np.cumsum(merges)).all()


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 3.0), (0.0, 0.0)])
def test_both_weights_0_and_nothing_to_merge_mean_a_single_pass(weights: tuple[float, float]) -> None:
    settings = MCTFLoss(*weights)
    assert (MCTF(3).second_pass(small_config(image_size=20), settings) is not None) == any(weights)
    assert MCTF(0).second_pass(small_config(image_size=20), settings) is None
    assert MCTF(3).second_pass(small_config(), settings) is None, "below 10 tokens nothing merges"
    assert avit_jax.ToMe(3).second_pass(small_config(), None) is None


@pytest.mark.parametrize("rule", [MCTF(4), MCTF(0.3, (1, 3)), MCTF((6, 0, 5)), MCTF(10**6)])
def test_second_passes_fit_the_model(rule: MCTF) -> None:
    config = small_config(image_size=20)
    found = rule.second_pass(config, MCTFLoss())
    assert found is not None and len(found.rules) == 8 and found.rules[0].counts(config) == (26,) * 4
    for second in found.rules:
        assert isinstance(second, MCTF) and second.layers == rule.layers
        assert all(ours >= first for ours, first in zip(second.counts(config), rule.counts(config), strict=True))


@pytest.mark.parametrize("weight", [None, (1.0, 1.0, 0.0), (0.0, 1.0, 1.0), (0.0, 1.0, 0.0)])
def test_agreement(weight: tuple[float, ...] | None) -> None:
    """The mean over channels, heads and the sure images that count; labels have 0.71, 0.10 and 0.71 of probability."""
    first, second = some_passes()
    counts = np.array([1, 0, 1]) * (np.ones(3) if weight is None else np.array(weight))
    squares = np.square(np.asarray(first.features) - np.asarray(second.features)).mean((0, 2))
    expected = (counts * squares).sum() / max(counts.sum(), 1)
    found = agreement(first, second, LABELS, None if weight is None else jnp.array(weight))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_only_the_first_passs_features_learn_from_the_agreement() -> None:
    first, second = some_passes()
    of_first, of_second = jax.grad(agreement, (0, 1))(first, second, LABELS)
    expected = np.asarray(first.features - second.features) * np.array([1, 0, 1])[:, None] * 2 / (2 * 2 * 5)
    np.testing.assert_allclose(of_first.features, expected, rtol=1e-5, atol=1e-8)
    assert not any(np.any(leaf) for leaf in (of_first.head_logits, of_second.head_logits, of_second.features))


def test_the_three_terms() -> None:
    first, second = some_passes()

    def classify(head_logits: jax.Array, share: Any = None) -> jax.Array:
        return head_logits.sum()

    found = pair_losses(first, second, labels=LABELS, classify=classify, settings=MCTFLoss(0.5, 2.0))
    assert list(found) == ["classification", "second_pass", "agreement"]
    np.testing.assert_allclose(found["classification"], first.head_logits.sum())
    np.testing.assert_allclose(found["second_pass"], 0.5 * second.head_logits.sum())
    np.testing.assert_allclose(found["agreement"], 2 * agreement(first, second, LABELS), rtol=1e-6)


@pytest.mark.parametrize(
    "fields", [{}, {"distilled": True}, {"pool": "norm_mean", "class_token": False}, {"pool": "mean_norm"}]
)
def test_the_passes_are_those_of_the_models(fields: dict[str, Any]) -> None:
    """The second pass against a plain ViT, and features against logits: a head's logits are linear in what it reads."""
    model = dense(rule=MCTF(9), **fields)
    output, first, second = jax.jit(lambda key: both_passes(model, (MCTF(0),), jnp.asarray(IMAGES), key))(
        jax.random.key(0)
    )
    np.testing.assert_allclose(first.head_logits, model(IMAGES).head_logits, atol=1e-6)
    np.testing.assert_array_equal(output.head_logits, first.head_logits)
    np.testing.assert_allclose(second.head_logits, model.with_config(rule=None)(IMAGES).head_logits, atol=1e-6)
    for heads in (first, second):
        np.testing.assert_allclose(heads.head_logits[0], model.head(heads.features[0]), atol=1e-6)
        if model.config.distilled:
            np.testing.assert_allclose(heads.head_logits[1], model.head_dist(heads.features[1]), atol=1e-6)


def test_every_second_pass_is_drawn() -> None:
    """Three different ones among four, the first of them twice as often."""
    model, rules = dense(rule=MCTF(9)), (MCTF(0), MCTF(2), MCTF(0), MCTF(8))
    of_rule = [np.asarray(model.with_config(rule=rule)(IMAGES[:1]).logits) for rule in (MCTF(0), MCTF(2), MCTF(8))]
    draw = jax.jit(lambda key: both_passes(model, rules, jnp.asarray(IMAGES[:1]), key)[2].head_logits[0])
    drawn = [np.abs(np.array([draw(key) - logits for logits in of_rule])).max((1, 2)) for key in keys(60)]
    assert (np.min(drawn, axis=1) < 1e-6).all()
    counts = np.bincount(np.argmin(drawn, axis=1), minlength=3)
    assert 18 <= counts[0] <= 42 and (counts[1:] >= 5).all()


def test_each_pass_has_its_own_dropout_and_both_have_the_positions() -> None:
    model, images = dense(rule=MCTF(9), drop_rate=0.3, drop_path_rate=0.5), jnp.asarray(IMAGES)
    key, positions = keys(2)[1], draw_positions(keys(3), model.config)
    _, first, second = both_passes(model, (MCTF(9),), images, key, positions)
    own, *_ = shrinking.run(model, images, MCTF(9), key=key, positions=positions)
    np.testing.assert_array_equal(first.head_logits, own.head_logits)
    assert np.abs(second.head_logits - first.head_logits).max() > 1e-3
    still = model.with_config(drop_rate=0.0, drop_path_rate=0.0)
    _, _, second = both_passes(still, (MCTF(0),), images, key, positions)
    cut, *_ = shrinking.run(still, images, None, positions=positions)
    np.testing.assert_allclose(second.head_logits, cut.head_logits, atol=1e-6)
    assert np.abs(cut.head_logits - still.with_config(rule=None)(IMAGES).head_logits).max() > 1e-3


def test_the_gradient_is_that_of_the_two_models() -> None:
    """Both models' own outputs in one loss. Nothing stops the second pass's classification from being learnt from."""
    model, images = dense(rule=MCTF(9)), jnp.asarray(IMAGES)
    graphdef, params = nnx.split(model)
    losses = functools.partial(pair_losses, labels=LABELS, settings=MCTFLoss(1.0, 100.0))

    def classify(head_logits: jax.Array, share: Any = None) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(4 * head_logits.mean(0), LABELS).mean()

    def found(params: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return sum(losses(*both_passes(model, (MCTF(2),), images, keys(1)[0])[1:], classify=classify).values())

    def expected(params: Any) -> jax.Array:
        passes = []
        for rule in (MCTF(9), MCTF(2)):
            output, _, features = shrinking.run(nnx.merge(graphdef, params), images, rule)
            passes.append(Pass(output.head_logits, features))
        return classify(passes[0].head_logits) + classify(passes[1].head_logits) + 100 * agreement(*passes, LABELS)

    values = [jax.jit(jax.value_and_grad(loss))(params) for loss in (found, expected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *values)
    only_first = jax.jit(jax.grad(lambda params: classify(nnx.merge(graphdef, params)(IMAGES).head_logits)))(params)
    differences = jax.tree.map(lambda a, b: np.abs(a - b).max(), values[0][1], only_first)
    assert max(jax.tree.leaves(differences)) > 0.01


def keys(count: int) -> jax.Array:
    """The random keys of so many steps."""
    return jax.random.split(jax.random.key(1), count)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_training_step_adds_the_terms_up(parts: int) -> None:
    """Each against its definition on the models' own outputs; with r 1 the second pass has nothing to merge.

    The last image does not count. In two parts, the agreement is the mean of the parts'.
    """
    model = dense(rule=MCTF(1))
    model.head.kernel[...] *= 20  # so that it is sure of images
    arrays = nnx.to_pure_dict(jax.tree.map(jnp.copy, nnx.state(model)))  # the step takes the state's own
    images = np.concatenate([IMAGES, 2 * IMAGES[:1]])
    logits = {rule: model.with_config(rule=rule)(images).logits for rule in (MCTF(1), None)}
    labels = logits[MCTF(1)].argmax(-1).at[0].set(4)
    probability = np.asarray(jax.nn.softmax(logits[MCTF(1)]))[np.arange(4), labels]
    assert (probability > 0.4).tolist() == [False, True, True, True], "the test needs images of both kinds"
    features = {}
    for rule in logits:
        headless = dense(num_classes=0, rule=rule)
        state = nnx.state(headless)
        nnx.replace_by_pure_dict(state, {name: p for name, p in arrays.items() if name != "head"})
        nnx.update(headless, state)
        features[rule] = np.asarray(headless(images).logits)

    config = npz_avit.get_config("")
    config.teacher, config.accumulation, config.batch_size = "", parts, 4
    config.loss.update({"distillation": "none", "label_smoothing": 0.1, "agreement_weight": 5.0})
    mesh, optimizer = training_mesh(MeshSettings(), 4), optax.sgd(0.0)
    state = initial_state(model, optimizer, 0.0, mesh)
    step = make_train_step(nnx.graphdef(model), optimizer, parse(config).step, mesh, state)
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    _, metrics = step(state, {"image": jnp.asarray(images), "label": labels, "weight": weight}, None)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 5), 0.1)
    for name, rule in (("classification", MCTF(1)), ("second_pass", None)):
        expected = optax.softmax_cross_entropy(logits[rule], targets)[:3].mean()
        np.testing.assert_allclose(metrics[name], expected, rtol=1e-5, err_msg=name)
    squares = np.square(features[MCTF(1)] - features[None]).mean(1)
    # Parts take every second image: 0 and 2, of which only 2 is sure; 1 and 3, of which only 1 counts.
    expected = squares[1:3].mean() if parts == 1 else (2 * squares[2] + squares[1]) / 3
    np.testing.assert_allclose(metrics["agreement"], 5 * expected, rtol=1e-5)
    terms = ("classification", "second_pass", "agreement")
    np.testing.assert_allclose(metrics["loss"], sum(metrics[term] for term in terms), rtol=1e-6)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_a_run_with_a_second_pass(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    config.model.update({"gate_scale": None, "gate_center": None, "patch_size": 2, "rule": "mctf(r=3)"})
    assert any(line.startswith("step 2    loss") for line in dry_run(config))
    run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["split"] == "train"):
        terms = ("classification", "second_pass", "agreement")
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert avit_jax.load(tmp_path / "run" / "model").config.rule == MCTF(3)
