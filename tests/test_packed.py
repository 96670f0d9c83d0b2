"""Packed execution: the masked model's answers, whatever halts, whatever the plan."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import avit_jax
from avit_jax import AViT, PackedPlan, compile_packed, plan_packed
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import load_dataset
from avit_jax.execution.plan import default_plan
from avit_jax.train.gate_start import start_gate
from tests.harness.arrays import read_npz
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.devices import run_on_devices
from tests.harness.halting_patterns import assert_exited, assert_same, drawn_images, drawn_model

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("distilled", "group_size", "capacities"),
    [
        (False, 1, (7,)),
        (True, 1, (3, 8)),
        (False, 2, (2, 4, 7)),
        (True, 3, (2, 4, 7, 8)),
        (False, 5, (7,)),
        (True, 8, (6, 8)),
    ],
)
def test_random_weights(distilled: bool, group_size: int, capacities: tuple[int, ...]) -> None:
    """Groups that divide the five images, that leave some over, and that are larger than the batch."""
    model = spread_gate(small_config(distilled=distilled))
    images = np.random.default_rng(3).normal(size=(5, 12, 8, 2)).astype(np.float32)
    plan = PackedPlan(model.config.num_tokens, group_size, capacities)
    masked = answers(model, images)
    assert len(np.unique(masked.token_depth)) >= 3
    assert_same(masked, compile_packed(model, 5, plan, image_exit=False)(images))
    assert_exited(masked, compile_packed(model, 5, plan)(images), model.config.num_special)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("micro-10-30", {"num_heads": 3, "gate_scale": 10.0, "gate_center": 30.0}),
        ("micro-5-50", {"num_heads": 2, "gate_scale": 5.0, "gate_center": 50.0}),
        ("micro-distilled-10-75", {"num_heads": 3, "gate_scale": 10.0, "gate_center": 75.0}),
    ],
)
def test_goldens(name: str, fields: dict[str, float]) -> None:
    recorded = read_npz(DATA / f"{name}.npz")
    model = avit_jax.load(DATA / f"{name}.pth", **fields)
    count, tokens = len(recorded["images"]), model.config.num_tokens
    packed = compile_packed(model, count, image_exit=False)(recorded["images"])
    np.testing.assert_allclose(packed.logits, recorded["logits"], atol=1e-5)
    np.testing.assert_array_equal(packed.token_depth, recorded["token_depth"])
    np.testing.assert_allclose(packed.ponder_cost, recorded["ponder"], atol=1e-5)
    np.testing.assert_allclose(packed.halting_scores, recorded["halting_scores"], atol=1e-5)
    thirds = PackedPlan(tokens, 2, (tokens // 3, 2 * tokens // 3, tokens))
    exited = compile_packed(model, count, thirds)(recorded["images"])
    np.testing.assert_allclose(exited.logits, recorded["logits"], atol=1e-5)


@pytest.fixture(scope="module")
def drawn() -> dict[bool, tuple[AViT, list[avit_jax.PackedModel]]]:
    models = {distilled: drawn_model(small_config(distilled=distilled)) for distilled in (False, True)}
    return {
        distilled: (
            model,
            [
                compile_packed(
                    model,
                    4,
                    PackedPlan(model.config.num_tokens, 2, (3, model.config.num_tokens)),
                    image_exit=image_exit,
                )
                for image_exit in (False, True)
            ],
        )
        for distilled, model in models.items()
    }


@settings(max_examples=40, deadline=None)
@given(
    distilled=st.booleans(),
    depths=st.lists(st.lists(st.integers(1, 4), min_size=6, max_size=6), min_size=1, max_size=4),
)
def test_any_pattern_of_halting(
    drawn: dict[bool, tuple[AViT, list[avit_jax.PackedModel]]], distilled: bool, depths: list[list[int]]
) -> None:
    model, (whole, exiting) = drawn[distilled]
    images = drawn_images(np.array(depths))
    masked = answers(model, images)
    np.testing.assert_array_equal(masked.token_depth[:, model.config.num_special :], depths)
    assert_same(masked, whole(images))
    assert_exited(masked, exiting(images), model.config.num_special)


@pytest.mark.parametrize("center", [-60.0, 60.0])
@pytest.mark.parametrize("image_exit", [False, True])
def test_all_halt_at_once_or_none_ever(center: float, image_exit: bool, images: jax.Array) -> None:
    model = spread_gate(small_config(gate_center=center))
    masked, packed = answers(model, images), compile_packed(model, 3, image_exit=image_exit)(images)
    np.testing.assert_array_equal(masked.token_depth, 1 if center < 0 else 4)
    if image_exit:
        assert_exited(masked, packed, 1)
    else:
        assert_same(masked, packed)


def test_a_model_without_a_gate(images: jax.Array) -> None:
    model = spread_gate(small_config(gate_scale=None, gate_center=None))
    assert_same(answers(model, images), compile_packed(model, 3, image_exit=False)(images))
    assert_same(answers(model, images), compile_packed(model, 3)(images))


def test_fewer_images_than_the_batch_and_more(model: AViT, images: jax.Array) -> None:
    packed = compile_packed(model, 4, image_exit=False)
    for count in (1, 2, 3):
        assert_same(answers(model, images[:count]), packed(np.asarray(images[:count])))
    with pytest.raises(ValueError, match="5 images for a program compiled for 4"):
        packed(jnp.concatenate([images, images[:2]]))
    with pytest.raises(ValueError, match="they are uint8: use avit_jax.preprocess"):
        packed(np.zeros((1, 12, 8, 2), np.uint8))


def test_what_lies_in_padding_does_not_matter(model: AViT, images: jax.Array) -> None:
    """An image of NaN beside others changes nothing of theirs."""
    packed = compile_packed(model, 3, image_exit=False)
    clean = packed(images)
    spoilt = packed(images.at[1].set(jnp.nan))
    np.testing.assert_array_equal(clean.logits[::2], spoilt.logits[::2])


def test_bfloat16_is_close() -> None:
    model = spread_gate(small_config(dtype="bfloat16"))
    images = np.random.default_rng(0).normal(size=(6, 12, 8, 2)).astype(np.float32)
    masked, packed = answers(model, images), compile_packed(model, 6, image_exit=False)(images)
    same = (np.asarray(masked.token_depth) == packed.token_depth).all(1)
    assert same.mean() > 0.5
    np.testing.assert_allclose(packed.logits[same], masked.logits[same], atol=0.05 * np.abs(masked.logits).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_weights(dtype: str) -> None:
    """The shipped digits' model with its gate started: real images, real predictions."""
    model = avit_jax.load("checkpoints/mnist_dense", gate_scale=5.0, gate_center=10.0, dtype=dtype)
    images = normalize(load_dataset("mnist").val.images[::8], model.config)
    start_gate(model, images, target_depth=6.8, deviation=2.5)
    masked, packed = answers(model, images), compile_packed(model, len(images))(images)
    assert 5 < masked.token_depth.mean() < 9
    np.testing.assert_array_equal(packed.logits.argmax(1), masked.logits.argmax(1))
    rounding = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(packed.logits, masked.logits, atol=rounding * float(np.abs(masked.logits).max()))


def test_one_image_full_and_the_rest_empty() -> None:
    model = drawn_model(small_config())
    depths = np.ones((6, 6), int)
    depths[4] = 4
    images = drawn_images(depths)
    assert_same(answers(model, images), compile_packed(model, 6, image_exit=False)(images))
    assert_exited(answers(model, images), compile_packed(model, 6)(images), 1)


def test_weights_are_arguments_of_the_program(model: AViT) -> None:
    packed = compile_packed(model, 2)
    assert packed.compiled.memory_analysis().argument_size_in_bytes > sum(
        leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))
    )


@pytest.mark.slow
def test_memory_grows_no_faster_than_the_batch() -> None:
    config = small_config(image_size=(40, 40), patch_size=4)
    model = AViT(config, rngs=nnx.Rngs(0))
    small, large = (compile_packed(model, batch).compiled.memory_analysis() for batch in (32, 512))
    assert large.temp_size_in_bytes / 512 < small.temp_size_in_bytes / 32


def test_plans_are_printed_saved_and_checked(tmp_path: Path, model: AViT) -> None:
    plan = PackedPlan(7, 2, (3, 7))
    plan.save(tmp_path / "plan.json")
    assert PackedPlan.load(tmp_path / "plan.json") == plan
    assert str(plan) == "groups of 2 images, capacities 3, 7 tokens"
    with pytest.raises(ValueError, match="they must rise from 1 or more to the 7 tokens"):
        PackedPlan(7, 2, (3, 5))
    with pytest.raises(ValueError, match="group_size is 0"):
        PackedPlan(7, 0, (7,))
    with pytest.raises(ValueError, match="the plan is for 9 tokens and the model has 7"):
        compile_packed(model, 2, PackedPlan(9, 1, (9,)))
    with pytest.raises(ValueError, match="batch_size is 0"):
        compile_packed(model, 0)
    (tmp_path / "bad.json").write_text(json.dumps({"num_tokens": 7}))
    with pytest.raises(ValueError, match="bad.json is not a plan of packed execution"):
        PackedPlan.load(tmp_path / "bad.json")


def test_a_planned_model_gives_the_same_answers(model: AViT) -> None:
    images = np.random.default_rng(0).normal(size=(8, 12, 8, 2)).astype(np.float32)
    plan = plan_packed(model, images, 4)
    assert plan.num_tokens == 7
    assert plan.group_size in (1, 2, 4)
    assert_same(answers(model, images[:4]), compile_packed(model, 4, plan, image_exit=False)(images[:4]))
    with pytest.raises(ValueError, match="batch_size is 9 and the sample has 8 images: give at least a batch"):
        plan_packed(model, images, 9)


@pytest.mark.slow
def test_eight_devices_pack_their_own_images() -> None:
    assert "8 devices agree" in run_on_devices("packed_on_devices.py")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("preset", ["avit_tiny_patch16_224", "avit_small_distilled_patch16_384"])
@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_default_plans_are_plans_for_any_model_and_batch(platform: str, preset: str, batch_size: int) -> None:
    plan = default_plan(avit_jax.PRESETS[preset], batch_size, platform)
    assert plan.num_tokens == avit_jax.PRESETS[preset].num_tokens
    assert 1 <= plan.group_size <= batch_size
    assert default_plan(small_config(), batch_size, platform).capacities[-1] == 7
