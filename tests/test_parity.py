"""Against outputs recorded from the published PyTorch code (tests/data/README.md)."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax.halting.avit_losses import log_depth_prior, ponder_loss, prior_loss
from avit_jax.train.objective import distillation_loss
from tests.harness.arrays import read_npz

pytestmark = pytest.mark.usefixtures("compiled_as_users_do")

DATA = Path(__file__).parent / "data"
NAMES = ("micro-10-30", "micro-5-50", "micro-distilled-10-75")


def golden(name: str) -> tuple[avit_jax.AViT, dict[str, np.ndarray], dict[str, Any]]:
    recorded = read_npz(DATA / f"{name}.npz")
    meta = json.loads(str(recorded["meta"]))
    model = avit_jax.load(
        DATA / f"{name}.pth",
        image_size=meta["img_size"],
        patch_size=meta["patch_size"],
        embed_dim=meta["embed_dim"],
        num_heads=meta["num_heads"],
        depth=meta["depth"],
        num_classes=meta["num_classes"],
        distilled=meta["distilled"],
        gate_scale=meta["gate_scale"],
        gate_center=meta["gate_center"],
        halt_epsilon=meta["eps"],
    )
    return model, recorded, meta


def objective(output: avit_jax.AViTOutput, labels: np.ndarray, meta: dict[str, Any]) -> dict[str, jax.Array]:
    # The published code leaves the first image out of H: so does this test, the project does not.
    ponder = meta["ponder_scale"] * ponder_loss(output.ponder_cost)
    prior = meta["prior_alpha"] * prior_loss(output.halting_scores[:, 1:].mean((1, 2)), "official")
    classification = distillation_loss(output.head_logits, jnp.asarray(labels))
    return {"classification": classification, "ponder": ponder, "prior": prior}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_losses(name: str, remat: bool) -> None:
    model, recorded, meta = golden(name)
    model = model.with_config(remat=remat)
    output = jax.jit(lambda images: model(images))(jnp.asarray(recorded["images"]))
    np.testing.assert_allclose(output.logits, recorded["logits"], atol=1e-5)
    np.testing.assert_array_equal(output.token_depth, recorded["token_depth"])
    np.testing.assert_allclose(output.ponder_cost, recorded["ponder"], atol=1e-5)
    np.testing.assert_allclose(output.halting_scores, recorded["halting_scores"], atol=1e-5)
    terms = objective(output, recorded["labels"], meta)
    np.testing.assert_allclose(terms["classification"], recorded["cross_entropy"], atol=1e-6)
    np.testing.assert_allclose(terms["ponder"], recorded["ponder_loss"], atol=1e-6)
    np.testing.assert_allclose(terms["prior"], recorded["prior_loss"], atol=1e-6)
    np.testing.assert_allclose(sum(terms.values()), recorded["total_loss"], atol=1e-6)
    log_prior = log_depth_prior(meta["depth"], "official", 0.0)
    np.testing.assert_allclose(jnp.exp(log_prior), recorded["prior_target"], rtol=2e-6)


def test_gradients() -> None:
    model, recorded, meta = golden("micro-10-30")
    graphdef, params = nnx.split(model)

    def loss(params: nnx.State) -> jax.Array:
        output = nnx.merge(graphdef, params)(jnp.asarray(recorded["images"]))
        return sum(objective(output, recorded["labels"], meta).values())

    gradients = torch_layout(jax.grad(loss)(params), meta)
    compared = 0
    for key, expected in recorded.items():
        kind, _, name = key.partition("/")
        if kind == "grad":
            difference = np.linalg.norm(gradients[name] - expected) / np.linalg.norm(expected)
            assert difference < 1e-5, f"{name}: {difference}"
        elif kind == "gradnorm":
            np.testing.assert_allclose(np.linalg.norm(gradients[name]), expected, rtol=1e-5, err_msg=name)
        compared += kind in ("grad", "gradnorm")
    assert compared == len(gradients), "every parameter is compared"


def torch_layout(state: nnx.State, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters under PyTorch's names and shapes, written out by hand rather than by convert.py."""
    out: dict[str, np.ndarray] = {}
    for path, variable in nnx.to_flat_state(state):
        value, name = np.asarray(variable[...]), list(map(str, path))
        leaf = {"kernel": "weight", "scale": "weight"}.get(name[-1], name[-1])
        layers = range(meta["depth"]) if name[0] == "blocks" else [None]
        for layer in layers:
            one = value if layer is None else value[layer]
            if name[-1] == "kernel" and name[0] == "patch_embed":
                size = meta["patch_size"]
                one = one.reshape(size, size, 3, -1).transpose(3, 2, 0, 1)
            elif name[-1] == "kernel":
                one = one.T
            middle = [*name[:-1]] if layer is None else ["blocks", str(layer), *name[1:-1]]
            out[".".join([*middle, leaf])] = one
    return out
