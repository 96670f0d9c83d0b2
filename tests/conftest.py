"""Shapes and types of every public function are checked at run time while the tests run."""

import os
from collections.abc import Iterator
from pathlib import Path

RUNS = Path(__file__).parents[1] / "runs"
RUNS.mkdir(exist_ok=True)  # pytest's --basetemp lies in it
os.environ.setdefault("MPLCONFIGDIR", str(RUNS / ".matplotlib"))

from jaxtyping import install_import_hook

install_import_hook("avit_jax", "beartype.beartype")

import jax
import pytest

from avit_jax import AViT, AViTConfig
from tests.harness.builders import small_config, spread_gate


@pytest.fixture
def config() -> AViTConfig:
    return small_config()


@pytest.fixture
def model(config: AViTConfig) -> AViT:
    """A model with random weights whose tokens stop at many different layers."""
    return spread_gate(config)


@pytest.fixture
def images(config: AViTConfig) -> jax.Array:
    height, width = config.image_shape
    return jax.random.normal(jax.random.key(1), (3, height, width, config.in_channels))


@pytest.fixture(autouse=True, scope="session")
def compile_each_program_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most of the time went into compiling tiny models: less optimised, they compile in half the time.

    Many tests train the same one: XLA's results are shared between them, in the session's own folder.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="module")
def compiled_as_users_do() -> Iterator[None]:
    """Every optimisation on, as outside the tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
