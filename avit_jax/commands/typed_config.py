"""Conversion between ConfigDict, which users of ml_collections expect, and the typed settings inside."""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from avit_jax.runtime.settings import Settings
from avit_jax.train.settings import TrainSettings

_PLAIN = (bool, int, float, str)


def config_dict(settings: Settings) -> ConfigDict:
    """The settings as a ConfigDict with a key for each; a key that is None takes values of its field's type."""
    config = ConfigDict()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Settings):
            section = config.get(value.section) or ConfigDict()  # two parts may share it
            for name, part in config_dict(value).items(preserve_field_references=True):
                section[name] = part
            config[value.section] = section
        else:
            config[field.name] = placeholder(_flag_type(field.type)) if value is None else value
    return config


def parse(config: ConfigDict) -> TrainSettings:
    """The settings of a whole run. Raises ValueError, naming the key and the fix, for values that cannot work."""
    return TrainSettings.from_config(config.to_dict())


def _flag_type(hint: Any) -> type:
    """The type that the command line reads; object (any Python literal) if a field takes several types."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [option for option in options if option is not type(None)]
    return kinds[0] if len(kinds) == 1 and kinds[0] in _PLAIN else object
