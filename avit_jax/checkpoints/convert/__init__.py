"""Conversion of weights from PyTorch, Hugging Face and AugReg, and to PyTorch: `python -m avit_jax.convert IN OUT`."""

from avit_jax.checkpoints.convert.architecture import override
from avit_jax.checkpoints.convert.fitting import Conversion, fit
from avit_jax.checkpoints.convert.state_dict import (
    convert,
    from_torch_state_dict,
    read_foreign,
    save_torch,
    to_torch_state_dict,
)

__all__ = [
    "Conversion",
    "convert",
    "fit",
    "from_torch_state_dict",
    "override",
    "read_foreign",
    "save_torch",
    "to_torch_state_dict",
]
