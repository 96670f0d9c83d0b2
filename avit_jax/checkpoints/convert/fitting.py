"""Putting parameters under our own names into a model: positions are resized, new heads made, names checked."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from avit_jax.checkpoints.convert.architecture import square
from avit_jax.halting.avit import AViTGate
from avit_jax.model.config import NO_RULE, AViTConfig
from avit_jax.model.linear import linear
from avit_jax.model.positions import resize_positions
from avit_jax.model.vit import AViT, model_of_shapes

_OWN = "rule_module."  # parameters that a rule brings


@dataclasses.dataclass
class Conversion:
    """A model converted from a checkpoint, and what was done to it."""

    model: AViT
    layout: str
    notes: list[str]
    changed: dict[str, str]  # our parameter -> what was done besides renaming


def fit(
    parameters: dict[str, Any], model_config: AViTConfig, saved: AViTConfig | None, given: Collection[str] = ()
) -> Conversion:
    """A model of this configuration from parameters under our own names.

    parameters: arrays by name, emptied as they are used. saved: the checkpoint's own configuration, from whose grid
    positions are resized (None: a square grid). given: the fields that the caller gave; with num_classes among them,
    heads are new if the number of classes differs. Raises ValueError if anything else does not fit.
    """
    notes: list[str] = []
    changed: dict[str, str] = {}
    _fit_positions(parameters, model_config, saved, notes, changed)
    _fit_heads(parameters, model_config, "num_classes" in given, notes, changed)
    if isinstance(model_config.halting, AViTGate) and (saved is None or not isinstance(saved.halting, AViTGate)):
        # The files of other programs do not say whether they were trained with a gate.
        which = (
            "weights that were trained without a gate" if saved is None else "the checkpoint has no gate: its weights"
        )
        notes.append(
            f"{which} halt no token, or only by chance, until avit_jax.start_gate(model, images, target_depth=...) "
            "or fine-tuning"
        )
    return Conversion(_with_rule(model_config, saved, parameters, notes, changed), "avit_jax", notes, changed)


def _with_rule(
    model_config: AViTConfig,
    saved: AViTConfig | None,
    flat: dict[str, Any],
    notes: list[str],
    changed: dict[str, str],
) -> AViT:
    """The filled model; what its rule has to learn is the checkpoint's, or starts anew."""
    own = [name for name in flat if name.startswith(_OWN)]
    # Only gates come from the files of other programs.
    kept = saved is None or type(saved.rule_in_force) is type(model_config.rule_in_force)
    brings = "rule_module" in nnx.to_pure_dict(nnx.state(model_of_shapes(model_config)))
    if own and kept and brings:
        return _filled(model_config, flat)
    for name in own:
        del flat[name]
    if own:
        notes.append("what the checkpoint's rule had learnt was left out, as the model has another rule")
    if not brings:
        return _filled(model_config, flat)
    model = _filled(dataclasses.replace(model_config, **NO_RULE), flat)
    notes.append("what the rule learns starts from the checkpoint's norm and head or from random weights")
    model = model.with_config(**{name: getattr(model_config, name) for name in NO_RULE})
    changed |= {name: "new" for name in map(_dotted, nnx.to_flat_state(nnx.state(model))) if name.startswith(_OWN)}
    return model


def _dotted(item: tuple[tuple[Any, ...], Any]) -> str:
    return ".".join(map(str, item[0]))


def _fit_positions(
    flat: dict[str, Any],
    model_config: AViTConfig,
    saved: AViTConfig | None,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Position embeddings for this image size, a row for every token."""
    positions = flat.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return  # reported when shapes are compared
    special, rows = model_config.num_special, positions.shape[1]
    if rows == model_config.num_tokens and (saved is None or saved.patch_grid == model_config.patch_grid):
        return  # there is one for each token: they are used as they are
    source = saved.patch_grid if saved is not None else None
    if source is None:
        patches = model_config.num_tokens - special
        # There are rows for all special tokens, for all but registers (DINOv2), or for none (timm's no_embed_class).
        ways = (special, special - model_config.num_registers, 0)
        given = next((n for n in ways if rows - n == patches == square(patches) ** 2), None)
        if given is None:
            given = next((n for n in ways if square(rows - n)), None)
        if given is None:
            given = next((n for n in ways if rows - n == patches), None)
        if given is None:
            raise ValueError(
                f"{rows} position embeddings fit neither the {model_config.num_tokens} tokens of image size "
                f"{model_config.image_shape} nor a square image: give the image_size they belong to"
            )
        side = square(rows - given)
        source = (side, side) if side else model_config.patch_grid
        if given < special:
            none = np.zeros((1, special - given, positions.shape[2]), positions.dtype)
            positions = np.concatenate([positions[:, :given], none, positions[:, given:]], axis=1)
            changed["pos_embed"] = "zero for registers" if given else "zero for special tokens"
    if positions.shape[1] != special + source[0] * source[1]:
        return  # other special tokens: reported when names are compared
    # DINOv2's authors and transformers use antialiasing for DINOv2 with registers. For other models, DeiT's authors and
    # transformers do not.
    antialias = model_config.num_registers > 0
    flat["pos_embed"] = resize_positions(positions, special, source, model_config.patch_grid, antialias=antialias)
    if source != model_config.patch_grid:
        what = "resized from {}x{} to {}x{} patches".format(*source, *model_config.patch_grid)
        changed["pos_embed"] = what
        notes.append(f"pos_embed was {what}")


def _fit_heads(
    flat: dict[str, Any],
    model_config: AViTConfig,
    classes_given: bool,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Heads for this number of classes: the checkpoint's, or new ones if num_classes was given."""
    bias = flat.get("head.bias")
    found = bias.shape[0] if bias is not None and bias.ndim == 1 else None
    reads_tanh = any(name.startswith("pre_logits.") for name in flat)
    if (found or 0) == model_config.num_classes and not reads_tanh:
        return
    if not classes_given:
        if reads_tanh:
            raise ValueError(
                "its head reads a tanh layer (pre_logits), which AViT lacks: pass num_classes for a new head, "
                "or 0 for none"
            )
        if found is None:
            raise ValueError("the checkpoint has no head: pass num_classes for a new one, or 0 for none")
        raise ValueError(
            f"the checkpoint has {found} classes and the model {model_config.num_classes}: pass num_classes="
            f"{model_config.num_classes} for a new head, or num_classes={found} for the checkpoint's"
        )
    scale = flat.get("norm.scale")
    if scale is None or scale.shape != (model_config.embed_dim,):
        return  # reported when shapes are compared; without the right width a new head could be huge
    for name in [name for name in flat if name.startswith(("pre_logits.", "head.", "head_dist."))]:
        del flat[name]
    if not model_config.num_classes:
        notes.append("the head was left out because num_classes is 0: logits are what it would read")
        return
    for name in ("head", "head_dist") if model_config.distilled else ("head",):
        new = nnx.to_pure_dict(
            nnx.state(linear(model_config.head_inputs, model_config.num_classes, "float32", nnx.Rngs(0)))
        )
        for part, value in new.items():
            flat[f"{name}.{part}"] = value
            changed[f"{name}.{part}"] = "new"
    was = "no head" if found is None else f"{found} classes" + (" behind a tanh layer" if reads_tanh else "")
    notes.append(
        f"the head is new and untrained: the checkpoint has {was}, the model {model_config.num_classes} classes"
    )


def _filled(model_config: AViTConfig, flat: dict[str, Any]) -> AViT:
    """The model with these parameters. Raises ValueError unless they are exactly those of the model."""
    graphdef, abstract = nnx.split(model_of_shapes(model_config))
    targets = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    unused, unfilled = sorted(flat.keys() - targets), sorted(targets.keys() - flat.keys())
    if unused or unfilled:
        raise ValueError(f"the checkpoint does not fit the model: unused {_some(unused)}, unfilled {_some(unfilled)}")
    for name, target in targets.items():
        value = flat[name]
        if value.shape != target.shape:
            raise ValueError(f"{name} has shape {value.shape} in the checkpoint and {target.shape} in the model")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{name} holds {value.dtype} in the checkpoint: weights are floating-point numbers")
    arrays = {}
    for name, target in targets.items():  # one after the other, so that there are never two copies of all
        arrays[name] = jnp.asarray(flat.pop(name), target.dtype)
    nnx.replace_by_pure_dict(abstract, unflatten_dict(arrays, sep="."))
    return nnx.merge(graphdef, abstract)


def _some(names: list[str]) -> str:
    shown = [f"{name:.100}" for name in names[:20]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{shown or 'none'}{more}"
