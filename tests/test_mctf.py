"""MCTF: recorded outputs, a NumPy loop, the sums before the values, and the properties of every reduction."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import MCTF, AViT
from avit_jax.execution import shrinking
from avit_jax.execution.work import image_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.model.layers import Block
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Reduction, spread
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.arrays import read_npz
from tests.harness.builders import shrunk, small_config, spread_gate
from tests.harness.numpy_mctf import mctf

DATA = Path(__file__).parent / "data" / "methods"
ARCHITECTURE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 20, 20, 2)).astype(np.float32)


def dense(**fields: Any) -> AViT:
    """25 patches, two layers, no rule."""
    return spread_gate(small_config(**({"image_size": 20, "depth": 2} | NO_RULE | fields)))


def merges_of(rule: MCTF, model: AViT) -> list[int]:
    counts = (model.config.num_tokens, *rule.counts(model.config))
    return [before - after for before, after in itertools.pairwise(counts)]


@pytest.mark.parametrize("name", ["fast-0.35", pytest.param("r5", marks=pytest.mark.slow)])
def test_recorded_outputs(name: str) -> None:
    recorded = read_npz(DATA / f"mctf-{name}.npz")
    meta = json.loads(str(recorded["meta"]))
    weights = read_npz(DATA / f"{meta['weights']}.npz")
    model = avit_jax.from_torch_state_dict(weights, **{field: meta[field] for field in ARCHITECTURE})
    rule = MCTF(meta["r"], tuple(meta["layers"]))
    output, reduced = shrunk(model, recorded["images"].transpose(0, 2, 3, 1), rule)
    np.testing.assert_allclose(output.logits, recorded["logits"], atol=1e-5)
    np.testing.assert_array_equal(reduced.sizes[-1], recorded["sizes"])
    if name == "r5":
        assert MCTF(meta["r"]).counts(model.config) == rule.counts(model.config)


@pytest.mark.parametrize(
    "fields",
    [
        {"depth": 3, "rule": MCTF((5, 4))},
        {"distilled": True, "rule": MCTF(0.4, (0, 1))},
        {"distilled": True, "num_registers": 1, "rule": MCTF((1, 6), (0, 1))},
        {"class_token": False, "pool": "mean_norm", "rule": MCTF(7, (0,))},
        {"pool": "norm_mean", "qkv_bias": False, "rule": MCTF(100, (1,))},
    ],
)
def test_against_numpy(fields: dict[str, Any]) -> None:
    rule = fields["rule"]
    model = dense(**{name: value for name, value in fields.items() if name != "rule"})
    output, reduced = shrunk(model, IMAGES, rule, short_last_layer=True)
    for image in range(len(IMAGES)):
        expected = mctf(model, IMAGES[image], merges_of(rule, model))
        np.testing.assert_allclose(output.logits[image], expected.logits, atol=1e-5)
        for slots, sizes, members in zip(reduced.slots, reduced.sizes, expected.members, strict=True):
            assert [sorted(np.flatnonzero(slots[image] == slot)) for slot in range(len(members))] == [
                sorted(group) for group in members
            ]
            np.testing.assert_array_equal(sizes[image], [len(group) for group in members])
    assert tuple(size.shape[1] for size in reduced.sizes) == rule.counts(model.config)


@pytest.mark.parametrize(("num_special", "patches", "r"), [(0, 12, 2), (1, 10, 1), (1, 20, 9), (2, 21, 10), (3, 16, 6)])
def test_groups_of_every_size(num_special: int, patches: int, r: int) -> None:
    """Sizes add up, special tokens stay first and alone, leaders and joining tokens are all there are."""
    tokens = num_special + patches
    known = Seen(
        before=jnp.asarray(RNG.normal(size=(2, tokens, 4)), jnp.float32),
        attention_received=jnp.asarray(RNG.uniform(0.01, 0.1, (2, tokens)), jnp.float32),
        size=jnp.asarray(RNG.integers(1, 5, (2, tokens)), jnp.float32),
    )
    groups = jax.jit(lambda known: MCTF(r).groups(known, layer=1, num_special=num_special))(known)
    assert groups is not None and known.size is not None and known.attention_received is not None
    np.testing.assert_array_equal(groups.size.sum(1), known.size.sum(1))
    np.testing.assert_allclose(groups.weight, known.size * known.attention_received, rtol=1e-6)
    for image in range(2):
        into, leader, joins = (np.asarray(x[image]) for x in (groups.into, groups.leader, groups.joins))
        assert sorted([*leader, *joins]) == list(range(tokens)) and len(joins) == r
        np.testing.assert_array_equal(into[leader], np.arange(tokens - r))
        np.testing.assert_array_equal(leader[:num_special], np.arange(num_special))
        np.testing.assert_array_equal(np.bincount(into, known.size[image]), groups.size[image])
        assert (into[joins] >= num_special).all()
        assert sum(joins % 2 == 0) == r // 2


def test_a_chain_of_two_steps_ends_in_one_slot() -> None:
    """Token 2 joins its twin 3, which joins 4: all three are in the slot of the even one that stays."""
    tokens = np.eye(12, dtype=np.float32)
    tokens[3] = tokens[2]
    tokens[4] = tokens[2] + tokens[4] / 2
    known = Seen(before=jnp.asarray(tokens[None]), attention_received=jnp.full((1, 12), 0.1), size=jnp.ones((1, 12)))
    groups = MCTF(2).groups(known, layer=1, num_special=0)
    assert groups is not None
    np.testing.assert_array_equal(groups.into[0, 2:5], [1, 1, 1])
    np.testing.assert_array_equal(groups.leader[0, :5], [0, 4, 6, 8, 10])
    np.testing.assert_array_equal(groups.joins[0], [2, 3])
    np.testing.assert_array_equal(groups.size[0], [1, 3, *[1] * 8])


@pytest.mark.parametrize("scarce", ["attention", "size"])
def test_little_attended_and_small_tokens_merge_first(scarce: str) -> None:
    """All tokens are alike: 5 and 6 differ from the others in one respect alone."""
    low = jnp.ones((1, 12)).at[0, jnp.array([5, 6])].set(0.5)
    received, size = (0.1 * low, 2 * jnp.ones((1, 12))) if scarce == "attention" else (0.1 * jnp.ones((1, 12)), 2 * low)
    groups = MCTF(1).groups(
        Seen(before=jnp.ones((1, 12, 3)), attention_received=received, size=size), layer=1, num_special=0
    )
    assert groups is not None and int(groups.joins[0, 0]) == 5 and groups.into[0, 5] == groups.into[0, 6]


def general_groups() -> Groups:
    """Three slots of seven tokens; tokens 3 and 6 are dropped in one image, 2 in the other."""
    return Groups(
        into=jnp.array([[0, 1, 1, 3, 2, 0, 3], [2, 0, 3, 1, 1, 1, 0]]),
        weight=jnp.asarray(RNG.uniform(0.5, 2, (2, 7)), jnp.float32),
        leader=jnp.array([[0, 2, 4], [1, 3, 0]]),
        joins=jnp.array([[1, 5, 5], [4, 6, 5]]).at[0, 2].set(3),
        size=jnp.ones((2, 3)),
        mean=True,
    )


def test_spread_and_its_gradient() -> None:
    groups = general_groups()
    x, direction = (jnp.asarray(RNG.normal(size=(2, n, 4)), jnp.float32) for n in (3, 7))
    matrix = np.asarray(groups.into)[..., None] == np.arange(3)
    expected = np.einsum("bnk,bkd->bnd", matrix, x)
    np.testing.assert_array_equal(spread(x, groups), expected)
    gradient = jax.grad(lambda x: (spread(x, groups) * direction).sum())(x)
    np.testing.assert_allclose(gradient, np.einsum("bnk,bnd->bkd", matrix, direction), atol=1e-6)


@pytest.mark.parametrize("dropped", [False, True])
def test_reduced_attention_is_the_sum_over_queries_and_keys(dropped: bool) -> None:
    """Against the reduced matrix, written out in NumPy; and its gradients against those of the dense sums."""
    config = small_config(image_size=8, num_registers=2, **NO_RULE)
    attention = Block(config, rngs=nnx.Rngs(0)).attn
    groups = general_groups()
    if not dropped:
        into = jnp.where(groups.into == 3, 1, groups.into)
        joins = jnp.array([[1, 3, 5, 6], [2, 4, 5, 6]])
        groups = dataclasses.replace(groups, into=into, joins=joins)
    x = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)
    weights = jnp.asarray(RNG.uniform(size=(2, 2, 7, 7)), jnp.float32)
    direction = jnp.asarray(RNG.normal(size=(2, 3, 16)), jnp.float32)
    kernel, bias = (np.asarray(p[...])[..., 32:] for p in (attention.qkv.kernel, attention.qkv.bias))
    one_hot = (np.asarray(groups.into)[..., None] == np.arange(3)).astype(np.float32)
    rows = one_hot * np.asarray(groups.weight)[..., None]
    rows = rows / rows.sum(1, keepdims=True)

    def found(weights: jax.Array, x: jax.Array) -> jax.Array:
        return (attention.mixed(weights, weights.sum(-1, keepdims=True), x, groups) * direction).sum()

    def expected(weights: jax.Array, x: jax.Array) -> jax.Array:
        matrix = weights / weights.sum(-1, keepdims=True)
        reduced = jnp.einsum("bqg,bhqk,bkj->bhgj", rows, matrix, one_hot)
        value = (x @ kernel + bias).reshape(2, 3, 2, 8)
        mixed = jnp.einsum("bhgj,bjhc->bghc", reduced, value).reshape(2, 3, 16)
        return (attention.proj(mixed) * direction).sum()

    pairs = (jax.jit(jax.value_and_grad(f, (0, 1)))(weights, x) for f in (found, expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *pairs)


def test_a_layer_that_is_asked_for_no_groups_is_the_plain_layer() -> None:
    block = Block(small_config(**NO_RULE), rngs=nnx.Rngs(0))
    x, mass = (jnp.asarray(RNG.uniform(1, 3, shape), jnp.float32) for shape in ((2, 7, 16), (2, 7)))
    found, groups = block.attend_reduced(x, mass, None, None, frozenset(), lambda facts: None)
    assert groups is None
    np.testing.assert_allclose(found, block.attend(x, mass)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        (MCTF(0), (26, 26, 26, 26)),
        (MCTF(0.0), (26, 26, 26, 26)),
        (MCTF(3), (26, 23, 20, 17)),
        (MCTF(100), (26, 14, 10, 10)),
        (MCTF(0.3), (26, 19, 14, 11)),
        (MCTF(0.5, (0, 3)), (14, 14, 14, 10)),
        (MCTF((8, 0, 1)), (26, 18, 18, 17)),
        (MCTF((6,), (3,)), (26, 26, 26, 20)),
    ],
)
def test_counts(rule: MCTF, counts: tuple[int, ...]) -> None:
    config = small_config(image_size=20)
    assert rule.counts(config) == counts
    before = (26, *counts[:-1])
    assert rule.acts_in(config) == tuple(layer for layer in range(4) if counts[layer] < before[layer])
    assert rule.counts(small_config()) == (7,) * 4, "below 10 tokens nothing merges"


def test_matching_work() -> None:
    """26 and 14 tokens are compared, 13 x 13 and 7 x 7 pairs of width 16; then nothing."""
    assert MCTF((100, 2, 0)).matching_macs(small_config(image_size=20)) == (0, 169 * 16, 49 * 16, 0)


def test_neutral_settings_give_the_static_model() -> None:
    """In training too, with the same dropout and stochastic depth."""
    model = dense(drop_rate=0.2, drop_path_rate=0.4)
    for key in (None, jax.random.key(3)):
        expected, *_ = model.forward(IMAGES, key)
        found = shrinking.forward(model, IMAGES, MCTF(**MCTF.neutral), key=key)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), vars(found), vars(expected))


def test_an_image_does_not_depend_on_its_batch() -> None:
    model = dense().with_config(rule=MCTF(9))
    program = avit_jax.compile(model, 3)
    together = program(IMAGES)
    others = np.concatenate([100 * RNG.normal(size=(2, 20, 20, 2)).astype(np.float32), IMAGES[:1]])
    np.testing.assert_allclose(program(others).logits[2], together.logits[0], atol=1e-6)
    np.testing.assert_array_equal(program(others).token_depth[2], together.token_depth[0])
    np.testing.assert_allclose(together.logits, model(IMAGES).logits, atol=1e-6)


def test_special_tokens_outlast_any_r() -> None:
    model = dense(distilled=True, num_registers=1, depth=4)
    reduced = shrinking.follow_tokens(model, IMAGES, MCTF(1000, (0, 1, 2, 3)))
    assert reduced.sizes[-1].shape == (3, 10)
    np.testing.assert_array_equal(reduced.sizes[-1][:, :3], np.ones((3, 3)))
    np.testing.assert_array_equal(reduced.sizes[-1].sum(1), [28] * 3)
    np.testing.assert_array_equal(reduced.slots[-1][:, :3], [[0, 1, 2]] * 3)


@pytest.mark.parametrize("sharpness", [1.0, 1e3])
def test_gradients(sharpness: float) -> None:
    """Training merges too. Finite, also where attention underflows; the slope of the loss where it does not.

    The weights w carry no gradient, so the slope is that of a loss whose groups stay those of the first step.
    """
    model = dense(pool="norm_mean")
    graphdef, params = nnx.split(model)
    kernel = params["blocks"]["attn"]["qkv"]["kernel"]
    kernel[...] = sharpness * kernel[...]
    rule = MCTF(9, (0, 1))

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            merging = nnx.merge(graphdef, params).with_config(rule=rule)
            output, *_ = merging.forward(IMAGES, jax.random.key(0))
            return (output.logits**2).sum()

        return jax.value_and_grad(loss)(params)

    value, found = gradient(params)
    expected = (shrinking.forward(nnx.merge(graphdef, params), IMAGES, rule).logits ** 2).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    if sharpness == 1:
        assert all(np.any(leaf) for leaf in jax.tree.leaves(found["blocks"]["attn"]["qkv"]["kernel"]))


def test_the_gradient_of_the_reduced_attention_reaches_queries_and_keys() -> None:
    """One layer that merges: the slope along queries and keys, with the groups and their weights held fixed."""
    graphdef, params = nnx.split(Block(small_config(**NO_RULE), rngs=nnx.Rngs(0)))
    params["attn"]["qkv"]["kernel"][...] *= 10
    step = jax.tree.map(jnp.zeros_like, params)
    step["attn"]["qkv"]["kernel"][...] += jnp.asarray(RNG.normal(size=(16, 48)), jnp.float32).at[:, 32:].set(0)
    x = jnp.asarray(RNG.normal(size=(2, 14, 16)), jnp.float32)
    direction = jnp.asarray(RNG.normal(size=(2, 10, 16)), jnp.float32)
    size, reads = jnp.ones((2, 14)), frozenset({"attention_received"})
    rule = MCTF(4, (0,))

    def chosen(facts: Any) -> Groups | None:
        return rule.groups(Seen(before=x, size=size, **facts), layer=0, num_special=1)

    def value(params: Any, choose: Any) -> tuple[jax.Array, Groups | None]:
        mixed, groups = nnx.merge(graphdef, params).attend_reduced(x, None, None, None, reads, choose)
        return (mixed * direction).sum(), groups

    found, groups = jax.jit(jax.grad(lambda params: value(params, chosen), has_aux=True))(params)
    at = jax.jit(lambda params, groups: value(params, lambda facts: groups)[0])
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), found, step)))
    ends = (jax.tree.map(lambda p, d, s=s: p + s * d, params, step) for s in (1e-2, -1e-2))
    high, low = (float(at(end, groups)) for end in ends)
    np.testing.assert_allclose(slope, (high - low) / 2e-2, rtol=1e-2)
    assert abs(slope) > 0.1


def test_levels_are_monotone_and_fine() -> None:
    model = dense(depth=6)
    at = MCTF(3, (1, 2, 4)).levels(model, IMAGES)
    work = [
        float(image_gmacs(dataclasses.replace(model.config, rule=at(level)), jnp.ones((1, 26), jnp.int32))[0])
        for level in np.linspace(0, 1, 101)
    ]
    assert at(1.0).counts(model.config) == (26,) * 6
    assert at(0.0).counts(model.config) == MCTF(1000, (1, 2, 4)).counts(model.config)
    assert np.all(np.diff(work) >= 0) and len(set(work)) > 10


@pytest.mark.parametrize("r", [-1, 1.0, 1.5, float("nan"), True, (1, -2), (1, True)])
def test_r_is_checked(r: Any) -> None:
    with pytest.raises(ValueError, match="MCTF's r is .*: give a whole number from 0, a share of the patches"):
        MCTF(r)


@pytest.mark.parametrize("layers", [(), (-1,), (3, 3), (6, 3)])
def test_layers_are_checked(layers: Any) -> None:
    with pytest.raises(ValueError, match="MCTF's layers are .*: give whole numbers from 0 in ascending order"):
        MCTF(2, layers)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (MCTF((1, 2)), "MCTF's r has 2 numbers and tokens merge in 3 layers: give one for each"),
        (
            MCTF(1, (2, 4)),
            r"MCTF's layers are \(2, 4\) and the model's last layer is 3: give layers that the model has",
        ),
    ],
)
def test_a_rule_that_does_not_fit_the_model(rule: MCTF, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small_config(rule=rule)


def test_as_text_and_json() -> None:
    for rule in (MCTF(5), MCTF(0.35, (3, 6, 9)), MCTF((3, 2), (1, 2))):
        found = rule_from_json(json.loads(json.dumps(rule_to_json(rule))))
        assert found == rule and isinstance(found, Reduction)
        assert isinstance(found, MCTF) and type(found.r) is type(rule.r)
    assert parse_rule("mctf(r=0.35, layers=[3, 6, 9])") == MCTF(0.35, (3, 6, 9))
    assert (
        MCTF(0.35, (3, 6)).describe() == "MCTF, r 0.35 in layers 3, 6" and MCTF((2, 1)).describe() == "MCTF, r (2, 1)"
    )


def test_numpy_numbers_become_plain_ones() -> None:
    rule = object.__new__(MCTF)  # the tests' type check of the constructor would come first
    for r, layers, plain in ((np.int64(2), [np.int32(1), 2], MCTF(2, (1, 2))), (np.float32(0.5), None, MCTF(0.5))):
        object.__setattr__(rule, "r", r)
        object.__setattr__(rule, "layers", layers)
        rule.__post_init__()
        assert json.dumps(rule_to_json(rule)) == json.dumps(rule_to_json(plain))
