"""Training: the state, the jitted step, the loop that logs, evaluates and checkpoints."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from avit_jax import losses
from avit_jax.checkpoint import RunCheckpoints
from avit_jax.data.pipeline import TrainingBatches, training_batches
from avit_jax.data.sources import Dataset
from avit_jax.evaluation import evaluate
from avit_jax.logs import RunLog
from avit_jax.mesh import batch_sharding, data_mesh, replicated
from avit_jax.model import AViT
from avit_jax.optim import learning_rate_schedule, make_optimizer, update_average

LOSS_TERMS = ("classification", "ponder", "prior", "gradient_norm")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes; randomness comes from the seed and the step."""

    step: Int[Array, ""]
    params: nnx.State
    ema: nnx.State | None
    optimizer: optax.OptState

    @property
    def eval_params(self) -> nnx.State:
        """The moving average where there is one."""
        return self.params if self.ema is None else self.ema


def initial_state(
    model: AViT, optimizer: optax.GradientTransformation, ema_decay: float, sharding: NamedSharding
) -> TrainState:
    """The state before step 1; it owns copies, because the step donates its buffers."""
    params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    state = TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))
    return jax.device_put(state, sharding)


def make_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: ConfigDict, teacher: AViT | None = None
) -> Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]:
    """One jitted function: forward, the three loss terms, backward, update. The old state's buffers are donated."""
    loss_config = config.loss
    teacher_graphdef, teacher_state = (None, None) if teacher is None else nnx.split(teacher)

    def loss_function(params: nnx.State, batch: dict[str, Array], step: Array, teacher_state: Any) -> Any:
        model = nnx.merge(graphdef, params)
        rngs = nnx.Rngs(dropout=jax.random.fold_in(jax.random.key(config.seed), step))
        output = model(batch["image"], deterministic=False, rngs=rngs)
        teacher_logits = None
        if teacher_graphdef is not None:
            teacher_logits = jax.lax.stop_gradient(nnx.merge(teacher_graphdef, teacher_state)(batch["image"]).logits)
        classification = losses.distillation_loss(
            output.head_logits,
            batch["label"],
            teacher_logits,
            kind=loss_config.distillation,
            weight=loss_config.distillation_weight,
            temperature=loss_config.distillation_temperature,
            label_smoothing=loss_config.label_smoothing,
        )
        ponder = prior = jnp.zeros(())
        if model.config.halts:
            ponder, prior = losses.halting_losses(
                output.halting_scores,
                output.ponder_cost,
                ponder_weight=loss_config.ponder_weight,
                prior_weight=loss_config.prior_weight,
                prior=loss_config.prior,
                prior_target_depth=loss_config.prior_target_depth,
            )
        terms = losses.LossTerms(classification, ponder, prior)
        return terms.total, (terms, output)

    def train_step(state: TrainState, batch: dict[str, Array], teacher_state: Any) -> Any:
        gradient = jax.value_and_grad(loss_function, has_aux=True)
        (loss, (terms, output)), grads = gradient(state.params, batch, state.step, teacher_state)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else update_average(state.ema, params, config.optim.ema_decay)
        metrics = {
            "loss": loss,
            "classification": terms.classification,
            "ponder": terms.ponder,
            "prior": terms.prior,
            "gradient_norm": optax.tree.norm(grads),
            "accuracy": (output.logits.argmax(-1) == batch["label"]).mean(),
            "mean_depth": output.token_depth.mean(),
        }
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    mesh = data_mesh(config.batch_size)
    everywhere, split = replicated(mesh), batch_sharding(mesh)
    jitted = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(everywhere, split, everywhere),
        out_shardings=(everywhere, everywhere),
    )
    return lambda state, batch: jitted(state, batch, teacher_state)


def train(
    config: ConfigDict, dataset: Dataset, model: AViT, workdir: Path, teacher: AViT | None = None, *, began: float
) -> float:
    """Train to config.epochs, from the newest checkpoint in workdir where there is one; the model ends up trained.

    began: time.perf_counter() when this run started. Returns the seconds that earlier, stopped runs took. Raises
    FloatingPointError at a NaN or infinite loss; the last good checkpoint stays.
    """
    batches = training_batches(
        dataset.train, model.config, batch_size=config.batch_size, seed=config.seed, augment=dict(config.augment)
    )
    steps = training_steps(config, dataset)
    optimizer = make_optimizer(config.optim, steps)
    graphdef, _ = nnx.split(model)
    everywhere = replicated(data_mesh(config.batch_size))
    state = initial_state(model, optimizer, config.optim.ema_decay, everywhere)
    train_step = make_train_step(graphdef, optimizer, config, teacher)
    checkpoints = RunCheckpoints(workdir / "checkpoints", config.keep_checkpoints)
    start, earlier, window = 0, 0.0, []
    if (latest := checkpoints.latest_step()) is not None:
        items, progress, data = checkpoints.restore(latest, _items(state))
        state = jax.device_put(_with_items(state, items, latest), everywhere)
        batches.set_state(data)
        start, earlier, window = latest, progress["seconds"], progress["window"]
        print(f"going on from step {latest} of {steps} in {workdir}")
    with RunLog(workdir, start, learning_rate_schedule(config.optim, steps)) as log:
        loop = _Loop(config, dataset, model, steps, train_step, batches, checkpoints, log)
        try:
            state = loop.run(state, start, began - earlier, window)
        finally:
            checkpoints.close()
            batches.close()
    _show(model, state)
    return earlier


def _show(model: AViT, state: TrainState) -> None:
    """Give the model the state's weights, on one device, for evaluation."""
    nnx.update(model, jax.device_put(state.eval_params, jax.devices()[0]))


def training_steps(config: ConfigDict, dataset: Dataset) -> int:
    """The number of steps in config.epochs, at least 1."""
    return max(1, round(config.epochs * len(dataset.train) / config.batch_size))


def _items(state: TrainState) -> dict[str, Any]:
    """The state as plain nested dicts and tuples of arrays, as the checkpoint's items."""
    items = {"model": nnx.to_pure_dict(state.params), "optimizer": _pure_leaves(state.optimizer)}
    return items | ({} if state.ema is None else {"ema": nnx.to_pure_dict(state.ema)})


def _pure_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _with_items(state: TrainState, items: dict[str, Any], step: int) -> TrainState:
    def filled(target: nnx.State, values: Any) -> nnx.State:
        target = jax.tree.map(lambda x: x, target)
        nnx.replace_by_pure_dict(target, values)
        return target

    optimizer = jax.tree_util.tree_map_with_path(
        lambda path, _: items["optimizer"][jax.tree_util.keystr(path, simple=True, separator=".")], state.optimizer
    )
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params=filled(state.params, items["model"]),
        ema=None if state.ema is None else filled(state.ema, items["ema"]),
        optimizer=optimizer,
    )


@dataclasses.dataclass
class _Loop:
    config: ConfigDict
    dataset: Dataset
    model: AViT
    steps: int
    train_step: Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]
    batches: TrainingBatches
    checkpoints: RunCheckpoints
    log: RunLog

    def run(self, state: TrainState, start: int, began: float, window: list[dict[str, float]]) -> TrainState:
        pending: tuple[int, dict[str, Array]] | None = None
        bar = tqdm(total=self.steps, initial=start, unit="step", desc="training", mininterval=1, dynamic_ncols=True)
        window_began, window_start = time.perf_counter(), start
        with bar:
            for step in range(start + 1, self.steps + 1):
                state, metrics = self.train_step(state, next(self.batches))
                # The step before is read while this one runs, so that the device never waits for Python.
                if pending is not None:
                    window.append(_checked(*pending))
                pending = (step, metrics)
                stop = step == self.steps
                logs = stop or step % self.config.log_every == 0
                evaluates = stop or step % self.config.eval_every == 0
                saves = stop or step % self.config.checkpoint_every == 0
                if logs or evaluates or saves:
                    window.append(_checked(*pending))
                    pending = None
                if logs:
                    elapsed = time.perf_counter() - window_began
                    means = {name: sum(m[name] for m in window) / len(window) for name in window[0]}
                    means["images_per_second"] = (step - window_start) * self.config.batch_size / elapsed
                    self.log.train(step, means)
                    bar.set_postfix(
                        loss=f"{means['loss']:.3f}",
                        accuracy=f"{means['accuracy']:.3f}",
                        depth=f"{means['mean_depth']:.2f}",
                        images_s=f"{means['images_per_second']:.0f}",
                    )
                    window.clear()
                    window_began, window_start = time.perf_counter(), step
                bar.update(1)
                aside = time.perf_counter()
                if evaluates:
                    _show(self.model, state)
                    result = evaluate(self.model, self.dataset.val, self.config.eval_batch_size)
                    self.log.val(step, result)
                if saves:
                    # With the metrics since the last line: the next line after a resume is the same mean.
                    progress = {"step": step, "seconds": time.perf_counter() - began, "window": list(window)}
                    self.checkpoints.save(step, _items(state), progress, self.batches.get_state(), self.model.config)
                # images/s is the speed of training alone.
                window_began += time.perf_counter() - aside
        return state


def _checked(step: int, metrics: dict[str, Array]) -> dict[str, float]:
    """The metrics on the host. Raises FloatingPointError, naming the step and the term, where one is not finite."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    for term in LOSS_TERMS:
        if not math.isfinite(values[term]):
            raise FloatingPointError(
                f"the {term.replace('_', ' ')} is {values[term]} at step {step}: training stopped, the last good "
                "checkpoint is kept; in another --workdir, lower config.optim.learning_rate or config.loss's weights"
            )
    return values
