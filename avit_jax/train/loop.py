"""The training loop: it logs, evaluates, saves checkpoints, stops when asked to, and resumes exactly."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from avit_jax.checkpoints.run_checkpoints import Restored, RunCheckpoints
from avit_jax.data.device import DeviceBatches
from avit_jax.data.pipeline import training_batches
from avit_jax.data.sources import Dataset
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import global_batch, place, state_shardings, training_mesh
from avit_jax.runtime.signals import StopAsked, StopRequest
from avit_jax.train.clock import StepClock
from avit_jax.train.display import Display
from avit_jax.train.logs import RunLog, means_of
from avit_jax.train.planner import WINDOW
from avit_jax.train.progress import Metrics, Progress
from avit_jax.train.settings import TrainSettings
from avit_jax.train.setup import Setup, prepare
from avit_jax.train.state import TrainState, initial_state, state_items, state_with, teacher_weights
from avit_jax.train.validation import Validation

Step = Callable[[TrainState, dict[str, Array]], tuple[TrainState, dict[str, Array]]]


class Stopped(Exception):
    """The run was asked to stop and has written its checkpoint; the message says how to continue."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What `train` returns."""

    model: AViT
    progress: Progress


def train(
    settings: TrainSettings,
    dataset: Dataset,
    model: AViT,
    workdir: Path,
    teacher: AViT | None = None,
    *,
    seconds: float = 0.0,
) -> Trained:
    """Train to config.epochs, from workdir's newest complete checkpoint if there is one.

    model: trained in place. teacher: for config.loss.distillation. seconds: what this process has spent on the run so
    far; they count in the progress. Raises FloatingPointError at a NaN or infinite loss (config.on_nan); the last good
    checkpoint is kept. Raises Stopped after SIGTERM or SIGINT.
    """
    began = time.perf_counter() - seconds
    mesh = training_mesh(settings.mesh, settings.batch_size, settings.accumulation)
    batches = DeviceBatches(
        training_batches(
            dataset.train,
            model.config,
            batch_size=settings.batch_size,
            seed=settings.seed,
            augment=settings.augment,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        place=lambda batch: global_batch(batch, mesh),
    )
    setup = prepare(settings, model, mesh, len(dataset.train), teacher)
    state = initial_state(model, setup.optimizer, settings.optim.ema_decay, mesh)
    weights = teacher_weights(teacher, mesh)

    def step(plan: PlannedPlan | None) -> Step:
        program = setup.step if plan is None else setup.planned_step(plan)
        return lambda state, batch: program(state, batch, weights)

    kept = settings.keep_checkpoints, settings.keep_every, settings.keep_best
    with contextlib.closing(batches), RunCheckpoints(workdir / "checkpoints", *kept) as checkpoints:
        display = Display(setup.steps, settings.batch_size)
        run = _Run(settings, dataset, model, setup, mesh, step, batches, checkpoints, display, state, began)
        display.begin(model.config, sum(leaf.size for leaf in jax.tree.leaves(state.params)), dataset, workdir)
        run.restore(workdir)
        begun = run.progress
        with (
            RunLog(workdir, begun.step, setup.schedule, validated=not begun.evaluation_due) as log,
            StopRequest() as stop,
            display,
        ):
            run.loop(log, stop, workdir)
    return Trained(model, dataclasses.replace(run.progress, seconds=run.seconds()))


@dataclasses.dataclass
class _Run:
    settings: TrainSettings
    dataset: Dataset
    model: AViT
    setup: Setup
    mesh: Mesh
    step_with: Callable[[PlannedPlan | None], Step]
    batches: DeviceBatches
    checkpoints: RunCheckpoints
    display: Display
    state: TrainState
    began: float  # of this process, as time.perf_counter()
    earlier: float = 0.0  # seconds that earlier, stopped processes took
    progress: Progress = dataclasses.field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.steps, self.planner = self.setup.steps, self.setup.planner
        self.train_step = self.step_with(None)
        self.validation = Validation(self.settings, self.dataset.val, self.model, self.mesh)

    def seconds(self) -> float:
        """Seconds that the run has taken so far in all its processes."""
        return self.earlier + time.perf_counter() - self.began

    def restore(self, workdir: Path) -> None:
        """Continue from the newest complete checkpoint."""
        found = self.checkpoints.restore_newest(state_items(self.state))
        if found is None:
            return
        self._take(found)
        self.earlier = self.progress.seconds
        self.display.say(f"going on from step {self.progress.step} of {self.steps} in {workdir}")

    def _take(self, found: Restored) -> None:
        try:
            self.progress = Progress.from_json(found.progress, found.step)
            if self.progress.planning is None:
                self.planner = None  # a run that began before there were plans goes on with every token computed
            elif self.planner is not None:
                self.planner.take(self.progress.planning)
                self.train_step = self.step_with(self.planner.plan)
        except ValueError as error:
            raise ValueError(f"the checkpoint {found.folder} is damaged: {error}") from error
        state = state_with(self.state, found.items, found.step)
        self.state = place(state, state_shardings(self.mesh, state))
        self.batches.set_state(found.data)

    def loop(self, log: RunLog, stop: StopRequest, workdir: Path) -> None:
        """Train to the last step, and leave the model with the weights to keep."""
        clock = StepClock(
            self.model.config,
            self.mesh,
            workdir,
            batch_size=self.settings.batch_size,
            profile=self.settings.profile,
            peak_tflops=self.settings.peak_tflops,
        )
        self.display.start(self.progress.step)
        with contextlib.closing(clock):
            while self.progress.step < self.steps or self.progress.evaluation_due:
                try:
                    self._some_steps(log, stop, clock)
                except FloatingPointError as error:
                    self._roll_back(error)
                    log.back_to(self.progress.step, validated=not self.progress.evaluation_due)
                    self.display.start(self.progress.step)
        self.checkpoints.wait()
        try:
            kept = self.validation.keep(self.state, stop)
            if kept:
                self.display.say(kept)
            stop.check()
        except StopAsked:
            self._stop(stop)

    def _some_steps(self, log: RunLog, stop: StopRequest, clock: StepClock) -> None:
        """Train to the last step. Raises FloatingPointError at a loss that is not finite."""
        settings, progress = self.settings, self.progress
        pending: tuple[int, dict[str, Array]] | None = None
        if progress.evaluation_due and not self._evaluate(log, stop):
            self._stop(stop)  # its checkpoint has been written already
        clock.start(progress.step)
        while progress.step < self.steps:
            clock.trace(progress.step + 1)
            with clock.waiting_for("data"):
                batch = next(self.batches)
            self.state, metrics = self.train_step(self.state, batch)
            step = progress.step + 1
            # The previous step's metrics are read while this step runs, so that the device never waits for Python.
            if pending is not None:
                with clock.waiting_for("device"):
                    self._take_in(*pending)
            pending = (step, metrics)
            stopping = stop.signal is not None or self.checkpoints.preempted(step)
            if stopping:
                stop.agreed()
            last = step == self.steps
            logs = last or step % settings.log_every == 0
            progress.evaluation_due = last or step % settings.eval_every == 0
            saves = last or stopping or step % settings.checkpoint_every == 0
            plans = self.planner is not None and step % WINDOW == 0
            if logs or progress.evaluation_due or saves or plans:
                with clock.waiting_for("device"):
                    self._take_in(*pending)
                pending = None
            progress.step = step
            if plans:
                self._plan(step)
            if logs:
                means = means_of(progress.window) | clock.figures(step)
                log.train(step, means)
                self.display.means(step, means)
                progress.window.clear()
                clock.start(step)
            self.display.at(step)
            if progress.evaluation_due and not stopping:
                with clock.aside():
                    stopping = not self._evaluate(log, stop)
            if saves or stopping:
                with clock.waiting_for("checkpoint"):
                    self._save(stopping or last)
            if stopping:
                self._stop(stop)

    def _take_in(self, step: int, metrics: dict[str, Any]) -> None:
        counts = metrics.pop("counts", None)
        self.progress.window.append(_checked(step, metrics))
        if self.planner is not None and counts is not None:
            self.planner.saw(jax.device_get(counts))

    def _plan(self, step: int) -> None:
        """Use another plan from the next step on, if recent batches call for one."""
        assert self.planner is not None
        if self.planner.renewed(step):
            self.display.say(f"after step {step}: {self.planner}")
            self.train_step = self.step_with(self.planner.plan)

    def _stop(self, stop: StopRequest) -> NoReturn:
        stop.agreed()
        self.checkpoints.wait()
        raise Stopped(
            f"stopped by {stop.signal or 'preemption'} after step {self.progress.step} of {self.steps}; its "
            "checkpoint is written: the same command goes on"
        )

    def _save(self, now: bool) -> None:
        self.progress.seconds = self.seconds()
        self.progress.planning = None if self.planner is None else self.planner.to_json()
        # The progress holds the metrics since the last line, so that a resumed run logs the same means.
        step, items = self.progress.step, state_items(self.state)
        self.checkpoints.save(
            step, items, self.progress.to_json(), self.batches.get_state(), self.model.config, self.progress.top1
        )
        if now:
            self.checkpoints.wait()

    def _evaluate(self, log: RunLog, stop: StopRequest) -> bool:
        """Evaluate and log it. Returns False, without logging, if a signal interrupted it."""
        try:
            result, raw = self.validation.of_state(self.state, stop)
        except StopAsked:
            return False
        log.val(self.progress.step, result, "val")
        if raw is not None:
            log.val(self.progress.step, raw, "val_raw")
        self.display.validation(self.progress.step, result, self.model.config.depth, raw)
        self.progress.top1 = result.top1 if raw is None else max(result.top1, raw.top1)
        self.progress.evaluation_due = False
        return True

    def _roll_back(self, error: FloatingPointError) -> None:
        """Continue from the last checkpoint and skip the data since, but only once, and if config.on_nan says so."""
        if self.settings.on_nan != "roll back" or self.progress.rolled_back:
            raise error
        bad, data = self.progress.step + 1, self.batches.get_state()
        self.checkpoints.wait()
        found = self.checkpoints.restore_newest(state_items(self.state))
        if found is None:
            raise error
        self._take(found)
        self.batches.set_state(data)
        self.progress.rolled_back = bad
        self.display.say(f"{error}\nrolled back to step {self.progress.step}; the data up to step {bad} are skipped")


def _checked(step: int, metrics: dict[str, Array]) -> Metrics:
    """The metrics on the host. Raises FloatingPointError, naming step and term, if one is not finite."""
    values = {name: np.asarray(value, np.float64).tolist() for name, value in jax.device_get(metrics).items()}
    # If a term is not finite, neither are the loss and the gradient: the term is what to name.
    scalars = [name for name, value in values.items() if not isinstance(value, list)]
    for term in sorted(scalars, key=lambda name: name in ("gradient_norm", "loss")):
        if not math.isfinite(values[term]):
            raise FloatingPointError(
                f"the {term.replace('_', ' ')} is {values[term]} at step {step}: training stopped, the last good "
                "checkpoint is kept; in another --workdir, lower config.optim.learning_rate or config.loss's weights"
            )
    return values
