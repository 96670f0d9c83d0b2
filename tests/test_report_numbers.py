"""The report's numbers against scikit-learn, SciPy and slow loops; parts of the data, and devices, add up."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import top_k_accuracy_score

from avit_jax import ATS, MCTF, AViTConfig, Preprocessing, Similarity, ToMe, TopK
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.calibration import reliability
from avit_jax.evaluate.figures import ImageFigures, evaluate, figures, totals
from avit_jax.evaluate.intervals import bootstrap_difference, bootstrap_means, share
from avit_jax.evaluate.sweep import Sweep, parse_sweep, rule_with, unbeaten, with_setting
from avit_jax.execution.compiled import predict
from avit_jax.model.config import NO_RULE
from avit_jax.report.numbers import _right_and_wrong, as_json, by_class, by_depth, disagreements, evaluation_numbers
from avit_jax.report.sweep_part import Setting, setting_name, sweep_numbers
from tests.harness.builders import small_config, spread_gate
from tests.harness.devices import run_on_devices

TWO_CHANNELS = Preprocessing((0.5, 0.4), (0.2, 0.3))
CONFIG = small_config(num_classes=7, preprocessing=TWO_CHANNELS)


def drawn_split(count: int, seed: int = 0, model_config: AViTConfig = CONFIG) -> Split:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, *model_config.image_shape, model_config.in_channels)).astype(np.uint8)
    return Split(images, (np.arange(count) % model_config.num_classes).astype(np.int32))


def drawn_figures(count: int = 200, classes: int = 7, seed: int = 0) -> ImageFigures:
    rng = np.random.default_rng(seed)
    return ImageFigures(
        index=np.arange(count),
        label=rng.integers(0, classes, count),
        prediction=rng.integers(0, classes, count),
        confidence=rng.uniform(size=count),
        rank=rng.integers(1, 4, count),
        loss=rng.exponential(size=count),
        mean_depth=rng.uniform(1, 4, count).round(1),
        depth_std=rng.uniform(size=count),
        class_token_depth=rng.integers(1, 5, count),
        gmacs=rng.uniform(size=count),
    )


def test_top_k_is_scikit_learns() -> None:
    model, split = spread_gate(CONFIG), drawn_split(40)
    logits = np.asarray(predict(model, normalize(split.images, CONFIG)).logits)
    found = evaluate(model, split, 16, "packed")
    for k, value in ((1, found.top1), (5, found.top5)):
        assert value == pytest.approx(top_k_accuracy_score(split.labels, logits, k=k, labels=range(7)))
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(found.per_image.confidence, p.max(1), rtol=1e-5)
    np.testing.assert_array_equal(found.per_image.prediction, logits.argmax(1))


def test_a_process_without_images_in_the_last_batch_counts_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of 8 + 4 images in batches of 8: 4 and none."""
    model, split = spread_gate(CONFIG), drawn_split(12)
    alone = totals(model, Split(split.images[4:8], split.labels[4:8]), 4, "packed")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    share = totals(model, split, 8, "packed")
    assert share.images.index.tolist() == [4, 5, 6, 7]
    assert share.executed_gmacs == pytest.approx(alone.executed_gmacs)


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_parts_of_the_data_add_up_to_the_whole(execution: str) -> None:
    """What two processes would do: each its own images, of unequal number."""
    model, split = spread_gate(CONFIG), drawn_split(23)
    parts = [totals(model, Split(split.images[s], split.labels[s]), 8, execution) for s in (np.s_[:9], np.s_[9:])]
    found, whole = figures(parts[0] + parts[1], CONFIG), evaluate(model, split, 8, execution)
    for field in dataclasses.fields(found):
        a, b = getattr(found, field.name), getattr(whole, field.name)
        if field.name == "executed_gmacs":  # padding depends on which images run together
            own = [figures(part, CONFIG).executed_gmacs for part in parts]
            assert a == pytest.approx((9 * own[0] + 14 * own[1]) / 23)
        elif field.name == "per_image":
            for name in ("label", "prediction", "rank", "mean_depth", "class_token_depth", "gmacs"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        else:
            assert a == pytest.approx(b, rel=1e-6), field.name


@pytest.mark.slow
def test_eight_devices_have_one_devices_totals() -> None:
    assert "8 devices agree" in run_on_devices("evaluate_on_devices.py")


def test_ece_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.1, 1, 500).astype(np.float32)
    confidence[:3] = 0.2, 0.4, 1.0  # on the edges: the bin below
    correct = rng.uniform(size=500) < confidence**2
    expected = 0.0
    for m in range(10):
        members = [i for i in range(500) if m / 10 < np.float64(confidence[i]) <= (m + 1) / 10]
        if members:
            gap = np.mean([correct[i] for i in members]) - np.mean([np.float64(confidence[i]) for i in members])
            expected += len(members) / 500 * abs(gap)
    found = reliability(confidence, correct, bins=10)
    assert found.ece == pytest.approx(expected, rel=1e-9)
    assert found.counts.sum() == 500
    sure = reliability(np.ones(4), np.array([True, True, True, False]))
    assert sure.ece == pytest.approx(0.25)


def test_intervals_are_those_of_their_distributions() -> None:
    """SciPy's bootstrap, one row at a time, and for shares what it samples: the binomial distribution itself."""
    rng = np.random.default_rng(1)
    columns = np.stack([rng.uniform(size=300) < 0.9, rng.exponential(size=300)]).astype(np.float64)
    (low, high), other = bootstrap_means(columns)
    successes = stats.binom(300, columns[0].mean())
    assert low == pytest.approx(successes.ppf(0.025) / 300, abs=0.005)
    assert high == pytest.approx(successes.ppf(0.975) / 300, abs=0.005)
    alone = stats.bootstrap((columns[1],), np.mean, method="percentile", rng=5).confidence_interval
    assert other == pytest.approx(tuple(alone), abs=0.02)
    assert np.isnan(bootstrap_means(columns[:, :1])).all()
    assert share(5, 5)[0] < 1
    low, high = bootstrap_difference(np.array([3.0, 3.1, 3.2]), np.array([1.0, 1.1, 0.9]))
    assert 1.9 < low < high < 2.3
    assert np.isnan(bootstrap_difference(np.array([3.0]), np.array([1.0, 1.1]))).all()


def test_bins_by_depth_hold_every_image_once_in_order() -> None:
    images = drawn_figures(203)
    bins = by_depth(images)
    assert [b["images"] for b in bins] == [21] * 3 + [20] * 7
    assert sum(b["images"] * b["top1"] for b in bins) == pytest.approx((images.rank <= 1).sum())
    assert sum(b["images"] * b["mean_depth"] for b in bins) == pytest.approx(images.mean_depth.sum())
    assert all(a["depth_high"] <= b["depth_low"] for a, b in itertools.pairwise(bins))
    assert len(by_depth(drawn_figures(3))) == 3


@pytest.mark.parametrize(("gap", "finding"), [(0.5, "more"), (-0.5, "less"), (0.0, "no difference")])
def test_whether_wrong_images_cost_more_is_what_was_measured(gap: float, finding: str) -> None:
    images = drawn_figures(400)
    depth = np.random.default_rng(3).normal(2, 0.5, 400)
    right = images.rank <= 1
    depth[right] -= depth[right].mean()
    depth[~right] += gap - depth[~right].mean()
    found = _right_and_wrong(dataclasses.replace(images, mean_depth=depth))
    assert found["finding"] == finding
    assert found["depth_wrong"] - found["depth_right"] == pytest.approx(gap)
    few = _right_and_wrong(dataclasses.replace(images, rank=np.ones(400, int)))
    assert few["finding"] is None and few["wrong"] == 0


def test_classes_are_those_of_the_data() -> None:
    images = drawn_figures(classes=5)
    rows = by_class(images, tuple("abcdefg"))
    assert [row["name"] for row in rows] == list("abcde")
    own = images.label == 2
    assert rows[2]["images"] == own.sum()
    assert rows[2]["top1"] == pytest.approx((images.rank[own] <= 1).mean())
    assert rows[2]["mean_depth"] == pytest.approx(images.mean_depth[own].mean())
    assert rows[2]["gmacs"] == pytest.approx(images.gmacs[own].mean())


@pytest.mark.parametrize("distilled", [False, True])
def test_position_means_are_laid_out_as_images_and_skip_special_tokens(distilled: bool) -> None:
    config = small_config(num_classes=7, distilled=distilled, preprocessing=TWO_CHANNELS)
    model, split = spread_gate(config), drawn_split(9, model_config=config)
    depth = np.asarray(predict(model, normalize(split.images, config)).token_depth)
    numbers = evaluation_numbers(evaluate(model, split, 4), config)
    first = 2 if distilled else 1
    for row in range(3):  # 12 x 8 pixels: 3 rows of 2 patches
        for column in range(2):
            assert numbers["by_position"][row][column] == pytest.approx(depth[:, first + 2 * row + column].mean())
    assert numbers["special_tokens"] == pytest.approx(depth[:, :first].mean(0).tolist())
    layers = numbers["by_layer"]
    assert [row["computed"] for row in layers] == pytest.approx([(depth >= layer).mean() for layer in range(1, 5)])
    assert [row["stopped"] for row in layers] == pytest.approx([(depth == layer).mean() for layer in range(1, 5)])


def test_disagreements_are_counted_by_pair() -> None:
    split = drawn_split(40)
    first, second = (evaluate(spread_gate(CONFIG, seed), split, 16) for seed in (0, 1))
    found = disagreements(first, second)
    pairs = list(zip(first.per_image.rank <= 1, second.per_image.rank <= 1, strict=True))
    assert found["only_ours"] == pairs.count((True, False))
    assert found["only_theirs"] == pairs.count((False, True))
    assert found["both_wrong"] == pairs.count((False, False)) and found["both_right"] == pairs.count((True, True))
    assert found["differ"] == (first.per_image.prediction != second.per_image.prediction).sum() > 0
    assert found["difference"]["value"] == pytest.approx((found["only_ours"] - found["only_theirs"]) / 40)


def test_without_labels_there_is_no_accuracy() -> None:
    split = drawn_split(5)
    model = spread_gate(CONFIG)
    found = evaluate(model, Split(split.images, np.full(5, -1, np.int32)), 4)
    assert not found.labelled
    assert np.isnan([found.top1, found.top5, found.loss]).all()
    assert found.mean_depth == evaluate(model, split, 4).mean_depth
    with pytest.raises(ValueError, match="labels run from -1 to 3"):
        evaluate(model, Split(split.images, np.arange(-1, 4, dtype=np.int32)), 4)


def test_json_has_no_numpy_and_no_nan() -> None:
    assert as_json({"a": (np.float32(1.5), np.nan), "b": np.int64(3), "c": [float("inf")]}) == {
        "a": [1.5, None],
        "b": 3,
        "c": [None],
    }


@pytest.mark.parametrize(
    ("text", "values"),
    [("gate_center:10,8,8", (8.0, 10.0)), ("gate_scale:1:3:5", (1.0, 1.5, 2.0, 2.5, 3.0))],
)
def test_sweeps_are_lists_or_ranges(text: str, values: tuple[float, ...]) -> None:
    assert parse_sweep(text) == Sweep(text.partition(":")[0], values)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gate_centre:1", "no rule has a setting 'gate_centre' to sweep: did you mean 'gate_center'"),
        ("gate_center", "'' is not a list of numbers: write FIELD:VALUE"),
        ("gate_center:a,b", "'a,b' is not a list of numbers"),
        ("gate_center:1:2", "a range has a first value, a last and a count"),
        ("gate_center:1:2:1.5", "a range has a first value"),
        ("gate_center:0:1:1000000000000", "more than 40 settings"),
        ("gate_center:1,nan", "every value must be finite"),
    ],
)
def test_other_sweeps_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_sweep(text)


def test_a_setting_of_another_rule_is_refused() -> None:
    model = spread_gate(dataclasses.replace(CONFIG, **NO_RULE | {"rule": ToMe(1)}))
    assert with_setting(model, "r", 2.0).config.rule == ToMe(2)
    for field, value, sentence in (
        ("threshold", 0.5, "the rule tome has no setting threshold to sweep: it has r"),
        ("r", -1.0, "ToMe's r is -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            with_setting(model, field, value)


@pytest.mark.parametrize(
    ("rule", "field", "value", "expected"),
    [
        (ToMe((2, 1, 0, 0)), "r", 3.0, ToMe(3)),
        (ATS(layers=(1,)), "samples", 32.0, ATS(32, (1,))),
        (MCTF(0.35, (1, 2)), "r", 2.0, MCTF(2, (1, 2))),
        (MCTF(2, (1, 2)), "r", 0.35, MCTF(0.35, (1, 2))),
        (TopK((0.7, 0.5), (1, 2)), "keep_rate", 1.0, TopK(1.0, (1, 2))),
        (Similarity((0.9, 0.9, 0.9, 0.9)), "thresholds", 1.0, Similarity(1.0)),
    ],
)
def test_a_sweep_replaces_a_setting_of_any_type(rule: Any, field: str, value: float, expected: Any) -> None:
    changed = rule_with(dataclasses.replace(CONFIG, **NO_RULE | {"rule": rule}), field, value)
    assert changed == expected and type(getattr(changed, field)) is type(getattr(expected, field))


def test_the_own_setting_of_ats_is_the_number_of_patches() -> None:
    """The model has 6 patches, and the last of the settings is the nearest one."""
    model = spread_gate(dataclasses.replace(CONFIG, **NO_RULE | {"rule": ATS(layers=(1,))}))
    settings = [Setting(value, model, {"top1": 0.5, "gmacs": 1.0}) for value in (2.0, 5.0)]
    rates = {setting_name(setting): 1.0 for setting in settings}
    found = sweep_numbers(Sweep("samples", (2.0, 5.0)), settings, model, rates, [], [np.zeros((0, 7))] * 2)
    assert found["own"] == "6" and found["nearest"] == 1


def test_unbeaten_settings_are_those_of_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    gain, cost = rng.integers(0, 6, 30), rng.integers(0, 6, 30)
    expected = [
        not any(
            gain[j] >= gain[i] and cost[j] <= cost[i] and (gain[j] > gain[i] or cost[j] < cost[i]) for j in range(30)
        )
        for i in range(30)
    ]
    assert unbeaten(gain.astype(float).tolist(), cost.astype(float).tolist()).tolist() == expected
    assert 1 < sum(expected) < 30


def test_another_gate_leaves_weights_and_model_alone() -> None:
    model, split = spread_gate(CONFIG), drawn_split(6)
    before = evaluate(model, split, 6)
    later = evaluate(with_setting(model, "gate_center", 6.0), split, 6)
    never = evaluate(model.with_config(**NO_RULE), split, 6)
    assert before.mean_depth < later.mean_depth < never.mean_depth == 4
    assert evaluate(model, split, 6).mean_depth == before.mean_depth
