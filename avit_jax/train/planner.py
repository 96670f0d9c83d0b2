"""Plans of a training run: when shapes are planned, and planned anew, from the tokens that recent batches needed."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from avit_jax.execution.stages import PlannedPlan, plan_fullest
from avit_jax.model.config import AViTConfig, rule_of_training

WINDOW = 50  # steps; at the end of each a plan may change
MOST_PLANS = 8  # of a run; each is a program to compile
_MARGIN = 0.05  # places beyond the fullest batch of the window
_WORTH = 0.92  # a new plan must take at most this part of the present one's work
_LEAST_STEPS = 100  # that must be left for a compilation to pay
_LONG = 1000  # steps from which a run plans by itself


def plans(execution: str, config: AViTConfig, steps: int) -> bool:
    """Whether a run plans its shapes. execution: config.execution. steps: of the run.

    Raises ValueError if "planned" does not fit the model's rule.
    """
    rule = rule_of_training(config)
    fits = rule is not None and rule.masks_in_training and not rule.teacher_tokens and config.reduction is None
    if execution == "planned" and not fits:
        name = config.rule_in_force.name if config.rule_in_force is not None else "none"
        raise ValueError(
            f"config.execution is planned and the rule is {name}: training with it masks no token that could be "
            "removed; give config.execution=masked"
        )
    return fits and (execution == "planned" or (execution == "auto" and steps >= _LONG))


@dataclasses.dataclass
class Planner:
    """The plan in force, and what recent batches needed. Only counts decide, so a resumed run plans the same."""

    config: AViTConfig
    images: int  # in a part of a step on one device
    steps: int  # of the run
    plan: PlannedPlan | None = None
    plans: int = 0  # made so far
    fullest: Int[np.ndarray, "l b"] | None = None  # the largest sorted loads since the last window
    overflows: int = 0  # steps since then that did not fit

    def saw(self, counts: dict[str, Any]) -> None:
        """Take in the counts of a step (train.step)."""
        loads = np.asarray(counts["loads"], int)
        self.fullest = loads if self.fullest is None else np.maximum(self.fullest, loads)
        self.overflows += int(counts["overflow"])

    def renewed(self, step: int) -> bool:
        """Whether there is a new plan for the steps after this one, which ends a window."""
        fullest, overflows = self.fullest, self.overflows
        self.fullest, self.overflows = None, 0
        if fullest is None or self.plans >= MOST_PLANS or self.steps - step < _LEAST_STEPS:
            return False
        found = plan_fullest(fullest, self.config, self.images, margin=_MARGIN)
        whole = self.images * self.config.num_tokens * self.config.depth
        before = whole if self.plan is None else self.plan.tokens().sum()
        if found.tokens().sum() > _WORTH * before and overflows == 0:
            return False
        self.plan, self.plans = found, self.plans + 1
        return True

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "plan": None if self.plan is None else dataclasses.asdict(self.plan),
            "plans": self.plans,
            "fullest": None if self.fullest is None else self.fullest.tolist(),
            "overflows": self.overflows,
        }

    def take(self, content: dict[str, Any]) -> None:
        """Go on from what `to_json` gave. Raises ValueError if it is something else."""
        try:
            self.plan = None if content["plan"] is None else PlannedPlan.from_json(content["plan"])
            self.plans, self.overflows = int(content["plans"]), int(content["overflows"])
            self.fullest = None if content["fullest"] is None else np.asarray(content["fullest"], int)
        except (KeyError, TypeError) as error:
            raise ValueError(f"its planning is damaged: {error}") from error
