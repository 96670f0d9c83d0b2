"""config.model: one key for every field of AViTConfig, so that each can be set from the command line."""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from avit_jax.model.config import AViTConfig
from avit_jax.rules import parse_rule

# These come with the data: config.data has mean, std, crop_fraction, interpolation and class_names.
_FROM_DATA = ("preprocessing", "class_names")
_PLAIN = (bool, int, float, str)


def model_settings(**given: Any) -> ConfigDict:
    """The section config.model: preset and every field of AViTConfig, with the values given here.

    None means "not said here": the value is then the preset's, the data's (image size, channels, classes of images in
    memory) or AViTConfig's default.
    """
    hints = typing.get_type_hints(AViTConfig)
    section = ConfigDict({"preset": placeholder(str)})
    for field in dataclasses.fields(AViTConfig):
        if field.name not in _FROM_DATA:
            section[field.name] = placeholder(str if field.name == "rule" else _flag_type(hints[field.name]))
    section.update(given)
    return section


def given_fields(section: ConfigDict) -> tuple[str | None, dict[str, Any]]:
    """The preset of config.model, and the fields that it gives a value; a rule is text such as "tome(r=8)".

    Raises ValueError for an image size that is neither a number nor (height, width), and for what is no rule.
    """
    fields = {name: value for name, value in dict(section).items() if value is not None}
    size = fields.get("image_size", 1)
    if not _is_size(size):
        raise ValueError(f"config.model.image_size is {size!r}: it must be a number, or (height, width)")
    if not isinstance(size, int):  # one side where both are equal, as the data say it
        fields["image_size"] = size[0] if size[0] == size[1] else tuple(size)
    if "rule" in fields:
        try:
            fields["rule"] = parse_rule(fields["rule"])
        except ValueError as error:
            raise ValueError(f"config.model.rule: {error}") from error
    return fields.pop("preset", None), fields


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, list | tuple) else (size, size)
    return len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def _flag_type(hint: Any) -> type:
    """The type that the command line reads; object, any Python literal, where a field takes several."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in _PLAIN else object
