"""The model: its sizes, its properties, what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

import avit_jax
from avit_jax import AViT, AViTConfig
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.rule import State
from avit_jax.model import layers
from avit_jax.model.layers import Block, drop_path
from avit_jax.model.linear import gelu, matmul
from avit_jax.model.seen import Seen
from tests.harness.builders import answers, small_config, spread_gate

PARAMETERS = {
    "tiny": 5_717_416,
    "small": 22_050_664,
    "base": 86_567_656,
    "tiny_distilled": 5_910_800,
    "small_distilled": 22_436_432,
    "base_distilled": 87_338_192,
}


def reconfigured(model: AViT, **changes: object) -> AViT:
    """The same weights under a changed configuration."""
    other = AViT(dataclasses.replace(model.config, **changes), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model, nnx.Param))
    return other


@pytest.mark.parametrize("family", ["avit", "deit"])
@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_are_those_of_deit(family: str, size: str) -> None:
    model = nnx.eval_shape(lambda: avit_jax.create(f"{family}_{size}_patch16_224"))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == PARAMETERS[size]


def test_presets_carry_the_recipes_gates() -> None:
    gates = {name: (c.gate_scale, c.gate_center) for name, c in avit_jax.PRESETS.items()}
    assert len(gates) == 24
    assert gates["avit_tiny_patch16_224"] == (10, 30)
    assert gates["avit_small_distilled_patch16_384"] == gates["avit_base_patch16_224"] == (10, 75)
    assert gates["deit_tiny_patch16_224"] == (None, None)


@pytest.mark.parametrize("overrides", [{}, {"distilled": True}, {"image_size": 8, "in_channels": 1, "patch_size": 2}])
def test_output_shapes(overrides: dict[str, object]) -> None:
    config = small_config(**overrides)
    height, width = config.image_shape
    output = AViT(config, rngs=nnx.Rngs(0))(jnp.ones((3, height, width, config.in_channels)))
    tokens = height * width // config.patch_size**2 + config.num_special
    assert output.logits.shape == (3, 5)
    assert output.head_logits.shape == (config.num_special, 3, 5)
    assert output.token_depth.shape == output.ponder_cost.shape == (3, tokens)
    assert output.halting_scores.shape == (4, 3, tokens)
    assert output.token_depth.dtype == jnp.int32
    np.testing.assert_allclose(output.logits, output.head_logits.mean(0))


def test_every_layer_has_its_own_weights() -> None:
    kernel = AViT(small_config(), rngs=nnx.Rngs(0)).blocks.mlp.fc1.kernel[...]
    assert kernel.shape[0] == 4
    assert all(not np.array_equal(kernel[0], kernel[layer]) for layer in range(1, 4))
    assert abs(float(kernel.std()) - 0.02) < 0.002


def test_patches_are_read_row_by_row() -> None:
    model = AViT(small_config(), rngs=nnx.Rngs(0))
    images = np.zeros((1, 12, 8, 2), np.float32)
    plain = np.asarray(model.patch_embed(jnp.asarray(images)))
    images[0, 4:8, 4:8] = 1  # second row, second column of a 3 x 2 grid
    changed = np.abs(np.asarray(model.patch_embed(jnp.asarray(images))) - plain).sum(-1)[0]
    assert np.flatnonzero(changed).tolist() == [3]


def test_tokens_spread_over_the_layers(model: AViT, images: jax.Array) -> None:
    depth = np.asarray(model(images).token_depth)
    assert depth.min() >= 1 and depth.max() <= model.config.depth
    assert len(np.unique(depth)) >= 3, "the sample of the tests below must hold many depths"


def test_a_gate_that_never_fires_equals_the_plain_model(model: AViT, images: jax.Array) -> None:
    never = answers(reconfigured(model, gate_center=1e4), images)
    plain = answers(reconfigured(model, gate_scale=None, gate_center=None), images)
    np.testing.assert_allclose(never.logits, plain.logits, atol=1e-6)
    for output in (never, plain):
        np.testing.assert_array_equal(output.token_depth, model.config.depth)
        np.testing.assert_array_equal(output.ponder_cost, model.config.depth + 1)
        assert not output.halting_scores.any()


def test_the_whole_model_equals_block_by_block_removal(model: AViT, images: jax.Array) -> None:
    """Oracle: one image at a time, halted tokens really deleted, no mask anywhere."""
    config, output = model.config, answers(model, images)
    graphdef, stacked = nnx.split(model.blocks)
    blocks = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(config.depth)]
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    for index in range(len(images)):
        x = model.embed(images[index : index + 1])
        alive, total, mixed = np.arange(config.num_tokens), np.zeros(config.num_tokens), 0.0
        depth = np.zeros(config.num_tokens, int)
        for layer, block in enumerate(blocks):
            if not len(alive):
                break
            x = run(block, x)
            depth[alive] += 1
            score = 1 / (1 + np.exp(-(config.gate_scale * np.asarray(x[0, :, 0], np.float64) - config.gate_center)))
            stops = (total[alive] + score >= 1 - config.halt_epsilon) | (layer == config.depth - 1)
            weight = np.where(stops, 1 - total[alive], score)
            if alive[0] == 0:
                mixed = mixed + weight[0] * np.asarray(x[0, 0])
            total[alive] += score
            alive, x = alive[~stops], x[:, ~stops]
        np.testing.assert_array_equal(output.token_depth[index], depth)
        logits = model.head(model.norm(jnp.asarray(mixed, jnp.float32)[None]))[0]
        np.testing.assert_allclose(output.logits[index], logits, atol=2e-5)


@pytest.mark.parametrize("poison", [1e6, np.nan])
def test_changing_halted_tokens_changes_no_logit(
    model: AViT, images: jax.Array, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = model(images)
    advance, touched = AViTGate.advance, []

    def poisoned_advance(self: AViTGate, state: State, seen: Seen, **where: object) -> object:
        touched.append(True)
        tokens = jnp.where(state.active[..., None], seen.tokens, poison)
        return advance(self, state, dataclasses.replace(seen, tokens=tokens), **where)

    monkeypatch.setattr(AViTGate, "advance", poisoned_advance)
    original = Block.attend

    def poisoning_attention(self: Block, x: jax.Array, active: jax.Array, *rest: object, **more: object) -> object:
        # What a halted token holds in a block, whatever it is, meets the next layer only through drop_halted.
        y, facts = original(self, x, active, *rest, **more)
        return jnp.where(active[..., None], y, poison), facts

    monkeypatch.setattr(Block, "attend", poisoning_attention)
    dirty = model(images)
    assert touched
    np.testing.assert_array_equal(clean.logits, dirty.logits)
    np.testing.assert_array_equal(clean.token_depth, dirty.token_depth)
    np.testing.assert_array_equal(clean.ponder_cost, dirty.ponder_cost)


def test_halted_tokens_are_no_keys() -> None:
    block = Block(small_config(), rngs=nnx.Rngs(3))
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))
    active = jnp.arange(7) < jnp.asarray([[4], [6]])
    masked = block(x, active)
    for image, count in enumerate((4, 6)):
        np.testing.assert_allclose(masked[image, :count], block(x[image : image + 1, :count])[0], atol=1e-6)
    assert np.isfinite(block(x, jnp.zeros((2, 7), bool))).all(), "an image without active tokens gives no NaN"


def test_all_tokens_halting_at_layer_one_is_finite(model: AViT, images: jax.Array) -> None:
    graphdef, params = nnx.split(reconfigured(model, gate_center=-60.0))

    def loss(params: nnx.State) -> jax.Array:
        output = nnx.merge(graphdef, params)(images)
        return (output.logits**2).sum() + output.ponder_cost.sum() + output.halting_scores.sum()

    output = nnx.merge(graphdef, params)(images)
    np.testing.assert_array_equal(output.token_depth, 1)
    assert np.isfinite(output.logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_a_later_layer_that_nobody_reaches_has_no_gradient(model: AViT, images: jax.Array) -> None:
    graphdef, params = nnx.split(reconfigured(model, gate_center=-60.0))
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p)(images).logits ** 2).sum()))(params)
    kernel = np.asarray(gradient["blocks"]["mlp"]["fc1"]["kernel"][...])
    assert kernel[0].any() and not kernel[1:].any()


def test_images_do_not_see_each_other(model: AViT, images: jax.Array) -> None:
    together, alone = model(images), model(images[1:2])
    np.testing.assert_allclose(together.logits[1], alone.logits[0], atol=1e-6)
    np.testing.assert_array_equal(together.token_depth[1], alone.token_depth[0])


def test_remat_changes_nothing(model: AViT, images: jax.Array) -> None:
    def value_and_gradient(model: AViT) -> tuple[jax.Array, nnx.State]:
        graphdef, params = nnx.split(model)
        return jax.jit(jax.value_and_grad(lambda p: (nnx.merge(graphdef, p)(images).logits ** 2).sum()))(params)

    plain, plain_gradient = value_and_gradient(model)
    again, again_gradient = value_and_gradient(reconfigured(model, remat=True))
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(plain_gradient), jax.tree.leaves(again_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max() + 1e-6))


def test_what_the_backward_pass_keeps(model: AViT, images: jax.Array) -> None:
    """Products of linear layers, but neither attention weights nor, with remat, anything inside a layer."""

    def kept(remat: bool) -> set[tuple[int, ...]]:
        graphdef, params = nnx.split(reconfigured(model, remat=remat))

        def pullback(params: nnx.State) -> object:
            return jax.vjp(lambda p: nnx.merge(graphdef, p)(images).logits.sum(), params)[1]

        return {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(pullback, params))}

    config = model.config
    tokens = (config.depth, len(images), config.num_tokens)
    weights = (config.depth, len(images), config.num_heads, config.num_tokens, config.num_tokens)
    products = {(*tokens, 3 * config.embed_dim), (*tokens, config.mlp_dim)}
    assert products <= kept(remat=False) and weights not in kept(remat=False)
    assert not products & kept(remat=True) and (*tokens, config.embed_dim) in kept(remat=True)


def test_bfloat16_halts_and_has_finite_gradients(model: AViT, images: jax.Array) -> None:
    graphdef, params = nnx.split(reconfigured(model, dtype="bfloat16"))
    depth = np.asarray(answers(nnx.merge(graphdef, params), images).token_depth)
    assert len(np.unique(depth)) >= 3
    assert (depth == np.asarray(answers(model, images).token_depth)).mean() > 0.8
    gradient = jax.jit(jax.grad(lambda p: (nnx.merge(graphdef, p)(images).logits ** 2).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_gelu_is_the_exact_one() -> None:
    x = np.linspace(-6, 6, 97)
    for dtype, relative in ((jnp.float32, 2e-7), (jnp.bfloat16, 0.5**8)):
        rounded = np.asarray(jnp.asarray(x, dtype), np.float64)
        expected = rounded * scipy.stats.norm.cdf(rounded)
        found = np.asarray(gelu(jnp.asarray(x, dtype)), np.float64)
        np.testing.assert_allclose(found, expected, rtol=relative, atol=1e-6)  # tanh's differs by 4e-4


def test_linear_layers_have_the_gradients_of_a_matrix_product() -> None:
    rng = np.random.default_rng(0)
    for inputs, outputs in ((3, 7), (7, 3)):
        x, kernel, g = (rng.normal(size=shape) for shape in ((2, 5, inputs), (inputs, outputs), (2, 5, outputs)))
        to_jax = [jnp.asarray(v, jnp.float32) for v in (x, kernel, g)]
        dx, dkernel = jax.grad(lambda x, k, g=to_jax[2]: (matmul(x, k) * g).sum(), (0, 1))(*to_jax[:2])
        np.testing.assert_allclose(dx, g @ kernel.T, atol=1e-5)
        np.testing.assert_allclose(dkernel, np.einsum("bni,bno->io", x, g), atol=1e-5)


def test_bfloat16_is_close_and_finite(images: jax.Array) -> None:
    model = AViT(small_config(gate_center=8.0), rngs=nnx.Rngs(0))
    exact, rounded = answers(model, images), answers(reconfigured(model, dtype="bfloat16"), images)
    assert rounded.logits.dtype == rounded.halting_scores.dtype == jnp.float32
    scale = float(jnp.abs(exact.logits).max())
    np.testing.assert_allclose(rounded.logits, exact.logits, atol=0.03 * scale)  # 8 bits: 0.4 % an operation
    assert not np.array_equal(rounded.logits, exact.logits), "bfloat16 is really used"
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))


def test_drop_path_is_unbiased_and_drops_whole_images() -> None:
    branch = jnp.ones((4000, 2, 3))
    dropped = np.asarray(drop_path(branch, jnp.float32(0.3), jax.random.key(0)))
    np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.7], rtol=1e-6)
    assert (dropped == dropped[:, :1, :1]).all()
    assert abs(dropped[:, 0, 0].mean() - 1) < 4 * np.sqrt(0.3 / 0.7 / 4000)  # four standard errors


@pytest.mark.parametrize("field", ["drop_path_rate", "drop_rate"])
def test_regularisation_acts_in_training_alone(field: str, images: jax.Array) -> None:
    plain, dropping = spread_gate(small_config()), spread_gate(small_config(**{field: 0.5}))
    np.testing.assert_array_equal(plain(images).logits, dropping(images).logits)
    rngs = nnx.Rngs(dropout=1)
    np.testing.assert_allclose(plain(images, deterministic=False, rngs=rngs).logits, plain(images).logits, atol=1e-6)
    trained = dropping(images, deterministic=False, rngs=nnx.Rngs(dropout=1)).logits
    assert not np.allclose(trained, plain(images).logits)
    again = dropping(images, deterministic=False, rngs=nnx.Rngs(dropout=1)).logits
    np.testing.assert_array_equal(trained, again)


def test_drop_path_grows_with_the_layer(images: jax.Array, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []

    def watched(branch: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
        jax.debug.callback(rates.append, rate, ordered=True)
        return branch

    monkeypatch.setattr(layers, "drop_path", watched)
    model = AViT(small_config(drop_path_rate=0.3), rngs=nnx.Rngs(0))
    jax.block_until_ready(model(images, deterministic=False, rngs=nnx.Rngs(0)).logits)
    jax.effects_barrier()
    np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3], 2), atol=1e-6)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((1, 12, 8, 2), np.uint8), r"uint8: use avit_jax.preprocess"),
        (np.zeros((1, 12, 8, 2), np.float64), r"float64: use astype"),
        (np.zeros((12, 8, 2), np.float32), r"add a batch axis"),
        (np.zeros((1, 2, 12, 8), np.float32), r"channels first: use images.transpose\(0, 2, 3, 1\)"),
        (np.zeros((1, 16, 8, 2), np.float32), r"\(1, 16, 8, 2\): resize"),
    ],
)
def test_other_images_are_refused_with_the_reason(model: AViT, images: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        model(images)


def test_the_model_itself_refuses_another_size(model: AViT) -> None:
    with pytest.raises(ValueError, match=r"float32 \[batch, 12, 8, 2\], but their shape is \(1, 8, 8, 2\)"):
        model(jnp.zeros((1, 8, 8, 2)))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"image_size": 225}, "image height 225 is not divisible by patch_size 16"),
        ({"image_size": (224, 230)}, "image width 230 is not divisible by patch_size 16"),
        ({"num_heads": 5}, "embed_dim 192 is not divisible by num_heads 5"),
        ({"gate_scale": 5.0}, "gate_scale is 5.0 and gate_center None"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown: choose float32 or bfloat16"),
        ({"halt_epsilon": 0.0}, "halt_epsilon is 0.0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"depth": 0}, "depth is 0"),
        ({"class_names": ("a", "b")}, "2 class_names for num_classes 1000"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        AViTConfig(**fields)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="no preset 'avit_tiny_patch16_225': did you mean 'avit_tiny_patch16_224'"):
        avit_jax.create("avit_tiny_patch16_225")
    with pytest.raises(ValueError, match="no field 'gate_centre': did you mean 'gate_center'"):
        avit_jax.create("avit_tiny_patch16_224", gate_centre=3.0)
