"""transformers and timm, for tests that compare with them: skipped where requirements-peers.txt is not installed."""

import functools
from typing import Any

import pytest


def import_peer(name: str) -> Any:
    """The module of this name."""
    _name_torchvision_operators()
    return pytest.importorskip(name, exc_type=ImportError)


@functools.cache
def _name_torchvision_operators() -> Any:
    """Beside a CPU build of torch, PyPI's torchvision has no operators built: its import needs no more than names."""
    torch = pytest.importorskip("torch")
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms(Tensor d, Tensor s, float t) -> Tensor", "qnms(Tensor d, Tensor s, float t) -> Tensor"):
        library.define(operator)
    return library  # kept: the names go when it does
