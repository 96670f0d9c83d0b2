"""DynamicViT: recorded outputs of the official code, a NumPy loop, its properties, and a run that trains it."""

import dataclasses
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
from avit_jax import AViT, DynamicViT
from avit_jax.commands.dry_run import dry_run
from avit_jax.commands.run import run
from avit_jax.commands.typed_config import parse
from avit_jax.data.sources import load_dataset
from avit_jax.execution.work import image_gmacs, shrinking_gmacs
from avit_jax.halting import keep_sampling
from avit_jax.halting.keep_sampling import DynamicViTLoss
from avit_jax.halting.rule import State, Teacher, Trace
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from avit_jax.runtime.mesh import data_mesh
from avit_jax.train.objective import distillation_loss, objective_terms
from avit_jax.train.optim import OptimSettings, make_optimizer
from avit_jax.train.setup import prepare
from avit_jax.train.start import initial_model
from tests.harness.arrays import read_npz
from tests.harness.builders import answers, shrunk, small_config, spread_gate, tiny_experiment
from tests.harness.numpy_tome import linear, norm

RECORDED = Path(__file__).parent / "data" / "methods" / "dynamicvit.npz"
ARCHITECTURE = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
# The official names of a predictor's parameters, and ours.
NAMES = {
    "in_conv.0": "norm",
    "in_conv.1": "fc1",
    "out_conv.0": "fc2",
    "out_conv.2": "fc3",
    "out_conv.4": "fc4",
}
IMAGES = np.random.default_rng(0).normal(size=(5, 16, 16, 2)).astype(np.float32)


def official_predictors(module: Any) -> dict[str, np.ndarray]:
    """The predictors' parameters (or their gradients) under the official names and in PyTorch's layout."""
    found = {}
    for theirs, ours in NAMES.items():
        for name, value in nnx.to_pure_dict(nnx.state(getattr(module.stages, ours))).items():
            for stage, array in enumerate(np.asarray(value)):
                part = "bias" if name == "bias" else "weight"
                found[f"score_predictor.{stage}.{theirs}.{part}"] = array.T
    return found


def set_predictors(model: AViT, state: dict[str, np.ndarray]) -> None:
    for theirs, ours in NAMES.items():
        part = getattr(model.rule_module.stages, ours)
        for name in nnx.to_pure_dict(nnx.state(part)):
            suffix = "bias" if name == "bias" else "weight"
            stages = [state[f"score_predictor.{stage}.{theirs}.{suffix}"].T for stage in range(3)]
            getattr(part, name)[...] = jnp.asarray(np.stack(stages))


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return read_npz(RECORDED)


def recorded_model(recorded: dict[str, np.ndarray], prefix: str, rule: DynamicViT | None) -> AViT:
    meta = json.loads(str(recorded["meta"]))
    state = {name[2:]: value for name, value in recorded.items() if name.startswith(prefix)}
    backbone = {name: value for name, value in state.items() if not name.startswith("score_predictor")}
    model = avit_jax.from_torch_state_dict(backbone, **{field: meta[field] for field in ARCHITECTURE})
    model = model.with_config(rule=rule)
    if rule is not None:
        set_predictors(model, state)
    return model


def test_recorded_inference(recorded: dict[str, np.ndarray]) -> None:
    model = recorded_model(recorded, "w/", DynamicViT(0.7))
    output, reduced = shrunk(model, recorded["images"].transpose(0, 2, 3, 1), model.config.reduction)
    np.testing.assert_allclose(output.logits, recorded["logits_inference"], atol=1e-5)
    sequence = np.broadcast_to(np.arange(1, 197), (4, 196))  # of the official code, which sorts by score
    for layer in (3, 6, 9):
        sequence = np.take_along_axis(sequence, recorded[f"kept_{layer}"], axis=1)
        kept = np.asarray(reduced.slots[layer]) < reduced.sizes[layer].shape[1]
        for image in range(4):
            np.testing.assert_array_equal(np.flatnonzero(kept[image]), [0, *np.sort(sequence[image])])


def recorded_noise(recorded: dict[str, np.ndarray]) -> Any:
    noise = jnp.stack([recorded[f"gumbel_{layer}"] for layer in (3, 6, 9)])
    return lambda draw, stage, patches: noise[stage]


def test_recorded_training(recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep_sampling, "gumbel_noise", recorded_noise(recorded))
    model = recorded_model(recorded, "w/", DynamicViT(0.7))
    images = jnp.asarray(recorded["images"].transpose(0, 2, 3, 1))
    teacher = recorded_model(recorded, "t/", None).teach(images)
    np.testing.assert_allclose(teacher.logits, recorded["teacher_logits"], atol=1e-5)
    graphdef, params = nnx.split(model)

    def loss(params: nnx.State) -> Any:
        output, trace, state = nnx.merge(graphdef, params).forward(images, jax.random.key(0))
        terms = training_terms(model, output.head_logits, trace, state, jnp.asarray(recorded["labels"]), teacher)
        return sum(terms.values()), (terms, output.logits, trace, state)

    (total, (terms, logits, trace, state)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for layer in (3, 6, 9):
        np.testing.assert_array_equal(trace.of_tokens["keep"][layer - 1][:, 1:], recorded[f"decision_{layer}"] > 0.5)
    np.testing.assert_allclose(logits, recorded["logits_training"], atol=1e-5)
    np.testing.assert_allclose(state.of_tokens["normed"][:, 1:], recorded["features_training"], atol=1e-5)
    weights = np.array([1, 2 / 3, 0.5, 0.5])  # the official ratio loss is recorded as a sum over three stages
    assert list(terms) == ["classification", "keep_ratio", "teacher_logits", "teacher_tokens"]
    np.testing.assert_allclose(np.array(list(terms.values())), weights * recorded["loss_parts"], atol=1e-6)
    np.testing.assert_allclose(total, recorded["loss"], rtol=1e-6)

    of_model = nnx.merge(graphdef, gradient)
    ours = avit_jax.to_torch_state_dict(of_model.with_config(rule=None)) | official_predictors(of_model.rule_module)
    for name in (name for name in recorded if name.startswith(("grad/", "gradnorm/"))):
        kind, _, parameter = name.partition("/")
        found = ours[parameter] if kind == "grad" else np.linalg.norm(ours[parameter])
        np.testing.assert_allclose(found, recorded[name], atol=1e-5 * np.abs(recorded[name]).max(), err_msg=name)


def training_terms(
    model: AViT, head_logits: Any, trace: Trace, state: State, labels: Any, teacher: Teacher | None, **more: Any
) -> dict[str, jax.Array]:
    rule = model.config.reduction.in_training(model.config)
    weight = more.get("image_weight")

    def classify(logits: Any) -> Any:
        return distillation_loss(logits, labels, image_weight=weight)

    settings = more.pop("settings", DynamicViTLoss())
    return objective_terms(rule, head_logits, trace, state, classify, settings, teacher=teacher, **more)


def pruned(rate: float = 0.6, layers: tuple[int, ...] = (1, 3), **fields: Any) -> AViT:
    """16 patches, 4 layers; predictors that tell the patches apart."""
    model = spread_gate(small_config(**NO_RULE | {"image_size": 16, "rule": DynamicViT(rate, layers)} | fields))
    rng = np.random.default_rng(1)
    for param in jax.tree.leaves(nnx.state(model.rule_module), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
        scale = param.shape[1] ** -0.5 if param.ndim == 3 else 0.3
        param[...] = jnp.asarray(scale * rng.normal(size=param.shape) + (param.ndim == 2), jnp.float32)
    model.rule_module.stages.fc4.bias[...] *= 0
    return model


def numpy_masked(model: AViT, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depths of one image by masking: every token is computed, dropped ones are no keys."""
    config, rule = model.config, model.config.reduction
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    x = np.asarray(model.embed(jnp.asarray(image[None])), np.float64)[0]
    kept, depth = list(range(len(x))), np.zeros(len(x), int)
    for layer in range(config.depth):
        if layer in rule.layers:
            stage = rule.layers.index(layer)
            patches = [n for n in kept if n >= config.num_special]
            score = numpy_scores(parameters["rule_module"]["stages"], stage, x[patches])
            count = max(1, int((len(x) - config.num_special) * rule.keep_rate ** (stage + 1)))
            best = sorted(range(len(patches)), key=lambda i: (-score[i], i))[:count]
            kept = list(range(config.num_special)) + sorted(patches[i] for i in best)
        depth[kept] += 1
        block = jax.tree.map(lambda p, layer=layer: np.asarray(p[layer], np.float64), parameters["blocks"])
        query, key, value = np.split(linear(norm(x, block["norm1"], 1e-6), block["attn"]["qkv"]), 3, axis=-1)
        mixed = np.zeros_like(x)
        width = config.embed_dim // config.num_heads
        for head in range(config.num_heads):
            columns = slice(head * width, (head + 1) * width)
            scores = np.full((len(x), len(x)), -np.inf)
            scores[:, kept] = query[:, columns] @ key[kept, columns].T / np.sqrt(width)
            mixed[:, columns] = scipy.special.softmax(scores, axis=-1) @ value[:, columns]
        x = x + linear(mixed, block["attn"]["proj"])
        x = x + linear(gelu(linear(norm(x, block["norm2"], 1e-6), block["mlp"]["fc1"])), block["mlp"]["fc2"])
    features = norm(x, parameters["norm"], 1e-6)
    heads = ["head", "head_dist"][: 1 + config.distilled]
    return np.mean([linear(features[i], parameters[head]) for i, head in enumerate(heads)], axis=0), depth


def numpy_scores(stages: Any, stage: int, patches: np.ndarray) -> np.ndarray:
    p = jax.tree.map(lambda array: np.asarray(array[stage], np.float64), stages)
    embedded = gelu(linear(norm(patches, p["norm"], 1e-5), p["fc1"]))
    half = embedded.shape[1] // 2
    shared = np.tile(embedded[:, half:].mean(0), (len(patches), 1))
    hidden = gelu(linear(np.hstack([embedded[:, :half], shared]), p["fc2"]))
    return scipy.special.log_softmax(linear(gelu(linear(hidden, p["fc3"])), p["fc4"]), axis=-1)[:, 0]


def gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2


@pytest.mark.parametrize("fields", [{}, {"distilled": True, "num_registers": 1}])
def test_removal_is_masking_by_a_numpy_loop(fields: dict[str, Any]) -> None:
    model = pruned(**fields)
    output = answers(model, IMAGES)
    compiled = avit_jax.compile(model, len(IMAGES))(IMAGES)  # its last layer is short
    for image in range(len(IMAGES)):
        logits, depth = numpy_masked(model, IMAGES[image])
        np.testing.assert_array_equal(output.token_depth[image], depth)
        np.testing.assert_allclose(output.logits[image], logits, atol=1e-5)
        np.testing.assert_allclose(compiled.logits[image], logits, atol=1e-5)
    special = model.config.num_special
    assert (output.token_depth[:, :special] == 4).all() and len(np.unique(output.token_depth, axis=0)) > 1
    np.testing.assert_allclose(answers(model, IMAGES[2:3]).logits[0], output.logits[2], atol=1e-5)


def test_a_predictor_by_numpy_for_tokens_of_small_variance() -> None:
    """The variance is about the 1e-5 that LayerNorm adds to it."""
    module = pruned().rule_module
    patches = 3e-3 * np.random.default_rng(2).normal(size=(1, 16, 16)).astype(np.float32)
    found = module(jnp.asarray(patches), jnp.ones((1, 16)), 1)[0, :, 0]
    stages = nnx.to_pure_dict(nnx.state(module.stages))
    np.testing.assert_allclose(found, numpy_scores(stages, 1, patches[0].astype(np.float64)), atol=1e-5)


def test_a_keep_rate_of_one_is_the_static_model() -> None:
    model = pruned(1.0)
    assert model.config.reduction.acts_in(model.config) == () and model.config.reduction.extra_macs(model.config) == 0
    np.testing.assert_array_equal(answers(model, IMAGES).logits, answers(model.with_config(rule=None), IMAGES).logits)


def test_counts_are_those_of_float_arithmetic() -> None:
    deit = avit_jax.PRESETS["deit_small_patch16_224"]
    assert DynamicViT(0.7).counts(deit) == (197,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3
    assert DynamicViT(0.01, (1, 2)).counts(small_config(image_size=16)) == (17, 2, 2, 2)
    assert DynamicViT(0.01, (1, 2)).acts_in(small_config(image_size=16)) == (1,)
    distilled = small_config(image_size=16, distilled=True, num_registers=2)
    assert DynamicViT(0.7, (2, 3)).counts(distilled) == (20, 20, 4 + 11, 4 + 7)


@pytest.mark.parametrize(("size", "gmacs", "predictors"), [("small", 2.981, 0.103), ("tiny", 0.801, 0.026)])
def test_work(size: str, gmacs: float, predictors: float) -> None:
    """Published for DeiT-S: 2.9 GFLOPs."""
    config = dataclasses.replace(avit_jax.PRESETS[f"deit_{size}_patch16_224"], rule=DynamicViT(0.7))
    assert shrinking_gmacs(config, short_last_layer=False) == pytest.approx(gmacs, abs=5e-4)
    assert config.reduction.extra_macs(config) / 1e9 == pytest.approx(predictors, abs=5e-4)
    assert image_gmacs(config, jnp.ones((2, 197), int)) == pytest.approx(gmacs, abs=5e-4)


def test_levels_choose_the_keep_rate() -> None:
    model = pruned()
    at = model.config.reduction.levels(model, IMAGES)
    configs = [dataclasses.replace(model.config, rule=at(level)) for level in np.linspace(0, 0.95, 30)]
    work = [shrinking_gmacs(config, short_last_layer=True) for config in configs]
    assert work == sorted(work) and len(set(work)) > 12
    assert at(0.0).counts(model.config) == (17, 2, 2, 2) and at(1.0) == DynamicViT(1.0, (1, 3))
    assert answers(model.with_config(rule=at(0.3)), IMAGES).logits.shape == (5, 5), "predictors work with any rate"


def trained(model: AViT, key: jax.Array, images: np.ndarray = IMAGES, **options: Any) -> Any:
    """The terms of the loss, what was traced, and the gradient of their sum, in training with a static teacher."""
    graphdef, params = nnx.split(model)
    teacher = options.pop("teacher", None) or pruned(**{"distilled": model.config.distilled}).teach(jnp.asarray(images))
    labels = jnp.arange(len(images)) % 5

    def loss(params: nnx.State, key: jax.Array) -> Any:
        output, trace, state = nnx.merge(graphdef, params).forward(images, key)
        terms = training_terms(model, output.head_logits, trace, state, labels, teacher, **options)
        return sum(terms.values()), (terms, trace, state, output)

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, key)
    return *found, gradient


@pytest.mark.parametrize(
    ("rate", "fields"), [(0.01, {}), (1.0, {"distilled": True, "remat": True}), (0.6, {"dtype": "bfloat16"})]
)
def test_gradients_are_finite_and_reach_every_parameter(rate: float, fields: dict[str, Any]) -> None:
    model = pruned(rate, **fields)
    terms, trace, _, output, gradient = trained(model, jax.random.key(0))
    for path, leaf in nnx.to_flat_state(gradient):
        assert np.isfinite(leaf[...]).all() and np.abs(leaf[...]).max() > 0, path
    keep, special = np.asarray(trace.of_tokens["keep"]), model.config.num_special
    assert set(np.unique(keep)) == {0, 1} and (keep[..., :special] == 1).all()
    assert (np.diff(keep, axis=0) <= 0).all(), "what is dropped stays dropped"
    np.testing.assert_array_equal(keep[0], keep[1])  # no predictor before layer 2
    assert (keep[0] > keep[2]).any()
    np.testing.assert_array_equal(output.token_depth, 1 + keep[:-1].sum(0))
    means = np.stack([keep[0], keep[2]])[..., special:].mean(-1)
    expected = 2 * np.mean((means - np.array([[rate], [rate**2]])) ** 2)
    np.testing.assert_allclose(terms["keep_ratio"], expected, rtol=1e-5)


def test_draws_differ_between_steps_and_images() -> None:
    model = pruned().with_config(rule=None).with_config(rule=DynamicViT(0.6, (1, 3)))  # with new predictors
    images = np.repeat(IMAGES[:1], 4, axis=0)
    first, again, other = (
        np.asarray(model.forward(images, jax.random.key(seed))[1].of_tokens["keep"]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and len(np.unique(first[0], axis=0)) == 4
    assert 0.3 < first[0, :, 1:].mean() < 0.7, "new predictors leave the choice to chance"
    noise = keep_sampling.gumbel_noise(jax.random.split(jax.random.key(0), 200), 0, 50)
    assert np.mean(noise) == pytest.approx(np.euler_gamma, abs=0.03)
    assert np.std(noise) == pytest.approx(np.pi / np.sqrt(6), abs=0.03)
    assert (noise != keep_sampling.gumbel_noise(jax.random.split(jax.random.key(0), 200), 1, 50)).all()


def test_an_image_that_keeps_no_patch() -> None:
    model = pruned()
    model.rule_module.stages.fc4.bias[...] += jnp.array([-1e3, 1e3])
    terms, trace, _, _, gradient = trained(model, jax.random.key(0))
    assert not np.any(trace.of_tokens["keep"][-1][:, 1:]) and terms["teacher_tokens"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((terms, gradient)))


def test_images_that_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = jax.random.gumbel(jax.random.key(3), (2, 5, 16, 2))
    monkeypatch.setattr(keep_sampling, "gumbel_noise", lambda draw, stage, patches: noise[stage, : len(draw)])
    model = pruned()
    weighted = trained(model, jax.random.key(0), image_weight=jnp.array([1.0, 1, 1, 0, 0]))
    alone = trained(model, jax.random.key(0), IMAGES[:3])
    for a, b in zip(jax.tree.leaves((weighted[0], weighted[-1])), jax.tree.leaves((alone[0], alone[-1])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_terms_that_need_a_teacher() -> None:
    model = pruned()
    output, trace, state = model.forward(IMAGES, jax.random.key(0))
    labels = jnp.arange(5)
    with pytest.raises(ValueError, match=r"config\.loss\.teacher_logits_weight is 0\.5 and there is no teacher: give"):
        training_terms(model, output.head_logits, trace, state, labels, None)
    settings = DynamicViTLoss(teacher_logits_weight=0.0, teacher_tokens_weight=0.1)
    with pytest.raises(ValueError, match=r"teacher_tokens_weight is 0\.1 and there is no teacher"):
        training_terms(model, output.head_logits, trace, state, labels, None, settings=settings)
    settings = DynamicViTLoss(teacher_logits_weight=0.0, teacher_tokens_weight=0.0)
    terms = training_terms(model, output.head_logits, trace, state, labels, None, settings=settings)
    assert list(terms) == ["classification", "keep_ratio"]
    wide = Teacher(jnp.zeros((5, 5)), jnp.zeros((5, 17, 24)))
    with pytest.raises(
        ValueError, match=r"patch tokens of shape \(16, 24\) and the model of \(16, 16\): give a teacher"
    ):
        training_terms(model, output.head_logits, trace, state, labels, wide)


def test_a_teacher_computes_every_token() -> None:
    model = pruned(0.1)
    static = model.with_config(rule=None)
    taught = model.teach(jnp.asarray(IMAGES))
    np.testing.assert_allclose(taught.logits, static(IMAGES).logits, atol=1e-6)
    np.testing.assert_allclose(static.head(taught.tokens[:, 0]), taught.logits, atol=1e-6)


def test_predictors_are_saved_loaded_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pruned()
    avit_jax.save(model, tmp_path / "model")
    loaded = avit_jax.load(tmp_path / "model", rule=DynamicViT(0.3, (1, 3)))
    np.testing.assert_array_equal(
        answers(loaded, IMAGES).logits, answers(model.with_config(rule=DynamicViT(0.3, (1, 3))), IMAGES).logits
    )
    with pytest.raises(ValueError, match="'DynamicViT, keep rate 0.6 before layers 1, 3' do not fit"):
        model.with_config(rule=DynamicViT(0.6, (1, 2, 3)))
    with pytest.raises(ValueError, match="has parameters of its own, which PyTorch's models have no place for"):
        avit_jax.to_torch_state_dict(model)
    avit_jax.save(model.with_config(rule=None), tmp_path / "static")
    fresh = avit_jax.load(tmp_path / "static", rule=DynamicViT(0.6, (1, 3)))
    assert "what the rule learns starts from the checkpoint's norm and head or from random" in capsys.readouterr().out
    first, second = fresh.rule_module.stages.fc1.kernel[...]
    assert 0.015 < first.std() < 0.025 and (first != second).all(), "small, and another one in every stage"


def test_the_optimiser_has_a_factor_for_the_predictors() -> None:
    params = nnx.state(pruned(), nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, params)

    def updates(factor: float) -> dict[Any, Any]:
        optimizer = make_optimizer(OptimSettings(rule_factor=factor), lambda step: 1e-3)
        update = jax.jit(lambda: optimizer.update(gradient, optimizer.init(params), params)[0])
        return dict(nnx.to_flat_state(update()))

    plain, scaled = updates(1.0), updates(100.0)
    for path, update in plain.items():
        factor = 100 if path[0] == "rule_module" else 1
        np.testing.assert_allclose(scaled[path][...], factor * update[...], rtol=1e-6)
    assert any(path[0] == "rule_module" for path in plain)


def test_at_first_only_the_predictors_are_trained() -> None:
    params = nnx.state(pruned(), nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, params)
    frozen, free = (make_optimizer(OptimSettings(frozen_steps=steps), lambda step: 1e-3) for steps in (2, 0))
    update = jax.jit(
        lambda *states: [o.update(gradient, s, params) for o, s in zip((frozen, free), states, strict=True)]
    )
    states = frozen.init(params), free.init(params)
    for step in range(4):
        (found, first), (expected, second) = update(*states)
        states = first, second
        moving = dict(nnx.to_flat_state(expected))
        for path, value in nnx.to_flat_state(found):
            still = step < 2 and path[0] != "rule_module"
            np.testing.assert_array_equal(value[...], 0 if still else moving[path][...])


def test_a_model_without_predictors_is_not_frozen(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    config.optim.frozen_steps = 1
    model = nnx.eval_shape(lambda: avit_jax.AViT(small_config(), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="frozen_steps is 1 and the model's rule brings no parameters"):
        prepare(parse(config), model, data_mesh(1), 100)


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({"keep_rate": 0.0}, {}, "keep_rate is 0.0: give a number above 0 and at most 1"),
        ({"keep_rate": 1.1}, {}, "keep_rate is 1.1"),
        ({"keep_rate": float("nan")}, {}, "keep_rate is nan"),
        ({"keep_rate": True}, {}, "keep_rate is True: give a number"),
        ({"keep_rate": "0.7"}, {}, "keep_rate is '0.7': give a number"),
        *(
            ({"layers": layers}, {}, "layers are .*: give whole numbers from 1 in ascending order")
            for layers in ((), (0, 1), (2, 1), (1, 1), (1.0,), (True,), 3, "13")
        ),
        (
            {"layers": (2, 4)},
            {},
            r"layers are \(2, 4\) and the model's last layer is 3: give layers that the model has",
        ),
        ({}, {"pool": "norm_mean"}, "keeps no mean over patches and pool is 'norm_mean': use pool 'token'"),
        ({}, {"embed_dim": 18}, "embed_dim is 18: DynamicViT's predictors need a multiple of 4"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(rule=checked(**settings), **fields)


def checked(**settings: Any) -> DynamicViT:
    """The rule after its own checks; the tests' type check of the constructor would come before them."""
    rule = object.__new__(DynamicViT)
    for name, value in ({"keep_rate": 0.7, "layers": (1, 2)} | settings).items():
        object.__setattr__(rule, name, value)
    rule.__post_init__()
    return rule


def test_as_text_and_json() -> None:
    rule = DynamicViT(0.7, (1, 2))
    for other in (rule_from_json(json.loads(json.dumps(rule_to_json(rule)))), parse_rule(TEXT)):
        assert other == rule and hash(other) == hash(rule)
    assert parse_rule("dynamicvit(keep_rate=1)") == DynamicViT(1.0, (3, 6, 9))
    plain = checked(keep_rate=np.float32(0.5), layers=[np.int64(1), 2])
    assert json.loads(json.dumps(rule_to_json(plain))) == {"name": "dynamicvit", "keep_rate": 0.5, "layers": [1, 2]}


TEXT = "dynamicvit(keep_rate=0.7, layers=(1, 2))"


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.slow
def test_a_run_trains_the_predictors(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    config.model.update({"gate_scale": None, "gate_center": None})
    static = initial_model(parse(config), load_dataset("npz", config.data.path))
    avit_jax.save(static, tmp_path / "static")
    config.init_from = config.teacher = str(tmp_path / "static")
    config.model.rule = TEXT
    config.loss.update({"distillation": "soft", "distillation_weight": 0.0})
    config.optim.update({"rule_factor": 10.0, "frozen_steps": 1})
    assert any(line.startswith("step 2    loss") for line in dry_run(config))
    summary = run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    for line in train:
        terms = ("classification", "keep_ratio", "teacher_logits", "teacher_tokens")
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
        assert 1 < line["mean_depth"] < 3
    model = avit_jax.load(tmp_path / "run" / "model")
    start = model.config.reduction.module(model)
    assert model.config.rule == DynamicViT(0.7, (1, 2))
    assert summary["dynamicvit"]["gmacs"] == pytest.approx(shrinking_gmacs(model.config, short_last_layer=False))
    assert not np.allclose(start.stages.fc1.kernel[...], model.rule_module.stages.fc1.kernel[...], atol=1e-4)
