"""Weights of PyTorch, Hugging Face and AugReg in, weights for PyTorch out: `python -m avit_jax.convert IN OUT`."""

from avit_jax.convert.state_dict import (
    Conversion,
    convert,
    fit,
    from_torch_state_dict,
    override,
    save_torch,
    to_torch_state_dict,
)

__all__ = ["Conversion", "convert", "fit", "from_torch_state_dict", "override", "save_torch", "to_torch_state_dict"]
