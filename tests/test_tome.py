"""ToMe's choice of what merges, and the sum that merges it."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax import ToMe
from avit_jax.model.seen import Seen
from avit_jax.reduction.groups import Groups, Reduction, reduce
from avit_jax.reduction.tome import r_schedule
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.builders import small_config

RNG = np.random.default_rng(0)
DENSE = {"gate_scale": None, "gate_center": None}


def seen(tokens: int, batch: int = 2) -> Seen:
    return Seen(
        key_mean=jnp.asarray(RNG.normal(size=(batch, tokens, 4)), jnp.float32),
        size=jnp.asarray(RNG.integers(1, 5, (batch, tokens)), jnp.float32),
    )


def dense_sum(x: jax.Array, groups: Groups) -> jax.Array:
    """Like reduce, from `into` and `weight` alone."""
    matrix = jax.nn.one_hot(groups.into, groups.leader.shape[1]) * groups.weight[..., None]
    total = jnp.einsum("bnk,bnd->bkd", matrix, x)
    return total / matrix.sum(1)[..., None] if groups.mean else total


@pytest.mark.parametrize(("num_special", "patches"), [(1, 1), (0, 9), (1, 8), (2, 9), (3, 8)])
def test_groups_of_every_size(num_special: int, patches: int) -> None:
    """Sizes add up, special tokens stay first and alone, leaders and joining tokens are all there are."""
    tokens = num_special + patches
    for r in (2, 100):
        known = seen(tokens)
        groups = ToMe(r).groups(known, layer=0, num_special=num_special)
        merges = min(r, patches // 2)
        if merges == 0:
            assert groups is None
            continue
        assert groups.size.shape == groups.leader.shape == (2, tokens - merges)
        np.testing.assert_array_equal(groups.size.sum(1), known.size.sum(1))
        for image in range(2):
            into, leader, joins = (np.asarray(x[image]) for x in (groups.into, groups.leader, groups.joins))
            assert sorted([*leader, *joins]) == list(range(tokens))
            np.testing.assert_array_equal(into[leader], np.arange(tokens - merges))
            np.testing.assert_array_equal(into[:num_special], np.arange(num_special))
            assert all(joining % 2 == 0 and leader[into[joining]] % 2 == 1 for joining in joins)
            assert (into[joins] >= num_special).all()
            np.testing.assert_array_equal(np.bincount(into, known.size[image]), groups.size[image])
        np.testing.assert_allclose(reduce(known.key_mean, groups), dense_sum(known.key_mean, groups), atol=1e-6)


def test_the_most_similar_pairs_merge() -> None:
    """Four even tokens; those at 2 and 6 have a twin among the odd ones, in another length."""
    keys = np.eye(8, dtype=np.float32)
    keys[2], keys[6] = 3 * keys[5], keys[1] / 2
    known = Seen(key_mean=jnp.asarray(keys[None]), size=jnp.ones((1, 8)))
    groups = ToMe(2).groups(known, layer=0, num_special=0)
    np.testing.assert_array_equal(groups.leader[0], [0, 4, 1, 3, 5, 7])
    np.testing.assert_array_equal(groups.into[0], [0, 2, 4, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(groups.size[0], [1, 1, 2, 1, 2, 1])


def general_groups() -> dict[str, Groups]:
    """What other rules would give: tokens that go nowhere, a sum that is no mean."""
    into = jnp.array([[0, 1, 3, 2, 3, 2, 4, 4], [0, 4, 1, 4, 2, 3, 3, 3]])
    leader = jnp.array([[0, 1, 3, 2], [0, 2, 4, 5]])
    joins = jnp.array([[5, 4], [6, 7]])
    weight = jnp.asarray(RNG.uniform(0.5, 2, (2, 8)), jnp.float32)
    groups = Groups(into, weight, leader, joins, jnp.ones((2, 4)), mean=True)
    dropped = jnp.where(jnp.isin(jnp.arange(8), jnp.array([3, 6]))[None], 2, into[:1] * 0 + 2)
    top_k = Groups(
        dropped.at[:, 3].set(0).at[:, 6].set(1),
        jnp.ones((1, 8)),
        jnp.array([[3, 6]]),
        jnp.zeros((1, 0), int),
        jnp.ones((1, 2)),
        mean=False,
    )
    return {"mean": groups, "sum": dataclasses.replace(groups, mean=False), "top-k": top_k}


@pytest.mark.parametrize("kind", ["mean", "sum", "top-k"])
def test_the_gradient_of_the_sum(kind: str) -> None:
    groups = general_groups()[kind]
    batch, count = groups.leader.shape
    x = jnp.asarray(RNG.normal(size=(batch, 8, 3)), jnp.float32)
    direction = jnp.asarray(RNG.normal(size=(batch, count, 3)), jnp.float32)

    def along(rule: Any) -> Any:
        def value(x: jax.Array, weight: jax.Array) -> jax.Array:
            return (rule(x, dataclasses.replace(groups, weight=weight)) * direction).sum()

        return jax.value_and_grad(value, (0, 1))(x, groups.weight)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), along(reduce), along(dense_sum))


def test_the_value_of_a_dropped_token_has_no_influence() -> None:
    groups = general_groups()["top-k"]
    x = jnp.full((1, 8, 3), jnp.nan).at[:, jnp.array([3, 6])].set(1.0)
    np.testing.assert_array_equal(reduce(x, groups), 1.0)
    np.testing.assert_array_equal(jax.grad(lambda x: reduce(x, groups).sum())(x)[0, :, 0], [0, 0, 0, 1, 0, 0, 1, 0])


@pytest.mark.parametrize(
    ("r", "counts"),
    [
        (0, (17, 17, 17, 17)),
        (3, (14, 11, 8, 5)),
        (40, (9, 5, 3, 2)),
        ((8, 0, 1, 5), (9, 9, 8, 5)),
    ],
)
def test_counts(r: Any, counts: tuple[int, ...]) -> None:
    assert ToMe(r).counts(small_config(image_size=16)) == counts


def test_schedules() -> None:
    assert r_schedule(5, 12) == (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0)
    assert r_schedule(5, 3, 0.0) == (5, 5, 5) and r_schedule(5, 3, 1.0) == (0, 5, 10)
    assert r_schedule(8, 5, -0.5) == (12, 10, 8, 6, 4) and r_schedule(3, 1, 0.0) == (3,)
    with pytest.raises(ValueError, match="give r from 0, depth from 1, and a slope from -1 to 1"):
        r_schedule(5, 12, -2.0)


@pytest.mark.parametrize("r", [-1, 1.5, True, "8", (1, -2), (1, 2.0), None])
def test_r_is_checked(r: Any) -> None:
    with pytest.raises(Exception, match=r"ToMe's r is|Type-check"):  # the tests' type check comes first
        ToMe(r)


@pytest.mark.parametrize(("r", "plain"), [(np.int64(2), 2), ([np.int32(4), 1], (4, 1))])
def test_numpy_numbers_become_plain_ones(r: Any, plain: Any) -> None:
    rule = object.__new__(ToMe)  # the tests' type check of the constructor would come first
    object.__setattr__(rule, "r", r)
    object.__setattr__(rule, "proportional", True)
    rule.__post_init__()
    assert json.loads(json.dumps(rule_to_json(rule))) == json.loads(json.dumps(rule_to_json(ToMe(plain))))


def test_r_has_one_number_for_each_layer() -> None:
    with pytest.raises(ValueError, match="ToMe's r has 3 numbers and the model 4 layers: give one for each"):
        small_config(rule=ToMe((1, 2, 3)))


def test_own_work() -> None:
    """17 and 9 tokens are compared, 9 x 8 and 5 x 4 pairs of width 8; then nothing."""
    assert ToMe((8, 1, 0, 0)).matching_macs(small_config(image_size=16)) == (72 * 8, 20 * 8, 0, 0)


def test_as_text_and_json() -> None:
    for rule in (ToMe(8), ToMe((3, 2, 1, 0), proportional=False)):
        assert rule_from_json(rule_to_json(rule)) == rule and isinstance(rule, Reduction)
    assert rule_from_json({"name": "tome", "r": [3, 2]}) == ToMe((3, 2))
    assert parse_rule("tome(r=2)") == ToMe(2)
    assert parse_rule("tome(r=(2, 1), proportional=False)") == ToMe((2, 1), False)
    assert len({ToMe(2), ToMe(2), ToMe((2, 2))}) == 2
