"""The same weights under other settings: arrays shared, layers made for the new settings, the old model unchanged."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.model.config import NO_RULE
from avit_jax.reduction.tome import ToMe
from tests.harness.builders import small_config, spread_gate


def arrays(model: AViT) -> dict[tuple[Any, ...], jax.Array]:
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize(
    "changes",
    [{"gate_center": 6.0}, {"dtype": "bfloat16"}, {"rule": ToMe(1)}, {"drop_rate": 0.5, "remat": True}, NO_RULE],
)
def test_arrays_are_shared_and_the_result_is_that_of_a_model_made_so(
    model: AViT, images: jax.Array, changes: dict[str, Any]
) -> None:
    config, before = model.config, arrays(model)
    other = model.with_config(**changes)
    assert other.config == dataclasses.replace(config, **changes) and model.config == config
    found = arrays(other)
    assert found.keys() == before.keys()
    for path, array in found.items():
        assert array.unsafe_buffer_pointer() == before[path].unsafe_buffer_pointer(), path
    made = AViT(other.config, rngs=nnx.Rngs(1))
    nnx.update(made, nnx.state(model, nnx.Param))
    assert nnx.graphdef(made) == nnx.graphdef(other), "layers are made for the new settings"
    np.testing.assert_array_equal(other(images).logits, made(images).logits)


def test_changing_one_models_weights_leaves_the_other_alone(model: AViT) -> None:
    other = model.with_config(gate_center=6.0)
    kernel = np.asarray(model.head.kernel[...])
    other.head.kernel[...] = 0 * other.head.kernel[...]
    np.testing.assert_array_equal(model.head.kernel[...], kernel)


def test_positions_are_resized_as_where_a_checkpoint_is_loaded(model: AViT, tmp_path: Any) -> None:
    avit_jax.save(model, tmp_path / "model")
    loaded = avit_jax.load(tmp_path / "model", image_size=(16, 24))
    np.testing.assert_array_equal(model.with_config(image_size=(16, 24)).pos_embed[...], loaded.pos_embed[...])


def test_without_the_last_layers_every_token_stops_earlier() -> None:
    """Layer 3 becomes the last: what had stopped before it keeps its depth, its cost and its logits."""
    model = spread_gate(small_config())
    images = np.random.default_rng(0).normal(size=(16, 12, 8, 2)).astype(np.float32)
    whole, shorter = model(images), model.with_config(depth=3)(images)
    np.testing.assert_array_equal(shorter.token_depth, np.minimum(whole.token_depth, 3))
    stopped = np.asarray(whole.token_depth) < 3
    assert stopped[:, 0].any() and not stopped[:, 0].all()
    np.testing.assert_allclose(shorter.ponder_cost[stopped], whole.ponder_cost[stopped], atol=1e-6)
    np.testing.assert_allclose(shorter.logits[stopped[:, 0]], whole.logits[stopped[:, 0]], atol=1e-5)
    cut = np.asarray(whole.token_depth)[:, 0] == 4
    assert cut.any() and (abs(shorter.logits - whole.logits).max(1)[cut] > 1e-3).all()


def test_a_gate_may_be_given_as_a_rule(model: AViT) -> None:
    assert model.with_config(rule=AViTGate(2.0, 3.0)).config == small_config(gate_scale=2.0, gate_center=3.0)


def test_what_a_rule_learnt_is_kept_for_that_kind_of_rule() -> None:
    model = spread_gate(small_config(rule=ConfidenceExit(0.4, own_heads=True)))
    later = model.with_config(rule=ConfidenceExit(0.7, own_heads=True))
    assert later.rule_module.head.kernel[...] is model.rule_module.head.kernel[...]
    assert model.with_config(**NO_RULE).rule_module is None
    assert model.with_config(rule=ConfidenceExit(0.7)).rule_module is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5}, "with_config cannot change depth: the weights are those of depth 4"),
        ({"embed_dim": 32}, "with_config cannot change embed_dim"),
        ({"num_heads": 4}, "with_config cannot change num_heads"),
        ({"gate_centre": 3}, "AViTConfig has no field 'gate_centre': did you mean 'gate_center'"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"rule": ToMe}, "rule is the class ToMe: give its settings, such as ToMe"),
    ],
)
def test_other_changes_are_refused(model: AViT, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.with_config(**changes)


def test_a_configuration_cannot_be_assigned(model: AViT) -> None:
    with pytest.raises(AttributeError, match=r"model.with_config\(...\) gives the same weights"):
        model.config = small_config(dtype="bfloat16")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.dtype = "bfloat16"
    assert model.config == small_config()


def test_a_change_of_the_gate_is_a_change_to_the_gates_rule(model: AViT, tmp_path: Any) -> None:
    merging = model.with_config(rule=ToMe(1))
    assert merging.with_config(gate_center=6.0).config == model.with_config(gate_center=6.0).config
    assert merging.with_config(dtype="bfloat16").config.rule == ToMe(1)
    avit_jax.save(merging, tmp_path / "merging")
    assert avit_jax.load(tmp_path / "merging").config.rule == ToMe(1)
    assert avit_jax.load(tmp_path / "merging", gate_scale=None, gate_center=None).config.rule_in_force is None


def test_a_rules_own_parameters_have_no_place_in_pytorch(model: AViT) -> None:
    exits = model.with_config(rule=ConfidenceExit(0.9, own_heads=True))
    with pytest.raises(ValueError, match=r"'confidence exit above 0.9, own heads' has parameters of its own"):
        avit_jax.to_torch_state_dict(exits)
    assert (
        avit_jax.to_torch_state_dict(exits.with_config(rule=None)).keys() == avit_jax.to_torch_state_dict(model).keys()
    )
