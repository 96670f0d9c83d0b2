"""Adaptive-token vision transformers (A-ViT, arXiv 2112.07658) in JAX."""

from typing import TYPE_CHECKING, Any

from avit_jax.checkpoints.convert import from_torch_state_dict, save_torch, to_torch_state_dict
from avit_jax.checkpoints.model_folder import load, save
from avit_jax.data.preprocessing import preprocess
from avit_jax.evaluate.budget import calibrate
from avit_jax.execution.export.formats import export
from avit_jax.execution.packed import PackedModel, compile_packed
from avit_jax.execution.plan import PackedPlan, plan_packed
from avit_jax.execution.planned_model import PlannedModel, compile_planned
from avit_jax.execution.program import compile
from avit_jax.execution.random_views import RandomViews, random_views
from avit_jax.execution.stages import PlannedPlan, plan
from avit_jax.gated.gates import Gates
from avit_jax.halting.act import ACT
from avit_jax.halting.ats import ATS
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.halting.mass import AttentionMass
from avit_jax.halting.pondernet import PonderNet
from avit_jax.halting.similarity import Similarity
from avit_jax.model.config import AViTConfig, Preprocessing
from avit_jax.model.output import GatedOutput
from avit_jax.model.presets import PRESETS
from avit_jax.model.vit import AViT, AViTOutput, create
from avit_jax.reduction.dynamicvit import DynamicViT
from avit_jax.reduction.mctf import MCTF
from avit_jax.reduction.positions import PositionDepths, position_depths
from avit_jax.reduction.random_drop import RandomDrop, RandomPatches
from avit_jax.reduction.tome import ToMe
from avit_jax.reduction.topk import EViT, TopK
from avit_jax.runtime.mesh import use_all_cores
from avit_jax.train.gate_start import start_gate

if TYPE_CHECKING:
    from avit_jax.commands.run import train_model

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = [
    "ACT",
    "ATS",
    "MCTF",
    "PRESETS",
    "AViT",
    "AViTConfig",
    "AViTOutput",
    "AttentionMass",
    "ConfidenceExit",
    "DynamicViT",
    "EViT",
    "GatedOutput",
    "Gates",
    "PackedModel",
    "PackedPlan",
    "PlannedModel",
    "PlannedPlan",
    "PonderNet",
    "PositionDepths",
    "Preprocessing",
    "RandomDrop",
    "RandomPatches",
    "RandomViews",
    "Similarity",
    "ToMe",
    "TopK",
    "__version__",
    "calibrate",
    "compile",
    "compile_packed",
    "compile_planned",
    "create",
    "export",
    "from_torch_state_dict",
    "load",
    "plan",
    "plan_packed",
    "position_depths",
    "preprocess",
    "random_views",
    "save",
    "save_torch",
    "start_gate",
    "to_torch_state_dict",
    "train_model",
    "use_all_cores",
]


def __getattr__(name: str) -> Any:
    """Imports train_model on first use, because it brings in the data pipeline and matplotlib."""
    if name == "train_model":
        from avit_jax.commands.run import train_model

        return train_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
