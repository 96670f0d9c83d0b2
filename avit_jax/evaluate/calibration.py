"""Calibration: the reliability of confidences by bins, and the expected calibration error."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Images by their confidence, in bins of equal width; an empty bin has NaN for its means."""

    counts: Int[np.ndarray, " bins"]  # of images
    confidence: Float[np.ndarray, " bins"]  # mean within the bin
    accuracy: Float[np.ndarray, " bins"]
    edges: Float[np.ndarray, " bins+1"]  # bin m holds confidences in (edges[m], edges[m + 1]]
    ece: float  # expected calibration error, 0..1


def reliability(confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], bins: int = 15) -> Reliability:
    """ECE = sum over bins of (share of the images) * |accuracy - mean confidence| (Guo et al., arXiv 1706.04599).

    confidence: probability of the predicted class, 0..1; NaN counts as 0. correct: whether the prediction is right.
    bins: how many there are, of equal width.
    """
    confidence = np.nan_to_num(confidence.astype(np.float64))
    edges = np.linspace(0, 1, bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    counts = np.bincount(index, minlength=bins)
    filled = np.where(counts > 0, counts, np.nan)
    mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / filled
    accuracy = np.bincount(index, weights=correct, minlength=bins) / filled
    gaps = np.nan_to_num(np.abs(accuracy - mean_confidence))
    return Reliability(counts, mean_confidence, accuracy, edges, float(counts @ gaps / len(confidence)))
