"""Sweeps: one checkpoint at several settings of its rule, without training; the Pareto-optimal settings."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.rules import RULES
from avit_jax.runtime.hints import nearest

_RULES: Any = RULES.values()
FIELDS: tuple[str, ...] = tuple(sorted({field for rule in _RULES for field in rule.sweeps}))
SYNTAX = f"FIELD:VALUE,VALUE,... or FIELD:FIRST:LAST:COUNT, where FIELD is {', '.join(FIELDS[:-1])} or {FIELDS[-1]}"
MOST = 40  # settings; a program is compiled for each


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A setting of a rule, and the values to try."""

    field: str
    values: tuple[float, ...]


def parse_sweep(text: str) -> Sweep:
    """Sweep("gate_center", (8.0, 10.0)) from "gate_center:8,10"; "gate_center:8:12:5" is five values, evenly spaced.

    Raises ValueError for anything else, naming the syntax.
    """
    field, _, values = text.partition(":")
    if field not in FIELDS:
        raise ValueError(f"--sweep={text}: no rule has a setting {field!r} to sweep: {nearest(field, FIELDS)}")
    parts = values.split(":") if ":" in values else values.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"--sweep={text}: {values!r} is not a list of numbers: write {SYNTAX}") from None
    if ":" in values:
        if len(parts) != 3 or not numbers[2].is_integer() or numbers[2] < 2:
            raise ValueError(f"--sweep={text}: a range has a first value, a last and a count from 2: write {SYNTAX}")
        numbers = np.linspace(numbers[0], numbers[1], int(min(numbers[2], MOST + 1))).tolist()
    if not np.isfinite(numbers).all():
        raise ValueError(f"--sweep={text}: every value must be finite")
    settings = tuple(sorted(set(numbers)))
    if len(settings) > MOST:
        raise ValueError(f"--sweep={text} has more than {MOST} settings, each a program to compile: give fewer")
    return Sweep(field, settings)


def with_setting(model: AViT, field: str, value: float) -> AViT:
    """The same weights with one setting of the model's rule changed. Raises what rule_with raises."""
    return model.with_config(rule=rule_with(model.config, field, value))


def rule_with(config: AViTConfig, field: str, value: float) -> Any:
    """The rule in force with one setting changed.

    Raises ValueError if there is no rule, if it has no such setting to sweep, or if it does not take the value.
    """
    rule: Any = config.rule_in_force
    if rule is None:
        raise ValueError(f"a sweep changes {field} and the model has no rule: no token ever halts or merges")
    if field not in rule.sweeps:
        raise ValueError(f"the rule {rule.name} has no setting {field} to sweep: it has {', '.join(rule.sweeps)}")
    # A rule that counts takes 8, not 8.0; its present setting may be a tuple, a share or None.
    (kind,) = (one.type for one in dataclasses.fields(rule) if one.name == field)
    whole = int in (kind, *typing.get_args(kind)) and value.is_integer()
    return dataclasses.replace(rule, **{field: int(value) if whole else value})


def unbeaten(gain: Sequence[float], cost: Sequence[float]) -> Bool[np.ndarray, " n"]:
    """Whether each setting is Pareto-optimal: no other one is at least as good in gain and cost and better in one."""
    g, c = np.asarray(gain, np.float64), np.asarray(cost, np.float64)
    no_worse = (g[:, None] >= g) & (c[:, None] <= c)
    better = (g[:, None] > g) | (c[:, None] < c)
    return ~np.any(no_worse & better, axis=0)
