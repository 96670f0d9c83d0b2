"""Every rule by its name: how it is written, as JSON and as text, and the keys of config.loss that rules add."""

import ast
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from avit_jax.gated.gates import Gates
from avit_jax.halting.act import ACT
from avit_jax.halting.ats import ATS
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.halting.mass import AttentionMass
from avit_jax.halting.pondernet import PonderNet
from avit_jax.halting.rule import Halting
from avit_jax.halting.similarity import Similarity
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.groups import Reduction
from avit_jax.reduction.mctf import MCTF
from avit_jax.reduction.positions import PositionDepths
from avit_jax.reduction.random_drop import RandomDrop, RandomPatches
from avit_jax.reduction.tome import ToMe
from avit_jax.reduction.topk import EViT, TopK
from avit_jax.runtime.files import shown
from avit_jax.runtime.json_fields import typed_fields
from avit_jax.runtime.settings import Settings

_HALTING = (ACT, ATS, AttentionMass, AViTGate, ConfidenceExit, PonderNet, Similarity)
_REDUCTION = (DynamicViT, EViT, MCTF, PositionDepths, RandomDrop, RandomPatches, ToMe, TopK)
RULES: dict[str, Any] = {rule.name: rule for rule in (*_HALTING, *_REDUCTION, Gates)}
_MOST_TEXT = 10_000  # characters of a rule on the command line: a thousand patches have a depth each


def rule_to_json(rule: Halting | Reduction | Gates) -> dict[str, Any]:
    """The rule's name and its settings as plain JSON."""
    settings = dataclasses.asdict(rule)  # type: ignore[arg-type]  # every rule is a dataclass
    return {"name": rule.name} | settings


def rule_from_json(content: Any) -> Halting | Reduction | Gates:
    """The inverse of rule_to_json. The content may come from a stranger.

    Raises ValueError for an unknown rule, an unknown setting and a value of the wrong type or range, naming it.
    """
    if not isinstance(content, dict):
        raise ValueError(f"rule is {shown(content, 50)}: it must be a JSON object with a name, or null")
    name = content.get("name")
    if not isinstance(name, str) or name not in RULES:
        what = f"'{shown(name, 50)}'" if isinstance(name, str) else shown(name, 50)
        raise ValueError(f"there is no rule {what}: known are {', '.join(sorted(RULES))}")
    kind = RULES[name]
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    settings = {key: value for key, value in content.items() if key != "name"}
    return kind(**typed_fields(kind, settings, f"the rule {name}", needed))


def parse_rule(text: str) -> Halting | Reduction | Gates:
    """A rule from text such as "confidence(threshold=0.9)"; each value is a number, a string, or a list of them.

    Raises ValueError, which shows the form of a rule, for any other text.
    """
    form = 'write NAME(setting=value, ...), such as "tome(r=8)", or leave it out'
    if len(text) > _MOST_TEXT:
        raise ValueError(f"a rule of {len(text)} characters is too long: {form}")
    try:
        content = _as_content(text)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"'{shown(text, 100)}' is not a rule: {form}") from None
    return rule_from_json(content)


def _as_content(text: str) -> dict[str, Any]:
    """The text as rule_from_json takes it; only literals are evaluated. Raises SyntaxError or ValueError."""
    call = ast.parse(text.strip(), mode="eval").body
    if isinstance(call, ast.Name):
        return {"name": call.id}
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise SyntaxError
    content: dict[str, Any] = {"name": call.func.id}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in content:
            raise SyntaxError
        content[keyword.arg] = ast.literal_eval(keyword.value)
    return content


@dataclasses.dataclass(frozen=True)
class _RuleLosses(Settings):
    """The keys of config.loss that rules add: every field of every rule's `loss_settings`.

    Raises ValueError for a value that a rule refuses.
    """

    section = "loss"

    def of(self, rule: Halting | Reduction | Gates | None) -> Any:
        """The rule's own part, of its type `loss_settings`; None if it has none."""
        kind = None if rule is None else rule.loss_settings
        return None if kind is None else _part(kind, self)


def _part(kind: type, losses: Settings) -> Any:
    return kind(**{field.name: getattr(losses, field.name) for field in dataclasses.fields(kind)})


def losses_of(rules: Iterable[Any]) -> type[_RuleLosses]:
    """The settings dataclass with the keys of these rules; two rules may share a type, but not a key of two types."""
    kinds = list(dict.fromkeys(kind for rule in rules if (kind := rule.loss_settings) is not None))
    fields = [
        (field.name, field.type, dataclasses.field(default=field.default, metadata=field.metadata))
        for kind in kinds
        for field in dataclasses.fields(kind)
    ]

    def check(self: Settings) -> None:
        for kind in kinds:
            _part(kind, self)

    return dataclasses.make_dataclass(
        "RuleLosses", fields, bases=(_RuleLosses,), namespace={"__post_init__": check}, frozen=True
    )


if typing.TYPE_CHECKING:
    RuleLosses = _RuleLosses
else:
    RuleLosses = losses_of(RULES.values())
