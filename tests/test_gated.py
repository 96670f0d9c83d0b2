"""Gates of patches, heads and sublayers: recorded outputs, a slow oracle with gradients, removal equal to masking."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, ConfidenceExit, Gates, PackedPlan, Preprocessing
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.evaluate.gate_controls import (
    fixed_gates,
    gate_figures,
    gate_rates,
    gates_of_other_images,
    image_gates,
    random_gates,
)
from avit_jax.evaluate.rows import correct_images
from avit_jax.execution import gated
from avit_jax.execution.work import masked_gmacs, output_gmacs, published_gmacs, shrinking_gmacs, whole_gmacs
from avit_jax.gated.gates import Choice, straight_through
from avit_jax.gated.losses import GateLoss, usage_losses
from avit_jax.gated.work import layer_macs, published_macs
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.model.output import GatedOutput
from avit_jax.model.presets import config_from
from avit_jax.model.vit import model_of_shapes
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from avit_jax.train.loop import train
from avit_jax.train.start import initial_model
from tests.harness.builders import answers, small_config, tiny_experiment

GOLDENS = Path(__file__).parent / "data" / "methods"
CONFIG = small_config(**NO_RULE | {"rule": Gates(token_bias=0.0, bias=0.0)})  # 6 patches, 4 layers, 2 heads of 8


def model_of_many_choices(seed: int = 0) -> AViT:
    """Weights so large that about half of all gates are on."""
    model = AViT(CONFIG, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda p: 6 * p if p.ndim >= 2 else p, nnx.state(model))
    state["rule_module"] = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), state["rule_module"]
    )
    nnx.update(model, state)
    return model


MODEL = model_of_many_choices()
FOR_PIXELS = MODEL.with_config(preprocessing=Preprocessing((0.5, 0.5), (0.25, 0.25)))
STATIC = AViT(small_config(**NO_RULE), rngs=nnx.Rngs(0))
IMAGES = jnp.asarray(np.random.default_rng(1).standard_normal((5, 12, 8, 2)), jnp.float32)


def run(model: AViT, images: jax.Array, key: Any = None, forced: Choice | None = None) -> Any:
    """gated.forward, compiled."""
    graphdef, state = nnx.split(model)
    program = jax.jit(lambda state, images: gated.forward(nnx.merge(graphdef, state), images, key, forced=forced))
    return program(state, images)


def everything(images: int = 5, depth: int = 4) -> Choice:
    return Choice(*(jnp.ones((depth, images, count)) for count in (7, 2, 2)))


@pytest.mark.parametrize("name", ["gated-micro", "gated-12"])
def test_recorded_outputs_of_the_public_code(name: str) -> None:
    """Logits to 1e-5 and every gate, from the checkpoint's own names, masked and packed."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        recorded = dict(file)
    meta = json.loads(str(recorded["meta"]))
    weights = {key[2:]: value for key, value in recorded.items() if key.startswith("w/")}
    model = avit_jax.from_torch_state_dict(weights, num_heads=meta["num_heads"])
    assert model.config.rule == Gates()
    assert (model.config.depth, model.config.image_size) == (meta["depth"], meta["image_size"])
    images = jnp.asarray(recorded["images"].transpose(0, 2, 3, 1))
    masked, packed = answers(model, images), avit_jax.compile(model, 3, execution="packed")(images)
    for output in (masked, packed):
        assert isinstance(output, GatedOutput)
        np.testing.assert_allclose(output.logits, recorded["logits"], atol=1e-5)
        for gates, first, wanted in (
            (output.token_gates, 0, "token_gates"),
            (output.head_gates, 1, "head_gates"),
            (output.sublayer_gates, 1, "sublayer_gates"),
        ):
            np.testing.assert_array_equal(np.asarray(gates)[first:].transpose(1, 0, 2), recorded[wanted])
    assert 0.2 < recorded["token_gates"].mean() < 0.8, "the recording decides something"


def slow_logits(params: Any, images: jax.Array, noise: list[tuple[Any, ...]] | None) -> jax.Array:
    """The equations of the paper's code, with its mask as it is written there, one layer after the other."""

    def norm(x: jax.Array, own: Any) -> jax.Array:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * own["scale"] + own["bias"]

    def gate(logits: jax.Array, threshold: float, drawn: Any) -> jax.Array:
        if drawn is None:
            return (jax.nn.sigmoid(logits) > threshold).astype(jnp.float32)
        soft = jax.nn.sigmoid((logits + drawn) / 5)
        return (soft > threshold) + (soft - jax.lax.stop_gradient(soft))

    patches = jnp.stack(
        [images[:, 4 * (i // 2) : 4 * (i // 2) + 4, 4 * (i % 2) : 4 * (i % 2) + 4] for i in range(6)], 1
    )
    embed = params["patch_embed"]["proj"]
    x = patches.reshape(len(images), 6, 32) @ embed["kernel"] + embed["bias"]
    x = jnp.concatenate([jnp.broadcast_to(params["cls_token"], (len(images), 1, 16)), x], 1)
    x = x + jax.lax.stop_gradient(params["pos_embed"])
    for layer in range(4):
        block = jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])
        own = jax.tree.map(lambda p, layer=layer: p[layer], params["rule_module"])
        drawn = (None, None, None) if noise is None else noise[layer]
        u, first = norm(x, block["norm1"]), x[:, 0]
        t = gate((u[:, 1:] @ own["tokens"]["kernel"] + own["tokens"]["bias"])[..., 0], 0.6, drawn[0])
        t = jnp.concatenate([jnp.ones((len(x), 1)), t], 1)
        heads, sub = jnp.ones((len(x), 2)), jnp.ones((len(x), 2))
        if layer:
            heads = gate(first @ own["heads"]["kernel"] + own["heads"]["bias"], 0.5, drawn[1])
            sub = gate(first @ own["sublayers"]["kernel"] + own["sublayers"]["bias"], 0.5, drawn[2])
        ch = jnp.repeat(heads, 8, axis=1)[:, None]
        qkv = u @ block["attn"]["qkv"]["kernel"] + block["attn"]["qkv"]["bias"]
        q, k, v = (part * ch for part in jnp.split(qkv, 3, -1))
        both = jax.lax.stop_gradient(t[:, :, None] * t[:, None]) == 1
        mixed = []
        for head in range(2):
            cut = slice(8 * head, 8 * head + 8)
            score = jnp.einsum("bnc,bmc->bnm", q[..., cut], k[..., cut]) / math.sqrt(8)
            score = jnp.where(both, score, jnp.where(jnp.eye(7) == 1, 0.0, -jnp.inf))
            mixed.append(jax.nn.softmax(score, -1) @ v[..., cut])
        out = (ch * jnp.concatenate(mixed, -1)) @ block["attn"]["proj"]["kernel"] + block["attn"]["proj"]["bias"]
        y = x + sub[:, 0, None, None] * t[..., None] * out
        mlp = block["mlp"]
        hidden = jax.nn.gelu(
            (ch * norm(y, block["norm2"])) @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"], approximate=False
        )
        x = y + sub[:, 1, None, None] * t[..., None] * (hidden @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"])
    return norm(x[:, 0], params["norm"]) @ params["head"]["kernel"] + params["head"]["bias"]


def noise_of(key: Any) -> list[tuple[Any, ...]]:
    """The noise that the layers draw from this key."""
    drawn = []
    for layer in range(4):
        keys = jax.random.split(jax.random.fold_in(key, layer), 3)
        drawn.append(
            tuple(jax.random.logistic(k, shape) for k, shape in zip(keys, ((5, 6), (5, 2), (5, 2)), strict=True))
        )
    return drawn


def test_inference_is_that_of_the_slow_oracle() -> None:
    found = answers(MODEL, IMAGES)
    expected = jax.jit(lambda p, x: slow_logits(p, x, None))(nnx.to_pure_dict(nnx.state(MODEL)), IMAGES)
    np.testing.assert_allclose(found.logits, expected, atol=2e-5)


def test_training_gradients_are_those_of_the_slow_oracle() -> None:
    """All parameters, with the same noise; positions are frozen and get none."""
    key, weight = jax.random.key(4), jnp.asarray(np.random.default_rng(2).standard_normal((5, 5)), jnp.float32)
    graphdef, state = nnx.split(MODEL)
    noise = noise_of(key)

    def ours(params: Any) -> jax.Array:
        nnx_state = jax.tree.map(lambda p: p, state)
        nnx.replace_by_pure_dict(nnx_state, params)
        return (gated.forward(nnx.merge(graphdef, nnx_state), IMAGES, key)[0].logits * weight).sum()

    params = nnx.to_pure_dict(state)
    found = jax.jit(jax.value_and_grad(ours))(params)
    expected = jax.jit(jax.value_and_grad(lambda p: (slow_logits(p, IMAGES, noise) * weight).sum()))(params)
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-4)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)), dict(found[1]), dict(expected[1])
    )
    assert float(jnp.abs(found[1]["pos_embed"]).max()) == 0
    for part in ("tokens", "heads", "sublayers"):
        assert float(jnp.abs(found[1]["rule_module"][part]["kernel"]).max()) > 1e-4, part


def test_all_gates_on_are_the_plain_vit() -> None:
    plain = answers(MODEL.with_config(**NO_RULE), IMAGES)
    output, _, _ = run(MODEL, IMAGES, forced=everything())
    np.testing.assert_allclose(output.logits, plain.logits, atol=1e-5)
    config = MODEL.config
    gates = 16 * (4 * 6 + 3 * (2 + 2)) / 1e9
    np.testing.assert_allclose(output_gmacs(config, output), whole_gmacs(config) + gates, rtol=1e-6)
    assert masked_gmacs(config) == pytest.approx(whole_gmacs(config) + gates, rel=1e-6)


def test_what_is_off_adds_nothing_and_keeps_its_value() -> None:
    """A patch that is off in every layer changes no logit; all sublayers off leave the embedding."""
    choice = everything()
    off = Choice(choice.tokens.at[:, :, 3].set(0), choice.heads, choice.sublayers)
    graphdef, state = nnx.split(MODEL)

    def of_pixels(images: jax.Array) -> jax.Array:
        return gated.forward(nnx.merge(graphdef, state), images, forced=off)[0].logits.sum()

    gradient = np.asarray(jax.jit(jax.grad(of_pixels))(IMAGES))
    patch = gradient[:, 4:8, 0:4]  # patch 2, token 3
    assert np.abs(patch).max() == 0 and np.abs(gradient).max() > 1e-4
    output, _, final = run(MODEL, IMAGES, forced=Choice(choice.tokens, choice.heads, jnp.zeros_like(choice.sublayers)))
    np.testing.assert_allclose(final.output[:, 0], MODEL.embed(IMAGES)[:, 0], atol=1e-6)
    assert int(output.token_depth.max()) == 0


@pytest.mark.parametrize(
    "plan", [PackedPlan(7, 1, (7,)), PackedPlan(7, 2, (2, 4, 7)), PackedPlan(7, 5, (3, 7))], ids=str
)
def test_removal_gives_the_same_as_masking(plan: PackedPlan) -> None:
    masked = answers(MODEL, IMAGES)
    program = avit_jax.compile_packed(MODEL, 6, plan)
    packed = program(IMAGES)
    assert isinstance(masked, GatedOutput) and isinstance(packed, GatedOutput)
    np.testing.assert_allclose(packed.logits, masked.logits, atol=1e-5)
    for name in ("token_depth", "token_gates", "head_gates", "sublayer_gates"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(masked, name), err_msg=name)
    share = np.asarray(masked.token_gates).mean(), np.asarray(masked.sublayer_gates).mean()
    assert 0.2 < share[0] < 0.9 and 0.2 < share[1] < 0.9, "something is off, something is on"


def test_the_work_of_removal_by_hand() -> None:
    """One image a group and a capacity for every count: exactly the tokens that are on, with whole heads."""
    program = avit_jax.compile_packed(MODEL, 5, PackedPlan(7, 1, tuple(range(1, 8))))
    output = program(IMAGES)
    assert isinstance(output, GatedOutput)
    found = program.executed(np.asarray(output.token_depth), 5, output)
    n, s = np.asarray(output.token_gates).sum(-1), np.asarray(output.sublayer_gates)
    macs = (s[..., 0] * (4 * n * 16**2 + 2 * n**2 * 16) + s[..., 1] * 2 * n * 16 * 64).sum() / 5
    macs += 6 * 32 * 16 + 16 * 5 + 16 * (4 * 6 + 3 * 4)
    assert found.gmacs * 1e9 == pytest.approx(macs, rel=1e-6)


def test_counts_of_a_block_of_deit_small() -> None:
    """Half of the heads, all tokens: 0.2473 G truly, 0.240 in the published table."""
    config = AViTConfig(embed_dim=384, num_heads=6, rule=Gates())
    one = Choice(jnp.ones((12, 1, 197)), jnp.ones((12, 1, 6)).at[..., 3:].set(0), jnp.ones((12, 1, 2)))
    fields = (jnp.zeros((1, 1000)), jnp.zeros((1, 1, 1000)), jnp.ones((1, 197), int), jnp.ones((1, 197)))
    output = GatedOutput(*fields, jnp.zeros((12, 1, 197)), one.tokens, one.heads, one.sublayers)
    rest = (196 * 768 * 384 + 384 * 1000) / 1e9
    gates = 384 * (196 * 12 + 8 * 11) / 1e9
    assert (float(output_gmacs(config, output)[0]) - rest - gates) / 12 == pytest.approx(0.2473, abs=5e-5)
    norms = 12 * 2 * 5 * 197 * 384 / 1e9
    assert (float(published_gmacs(config, output)[0]) - rest - gates - norms) / 12 == pytest.approx(0.2401, abs=1e-4)


def test_work_with_a_short_last_layer_by_hand() -> None:
    """Layers with some tokens, heads and sublayers off; of the last layer only the class token's query is computed."""
    tokens = jnp.ones((4, 1, 7)).at[1, :, 3:].set(0).at[3, :, 5:].set(0)
    heads = jnp.ones((4, 1, 2)).at[1, :, 1].set(0).at[3, :, 1].set(0)
    sublayers = jnp.ones((4, 1, 2)).at[2, :, 0].set(0)
    found = layer_macs(CONFIG, Choice(tokens, heads, sublayers), short_last_layer=True)
    d, m, gates = 16, 64, (6 * 16, (6 + 2 + 2) * 16)
    first = 4 * 7 * d * d + 2 * 7 * 7 * d + 2 * 7 * d * m
    second = 3 * 3 * d * 8 + 2 * 3 * 3 * 8 + 3 * 8 * d + 3 * (8 * m + m * d)
    third = 2 * 7 * d * m
    last = 2 * 5 * d * 8 + d * 8 + 2 * 5 * 8 + 8 * d + (8 * m + m * d)  # keys and values of 5 tokens
    assert found[:, 0].tolist() == [first + gates[0], *(layer + gates[1] for layer in (second, third, last))]
    whole = float(layer_macs(CONFIG, everything(1), short_last_layer=True).sum()) - gates[0] - 3 * gates[1]
    rest = 6 * 32 * 16 + 16 * 5
    static = dataclasses.replace(CONFIG, **NO_RULE)
    assert whole + rest == pytest.approx(1e9 * shrinking_gmacs(static, short_last_layer=True), rel=1e-6)


def test_the_published_count_of_a_layer_without_heads_is_that_of_its_norms() -> None:
    choice = everything(1)
    without = dataclasses.replace(choice, heads=choice.heads.at[2].set(0))
    found = published_macs(CONFIG, without)[:, 0] - published_macs(CONFIG, choice)[:, 0]
    assert float(found[2]) == -(3 * 7 * 16 * 16 + 2 * 49 * 16 + 7 * 16 * 16 + 2 * 7 * 16 * 64)
    assert found.at[2].set(0).tolist() == [0, 0, 0, 0]


def test_extra_parameters() -> None:
    """L (D + 1) + (L - 1)(H + 2)(D + 1), and the first layer's unused maps, which are zero."""
    model = model_of_shapes(config_from("deit_small_patch16_224", rule=Gates()))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.rule_module))) - (6 + 2) * 385 == 38_500
    own = nnx.state(AViT(CONFIG, rngs=nnx.Rngs(0)).rule_module)
    assert all(
        float(jnp.abs(leaf[0]).max()) == 0 for part in ("heads", "sublayers") for leaf in jax.tree.leaves(own[part])
    )


def test_straight_through() -> None:
    """1 or 0 exactly, by chance sigmoid(logit - temperature * logit(threshold)), with the gradient of the sigmoid."""
    logits, noise = jnp.full(200_000, 1.0), jax.random.logistic(jax.random.key(0), (200_000,))
    gates = straight_through(logits, noise, 0.6, 5.0)
    assert set(np.unique(gates)) == {0.0, 1.0}
    chance = 1 / (1 + math.exp(-(1 - 5 * math.log(1.5))))
    assert float(gates.mean()) == pytest.approx(chance, abs=0.005)
    soft = 1 / (1 + math.exp(-0.5 / 5))
    slope = jax.grad(lambda a: straight_through(a, jnp.array(-0.5), 0.6, 5.0))(1.0)
    assert float(slope) == pytest.approx(soft * (1 - soft) / 5, rel=1e-5)


@pytest.mark.parametrize("form", ["paper", "official"])
@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 1.0]])
def test_usage_terms_by_hand(form: str, weight: list[float] | None) -> None:
    rng = np.random.default_rng(0)
    t, h, s = (rng.integers(0, 2, (4, 3, n)).astype(np.float32) for n in (7, 2, 2))
    t[:, :, 0] = 1
    settings = GateLoss(gate_form=form, token_target=0.3, head_target=0.7, sublayer_target=0.2)
    found = usage_losses(
        jnp.asarray(t), jnp.asarray(h), jnp.asarray(s), settings, None if weight is None else jnp.asarray(weight)
    )
    kept = [0, 1, 2] if weight is None else [0, 2]
    tokens, heads, sub = t[:, kept], h[1:, kept], s[1:, kept]
    runs = np.broadcast_to(sub.sum(-1, keepdims=True) > 0, heads.shape)
    deviations = [tokens.mean() - 0.3, (heads * runs).sum() / runs.sum() - 0.7, sub.mean() - 0.2]
    expected = [2 * d**2 if form == "paper" or i == 0 else 2 * abs(d) for i, d in enumerate(deviations)]
    assert [float(found[name]) for name in ("token_use", "head_use", "sublayer_use")] == pytest.approx(
        expected, rel=1e-5
    )


def test_the_use_of_heads_moves_no_gate_of_a_sublayer() -> None:
    """M, whether a layer runs, is a number and no function: its gradient is stopped."""
    rng = np.random.default_rng(0)
    t, h, s = (jnp.asarray(rng.integers(0, 2, (4, 3, n)), jnp.float32) for n in (7, 2, 2))
    slopes = jax.grad(lambda s: usage_losses(t, h, s, GateLoss())["head_use"])(s)
    np.testing.assert_array_equal(slopes, jnp.zeros_like(s))
    assert jnp.abs(jax.grad(lambda h: usage_losses(t, h, s, GateLoss())["head_use"])(h)).max() > 0


def split_of(images: int) -> Split:
    pixels = np.random.default_rng(2).integers(0, 256, (images, 12, 8, 2)).astype(np.uint8)
    return Split(pixels, np.zeros(images, np.int32))


def test_rates_do_not_depend_on_padding() -> None:
    rates, whole = (gate_rates(image_gates(FOR_PIXELS, split_of(11), size)) for size in (4, 11))
    for own, other in zip(jax.tree.leaves(rates), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-6)
    assert (np.asarray(rates.tokens) % 1 > 0).any()


def test_gates_of_images_give_back_their_figures() -> None:
    """Forced to its own gates, each image has its own answer; with another image's, only the work stays."""
    split = split_of(11)  # three batches, the last one padded
    gates = image_gates(FOR_PIXELS, split, 4)
    own, forced = (gate_figures(FOR_PIXELS, split, choice, batch_size=4) for choice in (None, gates))
    assert forced == own
    other = gates_of_other_images(gates)
    np.testing.assert_array_equal(other.tokens[:, 1:], gates.tokens[:, :-1])
    np.testing.assert_array_equal(other.tokens[:, 0], gates.tokens[:, -1])
    turned = gate_figures(FOR_PIXELS, split, other, batch_size=4)
    for name in ("gmacs", "published_gmacs", "gmacs_deviation"):
        assert turned[name] == pytest.approx(own[name], rel=1e-6)
    assert turned["use"] == pytest.approx(own["use"]) and turned["disagreement"] == pytest.approx(own["disagreement"])


def test_disagreement_is_that_of_two_images() -> None:
    split = split_of(11)
    tokens = np.asarray(image_gates(FOR_PIXELS, split).tokens)[..., 1:]
    pairs = [(tokens[:, a] != tokens[:, b]).mean() for a in range(11) for b in range(11)]
    found = gate_figures(FOR_PIXELS, split)["disagreement"]["tokens"]
    assert found == pytest.approx(np.mean(pairs), rel=1e-5) and found > 0.1


def test_a_gate_at_its_threshold_is_off() -> None:
    for rule in (Gates(token_threshold=0.5), Gates(token_threshold=0.5, temperature=2.0)):
        zeros = jnp.zeros((2, 3))
        assert float(rule._gate(zeros, 0.5, None).max()) == 0
        assert float(straight_through(zeros, zeros, 0.5, rule.temperature).max()) == 0


@pytest.mark.parametrize("positions", [None, jnp.asarray([[[0, 0], [3, 2], [8, 4]]] * 5)], ids=["grid", "random"])
@pytest.mark.parametrize("trained", [False, True])
def test_position_embeddings_are_trained_only_if_the_rule_says_so(positions: Any, trained: bool) -> None:
    rule = dataclasses.replace(CONFIG.gates, train_positions=trained)
    graphdef, state = nnx.split(MODEL.with_config(rule=rule))

    def total(state: Any) -> jax.Array:
        return nnx.merge(graphdef, state).embed(IMAGES, positions=positions).sum()

    slope = jax.jit(jax.grad(total))(state)["pos_embed"][...]
    assert (float(jnp.abs(slope).max()) > 0) == trained


def test_gates_by_place_alone_are_random_in_the_control() -> None:
    """Rates of 0 and 1 only, a policy that never looks at the image: the control still draws for each image."""
    once = split_of(4)
    twice = Split(np.concatenate([once.images, once.images]), np.zeros(8, np.int32))  # in two batches
    rates = everything(1)
    rates = dataclasses.replace(rates, tokens=rates.tokens.at[..., 4:].set(0))
    fixed = gate_figures(FOR_PIXELS, twice, rates, batch_size=4)  # rates of 0 and 1 are gates
    drawn = gate_figures(FOR_PIXELS, twice, rates, seed=0, batch_size=4)
    assert fixed["disagreement"]["tokens"] == fixed["gmacs_deviation"] == 0
    assert drawn["disagreement"]["tokens"] > 0.1 and drawn["use"]["tokens"] == pytest.approx(0.5, abs=0.15)
    first = gate_figures(FOR_PIXELS, once, rates, seed=0, batch_size=4)
    assert drawn["gmacs"] != pytest.approx(first["gmacs"], rel=1e-6), "each batch draws anew"


@pytest.mark.parametrize("rule", [CONFIG.rule, ConfidenceExit(0.5, own_heads=True)], ids=["gates", "own heads"])
def test_fewer_layers_have_fewer_maps(rule: Any) -> None:
    static = AViT(small_config(**NO_RULE), rngs=nnx.Rngs(0))
    model = MODEL if rule is CONFIG.rule else static.with_config(rule=rule)
    short = model.with_config(depth=2)
    for long, own in zip(*(jax.tree.leaves(nnx.state(m.rule_module)) for m in (model, short)), strict=True):
        np.testing.assert_array_equal(long[:2], own)
    assert answers(short, IMAGES).token_depth.max() == 2
    assert answers(static.with_config(depth=2, rule=rule), IMAGES).token_depth.max() == 2
    if rule is CONFIG.rule:
        np.testing.assert_array_equal(answers(short, IMAGES).token_gates, answers(model, IMAGES).token_gates[:2])


def test_a_gate_of_avit_replaces_the_gates_of_a_checkpoint() -> None:
    with np.load(GOLDENS / "gated-micro.npz") as file:
        meta = json.loads(str(file["meta"]))
        weights = {key[2:]: file[key] for key in file if key.startswith("w/")}
    model = avit_jax.from_torch_state_dict(weights, num_heads=meta["num_heads"], gate_scale=10.0, gate_center=30.0)
    assert model.config.gates is None and model.config.halts and model.rule_module is None
    assert model.config.gate_scale == 10


def test_noise_is_of_the_key_and_of_the_layer() -> None:
    first, _, _ = run(MODEL, IMAGES, jax.random.key(0))
    again, _, _ = run(MODEL, IMAGES, jax.random.key(0))
    other, _, _ = run(MODEL, IMAGES, jax.random.key(1))
    np.testing.assert_array_equal(first.token_gates, again.token_gates)
    assert (np.asarray(first.token_gates) != np.asarray(other.token_gates)).any()


def test_new_gates_leave_nearly_everything_on() -> None:
    model = AViT(small_config(**NO_RULE), rngs=nnx.Rngs(0)).with_config(rule=Gates())
    output, trace, _ = run(model, jnp.tile(IMAGES, (20, 1, 1, 1)), jax.random.key(0))
    assert output.token_gates[..., 1:].mean() == pytest.approx(0.98, abs=0.015)
    assert trace.of_images["head_gate"][1:].mean() == pytest.approx(0.98, abs=0.02)


def test_controls() -> None:
    """Random gates have the rates of their layers; fixed gates cost what they may."""
    rng = np.random.default_rng(0)
    rates = Choice(*(jnp.asarray(rng.uniform(0, 1, (4, 1, n)), jnp.float32) for n in (7, 2, 2)))
    rates = Choice(rates.tokens.at[..., 0].set(1), rates.heads.at[0].set(1), rates.sublayers.at[0].set(1))
    drawn = random_gates(rates, 1, 4000)
    np.testing.assert_allclose(drawn.tokens[..., 1:].mean((1, 2)), rates.tokens[..., 1:].mean((1, 2)), atol=0.02)
    np.testing.assert_allclose(drawn.heads.mean((1, 2)), rates.heads.mean((1, 2)), atol=0.03)
    np.testing.assert_allclose(drawn.sublayers.mean(1), rates.sublayers[:, 0], atol=0.03)
    assert float(drawn.tokens[..., 0].min()) == 1
    for wanted in (3e-5, 5e-5):
        fixed = fixed_gates(rates, MODEL, wanted)
        cost = float(layer_macs(CONFIG, fixed, short_last_layer=True).sum()) / 1e9
        assert cost <= wanted
        flat, on = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(part)]) for part in (rates, fixed))
        assert set(np.unique(on)) == {0.0, 1.0}
        assert flat[on == 1].min() > flat[on == 0].max(), "the gates that are on most often"
        next_one = flat[on == 0].max()
        more = jax.tree.map(lambda rate, gate, own=next_one: jnp.where(rate == own, 1.0, gate), rates, fixed)
        assert float(layer_macs(CONFIG, more, short_last_layer=True).sum()) / 1e9 > wanted, "one more costs too much"
        assert float(fixed.tokens[..., 0].min()) == 1


def test_settings_as_text_and_json() -> None:
    rule = parse_rule("gates(token_threshold=0.5, temperature=2)")
    assert rule == Gates(token_threshold=0.5, temperature=2.0)
    assert rule_from_json(json.loads(json.dumps(rule_to_json(rule)))) == rule
    assert "gates of patches above 0.5" in rule.describe()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gates(temperature=0.0), "Gates' temperature is 0.0: give a number above 0"),
        (lambda: Gates(threshold=1.5), "Gates' threshold is 1.5: give a number from 0 to 1"),
        (
            lambda: small_config(**NO_RULE | {"rule": Gates(), "drop_rate": 0.1}),
            "drop_rate is 0.1 and the rule is gates",
        ),
        (
            lambda: small_config(**NO_RULE | {"rule": Gates(), "class_token": False, "pool": "norm_mean"}),
            "Gates reads the class token and the model has none",
        ),
        (lambda: image_gates(STATIC, split_of(2)), "the model has no gates, its rule is None: give a model whose"),
        (lambda: gate_figures(FOR_PIXELS, split_of(0)), "the split has no images"),
        (lambda: published_gmacs(STATIC.config, answers(STATIC, IMAGES)), "this output has none: take output_gmacs"),
        (lambda: GateLoss(gate_form="squares"), "config.loss.gate_form 'squares' is unknown"),
        (lambda: avit_jax.plan_packed(MODEL, IMAGES, 2), "the rule gates lets them return: leave plan out"),
        (lambda: avit_jax.plan(MODEL, IMAGES, 2), "planned execution is for a model with a halting rule"),
        (lambda: avit_jax.compile(MODEL, 2, execution="shrinking"), "shrinking execution cannot run the rule 'gates'"),
        (lambda: avit_jax.to_torch_state_dict(MODEL), "has parameters of its own"),
        (lambda: avit_jax.export(MODEL, "nowhere.onnx"), "the rule 'gates' cannot be exported to ONNX"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_checkpoint_without_some_gates_is_refused() -> None:
    with np.load(GOLDENS / "gated-micro.npz") as file:
        weights = {key[2:]: value for key, value in file.items() if key.startswith("w/")}
    missing = weights | {}
    del missing["blocks.2.head_select.mlp_head.bias"]
    with pytest.raises(ValueError, match=r"its gates head_select.mlp_head.bias are there for layers \[1, 3\]"):
        avit_jax.from_torch_state_dict(missing, num_heads=3)
    odd = weights | {"blocks.2.head_select.mlp_head.bias": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="every layer must have one vector of the same shape"):
        avit_jax.from_torch_state_dict(odd, num_heads=3)
    with pytest.raises(ValueError, match="tokens-to-token"):
        avit_jax.from_torch_state_dict(weights | {"tokens_to_token.project.weight": np.zeros((2, 2))}, num_heads=3)
    plain = avit_jax.from_torch_state_dict(weights, num_heads=3, rule=None)
    assert plain.config.rule is None and plain.rule_module is None


def test_saved_and_loaded(tmp_path: Path) -> None:
    avit_jax.save(MODEL, tmp_path / "model")
    loaded = avit_jax.load(tmp_path / "model")
    assert loaded.config.rule == CONFIG.rule
    np.testing.assert_allclose(answers(loaded, IMAGES).logits, answers(MODEL, IMAGES).logits, atol=1e-6)


@pytest.mark.slow
def test_training_evaluation_and_budget(tmp_path: Path) -> None:
    """A run of three steps: named terms, frozen positions, figures from the gates, and thresholds that meet a work."""
    config = tiny_experiment(tmp_path / "toy.npz")
    config.model.update({"gate_scale": None, "gate_center": None, "rule": "gates()"})
    config.loss.update({"token_target": 0.8})
    config.epochs, config.optim.warmup_steps = 3 * 12 / 87, 1
    settings = parse(config)
    dataset = open_dataset(settings.data)
    model = initial_model(settings, dataset)
    before = np.asarray(model.pos_embed[...]), np.asarray(model.rule_module.tokens.kernel[...])
    trained = train(settings, dataset, model, tmp_path / "run").model
    np.testing.assert_array_equal(trained.pos_embed[...], before[0])
    assert np.abs(np.asarray(trained.rule_module.tokens.kernel[...]) - before[1]).max() > 0
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"token_use", "head_use", "sublayer_use"} <= line.keys()
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), nnx.state(trained.rule_module))
    nnx.update(trained.rule_module, own)
    images = np.asarray(normalize(dataset.test.images, trained.config))
    rule = avit_jax.calibrate(trained, images, trained.config.gates, 0.6)
    found = gate_figures(trained.with_config(rule=rule), dataset.test, batch_size=16)
    assert found["gmacs"] / whole_gmacs(trained.config) == pytest.approx(0.6, rel=0.01)
    evaluated = evaluate(trained.with_config(rule=rule), dataset.test, 16, "packed")
    assert evaluated.top1 == pytest.approx(found["top1"])
    classes = answers(trained.with_config(rule=rule), images).logits.argmax(-1)
    np.testing.assert_array_equal(correct_images(found), classes == dataset.test.labels)
    assert found["gmacs"] < evaluated.gmacs < masked_gmacs(trained.config), "here the last layer is whole"
    assert evaluated.executed_gmacs > evaluated.gmacs, "heads are masks, and groups are padded"
    rates = gate_rates(image_gates(trained, dataset.test, 16))
    assert gate_figures(trained, dataset.test, rates, seed=0, batch_size=16)["use"]["tokens"] == pytest.approx(
        float(rates.tokens[..., 1:].mean()), abs=0.1
    )
