"""The comparison of rules: rows against the plain evaluation, reruns, curves by hand, charts of whatever is there."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import avit_jax
from avit_jax import AViT, ConfidenceExit, ToMe
from avit_jax.commands import compare_checkpoint
from avit_jax.commands.compare_checkpoint import comparison_from, photographs, start_for, write_pictures
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Part, Split, spread
from avit_jax.evaluate import bench, budget, curves, rows, timing, training_free
from avit_jax.evaluate.figures import Evaluation, evaluate
from avit_jax.evaluate.timing import Timed
from avit_jax.evaluate.training_free import Comparison, compare_rules
from avit_jax.execution.compiled import predict
from avit_jax.execution.work import image_gmacs
from avit_jax.halting.avit import AViTGate
from avit_jax.model.config import NO_RULE
from avit_jax.model.output import AViTOutput
from avit_jax.report.frontier_table import comparison_table
from avit_jax.report.kept import draw_kept
from avit_jax.report.method_style import styles
from avit_jax.rules import RULES
from configs import fashion_mnist, prior_art
from tests.harness.builders import answers, quick_start, small_config, spread_gate, toy_arrays
from tests.harness.command_server import run_command

ROOT = Path(__file__).parents[1]
COUNT = 30
FEW = Comparison(rules=("tome", "confidence"), budgets=(0.7, 0.5), batches=(10,), rounds=2)


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_SAMPLE_SECONDS", 0.001)
        patch.setattr(budget, "TOLERANCE", 0.12)  # settings are found after fewer programs, still within 5 %
        yield


@pytest.fixture(scope="module")
def model() -> AViT:
    preprocessing = avit_jax.Preprocessing((0.5,), (0.3,), crop_fraction=1.0)
    found = spread_gate(small_config(image_size=(24, 16), in_channels=1, preprocessing=preprocessing, **NO_RULE))
    found.head.kernel[...] *= 3
    return found


@pytest.fixture(scope="module")
def test_images() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (COUNT, 24, 16, 1)).astype(np.uint8), (np.arange(COUNT) % 5).astype(np.int32))


@pytest.fixture(scope="module")
def compared(model: AViT, test_images: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[rows.Row]]:
    folder = tmp_path_factory.mktemp("compared")
    pixels = normalize(test_images.images, model.config)
    found, left_out = compare_rules(model, test_images, pixels, folder, FEW, {"data": "noise", "weights": "w"})
    assert not left_out
    return folder, found


def test_a_row_says_what_the_plain_evaluation_says(
    model: AViT, test_images: Split, compared: tuple[Path, list[rows.Row]]
) -> None:
    _, found = compared
    assert [row["method"] for row in found] == [rows.STATIC, rows.STATIC_SHORT, *["tome"] * 2, *["confidence"] * 2]
    pixels = normalize(test_images.images, model.config)

    @functools.cache
    def plainly(rule: Any) -> tuple[AViT, Evaluation, AViTOutput]:
        own = model.with_config(rule=rule)
        return own, evaluate(own, test_images, 7), answers(own, pixels)

    _, static, _ = plainly(None)
    for row in found:
        own, result, output = plainly(None if row["rule"] is None else avit_jax.rules.rule_from_json(row["rule"]))
        right = result.per_image.rank <= 1
        assert row["top1"] == pytest.approx(result.top1)
        assert row["loss"] == pytest.approx(result.loss, rel=1e-4)
        np.testing.assert_array_equal(rows.correct_images(row), right)
        same = result.per_image.prediction == static.per_image.prediction
        assert row["agreement"] == pytest.approx(same.mean())
        assert row["cosine"] is None  # there are labels
        depth = jnp.asarray(output.token_depth)
        short = row["method"] != rows.STATIC
        assert row["gmacs"] == pytest.approx(float(image_gmacs(own.config, depth, short_last_layer=short).mean()))
        assert row["executed_gmacs"] >= row["gmacs"] * (1 - 1e-6)
        assert row["images"] == COUNT and row["data"] == "noise" and row["group"] == "training-free"
        assert set(row["speed"]) == {"1", "10"} and row["memory_mb"] > 0 and row["compile_seconds"] > 0
        for speed in row["speed"].values():
            assert 0 < speed["low_quartile"] <= speed["images_per_second"] <= speed["high_quartile"]
            assert 0 < speed["low_ratio"] <= speed["ratio"] <= speed["high_ratio"]
        assert row["static_gmacs"] == pytest.approx(found[0]["gmacs"])
        assert len(row["tokens"]) == 4 and row["tokens"][0] == model.config.num_tokens
    assert found[0]["agreement"] == found[1]["agreement"] == 1 and found[1]["gmacs"] < found[0]["gmacs"]
    whole = found[0]["gmacs"]
    for row in found[2:]:
        assert row["gmacs"] / whole == pytest.approx(row["budget"], rel=0.05)


def test_a_varying_rule_has_deciles_and_a_histogram(compared: tuple[Path, list[rows.Row]]) -> None:
    for row in compared[1]:
        if row["method"] != "confidence":
            assert row["deciles"] == [] and row["histogram"] is None
            continue
        deciles = row["deciles"]
        assert sum(decile["images"] for decile in deciles) == COUNT == sum(row["histogram"]["counts"])
        means = [decile["gmacs"] for decile in deciles]
        assert means == sorted(means) and means[0] < means[-1]
        weights = [decile["images"] / COUNT for decile in deciles]
        assert np.dot(weights, means) == pytest.approx(row["gmacs"])
        assert np.dot(weights, [decile["top1"] for decile in deciles]) == pytest.approx(row["top1"])
        assert row["tokens"] == sorted(row["tokens"], reverse=True)


def test_a_second_run_measures_only_what_is_missing(
    model: AViT,
    test_images: Split,
    compared: tuple[Path, list[rows.Row]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for row in compared[1]:
        rows.save_row(tmp_path, row)
    files = sorted((tmp_path / "rows").iterdir())
    (tmp_path / "settings").mkdir()
    for file in (compared[0] / "settings").iterdir():
        (tmp_path / "settings" / file.name).write_bytes(file.read_bytes())
    measured: list[str] = []
    real = bench.Bench.row

    def counted(self: Any, *arguments: Any, **given: Any) -> rows.Row:
        measured.append(f"{given['method']} {given['budget']}")
        return real(self, *arguments, **given)

    monkeypatch.setattr(bench.Bench, "row", counted)
    monkeypatch.setattr(training_free, "WorkByLevel", None)  # settings are not searched again
    pixels = normalize(test_images.images, model.config)
    same = {"data": "noise", "weights": "w"}
    assert compare_rules(model, test_images, pixels, tmp_path, FEW, same) == (json.loads(json.dumps(compared[1])), [])
    assert measured == []
    next(file for file in files if "tome" in file.name and "0.5" in file.name).unlink()
    assert len(compare_rules(model, test_images, pixels, tmp_path, FEW, same)[0]) == 6
    assert measured == ["tome 0.5"]
    one = rows.row_file(tmp_path, "training-free", "tome", 0.7)
    one.write_text(json.dumps(json.loads(one.read_text()) | {"settings": {"weights": "of another model"}}))
    compare_rules(model, test_images, pixels, tmp_path, FEW, same)
    assert measured == ["tome 0.5", "tome 0.7"]


def test_the_work_of_a_vit_is_the_rules_although_its_program_ends_images_early(
    test_images: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[bench.Answers] = []
    real = bench.answers
    monkeypatch.setattr(bench, "answers", lambda *arguments: (said.append(real(*arguments)), said[-1])[1])
    model = spread_gate(small_config(image_size=(24, 16), in_channels=1, gate_scale=8.0, gate_center=1.0))
    model = model.with_config(preprocessing=avit_jax.Preprocessing((0.5,), (0.3,)))
    depth = answers(model, normalize(test_images.images, model.config)).token_depth
    row = bench.Bench(model, test_images, data="noise", batches=(1,), rounds=1).row(
        model, method="avit", group="fine-tuned", batch=1, budget=0.5, seed=3
    )
    _, ended, exact = (answered.token_depth for answered in said)
    assert ended.sum() < np.asarray(depth).sum(), "the sample must have images that end before their patches"
    np.testing.assert_array_equal(exact, depth)
    assert row["gmacs"] == pytest.approx(
        float(image_gmacs(model.config, jnp.asarray(depth), short_last_layer=True).mean())
    )
    assert row["seed"] == 3 and row["rule"]["name"] == "avit"


@pytest.mark.slow
def test_without_labels_or_head_there_is_agreement_or_cosine(model: AViT, test_images: Split) -> None:
    plain = dataclasses.replace(test_images, labels=np.full(COUNT, -1))
    measured = bench.Bench(model, plain, data="noise", batches=(1,), rounds=1)
    row = measured.row(
        model.with_config(rule=ConfidenceExit(0.5)), method="confidence", group="training-free", batch=1, budget=0.5
    )
    assert row["top1"] is row["loss"] is row["correct"] is None and 0 < row["agreement"] < 1
    assert row["cosine"] is None  # it reads class logits
    assert all(decile["top1"] is None for decile in row["deciles"])

    def features(some: AViT) -> np.ndarray:
        x, _, _ = some._layers(some.embed(jnp.asarray(normalize(plain.images, some.config))), None, None, None)
        return np.asarray(some.norm(x[:, 0]), np.float64)

    shorter = prior_art.first_layers(model, 3)
    row = measured.row(shorter, method="fewer layers", group="training-free", batch=1, budget=0.7)
    cosine = [x @ y / math.sqrt((x @ x) * (y @ y)) for x, y in zip(features(shorter), features(model), strict=True)]
    assert row["cosine"] == pytest.approx(np.mean(cosine), abs=1e-5) and 0 < row["cosine"] < 1
    headless = spread_gate(small_config(image_size=(24, 16), in_channels=1, num_classes=0, **NO_RULE))
    headless = headless.with_config(preprocessing=avit_jax.Preprocessing((0.5,), (0.3,)))
    row = bench.Bench(headless, plain, data="noise", batches=(1,), rounds=1).row(
        headless.with_config(rule=ToMe(2)), method="tome", group="training-free", batch=1, budget=0.5
    )
    assert row["agreement"] is None and 0 < row["cosine"] < 1
    assert curves.gain(row) == row["cosine"] and curves.gain_name([row]).startswith("cosine")


def test_a_rule_that_does_not_fit_is_left_out_with_the_reason(test_images: Split, tmp_path: Path) -> None:
    headless = spread_gate(small_config(image_size=(24, 16), in_channels=1, num_classes=0, **NO_RULE))
    headless = headless.with_config(preprocessing=avit_jax.Preprocessing((0.5,), (0.3,)))
    pixels = normalize(test_images.images, headless.config)
    only = dataclasses.replace(FEW, rules=("confidence",))
    found, left_out = compare_rules(headless, test_images, pixels, tmp_path, only, {"data": "noise"})
    assert len(found) == 2 and len(left_out) == 1
    assert left_out[0].startswith("confidence is left out: a confidence exit needs class logits")


@pytest.mark.slow
def test_avit_takes_part_with_a_gate_that_was_started(
    model: AViT, test_images: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate is written into channel 0, so the rule runs on weights of its own."""
    pixels = np.asarray(normalize(test_images.images, model.config))
    only = dataclasses.replace(FEW, rules=(AViTGate(5.0, 10.0, 0.02),), budgets=(0.7,))
    started, reason = start_for(model, pixels, only)
    assert started is not None and reason == [] and model.config.halting is None
    found, left_out = compare_rules(model, test_images, pixels, tmp_path, only, {"data": "noise"}, started)
    row = found[2]
    rule = avit_jax.rules.rule_from_json(row["rule"])
    assert not left_out and isinstance(rule, AViTGate) and (rule.gate_scale, rule.halt_epsilon) == (5.0, 0.02)
    result = evaluate(started.with_config(rule=rule), test_images, 7)
    assert row["top1"] == pytest.approx(result.top1) and row["loss"] == pytest.approx(result.loss, rel=1e-4)
    assert row["gmacs"] / found[0]["gmacs"] == pytest.approx(0.7, rel=0.05)
    drawn: list[Any] = []
    monkeypatch.setattr("avit_jax.report.kept.predict", lambda own, images: drawn.append(own) or predict(own, images))
    assert draw_kept(found, model, test_images, tmp_path / "kept.png", started=started)
    assert len(drawn) == 1 and (drawn[0].pos_embed[...] == started.pos_embed[...]).all()
    assert draw_kept(found, model, test_images, tmp_path / "none.png") == []
    assert start_for(started, pixels, only) == (started, []) and start_for(model, pixels, FEW) == (None, [])
    nothing = compare_rules(model, test_images, pixels, tmp_path, only, {"data": "noise"})
    assert nothing[1] == ["avit is left out: no gate was started"]
    one_layer = AViT(small_config(depth=1, in_channels=1, image_size=(24, 16), **NO_RULE), rngs=nnx.Rngs(0))
    _, (sentence,) = start_for(one_layer, pixels, only)
    assert sentence.startswith("avit: target_depth")


def made_row(method: str, budget: float | None, gmacs: float, ratio: float, right: np.ndarray, **more: Any) -> rows.Row:
    speed = {"images_per_second": 100 * ratio, "low_quartile": 1.0, "high_quartile": 2.0, "ratio": ratio}
    row: rows.Row = {"data": "made", "group": "training-free", "method": method, "rule": None, "budget": budget}
    row |= {
        "static_gmacs": 1.0,
        "seed": None,
        "images": len(right),
        "top1": float(right.mean()),
        "loss": 1.0,
        "agreement": 0.5,
    }
    row |= {"cosine": 0.5, "gmacs": gmacs, "executed_gmacs": gmacs, "correct": rows.as_bits(right)}
    row |= {"speed": {"1": speed, "8": speed}, "memory_mb": 1.0, "compile_seconds": 1.0, "machine": "one"}
    row |= {"settings": {}, "tokens": [5.0, 3.0], "explained_by_position": None, "deciles": [], "histogram": None}
    return row | more


def first(share: float, count: int = 1000) -> np.ndarray:
    return np.arange(count) < round(share * count)


def test_curves_are_interpolated_linearly_and_seeds_averaged() -> None:
    static = made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.9))
    ours = [
        made_row("tome", 0.8, 0.8, 1.2, first(0.8)),
        made_row("tome", 0.4, 0.4, 2.0, first(0.6)),
        made_row("act", 0.5, 0.5, 1.5, first(0.5), group="fine-tuned", seed=0),
        made_row("act", 0.5, 0.5, 1.7, first(0.7), group="fine-tuned", seed=1),
    ]
    tome, act = curves.curves([static, *ours])
    assert tome.gain_at("gmacs", 0.5) == pytest.approx(0.65)  # a quarter of the way
    assert tome.gain_at("ratio", 1.8) == pytest.approx(0.65)
    assert tome.gain_at("speed", 180.0) == pytest.approx(0.65)
    assert tome.gain_at("gmacs", 0.39) is None and tome.gain_at("gmacs", 0.82) is None
    assert tome.gain_at("gmacs", 0.395) == tome.gain_at("gmacs", 0.4)  # within 2 % of the end
    assert tome.gain_at("gmacs", 0.8) == pytest.approx(0.8) and tome.gain_at("gmacs", 0.4) == pytest.approx(0.6)
    (point,) = act.points
    assert (point.gain, point.low, point.high) == pytest.approx((0.6, 0.5, 0.7))
    assert point.speed == pytest.approx(160) and act.gain_at("gmacs", 0.5) == pytest.approx(0.6)
    low, high = tome.difference_at("gmacs", 0.5, [static]) or (0, 0)
    assert low < 0.65 - 0.9 < high and high - low < 0.06
    short = made_row("topk", 0.5, 0.5, 1.5, first(0.7))
    table = comparison_table([static, *ours, short], works=(0.5, 0.7, 0.2), speed_ups=(1.8,))
    assert f"| {ToMe.label} | 65.0 (" in table and table.count("| - |") == 3  # top-k: 70 %, 1.8 x; ACT: by position
    assert "20%" not in table and table.count("1.8 x static") == 1  # nothing to show there
    assert "fine-tuned: top-1 (%) at equal work" in table and "0.5 GMACs (50%)" in table


def test_rows_of_a_slow_day_stand_where_their_ratios_say() -> None:
    """Also if only fine-tuned models were measured."""
    tuned: dict[str, Any] = {"group": "fine-tuned", "seed": 0}
    static = made_row(rows.STATIC_SHORT, None, 1.0, 0.8, first(0.9), **tuned)  # 80 images/s beside 100
    slow = {"images_per_second": 60.0, "low_quartile": 1.0, "high_quartile": 2.0, "ratio": 1.5}
    act = made_row("act", 0.5, 0.5, 1.5, first(0.8), **tuned) | {"speed": {"1": slow, "8": slow}}
    (curve,) = curves.curves([act, static])
    assert curve.points[0].speed == pytest.approx(150.0)
    (alone,) = curves.curves([act])
    assert alone.points[0].speed == pytest.approx(60.0)


def test_shares_of_the_work_are_those_of_the_whole_static_model() -> None:
    """Also if only rows with a short last layer are there; without its GMACs there is no table at equal work."""
    static = made_row(rows.STATIC_SHORT, None, 0.9, 1.0, first(0.9), group="fine-tuned")
    act = made_row("act", 0.5, 0.5, 1.5, first(0.8), group="fine-tuned")
    assert "| fine-tuned: top-1 (%) at equal work | 0.5 GMACs (50%) |" in comparison_table([act, static])
    unknown = [{name: value for name, value in row.items() if name != "static_gmacs"} for row in (act, static)]
    assert "equal work" not in comparison_table(unknown) and "equal measured images/s" in comparison_table(unknown)


def test_a_rule_looks_the_same_in_every_picture() -> None:
    some, more = styles(["tome", "fewer layers", "mine"]), styles(["fewer layers", "avit", *RULES, "tome", "yours"])
    assert all(some[name] == more[name] for name in ("tome", "fewer layers")) and some.keys() == {
        "tome", "fewer layers", "mine"
    }  # fmt: skip
    looks = [tuple(look.values()) for look in more.values()]
    assert len(set(looks)) == len(looks)


def test_programs_are_timed_with_the_same_images_of_all_classes() -> None:
    """Data in a folder are sorted by class."""
    config = small_config(image_size=(2, 1), in_channels=1, patch_size=1, embed_dim=8, **NO_RULE)
    config = dataclasses.replace(config, preprocessing=avit_jax.Preprocessing((0.0,), (1 / 255,)))
    pixels = np.broadcast_to(np.arange(250, dtype=np.uint8)[:, None, None, None], (250, 2, 1, 1))
    by_class = Split(pixels, (np.arange(250) // 25).astype(np.int32))

    def images(size: int) -> list[int]:
        seen: list[np.ndarray] = []

        class Program:
            batch_size = size

            def __init__(self) -> None:
                self.config = config

            def __call__(self, batch: Any) -> Any:
                return jnp.zeros(())

        timed = bench._timed(Program(), by_class)
        seen = [np.asarray(batch) for batch in timed.batches]
        return np.concatenate(seen)[:, 0, 0, 0].round().astype(int).tolist()

    alone, some, many = images(1), images(20), images(100)
    assert len(alone) == 64 and len(some) == 80 and len(many) == 200
    assert many[:64] == alone and many[:80] == some and len(set(many)) == 200
    assert len({number // 25 for number in some[:20]}) > 5


def test_rounds_are_repeated_until_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = iter([1.0, 2.0, 1.5, 3.0, *[2.0] * 100])
    rounds: list[float] = []

    def sampled(programs: Any) -> None:
        rounds.append(next(noise))
        for program, rate in zip(programs, (100 * rounds[-1], 100.0), strict=True):
            program.rates.append(rate)

    monkeypatch.setattr(timing, "sample_in_turn", sampled)

    def measured() -> dict[str, float]:
        return timing.ratios_in_turn({10: Timed(print, [])}, {10: Timed(print, [])}, 4)["10"]

    speed = measured()
    assert len(rounds) == 8 and speed["ratio"] == 2 and speed["images_per_second"] == 200
    assert speed["low_ratio"] <= 2 <= speed["high_ratio"]
    assert measured()["ratio"] == 2 and len(rounds) == 8 + 4


def test_a_paired_interval_is_zero_for_the_same_answers() -> None:
    static = made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.9))
    (same,) = curves.curves([static, made_row("tome", 0.8, 0.8, 1.2, first(0.9))])
    assert same.difference_at("gmacs", 0.8, [static]) == (0.0, 0.0)


def test_fine_tuned_rules_are_compared_with_the_static_model_that_was_trained_as_long() -> None:
    tuned = {"group": "fine-tuned"}
    static = [made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.9))]
    static += [made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.8), seed=seed, **tuned) for seed in range(2)]
    act = made_row("act", 0.5, 0.5, 1.5, first(0.8), seed=0, **tuned)
    free = made_row("tome", 0.5, 0.5, 1.5, first(0.8))
    every = [*static[1:], act, static[0], free]  # in the order of their files
    assert (
        curves.references(every, "fine-tuned") == static[1:] and curves.references(every, "training-free") == static[:1]
    )
    assert [curve.method for curve in curves.curves(every)] == ["act", "tome"]
    table = comparison_table(every, works=(0.5,), speed_ups=())
    assert "| ACT | 80.0 (+0.0 to +0.0) |" in table and "trained for as long: 80.00 (80.00 to 80.00, 2 seeds)" in table
    assert "| ToMe | 80.0 (-11." in table or "| ToMe | 80.0 (-12." in table
    assert (
        "| ACT, 50% | 80.00 | 1 | +0.00 to +0.00 | 0.5000 | 150 | 1.50 | 1.50 | - |" in table
        and "ToMe, 50%" not in table
    )
    assert curves.references([act], "fine-tuned") == []


def test_methods_are_compared_with_another_method_at_equal_work_and_speed() -> None:
    seeds = [
        made_row("act", 0.5, 0.5, 1.5, first(share), group="fine-tuned", seed=seed)
        for seed, share in enumerate((0.8, 0.7))
    ]
    ours = [made_row("avit", b, b, 1 / b, first(0.6 + b / 5), group="fine-tuned", seed=0) for b in (0.4, 0.6)]
    every = [*seeds, *ours, made_row("tome", 0.5, 0.5, 1.5, first(0.8)), made_row("avit", 1.0, 1.0, 1.0, first(0.9))]
    act, avit = curves.curves(every)[:2]
    low, high = act.difference_at("gmacs", 0.5, avit) or (0, 0)
    assert low < 0.75 - 0.7 < high and high - low < 0.04
    assert act.difference_at("gmacs", 0.5, act) == (0.0, 0.0) and act.difference_at("gmacs", 0.7, avit) is None
    table = comparison_table(every, works=(0.5,), speed_ups=(1.5,), reference="act")
    assert "at equal work, minus ACT | 0.5 GMACs (50%) |\n|---|---|\n| ACT | 75.0 |\n| A-ViT | 70.0 (-5." in table
    assert "| ACT, 50% | 75.00 | 70.00 to 80.00 (2) | - | 0.5000 | 150 | 1.50 | 1.50 | - |" in table
    assert "| ToMe | 80.0 |" in table  # ACT has no row without training
    with pytest.raises(ValueError, match="no row is of 'evit': the methods are act, avit, tome"):
        comparison_table(every, reference="evit")


def test_charts_are_drawn_of_whatever_is_there(compared: tuple[Path, list[rows.Row]], tmp_path: Path, model: AViT,
                                               test_images: Split) -> None:  # fmt: skip
    def drawn(some: list[rows.Row], folder: Path, *more: Any) -> set[str]:
        for row in some:
            rows.save_row(folder, row)
        *_, last = write_pictures(folder, *more)
        assert str(folder) in last and (folder / "table.md").read_text()
        for file in folder.glob("*.png"):
            with Image.open(file) as picture:
                assert min(picture.size) > 100
        return {file.stem for file in folder.glob("*.png")}

    every = {"accuracy_by_work", "accuracy_by_speed", "speed_by_saved_work", "work_by_image", "tokens_by_layer", "kept"}
    assert drawn(compared[1], tmp_path / "all", model, test_images) == every
    assert drawn(compared[1][:2], tmp_path / "static", model, test_images) == set()
    alone = drawn(compared[1][2:3], tmp_path / "one")
    assert alone == {"accuracy_by_work", "accuracy_by_speed", "tokens_by_layer"}
    tuned = [made_row("act", 0.5, 0.5, 1.5, first(0.5), group="fine-tuned", seed=seed) for seed in range(2)]
    assert drawn(tuned, tmp_path / "tuned") == alone
    tuned.append(made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.9), group="fine-tuned", seed=0))
    assert drawn(tuned, tmp_path / "tuned") == alone | {"speed_by_saved_work"}
    with pytest.raises(ValueError, match="has no rows of a comparison"):
        list(write_pictures(tmp_path / "nothing"))


def test_rows_of_other_weights_or_data_take_no_part(tmp_path: Path) -> None:
    ours, theirs = {"weights": "a", "content": "c"}, {"weights": "a", "content": "d"}
    rows.save_row(tmp_path, made_row(rows.STATIC_SHORT, None, 1.0, 1.0, first(0.9), settings=ours | {"rounds": 2}))
    rows.save_row(tmp_path, made_row("tome", 0.5, 0.5, 1.5, first(0.8), settings=ours))
    rows.save_row(tmp_path, made_row("topk", 0.5, 0.5, 1.5, first(0.8), settings=theirs))
    rows.save_row(tmp_path, made_row("act", 0.5, 0.5, 1.5, first(0.8), group="fine-tuned", seed=0))
    said = list(write_pictures(tmp_path, measured_with=ours))
    assert said[0] == "left out: top-k at 0.5 was measured with other weights or data" and len(said) == 3
    assert "ToMe" in said[1] and "ACT" in said[1] and "top-k" not in said[1]
    assert "top-k" in next(write_pictures(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"budget": "half"}, {"speed": {}}, {"speed": {"eight": {}}}, {"speed": {"8": {"images_per_second": 1.0}}},
        {"group": "finetuned"}, {"images": 2000}, {"gmacs": None}, {"correct": "?"}, {"method": 3}, {"budget": None},
    ],
)  # fmt: skip
def test_a_file_that_is_no_row_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    file = rows.save_row(tmp_path, made_row("tome", 0.5, 0.5, 1.5, first(0.8)))
    row = json.loads(file.read_text()) | change
    if change == {"budget": None}:
        assert rows.read_rows(tmp_path) and row.pop("budget") is None
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="tome-0.5.json is not a row of a comparison: move it elsewhere"):
        rows.read_rows(tmp_path)


def test_bits_of_answers_survive() -> None:
    for count in (1, 8, 13):
        right = np.random.default_rng(count).random(count) < 0.5
        found = rows.correct_images({"correct": rows.as_bits(right), "images": count})
        assert found is not None
        np.testing.assert_array_equal(found, right)


def test_a_part_of_the_data_is_spread_and_keeps_its_labels(test_images: Split) -> None:
    some = spread(test_images, 4)
    assert isinstance(some, Split) and some.labels.tolist() == test_images.labels[[0, 10, 19, 29]].tolist()
    lazy = Part(test_images, np.array([3, 29]))
    assert len(lazy) == 2 and lazy[1]["label"] == test_images.labels[29] and lazy.name(1) == "image 29"
    assert spread(test_images, 100) is test_images


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rules": ("tom",)}, "the rule 'tom' does not exist: did you mean"),
        ({"rules": ("act",)}, "the rule 'act' needs training"),
        ({"budgets": (0.5, 1.5)}, "give shares of the static model's work between 0 and 1"),
        ({"batches": (0,)}, "give numbers of at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(**fields)


def test_rules_on_the_command_line_have_names_or_settings() -> None:
    found = comparison_from("tome(r=0, proportional=False), mctf(r=0,layers=[3,6]),confidence", ["0.5"], None, 2)
    assert found.rules == (ToMe(0, proportional=False), avit_jax.MCTF(r=0, layers=(3, 6)), "confidence")
    assert found.names == ("tome", "mctf", "confidence") and found.budgets == (0.5,) and found.rounds == 2
    assert comparison_from(None, None, None, 11) == Comparison()
    with pytest.raises(ValueError, match="'tome' is there twice"):
        comparison_from("tome,tome(r=1)", None, None, 1)


def test_photographs_without_labels(tmp_path: Path, model: AViT) -> None:
    for number in range(3):
        Image.new("L", (40, 30), 60 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "note.txt").write_text("no picture")
    found, unread = photographs(tmp_path, model.config, 10)
    assert found.images.shape == (3, 24, 16, 1) and (found.labels == -1).all()
    assert found.images[:, 0, 0, 0].tolist() == [0, 60, 120]
    assert len(unread) == 1 and "note.txt" in unread[0]


def test_data_are_told_apart_by_what_is_in_them(model: AViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    avit_jax.save(model, tmp_path / "model")
    for folder, grey in (("a", 60), ("b", 90)):
        (tmp_path / folder / "val").mkdir(parents=True)
        Image.new("L", (40, 30), grey).save(tmp_path / folder / "val" / "0.png")
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(compare_checkpoint, "compare_rules", lambda *given: (found.append(given[5]), ([], []))[1])
    monkeypatch.setattr(compare_checkpoint, "write_pictures", lambda *_, **__: iter(()))
    for folder in ("a", "b", "a"):
        images, out = tmp_path / folder / "val", tmp_path / "out"
        config = fashion_mnist.get_config("dense")
        list(compare_checkpoint.compare_checkpoint(config, tmp_path / "model", FEW, images=images, out=out))
    assert found[0] == found[2] and found[0]["data"] == found[1]["data"] == "val"
    assert found[0]["content"] != found[1]["content"] and found[0]["weights"] == found[1]["weights"]


def command(*arguments: str) -> Any:
    environment = os.environ | quick_start() | {"JAX_PLATFORMS": "cpu"}
    return run_command(["-m", "avit_jax.compare", *arguments], environment=environment)


@pytest.mark.slow
def test_the_command_compares_and_prints_the_table(model: AViT, tmp_path: Path) -> None:
    np.savez(tmp_path / "toy.npz", **toy_arrays(120, 5, 8))
    small = spread_gate(small_config(image_size=8, in_channels=1, depth=2, **NO_RULE))
    avit_jax.save(small.with_config(preprocessing=avit_jax.Preprocessing((0.2,), (0.3,))), tmp_path / "model")
    options = [f"--checkpoint={tmp_path / 'model'}", f"--config=configs/npz_avit.py:{tmp_path / 'toy.npz'}"]
    few = ["--rules=tome", "--budgets=0.597", "--batches=8", "--rounds=1", "--most=20", f"--out={tmp_path / 'out'}"]
    done = command(*options, *few)
    assert done.returncode == 0, done.stderr
    assert "training-free: top-1 (%) at equal work" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"rows", "settings", "table.md", "kept.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no checkpoint to compare rules on: give --checkpoint=PATH"),
        (["--checkpoint=runs/nothing_there"], "runs/nothing_there"),
        (["--checkpoint=checkpoints/mnist_dense", "--rules=tom"], "the rule 'tom' does not exist: did you mean"),
        (["--checkpoint=checkpoints/mnist_dense", "--budgets=half"], "--budgets=half: give numbers"),
        (["--checkpoint=checkpoints/mnist_dense", "--most=0"], "--most is 0: give at least one image"),
    ],
)
def test_the_command_refuses_in_one_sentence(options: list[str], message: str) -> None:
    done = command(*options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
