"""Plans of a training run: when shapes are planned, and planned anew, from the tokens that recent batches needed."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from avit_jax.execution.plan import whole_number
from avit_jax.execution.stages import PlannedPlan, plan_fullest
from avit_jax.halting.rule import Halting
from avit_jax.model.config import AViTConfig, rule_of_training

WINDOW = 50  # steps; at the end of each a plan may change
MOST_PLANS = 8  # of a run; each is a program to compile
_MARGIN = 0.05  # places beyond the fullest batch of the window
_SMALL = 64  # tokens; up to here 2 groups and 4 stages are as fast and compile in half the time
_COMPILATION = 100  # masked steps that take as long as a compilation; a new plan must save more of them
_LONG = 1000  # steps from which a run plans by itself


def plans(execution: str, config: AViTConfig, steps: int, mesh: Mesh) -> bool:
    """Whether a run plans its shapes. execution: config.execution. steps: of the run. mesh: its devices.

    Raises ValueError if "planned" does not fit the model's rule.
    """
    rule = rule_of_training(config)
    fits = (
        isinstance(rule, Halting)
        and config.reduction is None
        and rule.masks_in_training
        and not rule.self_visible
        and not rule.teacher_tokens
    )
    if execution == "planned" and not fits:
        name = config.rule_in_force.name if config.rule_in_force is not None else "none"
        why = "gates let tokens come back" if config.gates else "training with it masks no token that could be removed"
        raise ValueError(f"config.execution is planned and the rule is {name}: {why}; give config.execution=masked")
    # Planned training has been measured on CPUs of one process only.
    measured = mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    return fits and (execution == "planned" or (execution == "auto" and steps >= _LONG and measured))


@dataclasses.dataclass
class Planner:
    """The plan in force, and what recent batches needed.

    At the end of a window there is a new plan if the rest of the run saves more with it than its compilation takes.
    A plan that costs more than masked steps is given up. Only the counts of steps decide, never time, so a resumed run
    plans as an uninterrupted one does.
    """

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
        """At the end of a window: whether the steps after this one have another plan, or none any more."""
        fullest, overflows = self.fullest, self.overflows
        self.fullest, self.overflows = None, 0
        if fullest is None:
            return False
        # The price of a step in masked steps, at most. One that does not fit is computed again with every token.
        present = 1.0 if self.plan is None else self.plan.share() + overflows / WINDOW
        if self.plans < MOST_PLANS:
            fewer = {"groups": 2, "most_stages": 4} if self.config.num_tokens <= _SMALL else {}
            found = plan_fullest(fullest, self.config, self.images, margin=_MARGIN, **fewer)
            if (min(present, 1.0) - found.share()) * (self.steps - step) > _COMPILATION:
                self.plan, self.plans = found, self.plans + 1
                return True
        if present > 1:
            self.plan = None
        return present > 1

    def __str__(self) -> str:
        if self.plan is None:
            return "every token is computed"
        return f"shapes are planned for {self.plan.share():.0%} of all tokens; {self.plan}"

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "plan": None if self.plan is None else dataclasses.asdict(self.plan),
            "plans": self.plans,
            "images": self.images,
            "fullest": None if self.fullest is None else self.fullest.tolist(),
            "overflows": self.overflows,
        }

    def take(self, content: dict[str, Any]) -> None:
        """Go on from what `to_json` gave; with other devices, begin anew. Raises ValueError for something else."""
        self.plan, self.plans, self.fullest, self.overflows = None, 0, None, 0
        try:
            if whole_number("images", content["images"]) != self.images:
                return
            if content["plan"] is not None:
                self.plan = PlannedPlan.from_json(content["plan"])
                self.plan.check(self.config, self.images)
            self.plans = whole_number("plans", content["plans"], 0)
            self.overflows = whole_number("overflows", content["overflows"], 0)
            if content["fullest"] is not None:
                self.fullest = np.asarray(content["fullest"])
                if self.fullest.shape != (self.config.depth, self.images) or self.fullest.dtype.kind != "i":
                    raise ValueError(f"fullest must be {self.config.depth} lists of {self.images} whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"planning: {error}") from error
