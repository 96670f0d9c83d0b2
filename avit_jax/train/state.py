"""The training state: what a step changes, how it is made, and how a checkpoint holds it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import place, replicated, state_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; randomness comes from the seed and the step.

    Fields are Any, because the same tree also holds shapes and shardings.
    """

    step: Any  # int32 scalar
    params: Any  # nnx.State
    ema: Any  # nnx.State, or None
    optimizer: Any  # optax.OptState


def initial_state(model: AViT, optimizer: optax.GradientTransformation, ema_decay: float, mesh: Mesh) -> TrainState:
    """The state before step 1, laid out over the mesh; it owns copies, because the step donates its buffers."""
    state = _first(nnx.state(model, nnx.Param), optimizer, ema_decay)
    return place(state, state_shardings(mesh, state))


def state_shapes(model: AViT, optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
    """The state's shapes and types without its arrays; a model of shapes is enough (nnx.eval_shape)."""
    return jax.eval_shape(lambda params: _first(params, optimizer, ema_decay), nnx.state(model, nnx.Param))


def _first(params: nnx.State, optimizer: optax.GradientTransformation, ema_decay: float) -> TrainState:
    params = jax.tree.map(jnp.copy, params)
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def teacher_weights(teacher: AViT | None, mesh: Mesh) -> nnx.State | None:
    """The step's third argument: the teacher's weights, whole on every device."""
    return None if teacher is None else place(nnx.state(teacher), replicated(mesh))


def state_items(state: TrainState) -> dict[str, Any]:
    """The state as plain nested dicts of arrays: the checkpoint's items."""
    items = {"model": nnx.to_pure_dict(state.params), "optimizer": _pure_leaves(state.optimizer)}
    return items | ({} if state.ema is None else {"ema": nnx.to_pure_dict(state.ema)})


def _pure_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def state_with(state: TrainState, items: dict[str, Any], step: int) -> TrainState:
    """The state with a checkpoint's items and step in place of its own."""

    def filled(target: nnx.State, values: Any) -> nnx.State:
        target = jax.tree.map(lambda x: x, target)
        nnx.replace_by_pure_dict(target, values)
        return target

    optimizer = jax.tree_util.tree_map_with_path(
        lambda path, _: items["optimizer"][jax.tree_util.keystr(path, simple=True, separator=".")], state.optimizer
    )
    return TrainState(
        step=place(np.asarray(step, np.int32), state.step.sharding),
        params=filled(state.params, items["model"]),
        ema=None if state.ema is None else filled(state.ema, items["ema"]),
        optimizer=optimizer,
    )
