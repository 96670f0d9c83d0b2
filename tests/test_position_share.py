"""How much of the variance of depth position explains, on arrays made by hand."""

import math

import numpy as np
import pytest

from avit_jax.evaluate.position_share import explained_by_position


@pytest.mark.parametrize(
    ("depth", "share"),
    [
        ([[1, 5, 3], [1, 5, 3]], 1.0),  # the same in every image
        ([[2, 2], [7, 7], [4, 4]], 0.0),  # the same at every position
        ([[1, 3], [3, 5]], 0.5),  # means 2 and 4: variance 1 of 2
        ([[0, 4], [0, 8]], 9 / 11),  # means 0 and 6: variance 9 of 11
        ([[1, 3], [3, 1]], 0.0),  # equal means
    ],
)
def test_share(depth: list[list[int]], share: float) -> None:
    assert explained_by_position(np.array(depth)) == pytest.approx(share)
    assert explained_by_position(10.0 + 0.5 * np.array(depth)) == pytest.approx(share)


def test_without_variance() -> None:
    assert math.isnan(explained_by_position(np.full((3, 4), 6)))


def test_few_images_raise_it_by_one_over_their_number() -> None:
    depth = np.random.default_rng(0).uniform(1, 12, (4, 10_000))
    assert explained_by_position(depth) == pytest.approx(1 / 4, rel=0.05)
