"""What holds for every rule that stops patches by what a layer shows: ATS, attention mass and similarity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avit_jax import ATS, AttentionMass, AViT, Similarity, compile_packed
from avit_jax.halting.rule import Halting, State
from avit_jax.model.config import NO_RULE
from avit_jax.model.seen import Seen
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.numpy_removal import remove_tokens
from tests.harness.stopping_rules import in_numpy

DEPTH, SIDE = 6, 16  # 16 patches
IMAGES = np.random.default_rng(0).normal(size=(5, SIDE, SIDE, 2)).astype(np.float32)
RULES: dict[str, Any] = {
    "ats": ATS(),
    "ats, few samples": ATS(5, (1, 3)),
    "mass": AttentionMass(0.9, (1, 2, 3)),
    "similarity": Similarity((-2.0, 0.985, 0.984, 0.985, 0.984, -2.0)),
    "similarity of images": Similarity(0.971, "image"),
}
EXTREMES = (ATS(2, (0, 1, 2, 3, 4)), AttentionMass(0.0, (0, 1, 2, 3, 4)), Similarity(-2.0), Similarity(-2.0, "image"))
every_rule = pytest.mark.parametrize("name", RULES)


def made(rule: Any, **fields: Any) -> AViT:
    config = small_config(**NO_RULE | {"rule": rule, "image_size": SIDE, "depth": DEPTH} | fields)
    return spread_gate(config)


@every_rule
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"distilled": True, "num_registers": 1},
        {"pool": "norm_mean"},
        {"pool": "token_and_mean", "num_registers": 2},
    ],
    ids=lambda fields: "-".join(fields) or "plain",
)
def test_agrees_with_removal_in_numpy_and_packed_execution_too(name: str, fields: dict[str, Any]) -> None:
    model = made(RULES[name], **fields)
    output = answers(model, IMAGES)
    for image in range(len(IMAGES)):
        expected = remove_tokens(model, IMAGES[image], in_numpy(RULES[name], 16))
        np.testing.assert_array_equal(output.token_depth[image], expected.token_depth)
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-4)
    assert len(np.unique(output.token_depth)) >= 3, "the sample must spread over the layers"
    np.testing.assert_array_equal(output.ponder_cost, output.token_depth + 1)
    for image_exit in (True, False):
        packed = compile_packed(model, len(IMAGES) + 1, image_exit=image_exit)(IMAGES)
        np.testing.assert_array_equal(packed.token_depth, output.token_depth)
        np.testing.assert_allclose(packed.head_logits, output.head_logits, atol=1e-5)


@every_rule
def test_neutral_settings_are_the_static_model(name: str) -> None:
    rule = dataclasses.replace(RULES[name], **RULES[name].neutral)
    output, static = answers(made(rule), IMAGES), answers(made(None), IMAGES)
    np.testing.assert_array_equal(output.token_depth, DEPTH)
    np.testing.assert_allclose(output.logits, static.logits, atol=1e-6)


@every_rule
def test_the_last_layer_of_packed_execution_is_as_short_as_without_a_rule(name: str) -> None:
    neutral = dataclasses.replace(RULES[name], **RULES[name].neutral)
    depth = np.full((5, 17), DEPTH)
    work = [compile_packed(made(rule), 5).executed(depth, 5).gmacs for rule in (neutral, None)]
    assert work[0] == pytest.approx(work[1])


@every_rule
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    model = made(RULES[name])
    together = answers(model, IMAGES)
    others = answers(model, np.concatenate([100 * IMAGES[2:0:-1], IMAGES[:1], 0 * IMAGES[:2]]))
    np.testing.assert_array_equal(others.token_depth[2], together.token_depth[0])
    np.testing.assert_allclose(others.logits[2], together.logits[0], atol=1e-5)


@every_rule
def test_patches_in_another_order_stop_at_the_same_layers(name: str) -> None:
    model = made(RULES[name])
    order = np.random.default_rng(1).permutation(16)
    moved = made(RULES[name])
    moved.pos_embed[...] = model.pos_embed[...][:, np.append(0, 1 + order)]
    blocks = IMAGES.reshape(-1, 4, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 4, 4, 2)[:, order]
    images = blocks.reshape(-1, 4, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(IMAGES.shape)
    expected, found = answers(model, IMAGES), answers(moved, images)
    np.testing.assert_array_equal(found.token_depth[:, 1:], np.asarray(expected.token_depth)[:, 1 + order])
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize("rule", [*EXTREMES, *(RULES[name] for name in ("ats", "mass"))], ids=str)
@pytest.mark.parametrize("pool", ["token", "norm_mean"])
def test_gradients_are_finite_and_special_tokens_stay_at_the_extremes(rule: Any, pool: str) -> None:
    model = made(rule, pool=pool, num_registers=2)
    graphdef, params = nnx.split(model)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        output, _, _ = nnx.merge(graphdef, params).forward(IMAGES, jax.random.key(0))
        return (output.logits**2).sum(), output.token_depth

    (value, depth), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    whole_image = isinstance(rule, Similarity) and rule.form == "image"
    np.testing.assert_array_equal(depth[:, :3], 2 if whole_image else DEPTH)
    assert np.min(depth) < DEPTH


def random_layer(rule: Halting, garbage: float) -> tuple[State, Seen]:
    """Tokens have stopped and moved, as in packed execution; stopped ones have `garbage` for values."""
    rng = np.random.default_rng(2)
    state = rule.initial(3, made(rule, num_registers=1).config)
    order = rng.permuted(np.broadcast_to(np.arange(18), (3, 18)), axis=1)
    active = rng.uniform(size=(3, 18)) < 0.7
    state = dataclasses.replace(
        state,
        active=jnp.asarray(active | (order < 2)),
        of_tokens={key: jnp.take_along_axis(values, order, 1) for key, values in state.of_tokens.items()},
    )

    def values(*shape: int) -> jax.Array:
        drawn = np.abs(rng.normal(size=(3, 18, *shape)))
        return jnp.where(jnp.expand_dims(state.active, tuple(range(2, 2 + len(shape)))), drawn, garbage)

    tokens = values(16)
    near = tokens + 0.5 * jnp.where(state.active[..., None], values(16), 0)
    return state, Seen(tokens=tokens, before=near, class_attention=values(), value_norm=values(), active=state.active)


@every_rule
def test_a_stopped_token_has_no_influence_and_special_ones_are_known_in_any_order(name: str) -> None:
    rule = dataclasses.replace(RULES[name], thresholds=0.9) if "thresholds" in vars(RULES[name]) else RULES[name]
    found = []
    for garbage in (0.0, np.nan, 1e30, -1.0):
        state, seen = random_layer(rule, garbage)
        found.append(rule.advance(state, seen, layer=3, is_last=False)[0])
        np.testing.assert_array_equal(found[-1].active, found[0].active)
        np.testing.assert_array_equal(found[-1].token_depth, found[0].token_depth)
    assert not np.any(found[0].active & ~state.active)
    if name != "similarity of images":
        assert np.all(found[0].active[state.of_tokens["special"]])
        assert np.sum(found[0].active) < np.sum(state.active)
