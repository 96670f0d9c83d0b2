"""The fields of a dataclass from untrusted JSON: a value that does not have its annotated type is refused."""

import dataclasses
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from avit_jax.runtime.files import shown
from avit_jax.runtime.numbers import MOST_REAL, MOST_WHOLE

_MAX_TEXT = 1000  # characters
_NAMES = {
    bool: "true or false",
    int: "a whole number below 2^31",
    float: "a number up to 10^9",
    str: f"text of at most {_MAX_TEXT} characters",
    type(None): "null",
}


def typed_fields(cls: type, content: Any, what: str, required: Collection[str]) -> dict[str, Any]:
    """The fields of `cls` in a JSON object, lists as tuples.

    what: what messages call the object. required: fields that must be there. Raises ValueError for anything but an
    object, for unknown fields, for missing required ones, and for a value that does not have the field's annotated type
    or is out of all bounds.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{what} is {shown(content, 50)}, not a JSON object")
    # A field that is itself a dataclass has its own part of the JSON.
    fields = {field.name: field.type for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.type)}
    if unknown := [name for name in content if name not in fields]:
        raise ValueError(f"{what} has no field '{shown(unknown[0], 50)}': known are {', '.join(fields)}")
    if missing := [name for name in required if name not in content]:
        raise ValueError(f"{what} lacks the field {missing[0]}")
    typed = {}
    for name, value in content.items():
        typed[name] = tuple(value) if isinstance(value, list) else value
        if not _fits(typed[name], fields[name]):
            raise ValueError(f"{name} is {shown(value, 50)}: it must be {_in_words(fields[name])}")
        options = (fields[name], *typing.get_args(fields[name]))
        if float in options and int not in options:  # JSON may say 4 for 4.0
            typed[name] = _as_float(typed[name])
    return typed


def _fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in arguments)
    if origin in (tuple, Sequence):
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= MOST_REAL  # NaN is not
    if annotation is int:
        return type(value) is int and abs(value) <= MOST_WHOLE
    if annotation is str:
        return type(value) is str and len(value) <= _MAX_TEXT
    return type(value) is annotation


def _as_float(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(float, value))
    return float(value) if type(value) is int else value


def _in_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_in_words(option) for option in arguments)
    if origin in (tuple, Sequence):
        return f"a list, each item {_in_words(arguments[0])}"
    return _NAMES[annotation]
