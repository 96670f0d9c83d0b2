"""Similarity: the cosine, the quantiles that set its thresholds, its settings."""

import dataclasses
import itertools
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax import AViT, Similarity
from avit_jax.halting.similarity import centred_cosine
from avit_jax.model.config import NO_RULE
from avit_jax.model.seen import Seen, of_tokens
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.numpy_removal import Layer, remove_tokens
from tests.harness.stopping_rules import untyped

IMAGES = np.random.default_rng(0).normal(size=(7, 16, 16, 2)).astype(np.float32)


def static(**fields: Any) -> AViT:
    return spread_gate(small_config(**NO_RULE | {"image_size": 16, "depth": 5, "num_registers": 1} | fields))


def test_the_cosine_leaves_out_the_mean_and_the_length() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 1, 4, 6)).astype(np.float32)
    found = centred_cosine(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_allclose(found[0], [np.corrcoef(x, y)[0, 1] for x, y in zip(a[0], b[0], strict=True)], atol=1e-6)
    np.testing.assert_allclose(centred_cosine(jnp.asarray(3 * a + 7), jnp.asarray(b)), found, atol=1e-5)
    np.testing.assert_array_equal(centred_cosine(jnp.ones((1, 1, 6)), jnp.asarray(b[:, :1])), [[0.0]])


@pytest.mark.parametrize("form", ["token", "image"])
def test_the_first_layer_stops_nothing_and_the_second_does(form: str) -> None:
    rule = Similarity(-2.0, form)
    state = rule.initial(2, static().config)
    seen = Seen(before=jnp.ones((2, 18, 16)), **of_tokens(jnp.ones((2, 18, 16)), 1))
    assert np.all(rule.advance(state, seen, layer=0, is_last=False)[0].active)
    after = rule.advance(state, seen, layer=1, is_last=False)[0].active
    np.testing.assert_array_equal(after, np.broadcast_to((np.arange(18) < 2) & (form == "token"), (2, 18)))


@pytest.mark.parametrize("form", ["token", "image"])
def test_levels_are_the_quantiles_of_the_static_model(form: str) -> None:
    model = static()
    rule_at = Similarity(0.5, form).levels(model, IMAGES)
    cosines = np.zeros((len(IMAGES), 5, 16))
    for image in range(len(IMAGES)):

        def goes(layer: int, seen: Layer, image: int = image) -> np.ndarray:
            pairs = zip(seen.before[seen.patch], seen.after[seen.patch], strict=True)
            cosines[image, layer] = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
            return np.ones(len(seen.patch), bool)

        remove_tokens(model, IMAGES[image], goes)
    pooled = cosines.mean(-1) if form == "image" else np.moveaxis(cosines, 1, 2).reshape(-1, 5)
    for level in (0.05, 0.5, 0.93):
        found = rule_at(level)
        assert found.form == form
        np.testing.assert_allclose(found.thresholds, np.quantile(pooled, level, axis=0), atol=1e-5)
    assert rule_at(0.0) == Similarity(-2.0, form) and rule_at(1.0) == Similarity(2.0, form)


def test_no_image_stops_earlier_at_a_higher_level() -> None:
    model = static(depth=6)
    rule_at = Similarity(0.5, "image").levels(model, IMAGES)
    depth = [
        np.asarray(answers(model.with_config(rule=rule_at(level)), IMAGES).token_depth)
        for level in (0.0, 0.3, 0.5, 0.9, 1.0)
    ]
    assert all((a <= b).all() for a, b in itertools.pairwise(depth))
    assert (depth[0] == 2).all() and (depth[-1] == 6).all() and 2 < depth[2].mean() < 6


def test_work_rises_with_the_level_of_tokens() -> None:
    model = static()
    rule_at = Similarity(0.5).levels(model, IMAGES)
    depth = [
        np.asarray(answers(model.with_config(rule=rule_at(level)), IMAGES).token_depth).mean()
        for level in (0.0, 0.3, 0.6, 1.0)
    ]
    assert depth == sorted(set(depth)) and depth[-1] == 5


def test_text_json_and_plain_numbers() -> None:
    assert parse_rule("similarity(thresholds=[0.5, 1], form='image')") == Similarity((0.5, 1.0), "image")
    for rule in (Similarity(0.9), Similarity((0.5, 0.75), "image")):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    numpy = untyped(Similarity, thresholds=(np.float32(0.5), np.float64(1)), form="token")
    assert json.dumps(rule_to_json(numpy)) == json.dumps(rule_to_json(Similarity((0.5, 1.0))))
    assert dataclasses.replace(Similarity(0.9), form="image").describe() == "similarity of each image above 0.9"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thresholds": 3.0}, "thresholds is 3.0: give a number from -2 to 2, or a tuple with one per layer"),
        ({"thresholds": [0.5, -2.5]}, r"thresholds is \(0.5, -2.5\): give a number from -2 to 2"),
        ({"thresholds": True}, "thresholds is True"),
        ({"thresholds": 0.5, "form": "patch"}, "form is 'patch': choose one of token, image"),
        ({"thresholds": []}, r"thresholds is \(\): give a number from -2 to 2"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_from_json({"name": "similarity"} | settings)


def test_the_number_of_thresholds_must_be_that_of_the_layers() -> None:
    with pytest.raises(ValueError, match="there are 3 thresholds and the model has 4 layers: give one for each"):
        small_config(rule=Similarity((0.5, 0.5, 0.5)))
