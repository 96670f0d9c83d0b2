"""Masked execution, compiled: fixed shapes, every token computed, halted ones masked."""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from avit_jax.execution.compiled import CompiledForward
from avit_jax.execution.work import Executed, masked_gmacs
from avit_jax.model.output import AViTOutput
from avit_jax.model.vit import AViT


class MaskedModel(CompiledForward):
    """Masked execution of up to `batch_size` images: the reference for every other execution."""

    execution = "masked"

    def __init__(self, model: AViT, batch_size: int, mesh: Mesh | None = None) -> None:
        super().__init__(model, batch_size, AViT.__call__, mesh)

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """Every layer computes every token, whatever the depths."""
        return Executed(images * self.config.depth * self.config.num_tokens, masked_gmacs(self.config))
