"""ATS: recorded outputs of the published code, the picks one by one, its settings."""

import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import avit_jax
from avit_jax import ATS
from avit_jax.halting.ats import sampled
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from tests.harness.arrays import read_npz
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.stopping_rules import untyped

DATA = Path(__file__).parent / "data" / "methods"
ARCHITECTURE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
RNG = np.random.default_rng(0)


def test_recorded_outputs() -> None:
    """Images alone; in a batch, only the image that has the most tokens in every layer gets no padding: the last."""
    recorded = read_npz(DATA / "ats-official.npz")
    meta = json.loads(str(recorded["meta"]))
    weights = read_npz(DATA / f"{meta['weights']}.npz")
    rule = ATS(layers=tuple(meta["ats_blocks"]))
    model = avit_jax.from_torch_state_dict(weights, **{field: meta[field] for field in ARCHITECTURE}, rule=rule)
    images = recorded["images"].transpose(0, 2, 3, 1)
    output = answers(model, images)
    np.testing.assert_allclose(output.logits, recorded["logits_alone"], atol=1e-5)
    entering = (np.asarray(output.token_depth)[:, :, None] > np.arange(meta["depth"])).sum(1).T  # [layer, image]
    np.testing.assert_array_equal(entering[1:, -1], recorded["counts_batch"][:-1, -1])
    np.testing.assert_array_equal(entering[:5], np.insert(recorded["counts_batch"][:4], 0, 65, axis=0))
    for same in (ATS(), ATS(meta["samples"])):
        np.testing.assert_array_equal(answers(model.with_config(rule=same), images).token_depth, output.token_depth)


def nearest(score: np.ndarray, count: int) -> set[int]:
    """The picks of `count` heights among these scores, each by its nearest level, as the docstring of ATS says."""
    order = np.argsort(score, kind="stable")
    level = np.cumsum(score[order].astype(np.float64))
    level = (level - level[0]) / (level[-1] - level[0])
    first = level[level > 0].min()
    heights = [first + (1 - first) * k / (count - 1) for k in range(count)]
    return {int(order[np.argmin(np.abs(level - height))]) for height in heights}


@pytest.mark.parametrize("count", [2, 3, 7, 40, 1000])
def test_picks_are_those_of_the_nearest_level(count: int) -> None:
    """Also with scores of 0 and among tokens that are not there."""
    score = RNG.gamma(0.3, size=(20, 24)).astype(np.float32)
    score[:10][score[:10] < 0.05] = 0
    there = RNG.uniform(size=score.shape) < 0.8
    kept = np.asarray(sampled(jnp.asarray(score), jnp.asarray(there), count))
    for image in range(len(score)):
        places = np.flatnonzero(there[image])
        assert set(np.flatnonzero(kept[image])) == {int(places[i]) for i in nearest(score[image, places], count)}
        assert 1 <= kept[image].sum() <= count


def test_picks_by_hand() -> None:
    """Levels 0, 1/8, 3/8, 1 of the scores below in ascending order; heights of 3: 1/8, 9/16, 1; of 2: 1/8, 1."""
    score = jnp.array([[5.0, 1.0, 2.0, 0.0, 9.0]])
    there = jnp.array([[True, True, True, True, False]])
    np.testing.assert_array_equal(sampled(score, there, 3), [[True, True, True, False, False]])
    np.testing.assert_array_equal(sampled(score, there, 2), [[True, True, False, False, False]])
    # 9/16 lies on the middle between the levels 1/8 and 1: the lower one has it already.
    np.testing.assert_array_equal(sampled(jnp.array([[7.0, 1.0, 0.0]]), jnp.ones((1, 3), bool), 3), [[1, 1, 0]])


@pytest.mark.parametrize(
    ("score", "there", "kept"),
    [
        ([3.0, 0.0, 9.0], [True, False, False], [True, False, False]),  # one is left
        ([0.0, 0.0, 0.0], [True, True, True], [True, True, True]),  # no score: F_last = F_first
        ([0.0, 2.0, 0.0], [True, True, True], [False, True, False]),  # the smallest level above 0 is 1
        ([2.0, 2.0, 2.0], [True, True, True], [False, True, True]),  # at a tie the lower position comes first
        ([3.0, 1.0, 9.0], [False, False, False], [False, False, False]),  # the image is finished
    ],
)
def test_edges(score: list[float], there: list[bool], kept: list[bool]) -> None:
    np.testing.assert_array_equal(sampled(jnp.array([score]), jnp.array([there]), 8), [kept])


def test_levels_go_from_two_patches_to_the_static_model() -> None:
    model = spread_gate(small_config(**NO_RULE, image_size=32, depth=6))
    images = RNG.normal(size=(8, 32, 32, 2)).astype(np.float32)
    rule_at = ATS().levels(model, images)
    assert rule_at(0.0) == ATS(2, (3, 4)) and rule_at(0.9) == ATS(2**16, (3, 4)) and rule_at(1.0) == ATS(2**16, ())
    rules: list[Any] = [rule_at(level) for level in np.linspace(0, 1, 201).tolist()]
    assert all(a.samples <= b.samples and len(a.layers) >= len(b.layers) for a, b in itertools.pairwise(rules))
    depths = [
        np.asarray(answers(model.with_config(rule=rule_at(level)), images).token_depth).mean()
        for level in (0.0, 0.15, 0.3, 0.45, 0.9, 1.0)
    ]
    assert depths == sorted(set(depths)) and depths[-1] == 6
    assert ATS(layers=(1, 2, 5)).levels(model, images)(0.5).layers == (1, 2)  # in the last layer all stop


def test_text_json_and_plain_numbers() -> None:
    assert parse_rule("ats") == ATS() and parse_rule("ats(samples=8, layers=[3, 6])") == ATS(8, (3, 6))
    for rule in (ATS(), ATS(8, ()), ATS(layers=(3, 9))):
        assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    numpy = untyped(ATS, samples=np.int64(8), layers=(np.int64(3),))
    assert json.dumps(rule_to_json(numpy)) == json.dumps(rule_to_json(ATS(8, (3,))))
    assert ATS(8, (3, 6)).describe() == "ATS, 8 samples in layers (3, 6)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "samples is 1: give a whole number from 2 and below"),
        ({"layers": [3, 3]}, r"layers are \(3, 3\): give whole numbers from 0 in ascending order"),
        ({"layers": [6, 3]}, r"layers are \(6, 3\): give whole numbers from 0 in ascending order"),
        ({"layers": [-1]}, r"layers are \(-1,\)"),
        ({"samples": 2.5}, "samples is 2.5"),
        ({"samples": True}, "samples is True"),
        ({"layers": 3}, "layers is 3"),
        ({"layers": [True]}, "layers is a list"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_from_json({"name": "ats"} | settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": ATS(layers=(4,))}, r"ATS's layers are \(4,\) and the model's last layer is 3: give layers that"),
        (
            {"rule": ATS(), "class_token": False, "pool": "mean_norm"},
            "ATS reads the class token's attention and the model has no",
        ),
    ],
)
def test_models_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**fields)
