"""config.model: one key for every field of AViTConfig, so that each can be set from the command line."""

import dataclasses
import typing
from typing import Any

from avit_jax.model.config import AViTConfig
from avit_jax.rules import parse_rule
from avit_jax.runtime.settings import Settings, setting

# These come from the data: config.data has mean, std, crop_fraction, interpolation and class_names.
_FROM_DATA = ("preprocessing", "class_names")
_KINDS = {"image_size": Any, "rule": str}  # a rule is text here, such as "tome(r=8)"
# For images in memory the data decide these.
_OF_IMAGES = ("image_size", "in_channels", "num_classes")


@dataclasses.dataclass(frozen=True)
class _ModelSettings(Settings):
    """config.model: what a config says about the architecture. None means that the config does not set the field.

    The value then comes from the preset, from the data (image size, channels and classes of images in memory), or it is
    AViTConfig's default. Raises ValueError for an image size that is neither a number nor (height, width).
    """

    section = "model"

    preset: str | None = setting(
        None, "Preset to start from, such as deit_tiny_patch16_224; None: AViTConfig's defaults."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.given.get("image_size", 1)
        if not _is_size(size):
            raise ValueError(f"config.model.image_size is {size!r}: it must be a number, or (height, width)")

    @property
    def given(self) -> dict[str, Any]:
        """The fields of AViTConfig that have a value here. Raises ValueError for a rule that cannot be read."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "preset"]
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        size = found.get("image_size")
        if isinstance(size, list | tuple) and len(size) == 2:
            # One number for a square, as it comes from the data.
            found["image_size"] = size[0] if size[0] == size[1] else tuple(size)
        if "rule" in found:
            try:
                found["rule"] = parse_rule(found["rule"])
            except ValueError as error:
                raise ValueError(f"config.model.rule: {error}") from error
        return found


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, list | tuple) else (size, size)
    return len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def _help(field: dataclasses.Field) -> str:
    data = "the data's for images in memory, else " if field.name in _OF_IMAGES else ""
    return f"{field.metadata['help']} None: {data}the preset's, or {field.default}."


def _with_every_field() -> type[_ModelSettings]:
    """_ModelSettings with a key for every field of AViTConfig."""
    hints = typing.get_type_hints(AViTConfig)
    fields = [
        (field.name, _KINDS.get(field.name, hints[field.name]) | None, setting(None, _help(field)))
        for field in dataclasses.fields(AViTConfig)
        if field.name not in _FROM_DATA
    ]
    return dataclasses.make_dataclass("ModelSettings", fields, bases=(_ModelSettings,), frozen=True)


if typing.TYPE_CHECKING:
    ModelSettings = _ModelSettings
else:
    ModelSettings = _with_every_field()
