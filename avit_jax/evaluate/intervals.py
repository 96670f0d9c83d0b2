"""95 % intervals by scipy: how far a figure would move with another sample of images."""

import numpy as np
from jaxtyping import Float
from scipy import stats

Interval = tuple[float, float]
RESAMPLES = 2000
_GATHERED = 4_000_000  # values drawn at a time, so that memory does not grow with the images


def bootstrap_means(columns: Float[np.ndarray, "k n"], seed: int = 0) -> list[Interval]:
    """Percentile bootstrap intervals of the rows' means; the rows are figures of the same n images, drawn together.

    The interval is NaN for a single image, and for a row with a NaN.
    """
    if columns.shape[1] < 2:
        return [(np.nan, np.nan)] * len(columns)
    found = stats.bootstrap(
        (columns.astype(np.float64),),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _GATHERED // columns.size),
        method="percentile",
        axis=-1,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return [(float(low), float(high)) for low, high in zip(found.low, found.high, strict=True)]


def bootstrap_difference(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"], seed: int = 0) -> Interval:
    """Percentile bootstrap interval of mean(first) - mean(second), two groups of images; NaN below two in either."""
    if min(len(first), len(second)) < 2:
        return np.nan, np.nan
    found = stats.bootstrap(
        (first.astype(np.float64), second.astype(np.float64)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        n_resamples=RESAMPLES,
        batch=max(1, _GATHERED // (len(first) + len(second))),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def share(successes: int, count: int) -> Interval:
    """Wilson's interval of a share of `count` images; a bootstrap interval of 0 or all of them would have no width."""
    found = stats.binomtest(successes, count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)
