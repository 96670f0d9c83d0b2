"""A run's weights on its validation images, and which weights the trained model keeps."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import Mesh

from avit_jax.data.sources import Images
from avit_jax.evaluate.figures import Evaluation, evaluate
from avit_jax.model.vit import AViT
from avit_jax.runtime.mesh import place, replicated
from avit_jax.runtime.signals import StopRequest
from avit_jax.train.settings import TrainSettings
from avit_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Validation:
    """Evaluation during training. The model takes the weights that are evaluated, and keeps them."""

    settings: TrainSettings
    images: Images
    model: AViT
    mesh: Mesh  # of the training

    def of_state(self, state: TrainState, stop: StopRequest) -> tuple[Evaluation, Evaluation | None]:
        """The figures of the moving average if there is one, and with config.optim.compare_ema of the raw weights.

        Without a moving average they are those of the weights, and None. Raises StopAsked if a signal came.
        """
        result = self._of(state.params if state.ema is None else state.ema, stop)
        compared = state.ema is not None and self.settings.optim.compare_ema
        return result, self._of(state.params, stop) if compared else None

    def keep(self, state: TrainState, stop: StopRequest) -> str:
        """Leave the model with the weights to keep: the moving average if there is one.

        With config.optim.compare_ema they are the better ones on validation, and the returned sentence says which;
        otherwise it is empty. Raises StopAsked if a signal came.
        """
        if state.ema is None or not self.settings.optim.compare_ema:
            self._show(state.params if state.ema is None else state.ema)
            return ""
        average, raw = self._of(state.ema, stop).top1, self._of(state.params, stop).top1
        if average >= raw:
            self._show(state.ema)
        better = "the moving average" if average >= raw else "the raw weights"
        return f"validation top-1: moving average {average:.2%}, raw weights {raw:.2%}; kept: {better}"

    def _of(self, params: nnx.State, stop: StopRequest) -> Evaluation:
        self._show(params)
        return evaluate(self.model, self.images, self.settings.eval_batch_size, before_batch=stop.check)

    def _show(self, params: nnx.State) -> None:
        """Give the model the weights, whole and on one device of this process."""
        whole = place(params, replicated(self.mesh))
        nnx.update(self.model, jax.tree.map(lambda x: x.addressable_data(0), whole))
