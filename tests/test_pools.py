"""Register tokens, heads on the mean of the patches, models without a class token or a head: masked and packed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from avit_jax import AViT, AViTConfig, AViTOutput, PackedPlan, compile_packed
from tests.harness.builders import small_config, spread_gate

NO_GATE = {"gate_scale": None, "gate_center": None}
PACKED: list[dict[str, object]] = [  # each also executed packed
    {"num_registers": 3},
    {"distilled": True, "num_registers": 2},
    {"pool": "mean_norm", "norm_epsilon": 0.1},
    {"pool": "norm_mean", "class_token": False, "num_registers": 2, "norm_epsilon": 0.1},
    {"pool": "token_and_mean", "num_registers": 1, "num_classes": 0},
]
PLAIN: list[dict[str, object]] = [PACKED[4] | NO_GATE, PACKED[3] | NO_GATE]
ARCHITECTURES = [*PACKED, {"pool": "mean_norm", "class_token": False}, {"num_classes": 0, "distilled": True}]


def spread(model_config: AViTConfig) -> AViT:
    """Tokens halt at many layers, and no two channels of the final LayerNorm are alike."""
    model = spread_gate(model_config)
    scale, bias = 1 + 0.3 * np.random.default_rng(7).normal(size=(2, model_config.embed_dim)).astype(np.float32)
    model.norm.scale[...], model.norm.bias[...] = scale, bias
    return model


def some_images(count: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, 12, 8, 2)).astype(np.float32)


def norm(x: np.ndarray, layer: nnx.LayerNorm, epsilon: float, index: object = ...) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * np.asarray(layer.scale[...])[index] + np.asarray(layer.bias[...])[index]


def linear(x: np.ndarray, layer: nnx.Linear, index: object = ...) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...])[index] + np.asarray(layer.bias[...])[index]


def block(x: np.ndarray, model: AViT, layer: int) -> np.ndarray:
    """Oracle: one layer for one image's tokens [n, 16], two heads of 8."""
    blocks, epsilon = model.blocks, model.config.norm_epsilon
    qkv = linear(norm(x, blocks.norm1, epsilon, layer), blocks.attn.qkv, layer).reshape(-1, 3, 2, 8)
    weights = scipy.special.softmax(np.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / 8**0.5, axis=-1)
    mixed = np.einsum("hqk,khd->qhd", weights, qkv[:, 2]).reshape(-1, 16)
    x = x + linear(mixed, blocks.attn.proj, layer)
    hidden = linear(norm(x, blocks.norm2, epsilon, layer), blocks.mlp.fc1, layer)
    return x + linear(hidden * scipy.special.ndtr(hidden), blocks.mlp.fc2, layer)


def removal(model: AViT, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Oracle: each token's weighted sum over layers and its depth, halted tokens really deleted, no mask anywhere."""
    config = model.config
    names = [name for name in ("cls_token", "dist_token", "reg_token") if hasattr(model, name)]
    patches = image.reshape(3, 4, 2, 4, 2).transpose(0, 2, 1, 3, 4).reshape(6, 32)
    tokens = [*(np.asarray(getattr(model, name)[...])[0] for name in names), linear(patches, model.patch_embed.proj)]
    x = np.concatenate(tokens).astype(np.float64) + np.asarray(model.pos_embed[...])[0]
    alive, total, depth = np.arange(len(x)), np.zeros(len(x)), np.zeros(len(x), int)
    values = np.zeros(x.shape)
    for layer in range(config.depth):
        if not len(alive):
            break
        x = block(x, model, layer)
        depth[alive] += 1
        score = scipy.special.expit(config.gate_scale * x[:, 0] - config.gate_center) if config.halts else 0 * x[:, 0]
        stops = (total[alive] + score >= 1 - config.halt_epsilon) | (layer == config.depth - 1)
        values[alive] += np.where(stops, 1 - total[alive], score)[:, None] * x
        total[alive] += score
        alive, x = alive[~stops], x[~stops]
    return values, depth


def head_outputs(model: AViT, values: np.ndarray) -> list[np.ndarray]:
    """Oracle: what each head says, or with num_classes 0 reads."""
    config, patches = model.config, values[-6:]

    def normed(x: np.ndarray) -> np.ndarray:
        return norm(x, model.norm, config.norm_epsilon)

    if config.pool == "token":
        read = [normed(values[0]), normed(values[1])] if config.distilled else [normed(values[0])]
    elif config.pool == "mean_norm":
        read = [normed(patches.mean(0))]
    elif config.pool == "norm_mean":
        read = [normed(patches).mean(0)]
    else:
        read = [np.concatenate([normed(values[0]), normed(patches).mean(0)])]
    if not config.num_classes:
        return read
    return [linear(x, head) for x, head in zip(read, [model.head, getattr(model, "head_dist", None)], strict=False)]


@pytest.mark.parametrize("fields", [*ARCHITECTURES, *PLAIN], ids=str)
def test_masked_and_packed_are_the_oracles(fields: dict[str, object]) -> None:
    model = spread(small_config(**fields))
    config, images = model.config, some_images()
    masked = jax.jit(lambda images: model(images))(images)
    if config.halts:
        assert len(np.unique(masked.token_depth)) >= 3
    values, depths = zip(*(removal(model, image) for image in images), strict=True)
    expected = np.stack([head_outputs(model, value) for value in values], axis=1)
    np.testing.assert_array_equal(masked.token_depth, depths)
    np.testing.assert_allclose(masked.head_logits, expected, atol=3e-5)
    np.testing.assert_allclose(masked.logits, expected.mean(0), atol=3e-5)
    if fields not in [*PACKED, *PLAIN]:
        return
    plan = PackedPlan(config.num_tokens, 2, (4, config.num_tokens))
    if config.halts:
        assert_exited(masked, compile_packed(model, 5, plan)(images[:4]), config, 4)
    if fields in (PACKED[1], PACKED[3], PLAIN[1]):
        whole = compile_packed(model, 5, plan, image_exit=False)(images)
        for name in ("head_logits", "logits", "ponder_cost", "halting_scores"):
            np.testing.assert_allclose(getattr(whole, name), getattr(masked, name), atol=1e-5)
        np.testing.assert_array_equal(whole.token_depth, masked.token_depth)


def assert_exited(masked: AViTOutput, packed: AViTOutput, model_config: AViTConfig, count: int) -> None:
    """The logits stay; depths end where the last token that the heads read stops, in the tests' own words."""
    np.testing.assert_allclose(packed.logits, masked.logits[:count], atol=1e-5)
    depth = np.asarray(masked.token_depth)[:count]
    first_patch = model_config.num_tokens - 6
    read = {
        "token": [0, 1][: 1 + model_config.distilled],
        "token_and_mean": [0, *range(first_patch, model_config.num_tokens)],
    }
    end = depth[:, read.get(model_config.pool, list(range(first_patch, model_config.num_tokens)))].max(1, keepdims=True)
    np.testing.assert_array_equal(packed.token_depth, np.minimum(depth, end))


def test_an_image_ends_with_its_last_patch_where_the_mean_is_read() -> None:
    """The class token would go on to the last layer, but no head reads it."""
    model = spread(small_config(pool="norm_mean", gate_scale=40.0, gate_center=20.0))
    for _, param in nnx.to_flat_state(nnx.state(model)):
        if param.shape[-1] == 16 and len(param.shape) > 1:
            param[...] = param[...].at[..., 0].set(0.0)
    model.patch_embed.proj.bias[...] = model.patch_embed.proj.bias[...].at[0].set(-1.0)  # patches stop at layer 2
    model.blocks.mlp.fc2.bias[...] = model.blocks.mlp.fc2.bias[...].at[:, 0].set(1.0)
    model.cls_token[...] = model.cls_token[...].at[..., 0].set(-9.0)
    images = some_images()
    masked, packed = model(images), compile_packed(model, 5)(images)
    np.testing.assert_array_equal(masked.token_depth, [[4, 2, 2, 2, 2, 2, 2]] * 5)
    np.testing.assert_array_equal(packed.token_depth, 2)
    np.testing.assert_allclose(packed.logits, masked.logits, atol=1e-5)


@pytest.mark.parametrize("center", [-60.0, 1.0])
def test_gradients_are_finite(center: float) -> None:
    model = spread(small_config(**PACKED[3], gate_center=center))
    graphdef, params = nnx.split(model)
    images = jnp.asarray(some_images(3))

    def loss(output: AViTOutput) -> jax.Array:
        return (output.logits**2).sum() + output.ponder_cost.sum() + output.halting_scores.sum()

    gradients = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params)(images))))
    gradient = gradients(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.asarray(gradient["reg_token"][...]).any()


def test_parameters_have_timms_shapes() -> None:
    def shapes(**fields: object) -> dict[str, tuple[int, ...]]:
        state = nnx.to_flat_state(nnx.state(AViT(small_config(**fields), rngs=nnx.Rngs(0))))
        return {".".join(map(str, path)): param.shape for path, param in state}

    registers = shapes(num_registers=4, pool="token_and_mean")
    assert registers["reg_token"] == (1, 4, 16)
    assert registers["pos_embed"] == (1, 1 + 4 + 6, 16)
    assert registers["head.kernel"] == (32, 5)
    bare = shapes(class_token=False, pool="mean_norm", num_classes=0)
    assert not {"cls_token", "dist_token", "reg_token", "head.kernel"} & bare.keys()
    assert bare["pos_embed"] == (1, 6, 16)


def test_positions_of_registers_are_rows_like_others() -> None:
    """Tokens lie in timm's order: class token, registers, patches."""
    model = spread(small_config(num_registers=2))
    x = np.asarray(model.embed(jnp.asarray(some_images(1))))[0]
    positions = np.asarray(model.pos_embed[...])[0]
    np.testing.assert_allclose(x[0], np.asarray(model.cls_token[...])[0, 0] + positions[0], atol=1e-6)
    np.testing.assert_allclose(x[1:3], np.asarray(model.reg_token[...])[0] + positions[1:3], atol=1e-6)


def test_the_seed_gives_todays_weights() -> None:
    """Without the new tokens nothing more is drawn: a seed's models stay what they were."""
    plain, registers = (AViT(small_config(num_registers=n), rngs=nnx.Rngs(0)) for n in (0, 1))
    np.testing.assert_array_equal(plain.cls_token[...], registers.cls_token[...])
    assert not np.array_equal(plain.pos_embed[...][:, 0], registers.pos_embed[...][:, 0])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_registers": -1}, "num_registers is -1: it must be at least 0"),
        ({"num_classes": -1}, "num_classes is -1: it must be at least 0"),
        ({"pool": "mean"}, "pool 'mean' is unknown: choose one of token, mean_norm, norm_mean, token_and_mean"),
        (
            {"class_token": False},
            "pool 'token' reads the class token and class_token is False: choose pool 'mean_norm'",
        ),
        ({"class_token": False, "pool": "token_and_mean"}, "pool 'token_and_mean' reads the class token"),
        ({"distilled": True, "pool": "mean_norm"}, "a distilled model has a head on its class token"),
        ({"distilled": True, "class_token": False, "pool": "norm_mean"}, "a distilled model has a head on its class"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0: it must lie between 0 and 1"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        small_config(**fields)


@pytest.mark.parametrize("fields", ARCHITECTURES, ids=str)
def test_configurations_survive_json(fields: dict[str, object]) -> None:
    config = small_config(**fields)
    assert AViTConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_configurations_written_before_the_new_fields_load() -> None:
    parts = small_config().to_json()
    for name in ("class_token", "num_registers", "pool", "norm_epsilon"):
        del parts["model"][name]
    assert AViTConfig.from_json(parts) == small_config()
    parts["model"]["num_register"] = 2
    with pytest.raises(ValueError, match="num_register'"):
        AViTConfig.from_json(parts)
