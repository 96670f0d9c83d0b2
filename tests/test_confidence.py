"""Confidence exit: against a slow loop over images and layers, its identities, and every execution of it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

import avit_jax
from avit_jax import AViT, compile_packed
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.rules import rule_to_json
from avit_jax.train.objective import distillation_loss, objective_terms
from tests.harness.builders import answers, small_config, spread_gate

COUNT = 9


def pictures(config: AViTConfig, count: int = COUNT) -> np.ndarray:
    shape = (count, *config.image_shape, config.in_channels)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def exits(threshold: float = 0.4, *, own_heads: bool = False, first_layer: int = 0, **fields: object) -> AViT:
    """A model whose images leave at different layers; with own heads, those of no two layers are alike."""
    rule = ConfidenceExit(threshold, own_heads, first_layer)
    model = spread_gate(small_config(**NO_RULE | fields | {"rule": rule}))
    model.head.kernel[...] *= 4
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[0] == "rule_module":
            param[...] += 0.3 * jax.random.normal(jax.random.key(len(str(path))), param.shape)
    return model


def layer_logits(model: AViT, images: np.ndarray) -> np.ndarray:
    """[layers, images, classes]: what every exit says, no layer left out; norm and heads in NumPy."""
    graphdef, blocks = nnx.split(model.blocks)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    own = model.rule_module
    source = model if own is None else own
    heads = [source.head, source.head_dist] if model.config.distilled else [source.head]
    found = np.zeros((model.config.depth, len(images), model.config.num_classes))
    x = model.embed(jnp.asarray(images))
    for layer in range(model.config.depth):
        x = run(jax.tree.map(lambda p, layer=layer: p[layer], blocks), x)
        at = layer if own is not None else ...
        for token, head in enumerate(heads):
            for image in range(len(images)):
                value = np.asarray(x[image, token], np.float64)
                value = (value - value.mean()) / np.sqrt(value.var() + model.config.norm_epsilon)
                value = value * np.asarray(source.norm.scale[...][at]) + np.asarray(source.norm.bias[...][at])
                said = value @ np.asarray(head.kernel[...][at]) + np.asarray(head.bias[...][at])
                found[layer, image] += said / len(heads)
    return found


@pytest.mark.parametrize(
    ("own_heads", "distilled", "first_layer"), [(False, False, 0), (True, False, 0), (False, True, 1), (True, True, 2)]
)
def test_agrees_with_a_slow_loop_and_packed_execution_too(own_heads: bool, distilled: bool, first_layer: int) -> None:
    model = exits(own_heads=own_heads, first_layer=first_layer, distilled=distilled)
    images = pictures(model.config)
    said = layer_logits(model, images)
    # Between the images' answers at the first exit, so that some leave there.
    threshold = float(np.sort(scipy.special.softmax(said[first_layer], -1).max(-1))[COUNT // 2 :][:2].mean())
    model = model.with_config(rule=ConfidenceExit(threshold, own_heads, first_layer))
    expected, depth = [], []
    for image in range(COUNT):
        for layer in range(model.config.depth):
            sure = scipy.special.softmax(said[layer, image]).max() > threshold
            if (sure and layer >= first_layer) or layer == model.config.depth - 1:
                expected.append(said[layer, image])
                depth.append(layer + 1)
                break
    assert len(set(depth)) >= 2, "the sample must spread over the layers"
    output = answers(model, images)
    np.testing.assert_array_equal(output.token_depth, np.repeat(np.array(depth)[:, None], model.config.num_tokens, 1))
    np.testing.assert_allclose(output.logits, expected, atol=1e-5)
    np.testing.assert_array_equal(output.ponder_cost, output.token_depth + 1)
    assert not np.any(output.halting_scores)
    for image_exit in (True, False):
        packed = compile_packed(model, COUNT + 2, image_exit=image_exit)(images)
        np.testing.assert_array_equal(packed.token_depth, output.token_depth)
        np.testing.assert_allclose(packed.head_logits, output.head_logits, atol=1e-5)
        np.testing.assert_array_equal(packed.ponder_cost, output.ponder_cost)
    macs = model.config.halting.extra_macs(model.config, jnp.asarray(output.token_depth))
    asked = [d - 1 - first_layer for d in depth]  # the last one is the head that the model has anyway
    np.testing.assert_array_equal(macs, np.array(asked) * model.config.embed_dim * 5 * (1 + distilled))


@pytest.mark.parametrize("pool", ["token", "mean_norm"])
def test_a_threshold_of_one_is_the_plain_model_and_of_zero_leaves_at_the_first_layer(pool: str) -> None:
    static = exits(pool=pool, class_token=pool == "token").with_config(**NO_RULE)
    images = pictures(static.config)
    whole = answers(static.with_config(rule=ConfidenceExit(1.0)), images)
    np.testing.assert_array_equal(whole.token_depth, static.config.depth)
    np.testing.assert_allclose(whole.logits, answers(static, images).logits, atol=1e-6)
    for first_layer in (0, 2):
        rule = ConfidenceExit(0.0, first_layer=first_layer)
        np.testing.assert_array_equal(answers(static.with_config(rule=rule), images).token_depth, first_layer + 1)


def test_own_heads_start_as_the_shared_ones_do() -> None:
    static = exits(distilled=True).with_config(**NO_RULE)
    images = pictures(static.config)
    shared = answers(static.with_config(rule=ConfidenceExit(0.4)), images)
    own = answers(static.with_config(rule=ConfidenceExit(0.4, own_heads=True)), images)
    np.testing.assert_array_equal(own.token_depth, shared.token_depth)
    np.testing.assert_allclose(own.head_logits, shared.head_logits, atol=1e-6)


def test_an_images_logits_do_not_depend_on_its_batch() -> None:
    model = exits()
    images = pictures(model.config)
    together = answers(model, images)
    for image in range(0, COUNT, 4):
        alone = answers(model, images[image : image + 1])
        np.testing.assert_allclose(alone.logits[0], together.logits[image], atol=1e-5)
        np.testing.assert_array_equal(alone.token_depth[0], together.token_depth[image])


@pytest.mark.parametrize("own_heads", [False, True])
def test_training_computes_every_layer_and_takes_the_mean_of_their_losses(own_heads: bool) -> None:
    model = exits(0.0, own_heads=own_heads)  # all images leave at the first layer, and still all layers learn
    images, labels = pictures(model.config), jnp.arange(COUNT) % 5
    graphdef, params = nnx.split(model)

    def loss(params: nnx.State) -> jax.Array:
        output, trace, state = nnx.merge(graphdef, params).forward(images, jax.random.key(0))
        rule, classify = model.config.halting, lambda logits: distillation_loss(logits, labels)
        terms = objective_terms(rule, output.head_logits, trace, state, classify, None)
        assert terms.keys() == {"classification"}
        return terms["classification"]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    said = layer_logits(model, images)
    entropy = -scipy.special.log_softmax(said, axis=-1)[:, np.arange(COUNT), labels]
    np.testing.assert_allclose(value, entropy.mean(), rtol=1e-5)
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.isfinite(leaf[...]).all()
        unused = own_heads and path[0] in ("norm", "head")
        assert unused or np.abs(leaf[...]).max() > 0, path
    if own_heads:
        of_layers = np.abs(gradient["rule_module"]["head"]["kernel"][...]).max((1, 2))
        assert (of_layers > 0).all()


def test_own_heads_are_saved_and_loaded(tmp_path: Path) -> None:
    model = exits(own_heads=True)
    images = pictures(model.config)
    avit_jax.save(model, tmp_path / "exits")
    loaded = avit_jax.load(tmp_path / "exits")
    assert loaded.config == model.config
    np.testing.assert_array_equal(loaded(images).logits, model(images).logits)
    # Another threshold keeps them; another rule leaves them out.
    later = avit_jax.load(tmp_path / "exits", rule=ConfidenceExit(1.0, own_heads=True))
    np.testing.assert_array_equal(
        later(images).logits, model.with_config(rule=ConfidenceExit(1.0, own_heads=True))(images).logits
    )
    assert avit_jax.load(tmp_path / "exits", rule=None).rule_module is None


def test_a_checkpoint_without_own_heads_gets_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    static = exits().with_config(**NO_RULE)
    avit_jax.save(static, tmp_path / "static")
    rule = ConfidenceExit(0.4, own_heads=True)
    loaded = avit_jax.load(tmp_path / "static", rule=rule)
    assert "what the rule learns starts from the checkpoint's norm and head" in capsys.readouterr().out
    images = pictures(static.config)
    np.testing.assert_array_equal(loaded(images).logits, static.with_config(rule=rule)(images).logits)


@pytest.mark.parametrize(
    ("rule", "fields", "message"),
    [
        ({"threshold": 1.1}, {}, "threshold is 1.1: it must be a number from 0 to 1"),
        ({"threshold": float("nan")}, {}, "threshold is nan"),
        ({"threshold": 0.5, "first_layer": -1}, {}, "first_layer is -1"),
        ({"threshold": 0.5, "first_layer": 4}, {}, "first_layer is 4 and the last layer is 3"),
        ({"threshold": 0.5}, {"num_classes": 0}, "num_classes is 0"),
        ({"threshold": 0.5, "own_heads": True}, {"pool": "norm_mean"}, "own_heads read the class token"),
    ],
)
def test_what_cannot_be_is_refused(rule: dict[str, float], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(rule=ConfidenceExit(**rule), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": "0.9"}, "threshold is '0.9': it must be a number"),
        ({"threshold": None}, "threshold is None: it must be a number"),
        ({"threshold": True}, "threshold is True: it must be a number"),
        ({"own_heads": "no"}, "own_heads is 'no': give True or False"),
        ({"first_layer": 1.5}, "first_layer is 1.5: it must be a whole number"),
        ({"first_layer": "1"}, "first_layer is '1': it must be a whole number"),
    ],
)
def test_settings_of_another_type_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(**{"threshold": 0.5, "own_heads": False, "first_layer": 0} | fields)


def test_numpy_numbers_become_plain_ones() -> None:
    rule = checked(threshold=np.float32(0.5), own_heads=False, first_layer=np.int64(1))
    assert json.loads(json.dumps(rule_to_json(rule))) == rule_to_json(ConfidenceExit(0.5, first_layer=1))


def checked(**fields: Any) -> ConfidenceExit:
    """The rule after its own checks; the tests' type check of the constructor would come before them."""
    rule = object.__new__(ConfidenceExit)
    for name, value in fields.items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule
