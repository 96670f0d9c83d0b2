"""Position embeddings resized to another resolution, with the bicubic interpolation of PyTorch."""

import numpy as np
from jaxtyping import Array, Float


def resize_positions(
    positions: Float[np.ndarray | Array, "1 n d"],
    num_special: int,
    source: tuple[int, int],
    target: tuple[int, int],
    *,
    antialias: bool = False,
) -> Float[np.ndarray, "1 m d"]:
    """Positions of a grid of patches resized to another grid; the special tokens' rows stay as they are.

    num_special: rows before those of the patches. source, target: (rows, columns) of patches. The interpolation is that
    of torch.nn.functional.interpolate(mode="bicubic"): bicubic convolution with a = -0.75, half-pixel centres
    (align_corners=False), no antialiasing, borders repeated. jax.image.resize has a = -0.5. With antialias, a is -0.5
    as in PyTorch, and the filter is as wide as the step and cut off at the borders.
    """
    values: np.ndarray = np.asarray(positions)
    special, patches = values[:, :num_special], values[0, num_special:]
    grid = patches.reshape(*source, -1).astype(np.float64)
    rows, columns = (
        (_antialiased_weights if antialias else _cubic_weights)(s, t) for s, t in zip(source, target, strict=True)
    )
    resized = np.einsum("ar,bc,rcd->abd", rows, columns, grid, optimize=True)
    return np.concatenate([special, resized.reshape(1, -1, grid.shape[-1]).astype(values.dtype)], axis=1)


def _cubic_weights(source: int, target: int) -> Float[np.ndarray, "t s"]:
    """Row t holds the weights of the source positions for position t of the target."""
    centre = (np.arange(target) + 0.5) * (source / target) - 0.5
    first = np.floor(centre).astype(int)
    weights = np.zeros((target, source))
    for offset in (-1, 0, 1, 2):
        x = np.abs(centre - first - offset)
        near = (-0.75 + 2) * x**3 - (-0.75 + 3) * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        # Repeated borders: several taps may fall on the same position.
        np.add.at(weights, (np.arange(target), np.clip(first + offset, 0, source - 1)), np.where(x <= 1, near, far))
    return weights


def _antialiased_weights(source: int, target: int) -> Float[np.ndarray, "t s"]:
    step = source / target
    width = max(step, 1.0)
    centre = (np.arange(target)[:, None] + 0.5) * step - 0.5
    x = np.abs(np.arange(source) - centre) / width
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)
