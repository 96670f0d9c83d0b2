"""Depth by position: a NumPy loop, the work of a halting rule with the same depths, and the depths of a model."""

import dataclasses
import json
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, PositionDepths, position_depths
from avit_jax.execution import shrinking
from avit_jax.execution.work import image_gmacs, shrinking_gmacs
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import reduce
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.builders import answers, shrunk, small_config, spread_gate
from tests.harness.numpy_drop import dropping
from tests.harness.numpy_tome import Token

RNG = np.random.default_rng(0)
NO_GATE: dict[str, Any] = {"gate_scale": None, "gate_center": None}
IMAGES = RNG.normal(size=(3, 12, 8, 2)).astype(np.float32)
DEPTHS = (0.2, 2.3, 9.0, 2.6, 1.0, 4.0)  # of six patches; in four layers 1, 2, 4, 3, 1, 4
WHOLE = (1, 2, 4, 3, 1, 4)


def dense(**fields: Any) -> AViT:
    return spread_gate(small_config(**NO_GATE | fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"distilled": True, "num_registers": 1}, {"class_token": False, "pool": "mean_norm"}, {"pool": "norm_mean"}],
)
def test_against_numpy(fields: dict[str, Any]) -> None:
    model = dense(**fields)
    special, rule = model.config.num_special, PositionDepths(DEPTHS)
    output, reduced = shrunk(model, IMAGES, rule)

    def before(layer: int, tokens: list[Token], _: Any) -> list[Token]:
        return [token for token in tokens if token.special or WHOLE[token.members[0] - special] > layer]

    for image in range(len(IMAGES)):
        expected = dropping(model, IMAGES[image], before=before)
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-5)
        np.testing.assert_array_equal(output.token_depth[image], [4] * special + [*WHOLE])
    assert tuple(size.shape[1] for size in reduced.sizes) == rule.counts(model.config)
    program = avit_jax.compile(model.with_config(rule=rule), 3)
    np.testing.assert_allclose(program(IMAGES).logits, output.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("depths", "shift", "left"),
    [
        (DEPTHS, 0.0, (6, 4, 3, 2)),
        (DEPTHS, 1.0, (6, 5, 4, 3)),  # 1.2, 3.3, 10, 3.6, 2, 5
        (DEPTHS, -1.55, (6, 2, 1, 1)),  # 4.0 becomes 2.45
        (2.5, 0.0, (6, 6, 0, 0)),  # a half becomes even
        (3.5, 0.0, (6, 6, 6, 6)),
        (0.0, -1e6, (6, 0, 0, 0)),
        (0.0, 1e6, (6, 6, 6, 6)),
    ],
)
def test_counts(depths: Any, shift: float, left: tuple[int, ...]) -> None:
    rule = PositionDepths(depths, shift)
    counts = rule.counts(small_config(rule=rule))
    assert counts == tuple(1 + count for count in left)


def test_work_is_that_of_a_halting_rule_with_these_depths() -> None:
    """A token of depth d is in layers 1 to d as a whole, with its MLP."""
    for depths, shift in ((DEPTHS, 0.0), (DEPTHS, -0.7), (2.0, 0.0)):
        rule = PositionDepths(depths, shift)
        config = small_config(**NO_GATE, rule=rule)
        depth = np.clip(np.rint(np.broadcast_to(depths, 6) + shift), 1, 4).astype(np.int32)
        expected = image_gmacs(small_config(), jnp.asarray([[4, *depth]]))
        assert shrinking_gmacs(config, short_last_layer=False) == pytest.approx(float(expected[0]), rel=1e-6)
        short = image_gmacs(small_config(), jnp.asarray([[4, *depth]]), short_last_layer=True)
        assert shrinking_gmacs(config, short_last_layer=True) == pytest.approx(float(short[0]), rel=1e-6)


def test_the_neutral_setting_is_the_static_model() -> None:
    model, rule = dense(), PositionDepths(**PositionDepths.neutral)
    assert rule.acts_in(model.config) == ()
    found = shrinking.forward(model, IMAGES, rule)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), vars(found), vars(model(IMAGES)))


def test_permuted_patches() -> None:
    """Patches, positions and depths in another order give the same logits."""
    model, order = dense(), RNG.permutation(6)
    expected = shrinking.forward(model, IMAGES, PositionDepths(DEPTHS)).logits
    patches = IMAGES.reshape(3, 3, 4, 2, 4, 2).swapaxes(2, 3).reshape(3, 6, 4, 4, 2)[:, order]
    images = patches.reshape(3, 3, 2, 4, 4, 2).swapaxes(2, 3).reshape(3, 12, 8, 2)
    model.pos_embed[...] = model.pos_embed[...][:, np.array([0, *(1 + order)])]
    permuted = PositionDepths(tuple(DEPTHS[i] for i in order))
    np.testing.assert_allclose(shrinking.forward(model, images, permuted).logits, expected, atol=1e-5)


def test_a_dropped_token_has_no_influence() -> None:
    groups = PositionDepths(DEPTHS).groups(Seen(size=jnp.ones((2, 7))), layer=1, num_special=1)
    x = jnp.ones((2, 7, 3)).at[:, jnp.array([1, 5])].set(jnp.nan)
    np.testing.assert_array_equal(reduce(x, groups), jnp.ones((2, 5, 3)))
    gradient = jax.grad(lambda x: reduce(x, groups).sum())(x)
    np.testing.assert_array_equal(gradient[:, :, 0], [[1, 0, 1, 1, 1, 0, 1]] * 2)


def test_gradients_are_finite_where_only_the_class_token_is_left() -> None:
    graphdef, params = nnx.split(dense())

    @jax.jit
    def gradient(params: Any) -> Any:
        return jax.grad(
            lambda params: (
                shrinking.forward(nnx.merge(graphdef, params), IMAGES, PositionDepths(1.0)).logits ** 2
            ).sum()
        )(params)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params)))


def test_levels() -> None:
    """From one layer for each patch to all layers, one patch after the other."""
    depths = tuple(float(d) for d in RNG.uniform(1, 12, 49))
    config = small_config(image_size=28, embed_dim=64, depth=12, num_heads=4, rule=PositionDepths(depths))
    rule = config.rule.levels(types.SimpleNamespace(config=config), IMAGES)
    assert rule(0.0).counts(config) == (50, *[1] * 11) and rule(1.0).counts(config) == (50,) * 12
    counts = [sum(rule(level).counts(config)) for level in np.linspace(0, 1, 5001)]
    steps = np.diff(counts)
    assert steps.min() == 0 and steps.max() <= 3
    reading = dataclasses.replace(config, pool="norm_mean", rule=None)
    rule = config.rule.levels(types.SimpleNamespace(config=reading), IMAGES)
    assert rule(0.0).counts(reading)[-1] == 2  # one patch for the head to read


def test_depths_of_a_model() -> None:
    """Those of A-ViT's gate, patch by patch; the rule made of them does about the same work."""
    model = spread_gate(small_config(distilled=True))
    depth = np.asarray(answers(model, IMAGES).token_depth)
    found = position_depths(model, IMAGES)
    assert len(set(found)) > 1 and len(found) == 6
    np.testing.assert_allclose(found, depth[:, 2:].mean(0))
    rule = PositionDepths(found)
    controlled = model.with_config(rule=rule)
    np.testing.assert_array_equal(
        controlled(IMAGES).token_depth, [[4, 4, *np.rint(depth[:, 2:].mean(0)).astype(int)]] * 3
    )
    with pytest.raises(ValueError, match="position_depths measures a halting rule and the model has none"):
        position_depths(controlled, IMAGES)


@pytest.mark.parametrize("depths", [-1.0, math.nan, math.inf, True, "3", (), (1.0, -2.0), None])
def test_depths_are_checked(depths: Any) -> None:
    with pytest.raises(Exception, match=r"PositionDepths has a depth of|Type-check"):  # the tests' type check first
        PositionDepths(depths)


def test_other_settings_are_checked() -> None:
    for shift in (math.nan, 2e6):
        with pytest.raises(ValueError, match=f"PositionDepths' shift is {shift}: give a number from"):
            PositionDepths(3.0, shift)
    with pytest.raises(ValueError, match="PositionDepths has 2 depths and the model 6 patches: give one for each"):
        small_config(rule=PositionDepths((1.0, 2.0)))
    with pytest.raises(ValueError, match="no patch reaches the last layer and the model's head reads the patches"):
        small_config(pool="mean_norm", rule=PositionDepths(3.0))


def test_as_text_and_json() -> None:
    """A depth for each of 576 patches too, rounded to two decimals on the command line."""
    depths = tuple(round(float(d), 2) for d in RNG.uniform(1, 12, 576))
    for rule in (PositionDepths(depths, -0.25), PositionDepths(3.0)):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    assert parse_rule(f"positions(depths={list(depths)}, shift=-0.25)") == PositionDepths(depths, -0.25)
    assert parse_rule("positions(depths=3)") == PositionDepths(3.0)
    assert PositionDepths(DEPTHS, 0.5).describe() == "depth by position, 0.2 to 9 layers, shift 0.5"
    rule = object.__new__(PositionDepths)  # the tests' type check of the constructor would come first
    object.__setattr__(rule, "depths", [np.float32(0.5), 1])
    object.__setattr__(rule, "shift", np.int64(2))
    rule.__post_init__()
    assert json.dumps(rule_to_json(rule)) == '{"name": "positions", "depths": [0.5, 1.0], "shift": 2.0}'
    assert hash(rule) == hash(PositionDepths((0.5, 1.0), 2.0))
