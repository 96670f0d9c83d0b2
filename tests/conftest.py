"""Shapes and types of every public function are checked at run time while the tests run."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

RUNS = Path(__file__).parents[1] / "runs"
RUNS.mkdir(exist_ok=True)  # pytest's --basetemp lies in it
os.environ.setdefault("MPLCONFIGDIR", str(RUNS / ".matplotlib"))

gc.set_threshold(100_000, 20, 20)  # imports and tracing make many objects and few cycles: they took a tenth of the time

from tests.harness.flags import COMPILE_SOONER

# XLA reads it when the first backend starts; processes that tests start inherit it.
os.environ["XLA_FLAGS"] = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), COMPILE_SOONER]))

import pytest

if TYPE_CHECKING:
    import jax

    from avit_jax import AViT, AViTConfig


def pytest_configure(config: pytest.Config) -> None:
    """Check types. xdist's first process runs no test, and the others start when it has imported this file."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        from jaxtyping import install_import_hook

        install_import_hook("avit_jax", "beartype.beartype")


@pytest.fixture
def config() -> "AViTConfig":
    from tests.harness.builders import small_config

    return small_config()


@pytest.fixture
def model(config: "AViTConfig") -> "AViT":
    """A model with random weights whose tokens stop at many different layers."""
    from tests.harness.builders import spread_gate

    return spread_gate(config)


@pytest.fixture
def images(config: "AViTConfig") -> "jax.Array":
    import jax

    height, width = config.image_shape
    return jax.random.normal(jax.random.key(1), (3, height, width, config.in_channels))


@pytest.fixture(autouse=True, scope="session")
def compile_each_program_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most of the time went into compiling tiny models: less optimised, they compile in half the time.

    Many tests train the same one: XLA's results are shared between them and between xdist's workers, in a folder of the
    whole session.
    """
    import jax

    base = tmp_path_factory.getbasetemp()
    programs = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla"
    programs.mkdir(exist_ok=True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module")
def compiled_as_users_do() -> Iterator[None]:
    """Every optimisation on, as outside the tests; XLA_FLAGS alone stay as they are."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def without_pictures() -> Iterator[None]:
    """Runs of this process draw nothing at their end: half of a small run's time would go into three pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avit_jax.commands.run.draw_run", lambda *_: [])
        yield


# Files that take longest, longest first: xdist begins with them, so that no worker is left alone with one at the end.
LONGEST = (
    "test_real_faults",
    "test_training",
    "test_planner",
    "test_planned",
    "test_packed",
    "test_report_page",
    "test_compare",
    "test_shrinking",
    "test_confidence",
    "test_commands",
    "test_peers",
    "test_budget",
    "test_gate_start",
    "test_model",
    "test_stopping",
    "test_faults",
    "test_program",
    "test_scaling",
    "test_docs",
    "test_work",
    "test_packed_calls",
    "test_processes",
    "test_report_numbers",
    "test_model_folder",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
