"""What holds for every rule that stops patches by what a layer shows: ATS, attention mass and similarity."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avit_jax import ATS, AttentionMass, AViT, Similarity, compile_packed
from avit_jax.execution.plan import PackedPlan
from avit_jax.execution.work import packed_gmacs
from avit_jax.halting.rule import Halting, State
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.model.seen import Seen, of_tokens
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


def config_of(rule: Any, **fields: Any) -> AViTConfig:
    return small_config(**NO_RULE | {"rule": rule, "image_size": SIDE, "depth": DEPTH} | fields)


def made(rule: Any, **fields: Any) -> AViT:
    return spread_gate(config_of(rule, **fields))


POOLS: tuple[dict[str, Any], ...] = ({"pool": "norm_mean"}, {"pool": "token_and_mean", "num_registers": 2})


def of_pools(first: int) -> list[Any]:
    """Each rule with one of the pools, in turn; first: the pool of the first rule."""
    return [(name, POOLS[(first + place) % 2], True) for place, name in enumerate(RULES)]


@pytest.mark.parametrize(
    ("name", "fields", "image_exit"),
    [
        *((name, {}, False) for name in RULES),
        *((name, {"distilled": True, "num_registers": 1}, True) for name in RULES),
        *of_pools(0),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in of_pools(1)),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_agrees_with_removal_in_numpy_and_packed_execution_too(
    name: str, fields: dict[str, Any], image_exit: bool
) -> None:
    model = made(RULES[name], **fields)
    output = answers(model, IMAGES)
    for image in range(len(IMAGES)):
        expected = remove_tokens(model, IMAGES[image], in_numpy(RULES[name], 16))
        np.testing.assert_array_equal(output.token_depth[image], expected.token_depth)
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-4)
    assert len(np.unique(output.token_depth)) >= 3, "the sample must spread over the layers"
    np.testing.assert_array_equal(output.ponder_cost, output.token_depth + 1)
    plan = PackedPlan(model.config.num_tokens, 2, (9, model.config.num_tokens))
    packed = compile_packed(model, len(IMAGES) + 1, plan, image_exit=image_exit)(IMAGES)
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
    loads = np.full((1, DEPTH, 1), 17)  # one group that needs every token in every layer
    work = [packed_gmacs(config_of(rule), loads, 5, 5) for rule in (neutral, None)]
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


@pytest.mark.parametrize(
    ("rule", "pool"),
    [
        *zip(EXTREMES, ("token", "norm_mean", "token", "norm_mean"), strict=True),
        (RULES["ats"], "norm_mean"),
        (RULES["mass"], "token"),
    ],
    ids=str,
)
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
    state = rule.initial(3, config_of(rule, num_registers=1))
    order = rng.permuted(np.broadcast_to(np.arange(18), (3, 18)), axis=1)
    active = (rng.uniform(size=(3, 18)) < 0.7) | (order < 2)
    state = dataclasses.replace(
        state,
        active=jnp.asarray(active),
        of_tokens={
            key: jnp.asarray(np.take_along_axis(np.asarray(values), order, 1))
            for key, values in state.of_tokens.items()
        },
    )

    def values(*shape: int) -> np.ndarray:
        drawn = np.abs(rng.normal(size=(3, 18, *shape)))
        return np.where(active.reshape(3, 18, *[1] * len(shape)), drawn, garbage)

    tokens = values(16)
    near = tokens + 0.5 * np.where(active[..., None], values(16), 0)
    shown = {"before": near, "class_attention": values(), "value_norm": values()}
    facts = {key: jnp.asarray(value, jnp.float32) for key, value in shown.items()}
    after = of_tokens(jnp.asarray(tokens, jnp.float32), state.output.shape[1])
    return state, Seen(**facts, **after, active=state.active)


@every_rule
def test_a_stopped_token_has_no_influence_and_special_ones_are_known_in_any_order(name: str) -> None:
    rule = dataclasses.replace(RULES[name], thresholds=0.9) if "thresholds" in vars(RULES[name]) else RULES[name]
    advance = jax.jit(lambda state, seen: rule.advance(state, seen, layer=3, is_last=False)[0])
    found = []
    for garbage in (0.0, np.nan, 1e30, -1.0):
        state, seen = random_layer(rule, garbage)
        found.append(advance(state, seen))
        np.testing.assert_array_equal(found[-1].active, found[0].active)
        np.testing.assert_array_equal(found[-1].token_depth, found[0].token_depth)
    assert not np.any(found[0].active & ~state.active)
    if name != "similarity of images":
        assert np.all(found[0].active[state.of_tokens["special"]])
        assert np.sum(found[0].active) < np.sum(state.active)
