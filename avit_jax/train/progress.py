"""What a run must remember from one process to the next."""

import dataclasses
from typing import Any

from avit_jax.runtime.json_fields import typed_fields

Metrics = dict[str, Any]  # by name: a number, or a list of numbers by layer


@dataclasses.dataclass
class Progress:
    """How far a run has got; every checkpoint holds one, as JSON with these names."""

    step: int = 0
    seconds: float = 0.0  # of all processes of the run together, until this was saved or training ended
    window: list[Metrics] = dataclasses.field(default_factory=list)  # of the steps since the last log line
    top1: float = 0.0  # on the validation images, at the last evaluation
    rolled_back: int = 0  # the step whose loss was not finite, after which the run went back; 0: none
    evaluation_due: bool = False  # the run was stopped before, or while, it evaluated after this step
    planning: dict[str, Any] | None = None  # of planned execution (train.planner); None: every step is masked

    def to_json(self) -> dict[str, Any]:
        """The progress as a checkpoint holds it; without planning, it is what older versions wrote."""
        return {name: value for name, value in vars(self).items() if name != "planning" or value is not None}

    @classmethod
    def from_json(cls, content: dict[str, Any], step: int) -> "Progress":
        """The progress in a checkpoint of this step; evaluation_due is False if an old one leaves it out.

        Raises ValueError, naming the key, if one is missing, unknown, of another type, or of another step.
        """
        plain = {name: value for name, value in content.items() if name not in ("window", "planning")}
        planning = content.get("planning")
        if not isinstance(planning, dict | None):
            raise ValueError("planning must be a table or null")
        fields = typed_fields(cls, plain, "its progress", ("step", "seconds", "top1", "rolled_back"))
        if fields["step"] != step:
            raise ValueError(f"step is {fields['step']} in its progress: it must be {step}, as the folder's name")
        for name in ("seconds", "rolled_back"):
            if fields[name] < 0:
                raise ValueError(f"{name} is {fields[name]}: it must be at least 0")
        if not _is_window(content.get("window")):
            raise ValueError("window must be a list of tables of numbers, all with the same names")
        return cls(**fields, window=content["window"], planning=planning)


def _is_window(value: Any) -> bool:
    """Whether these are metrics of steps. Their numbers have no bounds: a loss may be huge."""
    return (
        isinstance(value, list)
        and all(isinstance(line, dict) and line.keys() == value[0].keys() for line in value)
        and all(_is_metric(metric) for line in value for metric in line.values())
    )


def _is_metric(value: Any) -> bool:
    return all(type(number) in (int, float) for number in (value if isinstance(value, list) else (value,)))
