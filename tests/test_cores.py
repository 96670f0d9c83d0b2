"""All CPU cores are used: as devices where the user asks for them, and by larger groups where a device has several."""

import warnings

import jax
import pytest

from avit_jax import PRESETS, compile_packed, use_all_cores
from avit_jax.execution import packed
from avit_jax.execution.plan import default_plan
from avit_jax.runtime import mesh
from tests.harness.builders import small_config, spread_gate
from tests.harness.devices import run_on_devices


def test_every_core_becomes_a_device_and_programs_use_them_all() -> None:
    assert "3 cores, 3 devices" in run_on_devices("all_cores.py", None)


def test_a_call_that_comes_too_late_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jax.local_device_count() == 1  # JAX has started
    monkeypatch.setattr(mesh, "available_cores", lambda: 64)
    with pytest.warns(
        UserWarning, match="too late: JAX has already started with 1 CPU device for 8 cores; call it before the first"
    ):
        use_all_cores()
    monkeypatch.setattr(mesh, "available_cores", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_all_cores()  # one core has its device


def test_a_count_that_the_user_gave_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "available_cores", lambda: 64)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_all_cores()


@pytest.mark.parametrize("preset", ["avit_tiny_patch16_224", "avit_small_patch16_384"])
def test_groups_fill_the_cores_of_a_device(preset: str) -> None:
    config = PRESETS[preset]
    for cores in (1, 2, 8, 64):
        tokens = default_plan(config, 4096, "cpu", cores).group_size * config.num_tokens
        assert 384 <= tokens / cores < 1536 + config.num_tokens / cores
        assert default_plan(config, 3, "cpu", cores).group_size <= 3


def test_the_default_program_counts_the_cores_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "available_cores", lambda: 4)
    config = small_config()
    model = spread_gate(config)
    assert compile_packed(model, 128).plan == default_plan(config, 128, "cpu", 4) != default_plan(config, 128, "cpu", 1)
