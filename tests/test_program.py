"""compile(): which execution runs a rule, that all of them agree, and what is said of a choice that does not fit."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

import avit_jax
from avit_jax import AViTOutput, Gates, PackedPlan, PlannedPlan
from avit_jax.data.sources import Split
from avit_jax.evaluate.compare import format_summary, measure
from avit_jax.evaluate.figures import evaluate
from avit_jax.execution.compiled import check_batch_size
from avit_jax.execution.program import choose, fitting_executions, suited
from avit_jax.execution.stages import Stage
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.reduction.tome import ToMe
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.devices import run_on_devices

TWO_CHANNELS = {"preprocessing": avit_jax.Preprocessing((0.5, 0.4), (0.2, 0.3))}
CONFIGS = {
    "avit": small_config(**TWO_CHANNELS),
    "dense": small_config(**NO_RULE | TWO_CHANNELS),
    "tome": small_config(**NO_RULE | TWO_CHANNELS | {"rule": ToMe(1)}),
    "confidence": small_config(**NO_RULE | TWO_CHANNELS | {"rule": ConfidenceExit(0.3)}),
    "gates": small_config(**NO_RULE | TWO_CHANNELS | {"rule": Gates(token_bias=0.0, bias=0.0)}),
}
FITTING = {
    "avit": ("packed", "masked", "planned"),
    "dense": ("masked", "packed", "shrinking"),
    "tome": ("shrinking",),
    "confidence": ("packed", "masked", "planned"),
    "gates": ("packed", "masked"),
}


def images_of(config: AViTConfig, count: int) -> np.ndarray:
    shape = (count, *config.image_shape, config.in_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def split_of(config: AViTConfig, count: int) -> Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, *config.image_shape, config.in_channels), dtype=np.uint8)
    return Split(pixels, rng.integers(0, config.num_classes, count).astype(np.int32))


def assert_same(found: AViTOutput, expected: AViTOutput) -> None:
    np.testing.assert_array_equal(found.token_depth, expected.token_depth)
    for name in ("logits", "head_logits", "ponder_cost", "halting_scores"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_execution_of_a_rule_gives_the_same(name: str) -> None:
    config = CONFIGS[name]
    model, images = spread_gate(config), images_of(config, 4)
    expected = answers(model, images)
    assert fitting_executions(config) == FITTING[name]
    assert avit_jax.compile(model, 5).execution == FITTING[name][0]
    for execution in FITTING[name]:
        plan = avit_jax.plan(model, images, 5) if execution == "planned" else None
        program = avit_jax.compile(model, 5, execution=execution, plan=plan, image_exit=False)
        assert_same(program(images), expected)  # four images for five places
        assert program.batch_size == 5 and program.config == config
        assert (program.execution, program.reason) == (execution, "it was asked for")
        exported = jax.export.export(program.jitted)(*program.abstract_arguments)
        assert jax.export.deserialize(exported.serialize()).out_tree == exported.out_tree
        with pytest.raises(ValueError, match=r"6 images for a program compiled for 5: use compile\w*\(model, 6\)"):
            program(images_of(config, 6))
        with pytest.raises(ValueError, match="resize with"):
            program(images[:, 1:])


def test_every_execution_on_all_devices_gives_the_same() -> None:
    assert "4 devices agree" in run_on_devices("programs_on_devices.py", 4)


def test_shrinking_without_a_rule_shortens_the_last_layer() -> None:
    """The same logits for less work; heads on a mean over the patches need the whole last layer."""
    for pool, saves in (("token", True), ("norm_mean", False)):
        model = spread_gate(small_config(**NO_RULE | {"pool": pool}))
        images, depth = images_of(model.config, 3), np.full((3, 7), 4)
        short, whole = (avit_jax.compile(model, 3, execution=name) for name in ("shrinking", "masked"))
        found, expected = short(images), whole(images)
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-6 * float(np.abs(expected.logits).max()))
        np.testing.assert_array_equal(found.token_depth, expected.token_depth)
        assert (short.executed(depth, 3).gmacs < 0.99 * whole.executed(depth, 3).gmacs) == saves


def test_later_changes_of_the_model_do_not_reach_the_program() -> None:
    model = spread_gate(CONFIGS["dense"])
    program, images = avit_jax.compile(model, 2), images_of(model.config, 2)
    before = np.asarray(program(images).logits)
    model.head.bias[...] += 1
    np.testing.assert_array_equal(program(images).logits, before)


def test_programs_that_nobody_holds_are_freed() -> None:
    """A comparison compiles hundreds of them, and a process has a limited number of memory maps."""
    model = spread_gate(small_config(**NO_RULE, depth=1))
    client = jax.devices()[0].client
    loaded = []
    for numbers in (range(18), range(18, 24)):
        for number in numbers:
            avit_jax.compile(model.with_config(drop_path_rate=number / 100), 2)
        gc.collect()
        loaded.append(len(client.live_executables()))
    assert loaded[1] <= loaded[0]


PLAN = PlannedPlan(7, 4, 2, 1, (Stage(0, (7, 7)),))


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("tome", {"execution": "packed"}, "packed execution cannot run the rule 'tome': choose shrinking or auto"),
        ("tome", {"execution": "masked"}, "masked execution cannot run the rule 'tome': choose shrinking or auto"),
        ("avit", {"execution": "shrinking"}, "cannot run the rule 'avit': choose packed or masked or planned or auto"),
        (
            "avit",
            {"execution": "fast"},
            "execution 'fast' is unknown: choose one of masked, packed, planned, shrinking, auto",
        ),
        ("dense", {"plan": PackedPlan(7, 1, (7,))}, "the plan is for packed execution and this one is masked"),
        ("gates", {"plan": PLAN}, "the plan is for planned execution and this one is packed: leave plan out$"),
        ("tome", {"plan": PLAN}, "the plan is for planned execution and this one is shrinking: leave plan out$"),
        ("dense", {"execution": "planned"}, "planned execution cannot run a model without a rule"),
        ("avit", {"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ("tome", {"batch_size": 0}, "batch_size is 0: it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_sentence(name: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        avit_jax.compile(spread_gate(CONFIGS[name]), **{"batch_size": 2, **arguments})


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """The check of types in tests would come before a function's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ANYTHING: Any = "plan.json"


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model, _: avit_jax.compile(model, 2, plan=ANYTHING), "plan is a str: give a PackedPlan or a"),
        (lambda model, _: avit_jax.compile(model, 2, execution="planned", plan=ANYTHING), "plan is a str: give a"),
        (lambda model, _: avit_jax.compile_packed(model, 2, ANYTHING), "takes a PackedPlan and this is a str: make"),
        (lambda model, _: avit_jax.compile_packed(model, 2, PLAN), "takes a PackedPlan and this is a PlannedPlan"),
        (lambda model, _: avit_jax.compile_planned(model, 2, ANYTHING), "needs a plan and this is a str: make one"),
        (lambda model, images: avit_jax.plan_packed(model, images, 2.5), "batch_size is 2.5: it must be a whole"),
        (lambda model, images: avit_jax.plan_packed(model, images, "8"), "batch_size is '8': it must be a whole"),
        (lambda model, images: avit_jax.plan_packed(model, images, 0), "batch_size is 0: it must be at least 1"),
        (lambda model, images: avit_jax.plan_packed(model, images[:, 1:], 2), "resize with avit_jax.preprocess"),
        (
            lambda model, images: avit_jax.plan_packed(model.with_config(rule=ToMe(1)), images, 2),
            r"the rule tome is for shrinking execution: use model\(images\)",
        ),
    ],
)
def test_arguments_of_another_type_are_named(call: Callable[[Any, Any], Any], sentence: str) -> None:
    config = CONFIGS["avit"]
    with pytest.raises(ValueError, match=sentence):
        call(spread_gate(config), images_of(config, 4))


def test_a_mesh_without_an_axis_for_images_is_refused() -> None:
    mesh, config = jax.make_mesh((1, 1), ("x", "y")), CONFIGS["avit"]
    model, images = spread_gate(config), images_of(config, 2)
    for call in (
        lambda: avit_jax.compile(model, 2, mesh=mesh),
        lambda: avit_jax.compile(model, 2, execution="masked", mesh=mesh),
        lambda: avit_jax.compile_packed(model, 2, mesh=mesh),
        lambda: avit_jax.compile_planned(model, 2, PLAN, mesh=mesh),
        lambda: avit_jax.plan(model, images, 2, mesh=mesh),
        lambda: avit_jax.plan_packed(model, images, 2, mesh=mesh),
    ):
        with pytest.raises(ValueError, match=r"the mesh has the axes \('x', 'y'\) and images are split over an axis"):
            call()


@pytest.mark.parametrize("batch_size", [2.5, "4", None, True])
def test_a_batch_size_is_a_whole_number(batch_size: Any) -> None:
    with pytest.raises(ValueError, match="it must be a whole number"):
        check_batch_size(batch_size)


def test_auto_takes_the_execution_of_its_plan() -> None:
    model = spread_gate(CONFIGS["avit"])
    for execution, plan in (
        ("packed", PackedPlan(7, 1, (7,))),
        ("planned", avit_jax.plan(model, images_of(CONFIGS["avit"], 4), 2)),
    ):
        program = avit_jax.compile(model, 2, plan=plan)
        assert program.plan == plan
        assert (program.execution, program.reason) == (execution, "the plan is for it")
        assert {choose(model.config, plan=plan, platform=name).execution for name in PLATFORMS} == {execution}


PLATFORMS = ("cpu", "tpu", "gpu", "another")


def test_auto_decides_by_platform_where_tokens_halt() -> None:
    found = {platform: choose(CONFIGS["avit"], platform=platform) for platform in PLATFORMS}
    assert [choice.execution for choice in found.values()] == ["packed", "masked", "masked", "masked"]
    assert len({choice.reason for choice in found.values()}) == 4, "each has its own reason"
    gates = [choose(CONFIGS["gates"], platform=platform) for platform in PLATFORMS]
    assert [choice.execution for choice in gates] == ["packed", "masked", "masked", "masked"]
    assert not any("fastest" in choice.reason for choice in gates), "nothing was measured for gates"
    for name in ("dense", "tome"):
        assert {choose(CONFIGS[name], platform=platform).execution for platform in PLATFORMS} == {FITTING[name][0]}
    assert avit_jax.compile(spread_gate(CONFIGS["avit"]), 1).reason == found[jax.default_backend()].reason


def test_commands_take_any_execution_for_any_model() -> None:
    """eval.py has one flag for every checkpoint: it decides where a halting rule or gates leave a choice."""
    for name, (first, *_) in FITTING.items():
        for execution in ("masked", "packed", "auto"):
            free = (CONFIGS[name].halts or CONFIGS[name].gates is not None) and execution != "auto"
            assert suited(CONFIGS[name], execution).execution == (execution if free else first)
    with pytest.raises(ValueError, match="execution 'fast' is unknown"):
        suited(CONFIGS["tome"], "fast")


@pytest.mark.parametrize("name", ["tome", "confidence"])
def test_figures_of_other_rules(name: str) -> None:
    config = CONFIGS[name]
    model, split = spread_gate(config), split_of(config, 11)
    found = evaluate(model, split, 4, "packed")
    output = answers(model, avit_jax.data.preprocessing.normalize(split.images, config))
    depth = np.asarray(output.token_depth)
    assert found.mean_depth == pytest.approx(depth.mean())
    assert found.top1 == pytest.approx((np.asarray(output.logits).argmax(1) == split.labels).mean())
    if name == "tome":  # 7 tokens, one fewer after each of four layers
        assert found.executed_depth * 7 == 7 + 6 + 5 + 4
        assert found.executed_gmacs < found.gmacs, "the last layer computes the class token alone"
        assert np.ptp(found.image_depths) == 0 and found.depth_std_tokens > 0
    else:
        assert found.executed_depth == pytest.approx(depth.mean())
        assert np.ptp(found.image_depths) > 0 and found.depth_std_tokens == 0
        whole = evaluate(model.with_config(**NO_RULE), split, 4)
        assert found.gmacs < whole.gmacs


def test_the_table_has_a_row_for_every_rule() -> None:
    model = spread_gate(CONFIGS["tome"])
    summary, _ = measure(split_of(model.config, 6), model.with_config(**NO_RULE), model, 4)
    header, dense, tome, uses, last = format_summary(summary | {"seconds": 1.0}).splitlines()
    assert dense.split()[0] == "dense" and tome.split()[0] == "ToMe"
    assert [line.find("%") for line in (dense, tome)] == [header.find("top-1") + 4] * 2, "columns are straight"
    assert uses.startswith("ToMe uses ") and "ToMe by shrinking execution" in last
    longer = {"similarity": summary["tome"], **summary, "seconds": 1.0}  # its label has 21 characters
    header, *rows = format_summary(longer).splitlines()[:4]
    assert [row.find("%") for row in rows] == [header.find("top-1") + 4] * 3
