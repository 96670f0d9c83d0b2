"""Shrinking execution: against recorded outputs, a NumPy loop, the static model, and as a compiled program."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, ToMe
from avit_jax.execution import shrinking
from avit_jax.execution.work import shrinking_gmacs
from tests.harness.arrays import read_npz
from tests.harness.builders import shrunk, small_config, spread_gate
from tests.harness.devices import run_on_devices
from tests.harness.numpy_tome import tome

DATA = Path(__file__).parent / "data" / "methods"
ARCHITECTURE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes", "distilled")
SLOW = ("decreasing", "noprop")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 16, 16, 2)).astype(np.float32)


def dense(**fields: Any) -> AViT:
    """16 patches, two layers, no rule."""
    return spread_gate(
        small_config(**({"image_size": 16, "depth": 2, "gate_scale": None, "gate_center": None} | fields))
    )


# Each compiles twelve layers of different shapes; the gate runs the slow ones too.
@pytest.mark.parametrize("name", ["r5", "big-r", "distilled", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_recorded_outputs(name: str) -> None:
    recorded = read_npz(DATA / f"tome-{name}.npz")
    meta = json.loads(str(recorded["meta"]))
    weights = read_npz(DATA / f"{meta['weights']}.npz")
    model = avit_jax.from_torch_state_dict(weights, **{field: meta[field] for field in ARCHITECTURE})
    rule = ToMe(tuple(meta["r"]), meta["proportional_attention"])
    output, reduced = shrunk(model, recorded["images"].transpose(0, 2, 3, 1), rule)
    np.testing.assert_allclose(output.logits, recorded["logits"], atol=1e-5)
    for layer, size in enumerate(reduced.sizes):
        np.testing.assert_array_equal(size, recorded[f"size_{layer}"])
    slots = np.arange(recorded["source"].shape[1])
    np.testing.assert_array_equal(np.asarray(reduced.slots[-1])[:, None] == slots[:, None], recorded["source"] > 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"distilled": True, "rule": ToMe((6, 2), False)},
        {"num_registers": 2, "pool": "norm_mean"},
        {"class_token": False, "num_registers": 0, "pool": "mean_norm", "rule": ToMe(3)},
        {"pool": "token_and_mean", "num_registers": 1},
    ],
)
def test_against_numpy(fields: dict[str, Any]) -> None:
    fields = {"rule": ToMe((5, 4))} | fields
    rule = fields.pop("rule")
    model = dense(**fields)
    output, reduced = shrunk(model, IMAGES, rule)
    for image in range(len(IMAGES)):
        expected = tome(model, IMAGES[image], list(np.broadcast_to(rule.r, 2)), rule.proportional)
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-5)
        np.testing.assert_array_equal(output.token_depth[image], expected.token_depth)
        np.testing.assert_array_equal(output.ponder_cost[image], np.array(expected.token_depth) + 1)
        for slots, sizes, members in zip(reduced.slots, reduced.sizes, expected.members, strict=True):
            assert [sorted(np.flatnonzero(slots[image] == slot)) for slot in range(len(members))] == [
                sorted(group) for group in members
            ]
            np.testing.assert_array_equal(sizes[image], [len(group) for group in members])
    assert tuple(size.shape[1] for size in reduced.sizes) == rule.counts(model.config)
    assert not np.any(output.halting_scores)


@pytest.mark.parametrize(("pool", "training"), [("token", True), ("mean_norm", False)])
def test_without_merging_it_is_the_static_model(pool: str, training: bool) -> None:
    """In training too, with the same dropout and stochastic depth."""
    model = dense(pool=pool, drop_rate=0.2, drop_path_rate=0.4, depth=3)
    key = jax.random.key(3) if training else None
    expected, *_ = model.forward(IMAGES, key)
    found = shrinking.forward(model, IMAGES, ToMe(0), key=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), vars(found), vars(expected))


def test_the_short_last_layer_without_a_rule() -> None:
    model = dense(depth=3)
    short = shrinking.forward(model, IMAGES, None, short_last_layer=True)
    np.testing.assert_allclose(short.logits, model(IMAGES).logits, atol=1e-5)


def test_layers_without_a_reduction_are_scanned() -> None:
    """Layer by layer with tokens merged in layer 2 alone, and dropout: as NumPy has it where nothing is dropped."""
    assert shrinking.stretches(5, (2,), False) == [(0, 2), (2, 3), (3, 5)]
    assert shrinking.stretches(5, (2,), True) == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert shrinking.stretches(2, (0, 1), True) == [(0, 1), (1, 2)]
    assert shrinking.stretches(1, (), True) == [(0, 1)]
    model, rule = dense(depth=5), ToMe((0, 0, 8, 0, 0))
    output = shrinking.forward(model, IMAGES[:1], rule, short_last_layer=True)
    expected = tome(model, IMAGES[0], [0, 0, 8, 0, 0])
    np.testing.assert_allclose(output.logits[0], expected.logits, atol=1e-4)
    np.testing.assert_array_equal(output.token_depth[0], expected.token_depth)
    assert sorted(set(expected.token_depth)) == [3, 5]


def test_an_image_does_not_depend_on_its_batch() -> None:
    model, rule = dense(), ToMe(5)
    together = shrinking.forward(model, IMAGES, rule)
    others = np.concatenate([100 * RNG.normal(size=(2, 16, 16, 2)).astype(np.float32), IMAGES[:1]])
    moved = shrinking.forward(model, others, rule)
    np.testing.assert_allclose(moved.logits[2], together.logits[0], atol=1e-5)
    np.testing.assert_array_equal(moved.token_depth[2], together.token_depth[0])


def test_special_tokens_outlast_any_r() -> None:
    model = dense(distilled=True, num_registers=1, depth=6)
    reduced = shrinking.follow_tokens(model, IMAGES, ToMe(1000))
    assert reduced.sizes[-1].shape == (3, 4)
    np.testing.assert_array_equal(reduced.sizes[-1], [[1, 1, 1, 16]] * 3)
    np.testing.assert_array_equal(reduced.slots[-1][:, :3], [[0, 1, 2]] * 3)


def test_gradients() -> None:
    """Finite, the same with remat, and the slope of the loss along a random direction."""
    model = dense(pool="norm_mean")
    graphdef, params = nnx.split(model)
    direction = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), jnp.float32), params)

    def gradient(graphdef: nnx.GraphDef) -> Any:
        def loss(params: Any) -> jax.Array:
            return (shrinking.forward(nnx.merge(graphdef, params), IMAGES, ToMe((7, 0))).logits ** 2).sum()

        return jax.jit(jax.value_and_grad(loss))

    def value_at(step: float) -> float:
        return float(function(jax.tree.map(lambda p, d: p + step * d, params, direction))[0])

    function = gradient(graphdef)
    _, found = function(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), found, direction)))
    np.testing.assert_allclose(slope, (value_at(1e-3) - value_at(-1e-3)) / 2e-3, rtol=1e-2)
    _, remat = gradient(nnx.graphdef(model.with_config(remat=True)))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, remat)


def test_models_with_the_rule() -> None:
    model = dense(depth=3)
    merging = model.with_config(rule=ToMe(3))
    expected = shrinking.forward(model, IMAGES, ToMe(3))
    jax.tree.map(np.testing.assert_array_equal, vars(merging(IMAGES)), vars(expected))
    assert set(np.unique(expected.token_depth)) == {1, 2, 3}

    program = avit_jax.compile(merging, 3)
    short = program(IMAGES[:2])
    np.testing.assert_allclose(short.logits, expected.logits[:2], atol=1e-5)
    np.testing.assert_array_equal(short.token_depth, expected.token_depth[:2])
    # Tokens that enter the layers: 17, 14, 11. The last one compares nothing: what it would merge is not read.
    executed = program.executed(np.asarray(short.token_depth), 2)
    assert executed.slots == 2 * (17 + 14 + 11)
    assert executed.gmacs == pytest.approx(shrinking_gmacs(merging.config, short_last_layer=True) + (72 + 49) * 8 / 1e9)

    assert jax.make_jaxpr(program.jitted)(*program.abstract_arguments).consts == []
    with jax.numpy_rank_promotion("raise"):
        lowered = jax.export.export(program.jitted, platforms=["cuda"])(*program.abstract_arguments)
    assert lowered.platforms == ("cuda",) and lowered.out_avals[0].shape == (3, 5)


@pytest.mark.slow
def test_eight_devices_give_the_same_logits_and_gradients() -> None:
    assert "8 devices agree" in run_on_devices("shrinking_on_devices.py")
