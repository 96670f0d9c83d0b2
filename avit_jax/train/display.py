"""What a user sees during training: a bar on a terminal, otherwise a line per log step. Only process 0 prints."""

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from tqdm import tqdm

from avit_jax.data.sources import Dataset
from avit_jax.evaluate.figures import Evaluation
from avit_jax.model.config import AViTConfig


class Display:
    """Progress of a run of `steps` steps of `batch_size` images. The bar goes to stderr, lines to stdout."""

    def __init__(self, steps: int, batch_size: int) -> None:
        self._steps, self._batch_size = steps, batch_size
        self._speaks = jax.process_index() == 0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Display":
        self._bar = tqdm(
            total=self._steps,
            unit="step",
            desc="training",
            mininterval=1,
            dynamic_ncols=True,
            disable=not (self._speaks and self._terminal),
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._speaks:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def begin(self, model_config: AViTConfig, parameters: int, dataset: Dataset, workdir: Path) -> None:
        """Print what is trained on what, and where it is written. parameters: how many the model has."""
        rule = model_config.rule_in_force
        kind = "dense ViT" if rule is None else "A-ViT" if rule.name == "avit" else f"ViT, {rule.describe()}"
        data = dataset.train.settings
        source = ", ".join(value for value in (data.source, data.name, data.path) if value)
        self.say(
            f"training {kind}: {model_config.depth} layers of width {model_config.embed_dim}, {parameters:,} "
            f"parameters; {len(dataset.train)} images in {len(dataset.class_names)} classes ({source}); "
            f"{self._steps} steps of {self._batch_size} images; writes to {workdir}"
        )

    def start(self, step: int) -> None:
        """Set the bar to this step."""
        self._bar.initial = self._bar.n = step
        self._bar.refresh()

    def at(self, step: int) -> None:
        """Show that this step is done."""
        self._bar.update(step - self._bar.n)

    def means(self, step: int, means: dict[str, Any]) -> None:
        """Show the means over the steps since the last line."""
        loss, accuracy = f"{means['loss']:.3f}", f"{means['accuracy']:.3f}"
        depth, speed = f"{means['mean_depth']:.2f}", means["images_per_second"]
        if self._terminal:
            self._bar.set_postfix(loss=loss, accuracy=accuracy, depth=depth, images_s=f"{speed:.0f}")
            return
        left = (self._steps - step) * self._batch_size / speed
        self.say(
            f"step {step} of {self._steps}: loss {loss}, accuracy {accuracy}, mean depth {depth}, "
            f"{speed:.0f} images/s, {tqdm.format_interval(left)} left"
        )

    def validation(self, step: int, result: Evaluation, depth: int, raw: Evaluation | None) -> None:
        """Print what an evaluation found.

        depth: layers of the model. raw: figures of the raw weights, if `result` is of the moving average.
        """
        beside = "" if raw is None else f" (raw weights {raw.top1:.2%})"
        self.say(
            f"step {step} of {self._steps}: validation top-1 {result.top1:.2%}{beside}, mean depth "
            f"{result.mean_depth:.2f} of {depth} layers"
        )
