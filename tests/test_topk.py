"""EViT, top-k and random drop: recorded outputs, a NumPy loop, and what holds for every setting."""

import dataclasses
import itertools
import json
import math
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, EViT, RandomDrop, TopK
from avit_jax.execution import shrinking
from avit_jax.execution.work import shrinking_gmacs
from avit_jax.model.presets import config_from
from avit_jax.model.rule import image_keys
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Reduction, reduce
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.arrays import read_npz
from tests.harness.builders import shrunk, small_config, spread_gate
from tests.harness.numpy_drop import dropping, kept_and_fused
from tests.harness.numpy_tome import Result, Token

DATA = Path(__file__).parent / "data" / "methods"
ARCHITECTURE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 16, 16, 2)).astype(np.float32)
KINDS = (EViT, TopK, RandomDrop)


def dense(**fields: Any) -> AViT:
    """16 patches, three layers, no rule."""
    return spread_gate(
        small_config(**({"image_size": 16, "depth": 3, "gate_scale": None, "gate_center": None} | fields))
    )


def known(batch: int, tokens: int, attention: Any = None) -> Seen:
    attention = RNG.uniform(size=(batch, tokens)) if attention is None else attention
    return Seen(class_attention=jnp.asarray(attention, jnp.float32), size=jnp.ones((batch, tokens)))


def keys(batch: int, layer: int = 0) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(image_keys(jnp.asarray(IMAGES[:batch])), layer)


def in_numpy(model: AViT, image: np.ndarray, rule: Any) -> Result:
    """The rule as its equations have it, one image alone."""
    rates = dict(zip(rule.layers, np.broadcast_to(rule.keep_rate, len(rule.layers)), strict=True))
    special = model.config.num_special

    def between(layer: int, tokens: list[Token], class_attention: np.ndarray) -> list[Token]:
        if layer not in rates:
            return tokens
        patches = tokens[special:]
        if isinstance(rule, RandomDrop):
            key = jax.random.fold_in(image_keys(jnp.asarray(image[None]))[0], layer)
            scores = np.asarray(jax.random.uniform(jax.random.fold_in(key, rule.seed), (len(tokens),)))[special:]
        else:
            scores = class_attention[special:]
        kept = math.ceil(round(rates[layer] * len(patches), 6))
        return tokens[:special] + kept_and_fused(patches, scores, kept, isinstance(rule, EViT))

    return dropping(model, image, between=between)


@pytest.mark.parametrize("name", ["evit-fuse-0.7", pytest.param("evit-fuse-0.5", marks=pytest.mark.slow), "topk-0.7"])
def test_recorded_outputs(name: str) -> None:
    recorded = read_npz(DATA / f"{name}.npz")
    meta = json.loads(str(recorded["meta"]))
    weights = read_npz(DATA / f"{meta['weights']}.npz")
    model = avit_jax.from_torch_state_dict(weights, **{field: meta[field] for field in ARCHITECTURE})
    rule = (EViT if meta["fuse"] else TopK)(float(meta["keep"][3]))
    output, reduced = shrunk(model, recorded["images"].transpose(0, 2, 3, 1), rule)
    np.testing.assert_allclose(output.logits, recorded["logits"], atol=1e-5)
    for image in range(len(output.logits)):
        there = [frozenset([patch]) for patch in range(1, model.config.num_tokens)]  # in the published code's order
        for layer in rule.layers:
            kept = recorded[f"kept_{layer}"][image]
            dropped = set(range(len(there))) - set(kept)
            there = [there[i] for i in kept] + [frozenset().union(*(there[i] for i in dropped))] * meta["fuse"]
            slots = np.asarray(reduced.slots[layer][image])
            found = [frozenset(np.flatnonzero(slots == slot)) for slot in range(1, len(there) + 1)]
            assert set(found) == set(there)
            assert not meta["fuse"] or found[-1] == there[-1]


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        (EViT(0.6, (0, 1, 2)), {}),
        (EViT((0.95, 0.3), (0, 2)), {"distilled": True, "pool": "token"}),  # one token dropped, and fused
        (EViT(0.5, (0, 1)), {"num_registers": 2, "pool": "token_and_mean"}),
        (TopK((0.7, 0.4), (0, 1)), {"distilled": True}),
        (TopK(0.6, (0, 2)), {"num_registers": 1, "pool": "norm_mean"}),
        (RandomDrop(0.6, (0, 1), seed=3), {}),
        (RandomDrop(0.5, (1,)), {"class_token": False, "pool": "mean_norm"}),
    ],
)
def test_against_numpy(rule: Any, fields: dict[str, Any]) -> None:
    model = dense(**fields)
    output, reduced = shrunk(model, IMAGES, rule)
    for image in range(len(IMAGES)):
        expected = in_numpy(model, IMAGES[image], rule)
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-5)
        np.testing.assert_array_equal(output.token_depth[image], expected.token_depth)
        for slots, sizes, members in zip(reduced.slots, reduced.sizes, expected.members, strict=True):
            assert [sorted(np.flatnonzero(slots[image] == slot)) for slot in range(len(members))] == [
                sorted(group) for group in members
            ]
            np.testing.assert_array_equal(sizes[image], [len(group) for group in members])
    assert tuple(size.shape[1] for size in reduced.sizes) == rule.counts(model.config)


@pytest.mark.parametrize(
    ("rule", "image_size", "counts", "acts"),
    [
        (TopK(0.07, (0,)), 40, (8, 8, 8, 8), (0,)),  # of 100 patches: 0.07 * 100 is above 7
        (TopK(0.7, (0, 1, 3)), 40, (71, 50, 50, 36), (0, 1, 3)),
        (EViT(0.7, (0, 1, 3)), 40, (72, 52, 52, 38), (0, 1, 3)),  # 70 + 1, ceil(49.7) + 1, ceil(35.7) + 1
        (EViT(0.98, (0, 1)), 16, (17, 17, 17, 17), ()),  # ceil(15.7) is 16
        (EViT(0.9375, (0, 1)), 16, (17, 17, 17, 17), (0, 1)),  # 15 and the one dropped token
        (TopK((1.0, 0.5), (0, 1)), 16, (17, 9, 9, 9), (1,)),
        (EViT(1e-30, (0, 1, 2)), 16, (3, 3, 3, 3), (0, 1, 2)),
        (TopK(1e-30, (0, 1, 2)), 16, (2, 2, 2, 2), (0,)),
    ],
)
def test_counts(rule: Any, image_size: int, counts: tuple[int, ...], acts: tuple[int, ...]) -> None:
    config = small_config(image_size=image_size, rule=rule)
    assert rule.counts(config) == counts
    assert rule.acts_in(config) == acts
    random = RandomDrop(rule.keep_rate, rule.layers)
    if isinstance(rule, TopK) and not isinstance(rule, EViT):
        assert random.counts(config) == counts


def test_of_equal_tokens_the_first_stay() -> None:
    attention = np.array([[9.0, 0.5, 0.1, 0.5, 0.5, 0.1, 0.9]])
    groups = TopK(0.5, (0,)).groups(known(1, 7, attention), layer=0, num_special=1)
    np.testing.assert_array_equal(groups.leader[0], [0, 1, 3, 6])
    np.testing.assert_array_equal(groups.into[0], [0, 1, 4, 2, 4, 4, 3])
    fused = EViT(0.5, (0,)).groups(known(1, 7, attention), layer=0, num_special=1)
    np.testing.assert_array_equal(fused.leader[0], [0, 1, 3, 6, 2])
    np.testing.assert_array_equal(fused.joins[0], [4, 5])
    np.testing.assert_array_equal(fused.into[0], [0, 1, 4, 2, 4, 4, 3])
    np.testing.assert_allclose(fused.weight[0], [1, 1, 0.1, 1, 0.5, 0.1, 1])
    np.testing.assert_array_equal(fused.size[0], [1, 1, 1, 1, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_the_neutral_setting_is_the_static_model(kind: Any) -> None:
    model = dense()
    found = shrinking.forward(model, IMAGES, kind(**kind.neutral))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), vars(found), vars(model(IMAGES)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_batch(kind: Any) -> None:
    model, rule = dense(), kind(0.5, (0, 1))
    together = shrinking.forward(model, IMAGES, rule)
    others = np.concatenate([100 * RNG.normal(size=(2, 16, 16, 2)).astype(np.float32), IMAGES[:1]])
    moved = shrinking.forward(model, others, rule)
    np.testing.assert_allclose(moved.logits[2], together.logits[0], atol=1e-5)
    np.testing.assert_array_equal(moved.token_depth[2], together.token_depth[0])


@pytest.mark.parametrize("kind", [TopK, RandomDrop])
def test_a_dropped_token_has_no_influence(kind: Any) -> None:
    """Not even if it is NaN, neither on the tokens that stay nor on their gradients."""
    groups = kind(0.4, (0,)).groups(known(3, 11), layer=0, num_special=1, draw=keys(3))
    assert groups is not None
    dropped = groups.into == groups.leader.shape[1]
    np.testing.assert_array_equal(dropped.sum(1), 6)
    x = jnp.where(dropped[..., None], jnp.nan, jnp.asarray(RNG.normal(size=(3, 11, 2)), jnp.float32))
    assert np.isfinite(reduce(x, groups)).all()
    gradient = jax.grad(lambda x: reduce(x, groups).sum())(x)
    np.testing.assert_array_equal(gradient, jnp.where(dropped[..., None], 0.0, jnp.ones_like(x)))


@pytest.mark.parametrize("kind", [EViT, TopK])
def test_permuted_patches(kind: Any) -> None:
    """Patches with their positions in another order: the same ones stay, with the same logits."""
    model, rule, order = dense(), kind(0.6, (0, 1)), RNG.permutation(16)
    output, reduced = shrunk(model, IMAGES, rule)
    patches = IMAGES.reshape(3, 4, 4, 4, 4, 2).swapaxes(2, 3).reshape(3, 16, 4, 4, 2)[:, order]
    images = patches.reshape(3, 4, 4, 4, 4, 2).swapaxes(2, 3).reshape(3, 16, 16, 2)
    tokens = np.array([0, *(1 + order)])
    model.pos_embed[...] = model.pos_embed[...][:, tokens]
    permuted, choices = shrunk(model, images, rule)
    np.testing.assert_allclose(permuted.logits, output.logits, atol=1e-5)
    for layer in range(3):
        gone, slots = reduced.sizes[layer].shape[1], reduced.slots[layer]
        stays = slots < gone - rule.fuses
        np.testing.assert_array_equal(choices.slots[layer] < gone - rule.fuses, np.asarray(stays)[:, tokens])


def test_gradients() -> None:
    """Finite where one patch is left, and along a direction the slope of a loss, by steps that change no choice."""
    model, rng = dense(pool="norm_mean"), np.random.default_rng(5)
    graphdef, params = nnx.split(model)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    for rule in (EViT(0.4, (0,)), EViT(1e-9, (0, 1, 2)), TopK(1e-9, (0, 1))):

        @jax.jit
        def function(params: Any, rule: Any = rule) -> Any:
            def loss(params: Any) -> jax.Array:
                return (shrinking.forward(nnx.merge(graphdef, params), IMAGES, rule).logits ** 2).sum()

            return jax.value_and_grad(loss)(params)

        def value_at(step: float, function: Any = function) -> float:
            return float(function(jax.tree.map(lambda p, d: p + step * d, params, direction))[0])

        _, found = function(params)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), found, direction)))
        np.testing.assert_allclose(slope, (value_at(2e-5) - value_at(-2e-5)) / 4e-5, rtol=1e-2)


def test_gradients_go_through_the_weights_and_not_through_the_choice() -> None:
    attention, size = jnp.array([[0.3, 0.4, 0.1, 0.2]]), jnp.ones((1, 4))
    y = jnp.asarray(RNG.normal(size=(1, 4, 2)), jnp.float32)

    def sum_under(rule: Any) -> Any:
        def value(attention: jax.Array) -> jax.Array:
            groups = rule.groups(Seen(class_attention=attention, size=size), layer=0, num_special=1)
            return reduce(y, groups).sum()

        return value

    dropped = jnp.array([0, 0, 1, 1])[None]
    np.testing.assert_allclose(jax.grad(sum_under(EViT(0.3, (0,))))(attention), dropped * y.sum(-1), atol=1e-6)
    np.testing.assert_array_equal(jax.grad(sum_under(TopK(0.3, (0,))))(attention), 0)


def test_draws_differ_by_image_layer_and_seed_alone() -> None:
    def stays(seed: int, layer: int) -> np.ndarray:
        groups = RandomDrop(0.5, (layer,), seed).groups(known(3, 33), layer=layer, num_special=1, draw=keys(3, layer))
        return np.asarray(groups.into < groups.leader.shape[1])

    first = stays(0, 0)
    np.testing.assert_array_equal(first, stays(0, 0))
    for other in (first[[1, 2, 0]], stays(1, 0), stays(0, 1)):
        assert (other != first).sum(1).min() > 4
    often = np.mean([stays(seed, 0)[:, 1:].mean(0) for seed in range(60)], axis=0)
    assert often.min() > 0.3 and often.max() < 0.7  # each of 32 patches stays in about half of 180 draws


@pytest.mark.parametrize("kind", KINDS)
def test_levels(kind: Any) -> None:
    """From one patch to all of them; each step is a token of one layer, so budgets are met within 1 %."""
    config = small_config(
        image_size=28, in_channels=1, embed_dim=64, depth=12, num_heads=4, num_classes=10, rule=kind(0.7)
    )
    rule = config.rule.levels(types.SimpleNamespace(config=config), IMAGES)
    fused = kind.fuses
    assert rule(0.0).counts(config) == (50,) * 3 + (2 + fused,) * 9
    assert rule(1.0).counts(config) == (50,) * 12 and rule(1.0).acts_in(config) == ()
    counts = [rule(level).counts(config) for level in np.linspace(0, 1, 2001)]
    for less, more in itertools.pairwise(counts):
        assert all(a <= b for a, b in zip(less, more, strict=True))
    work = [
        shrinking_gmacs(dataclasses.replace(config, rule=rule(level)), short_last_layer=True)
        for level in np.linspace(0.3, 1, 501)
    ]
    for target in (0.0273, 0.0235, 0.0199, 0.0164):
        assert min(abs(w - target) for w in work) < 0.004 * target
    assert rule(0.7).layers == (3, 6, 9) and type(rule(0.7)) is kind


@pytest.mark.parametrize(
    ("preset", "rate", "gmacs"),
    [("deit_small_patch16_224", 0.7, 3.0), ("deit_small_patch16_224", 0.5, 2.3), ("deit_small_patch16_224", 0.9, 4.0)],
)
def test_published_work(preset: str, rate: float, gmacs: float) -> None:
    """What EViT's published table has, to its one decimal."""
    config = config_from(preset, rule=EViT(rate))
    assert shrinking_gmacs(config, short_last_layer=False) == pytest.approx(gmacs, abs=0.05)


def test_models_with_the_rule() -> None:
    model = dense().with_config(rule=EViT(0.5, (0, 1)))
    expected = shrinking.forward(model, IMAGES, model.config.rule)
    jax.tree.map(np.testing.assert_array_equal, vars(model(IMAGES)), vars(expected))
    program = avit_jax.compile(model, 3)
    short = program(IMAGES[:2])
    np.testing.assert_allclose(short.logits, expected.logits[:2], atol=1e-5)
    # Tokens that enter the layers: 17; 8 + 1 patches; 5 + 1 patches.
    assert program.executed(np.asarray(short.token_depth), 2).slots == 2 * (17 + 10 + 7)


@pytest.mark.parametrize("rate", [0.0, -0.5, 1.1, math.nan, True, "0.7", None, (0.7, 0.0, 0.7), ()])
def test_keep_rate_is_checked(rate: Any) -> None:
    with pytest.raises(Exception, match=r"EViT's keep_rate (is|has)|Type-check"):  # the tests' type check comes first
        EViT(rate)


@pytest.mark.parametrize("layers", [(), (3, 3), (6, 3), (-1, 2), (1.5,), (True,), 3])
def test_layers_are_checked(layers: Any) -> None:
    with pytest.raises(Exception, match=r"TopK's layers are|Type-check"):
        TopK(0.7, layers)


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        (EViT(0.7), {}, r"EViT's layers are \(3, 6, 9\) and the model's last layer is 3: give .* layers=\(1, 2, 3\)"),
        (RandomDrop(0.7), {"depth": 1}, r"RandomDrop's layers are .* last layer is 0: .* layers=\(0,\)"),
        (TopK(0.7), {"depth": 9}, r"such as layers=\(2, 4, 6\)"),
        (EViT(0.7, (1,)), {"class_token": False, "pool": "mean_norm"}, "EViT reads the class token's attention and"),
    ],
)
def test_models_that_do_not_fit(rule: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(rule=rule, **fields)


def test_other_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="TopK's keep_rate has 2 numbers and layers has 3: give one for each layer"):
        TopK((0.7, 0.6))
    for seed in (-1, 2**31):
        with pytest.raises(ValueError, match=f"RandomDrop's seed is {seed}: give a whole number from 0"):
            RandomDrop(0.7, seed=seed)


def test_numpy_numbers_become_plain_ones() -> None:
    rule = object.__new__(RandomDrop)  # the tests' type check of the constructor would come first
    settings = {"keep_rate": [np.float32(0.5), 1], "layers": [np.int64(1), 2], "seed": np.int32(4)}
    for name, value in settings.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    assert json.loads(json.dumps(rule_to_json(rule))) == {
        "name": "random",
        "keep_rate": [0.5, 1.0],
        "layers": [1, 2],
        "seed": 4,
    }


def test_as_text_and_json() -> None:
    for rule in (EViT(0.7), TopK((0.7, 0.5), (1, 2)), RandomDrop(0.5, (0,), seed=7)):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule and isinstance(rule, Reduction)
    assert parse_rule("evit(keep_rate=0.7)") == EViT(0.7) != TopK(0.7)
    assert parse_rule("topk(keep_rate=(0.7, 1), layers=(1, 2))") == TopK((0.7, 1.0), (1, 2))
    assert parse_rule("random(keep_rate=1, layers=[0], seed=3)") == RandomDrop(1.0, (0,), 3)
    assert EViT((0.7, 0.5), (1, 2)).describe() == "EViT, keep_rate 0.7, 0.5 in layers 1, 2"
