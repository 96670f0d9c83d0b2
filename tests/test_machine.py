"""The machine's name in results."""

from pathlib import Path

import jax
import pytest

from avit_jax.runtime.machine import machine, processor
from avit_jax.runtime.mesh import available_cores


def test_the_machine_is_named_with_its_processor_cores_and_version() -> None:
    name, cores, version = machine().rsplit(", ", 2)
    assert (cores, version) == (f"{available_cores()} cores", f"jax {jax.__version__}")
    assert name == processor()  # tests run on CPUs


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("cpu\t: 0\nmodel name\t: Intel(R) Xeon(R) CPU @ 2 GHz\nmodel name\t: other\n", "Intel Xeon CPU @ 2 GHz"),
        ("CPU architecture: 8\n", "an ARM processor"),
    ],
)
def test_the_processors_name_comes_from_linux_or_from_python(
    told: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    monkeypatch.setattr("platform.processor", lambda: "an ARM processor")
    assert processor() == name
