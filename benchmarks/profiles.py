"""The depths that benchmarks draw: the published budgets, and profiles around them."""

import dataclasses

import numpy as np

from avit_jax import AViTConfig
from benchmarks.drawn import drawn_depths

MODELS = {"tiny": ("avit_tiny_patch16_224", 0.60), "small": ("avit_small_patch16_224", 0.78)}
TOKEN_SPREAD = 2.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """The depths of a model's tokens: the mean as a fraction of the layers, the spread between images in layers."""

    name: str
    fraction: float
    image_spread: float = 0.8

    def class_depth(self, model_config: AViTConfig) -> int:
        """The class token's depth in layers: two more than the mean."""
        return min(model_config.depth, round(self.fraction * model_config.depth) + 2)

    def depths(self, model_config: AViTConfig) -> np.ndarray:
        """The depth in layers of every patch: [512, patches]."""
        if self.fraction == 1:
            return np.full((512, model_config.num_tokens - 1), model_config.depth)
        mean = self.fraction * model_config.depth
        return drawn_depths(model_config, 512, mean, TOKEN_SPREAD, self.image_spread, self.class_depth(model_config))


NOTHING_HALTS = Profile("nothing halts", 1.0, 0.0)


def profiles(fraction: float) -> dict[str, list[Profile]]:
    """The profiles by their group's name; fraction: the model's published mean depth, as a fraction of its layers."""
    return {
        "published": [Profile("published", fraction)],
        "spreads": [Profile("spread 0", fraction, 0.0), Profile("spread 2", fraction, 2.0)],
        "sweep": [*(Profile(f"depth {share}", share) for share in (0.25, 0.5, 0.75)), NOTHING_HALTS],
    }
