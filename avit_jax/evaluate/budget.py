"""Budgets: the setting of a rule that leaves a given share of the static model's work."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from avit_jax.execution.compiled import on_one_device
from avit_jax.execution.program import compile
from avit_jax.execution.work import image_gmacs, output_gmacs, whole_gmacs
from avit_jax.model.check_images import check_images
from avit_jax.model.vit import AViT
from avit_jax.rules import RULES
from avit_jax.runtime.hints import nearest
from avit_jax.runtime.mesh import data_mesh

TOLERANCE = 0.01  # of the work that is asked for
_BATCH = 256  # images
_MOST_PROGRAMS = 12  # compiled to meet one budget, besides those of earlier budgets
_MOST_COUNTS = 80  # settings of a reduction rule, whose work is known without running an image


def calibrate(model: AViT, images: Float[Array | np.ndarray, "b h w c"], rule: Any, work: float = 0.6) -> Any:
    """The rule with the setting that leaves `work` of the static model's multiply-adds, within 1 % of `work`.

        rule = avit_jax.calibrate(model, images, avit_jax.ToMe, work=0.6)
        fast = avit_jax.compile(model.with_config(rule=rule), batch_size=64)

    images: normalised as the model takes them. A halting rule's work is its mean over them, and a few hundred are
    enough; a reduction rule's work is the same for every image. rule: a class, its name, or an instance whose other
    settings are kept. A rule that needs training is given as the instance that the model has: model.config.halting.
    work: mean GMACs by the rule, where the last layer computes only what the logits read, divided by the GMACs of the
    static model with all its layers whole. It lies between 0 and 1, and a static model has a little less than 1.

    Finds the setting by interpolation between levels of the rule (Rule.levels). For a halting rule each try is one
    compiled program, at most 14 of them. Raises ValueError if no setting is near enough, naming the nearest works, and
    for a rule whose work cannot be chosen without training.
    """
    return WorkByLevel(model, images, rule).setting(work)


class WorkByLevel:
    """The work of one rule by its level, where each level is measured once: for several budgets of the same rule.

    Arguments as for `calibrate`. Raises ValueError as it does.
    """

    def __init__(self, model: AViT, images: Float[Array | np.ndarray, "b h w c"], rule: Any) -> None:
        check_images(images, model.config)
        if not len(images):
            raise ValueError("there is no image to calibrate with: give a few hundred")
        self.rule = instance_of(rule)
        self._model, self._images = model, np.asarray(images)
        self._halts = model.with_config(rule=self.rule).config.reduction is None
        # A trained rule's levels start from the model's own setting.
        self._at: Callable[[float], Any] = self.rule.levels(model.with_config(rule=self.rule), self._images)
        self._works: dict[float, float] = {}
        self._by_rule: dict[Any, float] = {}

    def setting(self, work: float) -> Any:
        """The rule at the level whose work is nearest to `work`. Raises ValueError if it is not within 1 %."""
        rule, found = self.nearest(work)
        if abs(found - work) > TOLERANCE * work:
            raise ValueError(self._near(work))
        return rule

    def nearest(self, work: float) -> tuple[Any, float]:
        """The rule at the level whose work is nearest to `work`, and that work."""
        if not 0 < work <= 1:
            raise ValueError(f"work is {work!r}: give a number above 0 and at most 1, such as 0.6")
        level = self._search(float(work))
        return self._at(level), self._works[level]

    def work(self, level: float) -> float:
        """The share of the static model's work at a level."""
        if level not in self._works:
            rule = self._at(level)
            if rule not in self._by_rule:
                self._by_rule[rule] = self._measured(rule)
            self._works[level] = self._by_rule[rule]
        return self._works[level]

    def _search(self, wanted: float) -> float:
        """The level whose work is nearest to `wanted` among all that were measured."""
        ends = self.work(0.0), self.work(1.0)
        if not min(ends) < wanted < max(ends):
            return self._best(wanted)
        programs = _MOST_PROGRAMS if self._halts else _MOST_COUNTS
        moved: list[bool] = []  # whether each try moved the lower end
        for _ in range(programs):
            low, high = self._around(wanted)
            if self._error(self._best(wanted), wanted) <= TOLERANCE / 3 or high - low < 1e-9:
                break
            # If interpolation has moved the same end twice, halving is faster.
            halve = len(moved) >= 2 and moved[-1] == moved[-2]
            share = (wanted - self._works[low]) / (self._works[high] - self._works[low])
            level = low + (high - low) * (0.5 if halve else min(max(share, 0.05), 0.95))
            moved = [] if halve else [*moved, self.work(level) <= wanted]
            self.work(level)
        return self._best(wanted)

    def _around(self, wanted: float) -> tuple[float, float]:
        """Two neighbouring levels with `wanted` between their works, which may not rise strictly."""
        levels = sorted(self._works)
        return next(
            (low, high) for low, high in itertools.pairwise(levels) if self._works[low] <= wanted <= self._works[high]
        )

    def _best(self, wanted: float) -> float:
        return min(self._works, key=lambda level: self._error(level, wanted))

    def _error(self, level: float, wanted: float) -> float:
        return abs(self._works[level] - wanted) / wanted

    def _near(self, wanted: float) -> str:
        works = sorted(set(self._works.values()))
        below = [work for work in works if work < wanted][-1:]
        above = [work for work in works if work > wanted][:1]
        near = " and ".join(f"{work:.4f}" for work in below + above)
        return (
            f"the rule {self.rule.name} has no setting within 1 % of work {wanted:g}: the nearest are {near}; "
            "ask for one of them"
        )

    def _measured(self, rule: Any) -> float:
        model = self._model.with_config(rule=rule)
        config, images = model.config, self._images
        whole = whole_gmacs(config)
        if config.reduction is not None:  # the same for every image, whatever the depths
            return (
                float(image_gmacs(config, jnp.zeros((1, config.num_tokens), jnp.int32), short_last_layer=True)[0])
                / whole
            )
        size = min(_BATCH, len(images))
        program = compile(model, size, execution="masked", mesh=data_mesh(size))
        total = 0.0
        for start in range(0, len(images), size):
            output = on_one_device(program(images[start : start + size]))
            total += float(output_gmacs(config, output, short_last_layer=True).sum())
        return total / len(images) / whole


def instance_of(rule: Any) -> Any:
    """An instance of a rule given as a class, as a name or as an instance.

    Settings have their defaults; one that has none gets the value with which nothing is saved (Rule.neutral).

    Raises ValueError for a name that is unknown, and for a class that needs training.
    """
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"there is no rule {rule!r}: {nearest(rule, RULES)}")
        rule = RULES[rule]
    kind: Any = rule if isinstance(rule, type) else type(rule)
    if kind not in RULES.values():
        what = f"the class {kind.__name__}" if kind is rule else f"a {kind.__name__}"
        raise ValueError(f"rule is {what}: give a rule such as avit_jax.ToMe, or its name")
    if kind is not rule:
        return rule
    if kind.neutral is None:
        raise ValueError(
            f"the rule {kind.name} needs training: give the instance of a trained model, model.config.rule_in_force"
        )
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    return kind(**{name: kind.neutral[name] for name in needed})
