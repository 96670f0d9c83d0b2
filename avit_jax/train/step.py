"""The jitted training step: forward, the terms of the objective, backward, update, on any mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from avit_jax.data.mix import augment_on_device, training_positions
from avit_jax.execution import planned
from avit_jax.execution.stages import PlannedPlan, sorted_loads
from avit_jax.halting.image_mean import image_mean
from avit_jax.halting.rule import Halting
from avit_jax.model.config import rule_of_training
from avit_jax.reduction.groups import Pass
from avit_jax.runtime.mesh import batch_sharding, replicated, state_shardings
from avit_jax.train.objective import distillation_loss, objective_terms
from avit_jax.train.optim import update_average
from avit_jax.train.second_pass import both_passes
from avit_jax.train.settings import StepSettings
from avit_jax.train.state import TrainState


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    mesh: Mesh,
    state: TrainState,
    teacher_graphdef: nnx.GraphDef | None = None,
    plan: PlannedPlan | None = None,
) -> jax.stages.Wrapped:
    """The jitted step: (state, batch, the teacher's weights or None) -> (state, metrics). It donates the old state.

    graphdef: of the model. state: arrays or shapes, which give the layout of the state. The batch is split over the
    mesh, and means are over the whole batch. Images whose batch["weight"] is 0 do not count. With accumulation above 1
    it is processed in as many parts, which are weighted by their images that count. The prior and MCTF's agreement are
    not means over all images. Each is then the mean of the parts' values.

    plan: of planned execution, for the images that a device has in a part. A part that does not fit is computed again
    with every token. With settings.counts, metrics["counts"] has what a plan is made from, each the largest of all
    parts and devices: "loads" [l, b], the sorted loads, and "overflow", whether something did not fit.
    """
    layout, everywhere = state_shardings(mesh, state), replicated(mesh)
    return jax.jit(
        build_train_step(graphdef, optimizer, settings, mesh, teacher_graphdef, plan),
        donate_argnums=0,
        in_shardings=(layout, batch_sharding(mesh), everywhere),
        out_shardings=(layout, everywhere),
    )


def build_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    mesh: Mesh,
    teacher_graphdef: nnx.GraphDef | None,
    plan: PlannedPlan | None = None,
) -> Callable[[TrainState, dict[str, Array], Any], tuple[TrainState, dict[str, Array]]]:
    """The function that make_train_step compiles: (state, batch, the teacher's weights) -> (state, metrics)."""
    classifying, parts = settings.classification, settings.accumulation

    def loss_function(
        params: nnx.State,
        batch: dict[str, Array],
        key: Array,
        teacher_state: Any,
        plan: PlannedPlan | None,
        remat: bool,
    ) -> Any:
        model = nnx.merge(graphdef, params)
        if remat:
            model = model.with_config(remat=True)
        weight, rule = batch.get("weight"), rule_of_training(model.config)
        positions = batch.get("positions")
        draws, overflow = nnx.Rngs(dropout=key).dropout(), jnp.zeros((), bool)
        reduction, passes = model.config.reduction, list[Pass]()
        of_reduction = settings.rule_loss.of(reduction)
        second = None if reduction is None else reduction.second_pass(model.config, of_reduction)
        if second is not None:
            output, *passes = both_passes(model, second.rules, batch["image"], draws, positions)
        elif plan is None or not isinstance(rule, Halting):
            output, trace, final = model.forward(batch["image"], draws, positions)
        else:
            output, ran = planned.forward(model, rule, batch["image"], plan, key=draws, mesh=mesh, positions=positions)
            trace, final, overflow = ran.trace, ran.state, ran.overflow
        teacher, teacher_logits = None, None
        if teacher_graphdef is not None:
            instructor = nnx.merge(teacher_graphdef, teacher_state)
            if rule is not None and rule.teacher_tokens:
                teacher = jax.lax.stop_gradient(instructor.teach(batch["image"]))
                teacher_logits = teacher.logits
            else:
                teacher_logits = jax.lax.stop_gradient(instructor(batch["image"]).logits)

        def classify(head_logits: Array, share: Array | None = None) -> Array:
            return distillation_loss(
                head_logits,
                batch["target"],
                teacher_logits,
                kind=classifying.distillation,
                weight=classifying.distillation_weight,
                temperature=classifying.distillation_temperature,
                image_weight=weight,
                share=share,
            )

        if second is not None:
            terms = second.losses(*passes, labels=batch["label"], classify=classify, image_weight=weight)
        else:
            own = settings.rule_loss.of(rule)
            terms = objective_terms(rule, output.head_logits, trace, final, classify, own, weight, teacher)
        total = sum(terms.values(), start=jnp.zeros(()))
        right = (output.logits.argmax(-1) == batch["label"]).astype(jnp.float32)
        # Logs have always had these two, also without a rule.
        named = terms if rule is not None else {"ponder": jnp.zeros(()), "prior": jnp.zeros(()), **terms}
        metrics = {
            "loss": total,
            **named,
            "accuracy": image_mean(right, weight),
            "mean_depth": image_mean(output.token_depth.astype(jnp.float32), weight),
            "halting_by_layer": jax.vmap(image_mean, (0, None))(output.halting_scores, weight),
        }
        counts = {}
        if settings.counts:
            counts = {"loads": sorted_loads(output.token_depth, model.config, mesh.size), "overflow": overflow}
        return total, (metrics, counts)

    def gradient(params: nnx.State, batch: dict[str, Array], key: Array, teacher_state: Any) -> Any:
        """Gradient, metrics and counts of a part."""

        def run(plan: PlannedPlan | None, remat: bool = False) -> Any:
            gradient_of = jax.grad(loss_function, has_aux=True)
            grads, (metrics, counts) = gradient_of(params, batch, key, teacher_state, plan, remat)
            return grads, metrics, counts

        if plan is None:
            return run(None)
        fast = run(plan)
        overflow = fast[2]["overflow"]

        def whole() -> Any:
            # Activations are computed again, so that the rare case does not set the memory of every step.
            grads, metrics, counts = run(None, remat=True)
            return grads, metrics, counts | {"overflow": overflow}

        return jax.lax.cond(overflow, whole, lambda: fast)

    def gradients(params: nnx.State, batch: dict[str, Array], key: Array, teacher_state: Any) -> Any:
        if parts == 1:
            return gradient(params, batch, key, teacher_state)

        def part(index: Array) -> dict[str, Array]:
            # Every parts-th image, so that each part is spread over all devices, as the batch is.
            return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:])[:, index], batch)

        def add(total: Any, index: Array) -> tuple[Any, None]:
            own = part(index)
            *found, counts = gradient(params, own, jax.random.fold_in(key, index), teacher_state)
            if "weight" in batch:  # a factor of exactly 1 if every image counts
                share = own["weight"].sum() * parts / jnp.maximum(batch["weight"].sum(), 1)
                found = jax.tree.map(lambda x: x * share, found)
            *sums, largest = total
            return (*jax.tree.map(jnp.add, sums, found), jax.tree.map(jnp.maximum, largest, counts)), None

        shapes = jax.eval_shape(gradient, params, part(jnp.zeros((), int)), key, teacher_state)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (*sums, largest), _ = jax.lax.scan(add, zeros, jnp.arange(parts))
        return *jax.tree.map(lambda x: x / parts, sums), largest

    def train_step(
        state: TrainState, batch: dict[str, Array], teacher_state: Any
    ) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        model_config = nnx.merge(graphdef, state.params).config
        augment_key = jax.random.fold_in(key, 1)
        images, targets = augment_on_device(
            augment_key,
            batch["image"],
            batch["label"],
            settings.augment,
            model_config,
            label_smoothing=classifying.label_smoothing,
            weight=batch.get("weight"),
        )
        batch = batch | {"image": images, "target": targets}
        if settings.augment.cuts:
            batch["positions"] = training_positions(augment_key, len(images), settings.augment, model_config)
        # If fsdp splits the parameters, gather them once: otherwise the compiler may move activations instead.
        whole = jax.lax.with_sharding_constraint(state.params, replicated(mesh))
        grads, metrics, counts = gradients(whole, batch, key, teacher_state)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings(mesh, grads))
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_average(state.ema, params, settings.ema_decay)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        if counts:
            metrics["counts"] = counts
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    return train_step
