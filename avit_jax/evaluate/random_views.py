"""Figures of a model whose images are cut at random places at inference."""

from typing import Any

import numpy as np

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.rows import as_bits
from avit_jax.execution.random_views import RandomViews, random_views
from avit_jax.model.vit import AViT


def evaluate_views(model: AViT, split: Split, how: RandomViews, batch_size: int = 200) -> dict[str, Any]:
    """Top-1 (0..1), cross entropy (nats) and GMACs of an image, each image of a split in memory counted once.

    "correct" has the images that are answered rightly (rows.correct_images reads it).
    """
    found = []
    for start in range(0, len(split), batch_size):
        chosen = range(start, min(start + batch_size, len(split)))
        pixels = np.asarray(normalize(evaluation_images(split, chosen, model.config), model.config))
        padded = np.pad(pixels, ((0, batch_size - len(pixels)), (0, 0), (0, 0), (0, 0)))
        found.append([np.asarray(values)[: len(pixels)] for values in random_views(model, padded, how)])
    answers, work = (np.concatenate(parts) for parts in zip(*found, strict=True))
    right = answers[np.arange(len(split)), split.labels]
    correct = answers.argmax(1) == split.labels
    return {
        "images": len(split),
        "top1": float(correct.mean()),
        "correct": as_bits(correct),
        "loss": float(-np.log(np.maximum(right, np.finfo(np.float32).tiny)).mean()),
        "gmacs": float(work.mean(dtype=np.float64)),
    }
