"""The comparison without training: every rule that needs none, at several budgets, on one static checkpoint."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from avit_jax.data.sources import Images
from avit_jax.evaluate.bench import BATCHES, ROUNDS, Bench
from avit_jax.evaluate.budget import WorkByLevel
from avit_jax.evaluate.rows import GROUPS, STATIC, STATIC_SHORT, Row, row_file, save_row, saved_row
from avit_jax.model.config import NO_RULE
from avit_jax.model.vit import AViT
from avit_jax.rules import RULES, rule_from_json, rule_to_json
from avit_jax.runtime.bars import Steps
from avit_jax.runtime.files import read_json, write_json
from avit_jax.runtime.hints import nearest

STARTED = "avit"  # no training, but a gate that start_gate has set up
TRAINING_FREE: tuple[str, ...] = tuple(n for n, rule in RULES.items() if rule.neutral is not None or n == STARTED)
BUDGETS = (0.9, 0.82, 0.76, 0.71, 0.65, 0.6, 0.54, 0.49, 0.42, 0.35)
_NEAR = 0.05  # a setting further than this from its budget is left out, as a share of the budget
_GUESSES = {"settings": 30.0, "row": 30.0}  # seconds of each kind of step, until one is done


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and how it is measured.

    rules: names, or instances whose settings are kept apart from the one that sets the budget; one of each kind.
    budgets: shares of the static model's work. batches: candidates for each rule's best batch. rounds: of timing.
    Raises ValueError for an unknown rule, for the same one twice and for a number out of range.
    """

    rules: tuple[Any, ...] = TRAINING_FREE
    budgets: tuple[float, ...] = BUDGETS
    batches: tuple[int, ...] = BATCHES
    rounds: int = ROUNDS

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rules, which are the methods of the rows."""
        return tuple(rule if isinstance(rule, str) else rule.name for rule in self.rules)

    def __post_init__(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise ValueError(f"the rule {name!r} is there twice: compare one of them in another folder")
            if name not in TRAINING_FREE:
                if name in RULES:
                    raise ValueError(f"the rule {name!r} needs training: give some of {', '.join(TRAINING_FREE)}")
                raise ValueError(f"the rule {name!r} does not exist: {nearest(name, TRAINING_FREE)}")
        if not self.budgets or not all(0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"budgets are {self.budgets}: give shares of the static model's work between 0 and 1")
        if not self.batches or min(self.batches) < 1 or self.rounds < 1:
            raise ValueError(f"batches are {self.batches} and rounds {self.rounds}: give numbers of at least 1")


def compare_rules(
    model: AViT,
    test: Images,
    calibration: Float[np.ndarray, "b h w c"],
    folder: Path,
    comparison: Comparison,
    settings: dict[str, Any],
    started: AViT | None = None,
) -> tuple[list[Row], list[str]]:
    """Measure every rule at every budget, and the static model; a row that the folder has already is kept.

    model: static, or with a rule that is left out. test: the images that are evaluated, once for each setting.
    calibration: normalised images on which settings are found. folder: gets rows/ and settings/. settings: what rows
    depend on, such as checkpoint and data; "data" is their name. started: the model as an A-ViT whose gate was set up
    (start_gate), for the rule "avit"; None: that rule is left out. Shows its progress on stderr. Returns the rows and a
    sentence for each rule that is left out and each budget that a rule cannot meet.
    """
    settings = settings | {
        "images": len(test),
        "calibration_images": len(calibration),
        "batches": list(comparison.batches),
        "rounds": comparison.rounds,
    }
    bench = functools.cache(
        lambda: Bench(model, test, data=settings["data"], batches=comparison.batches, rounds=comparison.rounds)
    )
    rows: list[Row] = []
    left_out: list[str] = []
    static = model.with_config(**NO_RULE)
    counts = {"settings": len(comparison.rules), "row": 2 + len(comparison.rules) * len(comparison.budgets)}
    with contextlib.closing(Steps("comparison", counts, _GUESSES)) as steps:
        for method in (STATIC, STATIC_SHORT):
            with steps.step("row", method):
                row = saved_row(row_file(folder, GROUPS[0], method), None, settings)
                rows.append(row or _measured(bench(), folder, static, method, None, bench().batch, settings))
        for name, start in zip(comparison.names, comparison.rules, strict=True):
            base = static
            if name == STARTED:
                if started is None:
                    left_out.append(f"{name} is left out: no gate was started")
                    continue
                base, start = started, started.config.halting
            with steps.step("settings", f"settings of {name}"):
                found, missing = _settings_of(start, base, calibration, comparison.budgets, folder, settings)
            left_out += missing
            batch = None
            for budget, rule in found.items():
                with steps.step("row", f"{name} at {budget:g}"):
                    row = saved_row(row_file(folder, GROUPS[0], name, budget), rule, settings)
                    if row is None:
                        if batch is None:  # chosen once, at the middle of the budgets
                            batch = bench().best_batch(base.with_config(rule=list(found.values())[len(found) // 2]))
                        tested = base.with_config(rule=rule)
                        row = _measured(bench(), folder, tested, name, budget, batch, settings)
                    rows.append(row)
    return rows, left_out


def _measured(
    bench: Bench,
    folder: Path,
    model: AViT,
    method: str,
    budget: float | None,
    batch: int,
    settings: dict[str, Any],
) -> Row:
    row = bench.row(model, method=method, group=GROUPS[0], batch=batch, budget=budget, settings=settings)
    save_row(folder, row)
    return row


def _settings_of(
    start: Any,
    model: AViT,
    images: Float[np.ndarray, "b h w c"],
    budgets: Sequence[float],
    folder: Path,
    settings: dict[str, Any],
) -> tuple[dict[float, Any], list[str]]:
    """The rule at each budget, and a sentence for each budget that it cannot meet; both are kept in the folder."""
    name, own = (start, None) if isinstance(start, str) else (start.name, rule_to_json(start))
    path = folder / "settings" / f"{name}.json"
    wanted = json.loads(json.dumps(settings | {"budgets": budgets, "start": own}))
    if path.is_file() and (kept := read_json(path)).get("settings") == wanted:
        return {float(budget): rule_from_json(rule) for budget, rule in kept["rules"].items()}, kept["left_out"]
    found: dict[float, Any] = {}
    left_out = []
    try:
        works = WorkByLevel(model, images, start)
        for budget in budgets:
            rule, work = works.nearest(budget)
            if abs(work - budget) <= _NEAR * budget:
                found[budget] = rule
            else:
                left_out.append(f"{name} has no setting near work {budget:g}: the nearest is {work:.3f}")
    except ValueError as error:  # the rule does not fit the model
        found, left_out = {}, [f"{name} is left out: {error}"]
    path.parent.mkdir(parents=True, exist_ok=True)
    rules = {str(budget): rule_to_json(rule) for budget, rule in found.items()}
    write_json(path, {"settings": wanted, "rules": rules, "left_out": left_out})
    return found, left_out
