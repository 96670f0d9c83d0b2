"""What a run remembers: checkpoints of older versions are understood, damaged ones are refused in one sentence."""

import json
from typing import Any

import pytest

from avit_jax.train.progress import Progress

# The progress item of a run that version 0.1 began, stopped by SIGTERM at step 203 of 725; layers and figures cut.
OLD = json.loads(
    '{"step": 203, "seconds": 16.52, "window": [{"accuracy": 0.75, "classification": 0.4121, '
    '"gradient_norm": 1.5, "halting_by_layer": [0.25, 0.5, 1], "loss": 0.4131, "mean_depth": 2.5, "ponder": 0.0006, '
    '"prior": 0.0004}], "top1": 0.8888888888888888, "rolled_back": 0, "evaluation_due": true}'
)


def test_progress_of_an_older_version_is_what_the_new_one_writes() -> None:
    progress = Progress.from_json(OLD, 203)
    assert (progress.step, progress.seconds, progress.rolled_back) == (203, 16.52, 0)
    assert progress.top1 == 0.8888888888888888
    assert progress.evaluation_due is True
    assert progress.window == OLD["window"]
    assert json.dumps(progress.to_json()) == json.dumps(OLD), "same keys, same order"


def test_an_evaluation_is_not_due_where_an_older_version_did_not_say_so() -> None:
    assert not Progress.from_json({name: OLD[name] for name in OLD if name != "evaluation_due"}, 203).evaluation_due


def test_a_run_that_has_just_begun_reads_back() -> None:
    assert Progress.from_json(Progress().to_json(), 0) == Progress()


def test_a_loss_of_any_size_is_read() -> None:
    window = [{"loss": 1e30, "halting_by_layer": [float("nan"), 2]}]
    assert Progress.from_json(OLD | {"window": window}, 203).window == window


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": "203"}, "step is 203: it must be a whole number"),
        ({"step": 204}, "step is 204 in its progress: it must be 203"),
        ({"seconds": None}, "seconds is None: it must be a number"),
        ({"seconds": -1.0}, "seconds is -1.0: it must be at least 0"),
        ({"seconds": float("nan")}, "seconds is nan: it must be a number"),
        ({"top1": [0.5]}, "top1 is .*: it must be a number"),
        ({"rolled_back": True}, "rolled_back is True: it must be a whole number"),
        ({"evaluation_due": 1}, "evaluation_due is 1: it must be true or false"),
        ({"window": {}}, "window must be a list of tables of numbers"),
        ({"window": [3]}, "window must be a list of tables of numbers"),
        ({"window": [{"loss": "3"}]}, "window must be a list of tables of numbers"),
        ({"window": [{"loss": [[3.0]]}]}, "window must be a list of tables of numbers"),
        ({"window": [{"loss": 3.0}, {"ponder": 3.0}]}, "window must be .* all with the same names"),
        ({"unheard": 1}, "its progress has no field 'unheard'"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}") as found:
        Progress.from_json(OLD | changes, 203)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["step", "seconds", "top1", "rolled_back", "window"])
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Progress.from_json({key: OLD[key] for key in OLD if key != name}, 203)
