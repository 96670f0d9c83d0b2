"""Typed settings: frozen dataclasses that check themselves and carry, field by field, what a user may know of them.

    @dataclasses.dataclass(frozen=True)
    class OptimSettings(Settings):
        section = "optim"
        weight_decay: float = setting(0.05, "Decay of the kernels.", least=0)

    OptimSettings.from_config({"weight_decay": -1.0})    # config.optim.weight_decay is -1.0: it must be at least 0

A config is a nested dictionary: a section is a dictionary of its own, and a dataclass that has other `Settings` as
fields reads each of them from the section that it names. Two of them may share a section.
"""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from avit_jax.runtime.hints import nearest

# Whether a resumed run may change a key: never; freely, because neither its steps nor its log depend on it; or with a
# line that says so, because the log changes and the training does not.
Resume = Literal["never", "free", "log"]

Part = typing.TypeVar("Part", bound="Settings")

_BOUNDS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("least", operator.ge, "at least"),
    ("above", operator.gt, "above"),
    ("most", operator.le, "at most"),
    ("below", operator.lt, "below"),
)


def setting(
    default: Any,
    help: str,
    *,
    resume: Resume = "never",
    least: int | float | None = None,
    above: int | float | None = None,
    most: int | float | None = None,
    below: int | float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A field of a Settings dataclass.

    Args:
        default: The value where a config leaves the key out.
        help: One line for a user, with the unit.
        resume: Whether a run that goes on may change it; see `Resume`.
        least, above, most, below: What a number must be at least, above, at most or below.
        choices: The values of a text; any text where it is empty.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata: dict[str, Any] = {"help": help, "resume": resume, "choices": tuple(choices)}
    metadata |= {name: bound for name, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata=metadata)


def part(kind: type) -> Any:
    """A field that holds other settings, which have their section of the config."""
    return dataclasses.field(default=kind())


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of every settings dataclass. Raises ValueError, naming the key, for values that cannot be."""

    section: ClassVar[str] = ""  # where its keys are in a config; "" for the top

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_bounds(field)

    def _check_bounds(self, field: dataclasses.Field) -> None:
        value = getattr(self, field.name)
        if value is None or isinstance(value, Settings):
            return
        for name, holds, words in _BOUNDS:
            if name in field.metadata:  # nan is refused too: it compares as False
                self.check(field.name, holds(value, field.metadata[name]), f"{words} {field.metadata[name]}")
        if isinstance(value, float):
            self.check(field.name, math.isfinite(value), "a finite number")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{self.key(field.name)} {value!r} is unknown: {_choose(value, choices)}")

    def check(self, name: str, is_good: bool, rule: str) -> None:
        """Raises ValueError, "config.SECTION.NAME is VALUE: it must be RULE", unless is_good."""
        if not is_good:
            raise ValueError(f"{self.key(name)} is {getattr(self, name)!r}: it must be {rule}")

    @classmethod
    def key(cls, name: str) -> str:
        """What a user calls a field: config.optim.weight_decay."""
        return ".".join(["config", *([cls.section] if cls.section else []), name])

    @classmethod
    def from_config(cls: type[Part], config: Mapping[str, Any]) -> Part:
        """The settings in a config, or in a section of one; keys that it leaves out have their defaults.

        Raises ValueError, naming the key and the fix, for a key that is unknown, for a value that is not of its
        field's type, and for one that cannot be.
        """
        sections = _sections(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if not _is_section(field)}
        for name in config:
            if name not in fields and name not in sections:
                where = cls.key(name).rpartition(".")[0]
                raise ValueError(f"{where} has no key {name!r}: {nearest(name, [*fields, *sections])}")
        values = {name: _converted(cls, fields[name], config[name]) for name in config if name in fields}
        for section, parts in sections.items():
            values |= _parsed_section(section, parts, config.get(section, {}))
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """The inverse of from_config: a nested dictionary with every key."""
        found: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Settings):
                found.setdefault(value.section, {}).update(value.to_config())
            else:
                found[field.name] = value
        return found


def keys(cls: type[Settings]) -> dict[str, dataclasses.Field]:
    """Every key of a config with its field; the keys of a section as SECTION.NAME, section by section."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        if not _is_section(field):
            found[field.name] = field
    for section, parts in _sections(cls).items():
        for part in parts.values():
            found |= {f"{section}.{name}": field for name, field in keys(part).items()}
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with its keys joined by dots."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _is_section(field: dataclasses.Field) -> bool:
    return isinstance(field.type, type) and issubclass(field.type, Settings)


def _sections(cls: type[Settings]) -> dict[str, dict[str, type[Settings]]]:
    """Each section of a config with the fields that are read from it, and their types."""
    found: dict[str, dict[str, type[Settings]]] = {}
    for field in dataclasses.fields(cls):
        if _is_section(field):
            kind = typing.cast(type[Settings], field.type)
            found.setdefault(kind.section, {})[field.name] = kind
    return found


def _parsed_section(section: str, parts: Mapping[str, type[Settings]], given: Any) -> dict[str, Settings]:
    """Each part of a section from the keys that are its own."""
    if not isinstance(given, Mapping):
        raise ValueError(f"config.{section} is {given!r}: it must hold keys and values")
    owners = {field.name: part for part, kind in parts.items() for field in dataclasses.fields(kind)}
    for name in given:
        if name not in owners:
            raise ValueError(f"config.{section} has no key {name!r}: {nearest(name, owners)}")
    return {
        part: kind.from_config({name: value for name, value in given.items() if owners[name] == part})
        for part, kind in parts.items()
    }


def _choose(value: Any, choices: Sequence[str]) -> str:
    """What to do about an unknown value: a few choices are told, of many the nearest."""
    if len(choices) > 3:
        return nearest(str(value), choices)
    *others, last = map(repr, choices)
    return f"choose {', '.join(others)} or {last}" if others else f"choose {last}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or isinstance(value, (float, np.floating))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


# What a field of a type may hold, what a sentence calls it, and the value as the dataclass keeps it.
_KINDS: dict[Any, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    str: (_is_text, "text", str),
    bool: (lambda v: isinstance(v, (bool, np.bool_)), "True or False", bool),
    int: (_is_whole, "a whole number", int),
    float: (_is_number, "a finite number", float),  # whether it is finite is asked after its bounds
    tuple[str, ...]: (
        lambda v: isinstance(v, list | tuple) and all(map(_is_text, v)),
        "a list of names, as ('cat', 'dog')",
        tuple,
    ),
    tuple[float, ...]: (
        lambda v: isinstance(v, list | tuple) and all(map(_is_finite, v)),
        "a list of finite numbers, as (0.5,), or () for the default",
        lambda v: tuple(map(float, v)),
    ),
    Any: (lambda _: True, "anything", lambda v: v),
}


def _converted(cls: type[Settings], field: dataclasses.Field, value: Any) -> Any:
    """The value in its field's type. Raises ValueError where it is of another."""
    options = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
    if value is None and types.NoneType in options:
        return None
    is_good, kind, converted = _KINDS[next(option for option in options if option is not types.NoneType)]
    if not is_good(value):
        none = " or None" if types.NoneType in options else ""
        raise ValueError(f"{cls.key(field.name)} is {value!r}: it must be {kind}{none}")
    return converted(value)
