"""How much of a halting model's adaptation is the patch's position alone."""

import math

import numpy as np
from jaxtyping import Float, Int


def explained_by_position(
    token_depth: Int[np.ndarray, "images patches"] | Float[np.ndarray, "images patches"],
) -> float:
    """The share, 0..1, of the variance of depth that position alone explains; NaN if all depths are equal.

    It is Var_n(mean over images of depth[b, n]) / Var(depth). At 1 the model stops the same patches in every image, and
    at 0 position says nothing. With few images it is too high: by about 1 / images where position has no influence.

    token_depth: of the patches alone, in layers.
    """
    depth = np.asarray(token_depth, np.float64)
    total = depth.var()
    return float(depth.mean(0).var() / total) if total > 0 else math.nan
