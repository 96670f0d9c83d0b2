"""The colour scale of depths: a colour means the same depth in every picture and everywhere on the page.

It is viridis from layer 1 (dark blue) to the last layer (yellow). Its brightness grows evenly with depth, so that it
reads the same for colour-blind people and in grey. Below one layer it is light grey: nothing was computed.
"""

import matplotlib
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.colors import Normalize

COLOURS = matplotlib.colormaps["viridis"].with_extremes(under="#d4d4d4")


def scale(depth: int) -> Normalize:
    """Layers 1 to `depth` as 0..1, for matplotlib."""
    return Normalize(1, max(depth, 2))


def coloured(depths: Int[np.ndarray, "..."] | Float[np.ndarray, "..."], depth: int) -> UInt8[np.ndarray, "... 3"]:
    """The colour of each depth, in layers, of a model with `depth` layers."""
    return np.asarray(COLOURS(scale(depth)(depths), bytes=True))[..., :3]


def ink_on(colour: UInt8[np.ndarray, " 3"]) -> str:
    """Black or white, whichever is easier to read on the colour."""
    linear = np.asarray(colour / 255) ** 2.2
    luminance = linear @ (0.2126, 0.7152, 0.0722)
    return "white" if luminance < 0.18 else "black"  # at 0.18 both have the same contrast


def legend(depth: int) -> list[dict[str, str | int]]:
    """Each layer with its colour, in CSS notation, and the ink for text on it."""
    rows = ((layer, coloured(np.array(layer), depth)) for layer in range(1, depth + 1))
    return [{"layer": layer, "colour": "#" + bytes(colour).hex(), "ink": ink_on(colour)} for layer, colour in rows]


def ticks(depth: int) -> list[int]:
    """Layers that a colour bar names: the first, the last and a few between."""
    step = max(1, depth // 6)
    between = [layer for layer in range(1 + step, depth, step) if depth - layer >= step]
    return sorted({1, *between, depth})
