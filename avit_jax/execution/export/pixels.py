"""Preprocessing as part of an ONNX graph: resize, crop, normalise."""

from typing import Any

import numpy as np

from avit_jax.execution.export.graph import FLOAT32, INT64, Graph
from avit_jax.model.config import AViTConfig

# Resize's form of what Pillow does, by our name of the interpolation. On uint8, ONNX Runtime rounds as Pillow does
# in pictures that are not tall.
_RESIZE: dict[str, dict[str, Any]] = {
    "nearest": {"mode": "nearest", "nearest_mode": "round_prefer_ceil"},
    "bilinear": {"mode": "linear", "antialias": 1, "exclude_outside": 1},
    "bicubic": {"mode": "cubic", "antialias": 1, "exclude_outside": 1, "cubic_coeff_a": -0.5},
}


def check_channels(config: AViTConfig) -> None:
    """Raises ValueError if config.preprocessing has no mean for every channel."""
    given = len(config.preprocessing.mean)
    if given != config.in_channels:
        raise ValueError(
            f"preprocessing has a mean for {given} channels and the model takes {config.in_channels}: export without "
            "preprocess, or give Preprocessing(mean=..., std=...) one value for each channel"
        )


def preprocessed(graph: Graph, pictures: str, config: AViTConfig) -> str:
    """Images as the model takes them, from uint8 [batch, height, width, channels] of any size.

    The model's size is crop_fraction of the shorter side of the resized picture. It is cropped at the centre, with
    sizes rounded as avit_jax.preprocess rounds them.
    """
    how, size = config.preprocessing, list(config.image_shape)
    covered = [int(side / how.crop_fraction) for side in size]
    with graph.scope("preprocess"):
        given = graph.op("Shape", pictures, start=1, end=3)  # height, width
        # Both sides if the height becomes covered[0], and if the width becomes covered[1]: the larger one covers both.
        height, width = (graph.op("Slice", given, [side], [side + 1]) for side in range(2))
        by_height = graph.op("Div", graph.op("Mul", given, covered[0]), height)
        by_width = graph.op("Div", graph.op("Mul", given, covered[1]), width)
        resized = graph.op("Max", by_height, by_width)
        spare = graph.op("Cast", graph.op("Sub", resized, size), to=FLOAT32)
        half = graph.op("Round", graph.op("Mul", spare, 0.5))  # halves to even, as Python's
        corner = graph.op("Cast", half, to=INT64)
        axes = [1, 2]
        x = graph.op("Resize", pictures, "", "", resized, axes=axes, **_RESIZE[how.interpolation])
        x = graph.op("Cast", graph.op("Slice", x, corner, graph.op("Add", corner, size), axes), to=FLOAT32)
        mean, std = (np.asarray(values, np.float32) * 255 for values in (how.mean, how.std))
        return graph.op("Div", graph.op("Sub", x, mean), std)
