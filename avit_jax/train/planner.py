"""Plans of a training run: when shapes are planned, from the tokens of recent batches, and when they are planned anew."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from avit_jax.execution.stages import PlannedPlan, plan_fullest
from avit_jax.model.config import AViTConfig

WINDOW = 50  # steps whose batches a plan is made from
MOST_PLANS = 8  # of a run; each is a program to compile
_MARGIN = 0.05  # places beyond the fullest batch of the window
_WORTH = 0.92  # a new plan must take at most this part of the present one's work
_LEAST_STEPS = 100  # that must be left for a compilation to pay


@dataclasses.dataclass
class Planner:
    """The plan in force, and what recent batches needed. Only counts decide, so that a resumed run plans the same."""

    config: AViTConfig
    images: int  # of a step on one device
    steps: int  # of the run
    plan: PlannedPlan | None = None
    plans: int = 0  # made so far
    fullest: Int[np.ndarray, "l b"] | None = None  # the largest sorted loads of the window
    seen: int = 0  # steps in the window
    overflows: int = 0  # of the window

    def saw(self, step: int, sorted_loads: Any, overflow: Any) -> bool:
        """Take in a step's counts; whether there is a new plan for the steps after it.

        step: counted from 1. sorted_loads: [l, b], tokens that each layer needs for each image of a device, rising; the
        largest of all devices. overflow: whether the step did not fit its plan.
        """
        loads = np.asarray(sorted_loads, int)
        self.fullest = loads if self.fullest is None else np.maximum(self.fullest, loads)
        self.seen += 1
        self.overflows += bool(overflow)
        if self.seen < WINDOW and self.overflows <= WINDOW // 10:
            return False
        renewed = self._renew(self.steps - step)
        self.fullest, self.seen, self.overflows = None, 0, 0
        return renewed

    def _renew(self, steps_left: int) -> bool:
        if self.plans >= MOST_PLANS or steps_left < _LEAST_STEPS:
            return False
        assert self.fullest is not None
        found = plan_fullest(self.fullest, self.config, self.images, margin=_MARGIN)
        work = found.tokens().sum()
        before = self.plan.tokens().sum() if self.plan is not None else self.images * found.num_tokens * found.depth
        if work > _WORTH * before and self.overflows == 0:
            return False
        self.plan, self.plans = found, self.plans + 1
        return True

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "plan": None if self.plan is None else dataclasses.asdict(self.plan),
            "plans": self.plans,
            "fullest": None if self.fullest is None else self.fullest.tolist(),
            "seen": self.seen,
            "overflows": self.overflows,
        }

    def take(self, content: dict[str, Any]) -> None:
        """Go on from what `to_json` gave. Raises ValueError or KeyError if it is something else."""
        self.plan = None if content["plan"] is None else PlannedPlan.from_json(content["plan"])
        self.plans, self.seen, self.overflows = (int(content[name]) for name in ("plans", "seen", "overflows"))
        self.fullest = None if content["fullest"] is None else np.asarray(content["fullest"], int)
