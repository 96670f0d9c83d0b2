"""calibrate: the work of what it returns by formulas written out here, what it keeps, and what it refuses."""

import re
from typing import Any

import numpy as np
import pytest

import avit_jax
from avit_jax import AViT, ConfidenceExit, ToMe, calibrate
from avit_jax.evaluate import budget
from avit_jax.halting.avit import AViTGate
from avit_jax.model.config import NO_RULE, AViTConfig
from tests.harness.builders import answers, small_config, spread_gate

COUNT = 60


def model_of(**fields: Any) -> AViT:
    """48 patches, 4 layers of width 16, random weights whose confidences spread."""
    model = spread_gate(small_config(**{"image_size": (32, 24)} | NO_RULE | fields))
    model.head.kernel[...] *= 3
    return model


def pictures(config: AViTConfig, count: int = COUNT) -> np.ndarray:
    shape = (count, *config.image_shape, config.in_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def share(config: AViTConfig, tokens: list[tuple[float, float]], heads: int) -> float:
    """Work of an image relative to all tokens in all layers: (tokens as keys, tokens in the MLP) of each layer.

    The last layer has one query and one token in the MLP. heads: how many class predictions are made.
    """
    d, m, n = config.embed_dim, config.mlp_dim, config.num_tokens
    patches = n - 1
    around = patches * config.patch_size**2 * config.in_channels * d
    head = d * config.num_classes
    total = 0.0
    for layer, (keys, after) in enumerate(tokens):
        last = layer == config.depth - 1
        queries, outs = (min(keys, 1.0), min(keys, 1.0)) if last else (keys, after)
        total += 2 * keys * d * d + 2 * queries * d * d + 2 * queries * keys * d + 2 * outs * d * m
    whole = config.depth * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    return (total + around + heads * head) / (whole + around + head)


@pytest.mark.parametrize("work", [0.7, 0.5])
def test_tome_meets_a_budget_without_running_an_image(work: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    monkeypatch.setattr(budget, "compile", None)
    rule = calibrate(model, pictures(model.config, 1), ToMe(r=3, proportional=False), work=work)
    assert not rule.proportional
    tokens, left = [], model.config.num_tokens
    for r in rule.r:
        after = left - min(r, (left - 1) // 2)
        tokens.append((left, after))
        left = after
    assert share(model.config, tokens, 1) == pytest.approx(work, rel=0.01)


def confidence_share(model: AViT, rule: ConfidenceExit, images: np.ndarray) -> float:
    depth = np.asarray(answers(model.with_config(rule=rule), images).token_depth)
    found = []
    for own in depth:
        assert len(set(own)) == 1
        tokens = [(float(len(own)) if layer < own[0] else 0.0,) * 2 for layer in range(model.config.depth)]
        found.append(share(model.config, tokens, max(own[0] - rule.first_layer, 1)))
    return float(np.mean(found))


@pytest.mark.parametrize("rule", [ConfidenceExit(0.5, first_layer=1), "confidence", ConfidenceExit])
def test_a_confidence_exit_meets_a_budget_on_the_images(rule: Any) -> None:
    model = model_of()
    images = pictures(model.config)
    found = calibrate(model, images, rule, work=0.75)
    assert found.first_layer == (1 if isinstance(rule, ConfidenceExit) else 0)
    assert confidence_share(model, found, images) == pytest.approx(0.75, rel=0.01)


@pytest.fixture(scope="module")
def started() -> AViT:
    """An A-ViT whose gate was started at 3 of 4 layers, and nothing trained."""
    model = model_of(gate_scale=4.0, gate_center=1.0)
    avit_jax.start_gate(model, pictures(model.config), target_depth=3.0)
    return model


@pytest.mark.parametrize("work", [pytest.param(0.7, marks=pytest.mark.slow), 0.5])
def test_a_vits_own_gate_meets_a_budget(started: AViT, work: float) -> None:
    images = pictures(started.config)
    rule = calibrate(started, images, started.config.halting, work=work)
    assert isinstance(rule, AViTGate) and rule.gate_scale == 4.0 and rule.gate_center != started.config.gate_center
    depth = np.asarray(answers(started.with_config(rule=rule), images).token_depth)
    assert len(np.unique(depth)) >= 3, "tokens stop at many layers"
    tokens = [[((own > layer).sum(),) * 2 for layer in range(4)] for own in depth]
    assert np.mean([share(started.config, each, 1) for each in tokens]) == pytest.approx(work, rel=0.01)


def test_few_programs_meet_several_budgets(started: AViT, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = budget.compile
    monkeypatch.setattr(budget, "compile", lambda *a, **k: (made.append(1), real(*a, **k))[1])
    images = pictures(started.config)
    works = budget.WorkByLevel(started, images, started.config.halting)
    works.setting(0.7)
    assert 2 < len(made) <= 14
    before = len(made)
    works.setting(0.7)
    assert len(made) == before, "what was measured is not measured again"


def test_the_ends_are_no_work_saved_and_the_least() -> None:
    model = model_of()
    images = pictures(model.config)
    works = budget.WorkByLevel(model, images, "confidence")
    all_tokens = [(float(model.config.num_tokens),) * 2] * 4
    assert works.work(1.0) == pytest.approx(share(model.config, all_tokens, 4), rel=1e-5)
    assert works.work(0.0) == pytest.approx(share(model.config, all_tokens[:1] + [(0.0, 0.0)] * 3, 1), rel=1e-5)
    levels = [works.work(level) for level in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert levels == sorted(levels) and len(set(levels)) > 3


@pytest.mark.parametrize("kind", ["tome", "confidence"])
def test_a_budget_that_cannot_be_met_names_those_that_can(kind: str) -> None:
    model = model_of(image_size=(8, 12), depth=2)
    images = pictures(model.config, 1)
    with pytest.raises(ValueError, match="has no setting within 1 % of work 0.01") as caught:
        calibrate(model, images, kind, work=0.01)
    (least,) = (float(number) for number in re.findall(r"0\.\d{4}", str(caught.value)))
    assert calibrate(model, images, kind, work=least)
    reached = budget.WorkByLevel(model, images, kind)
    works = np.unique([reached.work(level) for level in np.linspace(0, 1, 9)])
    widest = int(np.diff(works).argmax())
    between = float(works[widest : widest + 2].mean())
    with pytest.raises(ValueError, match="the nearest are") as caught:
        calibrate(model, images, kind, work=between)
    low, high = (float(number) for number in re.findall(r"0\.\d{4}", str(caught.value).partition("nearest")[2]))
    assert low < between < high
    assert calibrate(model, images, kind, work=high)


@pytest.mark.parametrize(
    ("rule", "work", "message"),
    [
        (ToMe, 0.0, "work is 0.0: give a number above 0"),
        (ToMe, 1.5, "work is 1.5"),
        (ToMe, float("nan"), "work is nan"),
        ("tom", 0.5, "there is no rule 'tom': did you mean 'tome'"),
        (AViTGate, 0.5, "the rule avit needs training: give the instance of a trained model"),
        (3, 0.5, "rule is a int: give a rule such as avit_jax.ToMe"),
        (dict, 0.5, "rule is the class dict"),
    ],
)
def test_what_cannot_be_is_refused(rule: Any, work: Any, message: str) -> None:
    model = model_of()
    with pytest.raises(ValueError, match=message):
        budget.WorkByLevel(model, pictures(model.config, 1), rule).setting(work)


def test_a_rule_by_name_keeps_its_default_layers() -> None:
    assert budget.instance_of("topk").layers == (3, 6, 9) and budget.instance_of("topk").keep_rate == 1
    assert budget.instance_of(avit_jax.ATS) == avit_jax.ATS()


def test_images_that_cannot_be_are_refused() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="there is no image to calibrate with"):
        calibrate(model, pictures(model.config, 0), ToMe)
    with pytest.raises(ValueError, match="channels first"):
        calibrate(model, np.zeros((1, 2, 32, 24), np.float32), ToMe)
