"""Adaptive-token vision transformers (A-ViT, arXiv 2112.07658) in JAX."""

from avit_jax.checkpoint import load, save
from avit_jax.config import PRESETS, AViTConfig, Preprocessing
from avit_jax.convert import from_torch_state_dict, save_torch, to_torch_state_dict
from avit_jax.gate_start import start_gate
from avit_jax.model import AViT, AViTOutput, create
from avit_jax.packed import PackedModel, compile_packed
from avit_jax.plan import PackedPlan, plan_packed
from avit_jax.preprocessing import preprocess

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "PRESETS",
    "AViT",
    "AViTConfig",
    "AViTOutput",
    "PackedModel",
    "PackedPlan",
    "Preprocessing",
    "__version__",
    "compile_packed",
    "create",
    "from_torch_state_dict",
    "load",
    "plan_packed",
    "preprocess",
    "save",
    "save_torch",
    "start_gate",
    "to_torch_state_dict",
]
