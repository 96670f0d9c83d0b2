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
from avit_jax.execution import shrinking
from avit_jax.execution.work import image_gmacs, shrinking_gmacs
from avit_jax.halting import keep_sampling
from avit_jax.halting.keep_sampling import DynamicViTLoss
from avit_jax.halting.rule import State, Teacher, Trace
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule, rule_from_json, rule_to_json
from avit_jax.train.objective import distillation_loss, objective_terms
from avit_jax.train.optim import OptimSettings, make_optimizer
from tests.harness.builders import answers, small_config, spread_gate, tiny_experiment
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
    return dict(np.load(RECORDED))


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
    output, reduced = shrinking.run(model, recorded["images"].transpose(0, 2, 3, 1), model.config.reduction)
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

    (total, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    terms, logits, trace, state = found
    for layer in (3, 6, 9):
        np.testing.assert_array_equal(trace.of_tokens["keep"][layer - 1][:, 1:], recorded[f"decision_{layer}"] > 0.5)
    np.testing.assert_allclose(logits, recorded["logits_training"], atol=1e-5)
    np.testing.assert_allclose(state.of_tokens["normed"][:, 1:], recorded["features_training"], atol=1e-5)
    parts = np.array(list(terms.values()))
    print(parts, recorded["loss_parts"], total, recorded["loss"])
    np.testing.assert_allclose(total, recorded["loss"], rtol=1e-6)

    of_model = nnx.merge(graphdef, gradient)
    ours = avit_jax.to_torch_state_dict(of_model.with_config(rule=None)) | official_predictors(of_model.rule_module)
    worst = {}
    for name in (name for name in recorded if name.startswith(("grad/", "gradnorm/"))):
        kind, _, parameter = name.partition("/")
        expected = recorded[name]
        value = ours[parameter] if kind == "grad" else np.linalg.norm(ours[parameter])
        worst[name] = np.abs(value - expected).max() / np.abs(expected).max()
    print(sorted(worst.items(), key=lambda kv: -kv[1])[:8])
    assert max(worst.values()) < 1e-5


def training_terms(
    model: AViT, head_logits: Any, trace: Trace, state: State, labels: Any, teacher: Teacher | None, **more: Any
) -> dict[str, jax.Array]:
    rule = model.config.reduction.in_training(model.config)
    weight = more.get("image_weight")

    def classify(logits: Any) -> Any:
        return distillation_loss(logits, labels, image_weight=weight)

    settings = more.pop("settings", DynamicViTLoss())
    return objective_terms(rule, head_logits, trace, state, classify, settings, teacher=teacher, **more)
