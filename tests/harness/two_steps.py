"""Two real training steps of a model with a rule, as train.py makes them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from avit_jax.commands.typed_config import parse
from avit_jax.data.sources import load_dataset
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train.setup import prepare
from avit_jax.train.start import initial_model
from avit_jax.train.state import initial_state
from tests.harness.builders import tiny_experiment


def two_steps(folder: Path, rule: str, **loss: Any) -> tuple[list[dict[str, Any]], Any, Any]:
    """The metrics of both steps, and the parameters before and after as nested dictionaries of arrays.

    rule: as config.model.rule has it. loss: keys of config.loss.
    """
    config = tiny_experiment(folder / "toy.npz", **loss)
    config.model.rule = rule
    config.optim.update({"warmup_steps": 0})
    settings = parse(config)
    model = initial_model(settings, load_dataset("npz", config.data.path))
    mesh = training_mesh(MeshSettings(), 12)
    made = prepare(settings, model, mesh, 87)
    state = initial_state(model, made.optimizer, config.optim.ema_decay, mesh)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))
    metrics = []
    for step in range(2):
        rng = np.random.default_rng(step)
        batch = {"image": jnp.asarray(rng.normal(size=(12, 8, 8, 1)), jnp.float32), "label": jnp.arange(12) % 3}
        state, found = made.step(state, batch, None)
        metrics.append(jax.tree.map(np.asarray, found))
    return metrics, before, jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))
