"""Masked execution, compiled: fixed shapes, every token computed, halted ones masked."""

import numpy as np
from jaxtyping import Int

from avit_jax.execution.compiled import CompiledModel
from avit_jax.execution.work import Executed, masked_gmacs


class MaskedModel(CompiledModel):
    """Masked execution of up to `batch_size` images: the reference that every other execution agrees with."""

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int) -> Executed:
        """Every layer computes every token, whatever the depths."""
        return Executed(images * self.config.depth * self.config.num_tokens, masked_gmacs(self.config))
