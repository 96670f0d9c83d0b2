"""The presets: DeiT and A-ViT in three sizes, with and without a distillation token, for two image sizes."""

from typing import Any

from avit_jax.model.config import AViTConfig, changed
from avit_jax.runtime.hints import nearest

# DeiT's sizes (arXiv 2012.12877). The gates are those of the published recipe; base, which it lacks, has small's gate.
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "num_heads": 3},
    "small": {"embed_dim": 384, "num_heads": 6},
    "base": {"embed_dim": 768, "num_heads": 12},
}
_GATES = {"tiny": (10.0, 30.0), "small": (10.0, 75.0), "base": (10.0, 75.0)}

PRESETS: dict[str, AViTConfig] = {
    f"{family}_{size}{'_distilled' if distilled else ''}_patch16_{image_size}": AViTConfig(
        image_size=image_size,
        distilled=distilled,
        gate_scale=_GATES[size][0] if family == "avit" else None,
        gate_center=_GATES[size][1] if family == "avit" else None,
        **_SIZES[size],
    )
    for family in ("avit", "deit")
    for size in _SIZES
    for distilled in (False, True)
    for image_size in (224, 384)
}


def config_from(preset: str | None, **overrides: Any) -> AViTConfig:
    """The configuration of a preset (None: AViTConfig's defaults), with fields replaced.

    overrides: fields of AViTConfig. Raises ValueError for an unknown preset or field, naming the nearest one.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}: {nearest(preset, PRESETS)}")
    return changed(PRESETS[preset] if preset else AViTConfig(), **overrides)
