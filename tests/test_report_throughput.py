"""Which speeds the page compares, what it says of them, and how it tells the time that is left."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from avit_jax import AViT
from avit_jax.data.sources import Split
from avit_jax.evaluate.timing import Timed
from avit_jax.report import throughput
from avit_jax.report.throughput import batch_sizes, measure_speeds
from avit_jax.runtime import bars as progress
from avit_jax.runtime.bars import Steps, counted
from tests.harness.builders import small_config

RATES = {  # images/s by batch size: packed is best at 40, dense at 10
    "dense": {5: 90.0, 10: 100.0, 20: 70.0, 40: 50.0},
    "masked": {5: 80.0, 10: 90.0, 20: 95.0, 40: 40.0},
    "packed": {5: 60.0, 10: 90.0, 20: 120.0, 40: 150.0},
}


class _Faked(Timed):
    def __init__(self, rate: float) -> None:
        super().__init__(print, [], 1, f"plan {rate:g}")
        self._rate = rate

    def sample(self) -> None:
        self.rates.append(self._rate * (1 + 0.1 * (len(self.rates) - 2)))  # 0.8 to 1.2 times; the median is the rate


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("largest", [40, 20])
def test_each_execution_is_compared_at_its_best_batch(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    def compiled(variants: Any, split: Any, indices: Any, size: int, longest: float | None) -> Any:
        if size > largest:
            assert longest == throughput.LONGEST_RUN
            return None
        return {name: _Faked(RATES[name][size]) for name in variants}

    monkeypatch.setattr(throughput, "_compiled", compiled)
    model = AViT(small_config(), rngs=nnx.Rngs(0))
    variants = {"dense": (model, "masked"), "masked": (model, "masked"), "packed": (model, "packed")}
    split = Split(np.zeros((1, 12, 8, 2), np.uint8), np.zeros(1, np.int32))
    steps = Steps("test", {"batch": 4, "round": throughput.ROUNDS}, {"batch": 1.0, "round": 1.0})
    found = measure_speeds(variants, split, np.arange(1000), 20, steps)
    assert found["batch_sizes"] == [size for size in (5, 10, 20, 40) if size <= largest]
    assert found["best_batch"] == {"dense": 10, "masked": 20, "packed": largest}
    for name, batch in found["best_batch"].items():
        assert found["images_per_second"][name] == RATES[name][batch]
        assert [row["images_per_second"] for row in found["by_batch"][name]] == [
            RATES[name][size] for size in found["batch_sizes"]
        ]
    assert found["speed_up"]["value"] == RATES["packed"][largest] / 100, "not at the same batch: 3 times at 40"
    assert found["speed_up"]["low"] == pytest.approx(found["speed_up"]["high"]), "all slow or fast in one round"
    assert found["plan"] == f"plan {RATES['packed'][largest]:g}"
    assert steps.seconds_left() == 0


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_batch_sizes_are_of_the_data_and_about_the_evaluations(batch_size: int, images: int) -> None:
    sizes = batch_sizes(batch_size, images)
    assert sizes == sorted(set(sizes)) and sizes[0] >= 1 and sizes[-1] <= min(images, 2 * batch_size)
    devices = jax.local_device_count()
    whole = min(batch_size, images)
    assert (whole - whole % devices if whole > devices else whole) in sizes


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress.time, "perf_counter", clock)
    return clock


def test_time_left_is_told_in_plain_lines_where_there_is_no_terminal(
    clock: _Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = Steps("report", {"batch": 3, "round": 10, "page": 4}, {"batch": 100.0, "round": 2.0, "page": 1.0})
    assert steps.seconds_left() == 300 + 20 + 4
    for took in (10, 20):
        with steps.step("batch", "compiling"):
            clock.now += took
    steps.leave_out("batch")
    with steps.step("round", "timing"):
        clock.now += 1
    assert steps.seconds_left() == 9 * 1 + 4
    for _ in range(9):
        with steps.step("round", "timing"):
            clock.now += 1
    steps.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "report: 0 of 17 steps, compiling; about 5 min 24 s left"
    assert lines[1] == "report: 1 of 17 steps, compiling; about 44 s left"
    assert lines[2] == "report: 2 of 16 steps, timing; about 24 s left"
    assert len(lines) == 4, "one in five seconds"
    assert all("\r" not in line for line in lines)


def test_items_are_counted_in_plain_lines(clock: _Clock, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for item in counted(range(30), "evaluating", 30, "batches"):
        seen.append(item)
        clock.now += 2
    assert seen == list(range(30))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "evaluating: 3 of 30 batches, about 54 s left"
    assert len(lines) == 9, "one in five seconds"
