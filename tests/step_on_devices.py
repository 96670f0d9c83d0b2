"""Run by test_training in a process of its own: one step's terms and gradient on however many devices there are."""

import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from avit_jax import losses
from avit_jax.mesh import batch_sharding, data_mesh, replicated
from tests.builders import small_config, spread_gate

model = spread_gate(small_config())
graphdef, params = nnx.split(model)
mesh = data_mesh(6)
images = jax.random.normal(jax.random.key(1), (6, 12, 8, 2)) * (1 + jax.numpy.arange(6)[:, None, None, None])
labels = jax.numpy.arange(6) % 5


def loss(params: nnx.State, images: jax.Array) -> tuple[jax.Array, losses.LossTerms]:
    output = nnx.merge(graphdef, params)(images)
    weights = {"ponder_weight": 0.1, "prior_weight": 0.1, "prior": "kl", "prior_target_depth": 2.0}
    ponder, prior = losses.halting_losses(output.halting_scores, output.ponder_cost, **weights)
    terms = losses.LossTerms(losses.classification_loss(output.logits, labels), ponder, prior)
    return terms.total, terms


step = jax.jit(
    jax.grad(loss, has_aux=True), in_shardings=(replicated(mesh), batch_sharding(mesh)), out_shardings=replicated(mesh)
)
gradient, terms = step(params, images)
np.savez(
    Path(sys.argv[1]).with_suffix(".npz"),
    devices=mesh.size,
    gradient=np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)]),
    classification=terms.classification,
    ponder=terms.ponder,
    prior=terms.prior,
)
