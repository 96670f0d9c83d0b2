"""What a run remembers: checkpoints of older versions are understood, damaged ones are refused in one sentence."""

import json
from typing import Any

import pytest

from avit_jax.train.progress import Progress

# The progress item that a run of version 0.1 left when SIGTERM stopped it after step 208 of 725;
# of the window the first of five steps.
OLD = json.loads(
    '{"step": 208, "seconds": 61.86907414999996, "window": ['
    '{"accuracy": 1.0, "classification": 0.4260043799877167, '
    '"gradient_norm": 2.3021674156188965, '
    '"halting_by_layer": [0.0005945379962213337, 0.0007876005256548524, 0.0009833385702222586], '
    '"loss": 0.4446415603160858, "mean_depth": 3.000000238418579, '
    '"ponder": 0.007997236214578152, "prior": 0.010639944113790989}'
    '], "top1": 1.0, "rolled_back": 0, "evaluation_due": false}'
)


def test_progress_of_an_older_version_is_what_the_new_one_writes() -> None:
    progress = Progress.from_json(OLD, 208)
    assert (progress.step, progress.seconds, progress.rolled_back) == (208, 61.86907414999996, 0)
    assert progress.top1 == 1.0
    assert progress.evaluation_due is False
    assert progress.window == OLD["window"]
    assert json.dumps(progress.to_json()) == json.dumps(OLD), "same keys, same order"


def test_an_evaluation_is_not_due_where_an_older_version_did_not_say_so() -> None:
    assert not Progress.from_json({name: OLD[name] for name in OLD if name != "evaluation_due"}, 208).evaluation_due


def test_a_run_that_has_just_begun_reads_back() -> None:
    assert Progress.from_json(Progress().to_json(), 0) == Progress()


def test_a_loss_of_any_size_is_read() -> None:
    window = [{"loss": 1e30, "halting_by_layer": [float("nan"), 2]}]
    assert Progress.from_json(OLD | {"window": window}, 208).window == window


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"step": "208"}, "step is 208: it must be a whole number"),
        ({"step": 209}, "step is 209 in its progress: it must be 208"),
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
        Progress.from_json(OLD | changes, 208)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["step", "seconds", "top1", "rolled_back", "window"])
def test_a_missing_key_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Progress.from_json({key: OLD[key] for key in OLD if key != name}, 208)
