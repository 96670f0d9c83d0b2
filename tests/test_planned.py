"""Planned execution: the masked model's answers by shapes fixed ahead, also for batches that do not fit."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.mlir import ir

import avit_jax
from avit_jax import AViT, PackedPlan, PlannedModel, PlannedPlan, compile_packed, compile_planned
from avit_jax.commands.typed_config import parse
from avit_jax.execution import planned
from avit_jax.execution.places import Layout, Move, gathered, sorted_by
from avit_jax.execution.plan import layer_loads
from avit_jax.execution.planned_model import planned_program
from avit_jax.execution.stages import Stage, boundaries, plan_loads
from avit_jax.execution.work import block_macs, embedding_macs, head_macs, last_block_macs
from avit_jax.halting.ats import ATS
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.halting.pondernet import PonderNet
from avit_jax.halting.similarity import Similarity
from avit_jax.model.config import NO_RULE
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train.optim import learning_rate_schedule, make_optimizer
from avit_jax.train.state import state_shapes
from avit_jax.train.step import build_train_step
from configs import npz_avit
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.devices import run_on_devices
from tests.harness.halting_patterns import assert_exited, assert_same, drawn_images, drawn_model

FIRSTS = (0, 1, 3)  # the first layers of the stages


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 12, 8, 2)).astype(np.float32)


def tight(
    model: AViT, depths: Any, group_size: int, *, image_exit: bool = False, firsts: tuple[int, ...] = FIRSTS
) -> PlannedPlan:
    """The plan without a place to spare for a batch whose tokens stop at these depths [b n]."""
    loads = layer_loads(np.asarray(depths), model.config, image_exit)
    batch, stages = loads.shape[1], []
    for first in firsts:
        ordered = [0] * (-batch % group_size) + sorted(loads[first].tolist())
        most = [max(ordered[at : at + group_size]) for at in range(0, len(ordered), group_size)]
        stages.append(Stage(first, (*most[:-1], max(most[-1], 1))))
    return PlannedPlan(model.config.num_tokens, model.config.depth, batch, group_size, tuple(stages))


MODELS = {
    "avit": {},
    "distilled": {"distilled": True},
    "heads on a mean, with registers": {"pool": "norm_mean", "num_registers": 2},
    "confidence": NO_RULE | {"rule": ConfidenceExit(0.3)},
    "ats": NO_RULE | {"rule": ATS(3, (0, 2))},
    "ats as published": NO_RULE | {"rule": ATS(None, (0, 2)), "patch_size": 2},
    "similarity": NO_RULE | {"rule": Similarity((2.0, 0.3, 0.5, 0.6))},
    "pondernet": NO_RULE | {"rule": PonderNet(0.3, sampled=True)},
}


@pytest.mark.parametrize(("name", "large"), [*((name, 2048) for name in MODELS), ("distilled", 0), ("ats", 0)])
def test_every_rule_gives_the_masked_models_answers(name: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images in groups of two, so that a row is left over; with image exit, packed execution's answers.

    large: tokens of a group from which attention's linear layers run group by group.
    """
    monkeypatch.setattr(planned, "_LARGE", large)
    model, images = spread_gate(small_config(**MODELS[name])), pictures(5)
    masked = answers(model, images)
    assert len(np.unique(masked.token_depth)) >= 2, "tokens or images halt at different layers"
    rule = model.config.halting
    assert rule is not None
    plans = [tight(model, masked.token_depth, 2, image_exit=exits) for exits in (False, True)]
    assert plans[0].capacities()[-1].sum() < plans[0].capacities()[0].sum()

    @jax.jit
    def both(params: Any, images: jax.Array) -> Any:
        whole = nnx.merge(nnx.graphdef(model), params)
        found = [
            planned.forward(whole, rule, images, plan, image_exit=exits)
            for plan, exits in zip(plans, (False, True), strict=True)
        ]
        return [(output, ran.overflow) for output, ran in found]

    (found, overflow), (exited, overflow_too) = both(nnx.state(model), images)
    assert not overflow and not overflow_too
    assert_same(masked, found)
    packed = compile_packed(model, 5, PackedPlan(model.config.num_tokens, 5, (model.config.num_tokens,)))(images)
    assert_same(packed, exited)


@pytest.fixture(scope="module")
def drawn() -> dict[bool, tuple[AViT, PlannedModel]]:
    """A model whose images draw their depths, with few places: many batches fit and many do not. By image exit."""
    model = drawn_model(small_config())
    plan = PlannedPlan(7, 4, 4, 2, (Stage(0, (7, 7)), Stage(1, (5, 7)), Stage(2, (2, 6)), Stage(3, (0, 4))))
    return {exits: (model, compile_planned(model, 4, plan, image_exit=exits)) for exits in (False, True)}


@settings(max_examples=40, deadline=None)
@given(
    image_exit=st.booleans(),
    depths=st.lists(st.lists(st.integers(1, 4), min_size=6, max_size=6), min_size=1, max_size=4),
)
def test_any_pattern_of_halting(
    drawn: dict[bool, tuple[AViT, PlannedModel]], image_exit: bool, depths: list[list[int]]
) -> None:
    """Also in batches with fewer images; overflow is counted exactly where the loads do not fit."""
    model, program = drawn[image_exit]
    images = drawn_images(np.array(depths))
    masked = answers(model, images)
    batches, overflows = program.batches, program.overflows
    found = program(images)
    if image_exit:
        assert_exited(masked, found, 1)
    else:
        assert_same(masked, found)
    padded = np.pad(np.asarray(masked.token_depth), ((0, 4 - len(images)), (0, 0)))
    loads = layer_loads(padded, model.config, image_exit)
    over = any(
        pair.max() > place
        for stage in program.plan.stages
        for pair, place in zip(np.sort(loads[stage.first]).reshape(2, 2), stage.capacities, strict=True)
    )
    assert program.plan.fits(loads) != over
    assert (program.batches, program.overflows) == (batches + 1, overflows + over)


def test_a_batch_that_does_not_fit_is_computed_with_every_token(
    drawn: dict[bool, tuple[AViT, PlannedModel]],
) -> None:
    """One place is missing in one group of the last stage, and then none."""
    model, program = drawn[False]
    before = program.overflows
    fitting = np.array([[1] * 6, [1] * 6, [1] * 6, [4, 4, 4, 1, 1, 1]])
    assert_same(answers(model, drawn_images(fitting)), program(drawn_images(fitting)))
    assert program.overflows == before, "the class token stops after layer 3 but keeps its place"
    fitting[3, 3] = 4
    assert_same(answers(model, drawn_images(fitting)), program(drawn_images(fitting)))
    assert program.overflows == before + 1


@pytest.mark.parametrize("center", [-60.0, 60.0])
def test_all_halt_at_once_or_none_ever(center: float) -> None:
    """After layer 1 nothing is left, or everything."""
    model, images = spread_gate(small_config(gate_center=center)), pictures(3)
    masked = answers(model, images)
    np.testing.assert_array_equal(masked.token_depth, 1 if center < 0 else 4)
    plan = tight(model, masked.token_depth, 2, firsts=(0, 1))
    assert plan.capacities()[1:].sum() == (3 if center < 0 else 2 * 3 * 7)
    program = compile_planned(model, 3, plan, image_exit=False)
    assert_same(masked, program(images))
    assert program.overflows == 0


def test_what_lies_beside_an_image_does_not_matter(drawn: dict[bool, tuple[AViT, PlannedModel]]) -> None:
    """An image of NaN changes nothing of the others."""
    _, program = drawn[False]
    images = drawn_images(np.array([[1, 1, 2, 2, 1, 1]] * 4))
    clean = program(images)
    images[1] = np.nan
    spoilt = program(images)
    np.testing.assert_array_equal(np.delete(clean.logits, 1, 0), np.delete(spoilt.logits, 1, 0))


@pytest.mark.parametrize("exits", [False, True])
def test_halted_tokens_have_no_influence_whatever_they_hold(exits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer halted tokens come in as NaN. One stage with all places, so that nothing removes them."""
    model, images = spread_gate(small_config()), pictures(4)
    masked = answers(model, images)

    def poison(run: Any) -> Any:
        def poisoned(self: Any, layer: Any, x: Any, layout: Any, state: Any, *noise: Any) -> Any:
            active = layout.of_tokens(state.active)
            return run(self, layer, jnp.where(active[..., None], x, jnp.nan), layout, state, *noise)

        return poisoned

    for name in ("_block", "_read"):
        monkeypatch.setattr(planned._Layers, name, poison(getattr(planned._Layers, name)))
    rule = model.config.halting
    assert rule is not None
    plan = PlannedPlan(7, 4, 4, 2, (Stage(0, (7, 7)),))
    output, _ = planned.forward(model, rule, jnp.asarray(images), plan, image_exit=exits)
    np.testing.assert_allclose(output.logits, masked.logits, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close() -> None:
    model = spread_gate(small_config(dtype="bfloat16"))
    images = pictures(6)
    masked = answers(model, images)
    few = tuple(places + 1 for places in tight(model, masked.token_depth, 2, firsts=(0, 2)).stages[1].capacities)
    assert sum(few) < 3 * 7, "tokens move"
    program = compile_planned(model, 6, PlannedPlan(7, 4, 6, 2, (Stage(0, (7, 7, 7)), Stage(2, few))), image_exit=False)
    found = program(images)
    assert program.overflows == 0
    same = (np.asarray(masked.token_depth) == found.token_depth).all(1)
    assert same.mean() > 0.5
    np.testing.assert_allclose(found.logits[same], masked.logits[same], atol=0.05 * np.abs(masked.logits).max())


def test_devices_move_their_own_images() -> None:
    assert "4 devices agree" in run_on_devices("planned_on_devices.py", 4)


# The program


def conditionals(module: Any) -> int:
    """stablehlo.case and stablehlo.if in a program, without those inside a branch of another.

    A choice by the platform is a case of constants, which the compiler resolves.
    """
    functions = {op.name.value: op for op in module.body.operations if op.operation.name == "func.func"}

    def fixed(value: Any) -> bool:
        return not isinstance(value.owner, ir.Block) and all(map(fixed, value.owner.operands))

    def inside(op: Any) -> Iterator[str]:
        name, resolved = op.operation.name, False
        if name in ("stablehlo.case", "stablehlo.if"):
            resolved = fixed(op.operands[0])
        if not resolved:
            yield name
        if name in ("func.call", "call"):
            yield from inside(functions[op.attributes["callee"].value])
        if resolved or name not in ("stablehlo.case", "stablehlo.if"):
            for region in op.operation.regions:
                for block in region:
                    for inner in block.operations:
                        yield from inside(inner)

    names = list(inside(functions["main"]))
    assert not {"stablehlo.infeed", "stablehlo.outfeed", "stablehlo.send", "stablehlo.recv"} & set(names), "no host"
    assert "callback" not in str(module), "no host"
    assert names.count("stablehlo.while") >= 2, "the layers of the stages"
    return sum(name in ("stablehlo.case", "stablehlo.if") for name in names)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("task", ["inference", "training"])
def test_the_program_has_one_conditional(task: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fallback: on a GPU the host waits for each. A second one would be seen."""
    # The choices by platform of a bfloat16 training step reach its loops as arguments; the compiled text has no
    # conditional for them (tests/harness/compile_for_tpu.py).
    model = spread_gate(small_config(dtype="bfloat16" if task == "inference" else "float32"))
    graphdef, params = nnx.split(model)
    plan = PlannedPlan(7, 4, 4, 2, (Stage(0, (7, 7)), Stage(2, (3, 5))))
    images = jax.ShapeDtypeStruct((4, 12, 8, 2), "float32")

    def traced() -> Any:
        if task == "inference":
            program = jax.jit(planned_program(graphdef, plan, True, None))
            return program.trace(params, images, jax.ShapeDtypeStruct((), "int32"))
        experiment = npz_avit.get_config("")
        experiment.loss.distillation, experiment.teacher = "none", ""
        train = parse(experiment)
        optimizer = make_optimizer(train.optim, learning_rate_schedule(train.optim, 1000, epochs=1.0, batch_size=4))
        counts = dataclasses.replace(train.step, counts=True)
        step = build_train_step(graphdef, optimizer, counts, training_mesh(MeshSettings(), 1), None, plan)
        batch = {"image": images, "label": jax.ShapeDtypeStruct((4,), "int32")}
        return jax.jit(step).trace(state_shapes(model, optimizer, 0.0), batch, None)

    def counted() -> int:
        return conditionals(traced().lower(lowering_platforms=(platform,)).compiler_ir("stablehlo"))

    assert counted() == 1
    forward = planned.forward

    def choosing(*arguments: Any, **options: Any) -> Any:
        output, ran = forward(*arguments, **options)
        return jax.lax.cond(ran.overflow, lambda: jax.tree.map(lambda v: v + 1, output), lambda: output), ran

    monkeypatch.setattr(planned, "forward", choosing)
    assert counted() > 1


# Work


def test_the_work_is_that_of_the_plans_shapes() -> None:
    config = small_config()
    model = AViT(config, rngs=nnx.Rngs(0))
    plan = PlannedPlan(7, 4, 3, 2, (Stage(0, (7, 7)), Stage(2, (2, 5))))
    depths = np.array([[4, 4, 4, 4, 4, 1, 1], [2, 1, 1, 1, 1, 1, 1], [3, 3, 1, 1, 1, 1, 1]])

    def whole(places: int) -> float:
        return float(np.asarray(block_macs(np.array([float(places)]), 16, 64))[0])

    def short(places: int) -> float:
        return float(np.asarray(last_block_macs(np.array([float(places)]), 1, 16, 64))[0])

    for image_exit, last in ((True, short), (False, whole)):
        program = compile_planned(model, 3, plan, image_exit=image_exit)
        found = program.executed(depths, 3)
        blocks = 2 * (4 * whole(7) + whole(2) + whole(5) + last(2) + last(5)) / 3
        once = embedding_macs(config) + head_macs(config)
        assert found.gmacs == pytest.approx((blocks + once) / 1e9)
        assert found.slots == depths.sum(), "no token goes on after its image's class token"
        over = program.executed(np.full((3, 7), 4), 3)
        assert over.gmacs == pytest.approx(found.gmacs + (3 * whole(7) + last(7) + once) / 1e9)


# Moves


@jax.jit
def packed(needed: jax.Array, of_tokens: jax.Array, of_images: jax.Array) -> tuple[jax.Array, ...]:
    move = Move.packing(needed)
    return move.rows, move.apply(of_tokens), move.apply_rows(of_images)


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=4, max_size=4))
def test_moves_sort_images_and_bring_needed_tokens_to_the_front(cells: list[list[bool]]) -> None:
    needed, labels = np.array(cells), np.arange(24).reshape(4, 6)
    rows, tokens, images = packed(jnp.asarray(needed), jnp.asarray(labels), jnp.arange(4))
    np.testing.assert_array_equal(rows, np.argsort(needed.sum(1), kind="stable"))
    expected = [[*labels[row][needed[row]], *labels[row][~needed[row]]] for row in np.asarray(rows)]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(images, rows)


def test_layouts_hold_the_first_tokens_of_each_image_group_by_group() -> None:
    layout = Layout((2, 2, 2), (0, 1, 3))
    values = jnp.arange(24).reshape(6, 4)
    flat = layout.of_tokens(values)
    assert flat.tolist() == [8, 12, 16, 17, 18, 20, 21, 22]
    assert [part.tolist() for part in layout.split(flat)] == [[[], []], [[8], [12]], [[16, 17, 18], [20, 21, 22]]]
    first, capacities = layout.of_rows()
    assert first.tolist() == [0, 0, 0, 1, 2, 5] and capacities.tolist() == [0, 0, 1, 1, 3, 3]
    assert layout.sizes == (0, 2, 6)
    np.testing.assert_array_equal(layout.joined(layout.split(flat)), flat)
    one = Layout((6,), (3,))
    np.testing.assert_array_equal(one.of_tokens(values), values[:, :3])
    np.testing.assert_array_equal(one.joined(one.split(values[:, :3])), values[:, :3])


def test_neighbours_with_the_same_capacity_are_one_group() -> None:
    assert Layout.of(2, (0, 3, 3, 3, 5)) == Layout((2, 6, 2), (0, 3, 5))
    assert Layout.of(4, (7,)) == Layout((4,), (7,))


def test_a_sort_moves_tokens_as_a_gather_does() -> None:
    """The TPU's form, which no test runs on a TPU."""
    rng = np.random.default_rng(0)
    slots = rng.permuted(np.tile(np.arange(9), (5, 1)), axis=1)
    for values in (rng.normal(size=(5, 9)).astype(np.float32), rng.integers(0, 2, (5, 9)) > 0):
        expected = [[row[slot] for slot in order] for row, order in zip(values, slots, strict=True)]
        np.testing.assert_array_equal(gathered(jnp.asarray(values), jnp.asarray(slots)), expected)
        np.testing.assert_array_equal(sorted_by(jnp.asarray(values), jnp.argsort(jnp.asarray(slots))), expected)


@pytest.mark.parametrize("before", [Layout((2, 2), (4, 5)), Layout((4,), (5,))], ids=str)
@pytest.mark.parametrize("after", [Layout((2, 2), (2, 3)), Layout((4,), (3,))], ids=str)
def test_moved_tokens_and_their_gradients(before: Layout, after: Layout) -> None:
    """Against a loop over tokens, and against the gradients that JAX derives itself from plain indexing."""
    rng = np.random.default_rng(0)
    needed = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 1, 1]], bool)
    move = Move.packing(jnp.asarray(needed))
    x = rng.normal(size=(sum(before.sizes), 3)).astype(np.float32)
    places, capacities = before.of_rows()
    rows: list[np.ndarray] = []
    for new_row, row in enumerate(np.asarray(move.rows)):
        for slot in np.asarray(move.slots)[new_row, : after.of_rows()[1][new_row]]:
            rows.append(x[places[row] + slot] if slot < capacities[row] else np.zeros(3, np.float32))
    shape = (*before.images, *before.capacities, 3) if len(before.images) == 1 else x.shape
    found = move.tokens(jnp.asarray(x).reshape(shape), before, after)
    assert found.ndim == (3 if len(after.images) == 1 else 2)
    np.testing.assert_array_equal(found.reshape(-1, 3), rows)

    y, z = jnp.asarray(rng.normal(size=(4, 5, 3))), jnp.asarray(rng.normal(size=(4, 2)))
    weight, weight_y = jnp.asarray(rng.normal(size=(sum(after.sizes), 3))), jnp.asarray(rng.normal(size=y.shape))

    def ours(x: Any, y: Any, z: Any) -> jax.Array:
        moved = move.tokens(x.reshape(shape), before, after).reshape(-1, 3)
        return (moved**2 * weight).sum() + (move.apply(y) ** 2 * weight_y).sum() + (move.apply_rows(z) ** 3)[0].sum()

    def plain(x: Any, y: Any, z: Any) -> jax.Array:
        images = [x[first : first + n] for first, n in zip(places, capacities, strict=True)]
        whole = jnp.stack([jnp.pad(image, ((0, 5 - len(image)), (0, 0))) for image in images])
        sorted_rows, sorted_y = whole[move.rows[:, None], move.slots], y[move.rows[:, None], move.slots]
        moved = jnp.concatenate([sorted_rows[i, :n] for i, n in enumerate(after.of_rows()[1])])
        return (moved**2 * weight).sum() + (sorted_y**2 * weight_y).sum() + (z[move.rows] ** 3)[0].sum()

    gradients, expected = (jax.grad(f, argnums=(0, 1, 2))(jnp.asarray(x), y, z) for f in (ours, plain))
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    text = jax.jit(jax.grad(ours)).lower(jnp.asarray(x), y, z).as_text()
    assert "stablehlo.scatter" not in text, "the gradient of a move is a move"


# Plans


@pytest.mark.parametrize("move", [0.0, 0.08, 1.5])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
def test_stages_begin_where_the_work_is_least(most: int, move: float) -> None:
    """Against every choice of boundaries."""
    rng = np.random.default_rng(most)
    for _ in range(10):
        cost = np.sort(rng.integers(0, 20, 6))[::-1].astype(float)

        def work(firsts: tuple[int, ...], cost: np.ndarray = cost) -> float:
            layers = sum((end - a) * cost[a] for a, end in zip(firsts, (*firsts[1:], 6), strict=True))
            return layers + move * sum(cost[a] for a in firsts[1:])

        choices = [(0, *more) for k in range(most) for more in itertools.combinations(range(1, 6), k)]
        found = tuple(boundaries(cost, most, move))
        assert found in choices
        assert work(found) == pytest.approx(min(map(work, choices)))


@pytest.mark.parametrize("batch_size", [8, 64])
@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_new_batches_rarely_overflow(batch_size: int, spread: float) -> None:
    """3,000 batches of images that the plan has not seen: at most a few in 1,000 do not fit, and places are saved."""
    rng = np.random.default_rng(1)
    config = small_config(image_size=56, depth=12)
    around = rng.normal(7, spread, (4000, 1)) + rng.normal(0, 2.5, (4000, config.num_tokens))
    depths = np.clip(np.rint(around), 1, 12).astype(int)
    depths[:, 0] = 9
    loads = layer_loads(depths, config, image_exit=True)
    plan = plan_loads(loads[:, :400], config, batch_size)
    new = loads[:, 400:]
    batches = (new[:, rng.integers(0, new.shape[1], batch_size)] for _ in range(3000))
    assert sum(not plan.fits(batch) for batch in batches) <= 6
    needed = loads.sum(0).mean() / (config.num_tokens * config.depth)
    assert needed < plan.share() < needed + 0.2


def test_a_plan_of_images_is_used_saved_and_read(tmp_path: Path) -> None:
    model = drawn_model(small_config())
    rng = np.random.default_rng(0)
    depths = rng.integers(1, 3, (40, 6))
    plan = avit_jax.plan(model, drawn_images(depths), 8, image_exit=False)
    assert (plan.num_tokens, plan.depth, plan.batch_size, plan.rows) == (7, 4, 8, 8)
    loads = layer_loads(np.asarray(answers(model, drawn_images(depths)).token_depth), model.config, image_exit=False)
    assert plan == plan_loads(loads, model.config, 8)
    assert plan.capacities()[-1].sum() < 4 * 7, "images that halt first need fewer places"
    plan.save(tmp_path / "plan.json")
    assert PlannedPlan.load(tmp_path / "plan.json") == plan
    assert str(PlannedPlan(7, 4, 4, 2, (Stage(0, (7, 7)), Stage(2, (0, 5))))) == (
        "groups of 2 images, tokens for each group from layer 0: 7, 7; from layer 2: 0, 5"
    )
    one, two = (avit_jax.plan(model, drawn_images(depths), 8, most_stages=most).stages for most in (1, 2))
    assert [stage.first for stage in one] == [0] and len(two) == 2


GOOD: dict[str, Any] = {
    "num_tokens": 7,
    "depth": 4,
    "batch_size": 4,
    "group_size": 2,
    "stages": [{"first": 0, "capacities": [7, 7]}, {"first": 2, "capacities": [0, 5]}],
}


@pytest.mark.parametrize(
    "content",
    [
        None,
        [],
        "plan",
        7,
        {},
        GOOD | {"more": 1},
        GOOD | {"num_tokens": 7.5},
        GOOD | {"num_tokens": True},
        GOOD | {"batch_size": 0},
        GOOD | {"batch_size": 10**30},
        GOOD | {"group_size": float("nan")},
        GOOD | {"depth": 2},
        GOOD | {"stages": []},
        GOOD | {"stages": {}},
        GOOD | {"stages": "07"},
        GOOD | {"stages": [0]},
        GOOD | {"stages": [{"first": 0}]},
        GOOD | {"stages": [{"first": 1, "capacities": [7, 7]}]},
        GOOD | {"stages": [{"first": -1, "capacities": [7, 7]}]},
        GOOD | {"stages": [{"first": 0, "capacities": [7, 7]}] * 2},
        GOOD | {"stages": [{"first": 0, "capacities": 7}]},
        GOOD | {"stages": [{"first": 0, "capacities": "77"}]},
        GOOD | {"stages": [{"first": 0, "capacities": [7]}]},
        GOOD | {"stages": [{"first": 0, "capacities": [7, 8]}]},
        GOOD | {"stages": [{"first": 0, "capacities": [-1, 7]}]},
        GOOD | {"stages": [{"first": 0, "capacities": [7, 0]}]},
        GOOD | {"stages": [{"first": 0, "capacities": [7, [7]]}]},
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    assert PlannedPlan.load(tmp_path / "good.json").groups == 2
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"bad.json is not a plan of planned execution: .*") as found:
        PlannedPlan.load(tmp_path / "bad.json")
    assert "\n" not in str(found.value) and len(str(found.value)) < 500


def test_what_does_not_fit_is_one_sentence(model: AViT) -> None:
    plan = PlannedPlan.from_json(GOOD)
    static = spread_gate(small_config(**NO_RULE))
    with pytest.raises(ValueError, match=r"planned execution needs a plan .*with avit_jax.plan\(model, images, 4\)"):
        avit_jax.compile(model, 4, execution="planned")
    for wrong, batch in ((model, 5), (spread_gate(small_config(depth=5)), 4)):
        with pytest.raises(ValueError, match="is for 7 tokens, 4 layers and 4 images on a device, and this is"):
            avit_jax.compile(wrong, batch, execution="planned", plan=plan)
    with pytest.raises(ValueError, match="is for planned execution and this one is packed: .* execution='planned'"):
        avit_jax.compile(model, 4, execution="packed", plan=plan)
    with pytest.raises(ValueError, match="is for packed execution and this one is planned"):
        avit_jax.compile(model, 4, execution="planned", plan=PackedPlan(7, 1, (7,)))
    with pytest.raises(ValueError, match="with a halting rule: this one has none"):
        compile_planned(static, 4, plan)
    with pytest.raises(ValueError, match="with a halting rule: this one has none"):
        avit_jax.plan(static, pictures(3), 4)
    with pytest.raises(ValueError, match="a plan is made from images: give a few hundred"):
        avit_jax.plan(model, pictures(0), 4)
    with pytest.raises(ValueError, match="margin is -0.1: give a fraction from 0"):
        avit_jax.plan(model, pictures(3), 4, margin=-0.1)
    with pytest.raises(ValueError, match="most_stages is 0: it must be at least 1"):
        avit_jax.plan(model, pictures(3), 4, most_stages=0)
    with pytest.raises(ValueError, match=r"they are float16: use astype\('float32'\)"):
        avit_jax.plan(model, np.zeros((3, 12, 8, 2), np.float16), 4)


def test_weights_are_not_copied_for_the_backward_pass() -> None:
    """Temporaries of few images are the gradients of the stages, which become those of all layers."""
    config = small_config(embed_dim=128, depth=6)
    plan = PlannedPlan(7, 6, 2, 2, (Stage(0, (7,)), Stage(2, (5,)), Stage(4, (4,))))
    model = AViT(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    rule = config.halting
    assert rule is not None

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return planned.forward(nnx.merge(graphdef, params), rule, images, plan)[0].logits.sum()

    memory: Any = jax.jit(jax.grad(loss)).lower(params, jnp.zeros((2, 12, 8, 2))).compile().memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.blocks)))
    assert memory.temp_size_in_bytes < 1.3 * weights
