"""Parameters under our own names put into a model: positions resized, heads new where asked for, names checked."""

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
from avit_jax.model.layers import linear
from avit_jax.model.positions import resize_positions
from avit_jax.model.vit import AViT

_OWN = "rule_module."  # parameters that a rule brings


@dataclasses.dataclass
class Conversion:
    """A model and what became of its source."""

    model: AViT
    layout: str
    notes: list[str]
    changed: dict[str, str]  # our parameter -> what was done besides renaming


def fit(
    parameters: dict[str, Any], config: AViTConfig, saved: AViTConfig | None, given: Collection[str] = ()
) -> Conversion:
    """A model of this configuration from parameters under our own names (emptied as they are used).

    Positions are resized from the grid of `saved` (None: a square one); heads are new where their classes differ and
    num_classes is among the `given` fields. Raises ValueError where anything else does not fit.
    """
    notes: list[str] = []
    changed: dict[str, str] = {}
    _fit_positions(parameters, config, saved, notes, changed)
    _fit_heads(parameters, config, "num_classes" in given, notes, changed)
    if isinstance(config.halting, AViTGate) and (saved is None or not isinstance(saved.halting, AViTGate)):
        # No file of others says whether it was trained with a gate.
        which = (
            "weights that were trained without a gate" if saved is None else "the checkpoint has no gate: its weights"
        )
        notes.append(
            f"{which} halt no token, or only by chance, until avit_jax.start_gate(model, images, target_depth=...) "
            "or fine-tuning"
        )
    return Conversion(_with_rule(config, saved, parameters, notes, changed), "avit_jax", notes, changed)


def _with_rule(
    config: AViTConfig,
    saved: AViTConfig | None,
    flat: dict[str, Any],
    notes: list[str],
    changed: dict[str, str],
) -> AViT:
    """The filled model; what its rule has to learn is the checkpoint's, or starts from norm and head."""
    own = [name for name in flat if name.startswith(_OWN)]
    kept = saved is not None and type(saved.halting) is type(config.halting)
    brings = "rule_module" in nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: AViT(config, rngs=nnx.Rngs(0)))))
    if own and kept and brings:
        return _filled(config, flat)
    for name in own:
        del flat[name]
    if own:
        notes.append("what the checkpoint's rule had learnt was left out, as the model has another rule")
    if not brings:
        return _filled(config, flat)
    model = _filled(dataclasses.replace(config, **NO_RULE), flat)
    notes.append("what the rule learns starts from the checkpoint's norm and head")
    model = model.with_config(**{name: getattr(config, name) for name in NO_RULE})
    changed |= {name: "new" for name in map(_dotted, nnx.to_flat_state(nnx.state(model))) if name.startswith(_OWN)}
    return model


def _dotted(item: tuple[tuple[Any, ...], Any]) -> str:
    return ".".join(map(str, item[0]))


def _fit_positions(
    flat: dict[str, Any],
    config: AViTConfig,
    saved: AViTConfig | None,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Position embeddings for this image size, a row for every token."""
    positions = flat.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return  # said where shapes are compared
    special, rows = config.num_special, positions.shape[1]
    if rows == config.num_tokens and (saved is None or saved.patch_grid == config.patch_grid):
        return  # as many as this image has patches: they are taken as they are
    source = saved.patch_grid if saved is not None else None
    if source is None:
        patches = config.num_tokens - special
        # Rows of all special tokens; of all but registers (DINOv2); of patches alone (timm's no_embed_class).
        ways = (special, special - config.num_registers, 0)
        given = next((n for n in ways if rows - n == patches == square(patches) ** 2), None)
        if given is None:
            given = next((n for n in ways if square(rows - n)), None)
        if given is None:
            given = next((n for n in ways if rows - n == patches), None)
        if given is None:
            raise ValueError(
                f"{rows} position embeddings are neither those of the {config.num_tokens} tokens of image size "
                f"{config.image_shape} nor of a square image: give the image_size they belong to"
            )
        side = square(rows - given)
        source = (side, side) if side else config.patch_grid
        if given < special:
            none = np.zeros((1, special - given, positions.shape[2]), positions.dtype)
            positions = np.concatenate([positions[:, :given], none, positions[:, given:]], axis=1)
            changed["pos_embed"] = "zero for registers" if given else "zero for special tokens"
    if positions.shape[1] != special + source[0] * source[1]:
        return  # other special tokens: said where names are compared
    # DINOv2 with registers is resized so by its authors and by transformers. DeiT and transformers use none for others.
    antialias = config.num_registers > 0
    flat["pos_embed"] = resize_positions(positions, special, source, config.patch_grid, antialias=antialias)
    if source != config.patch_grid:
        what = "resized from {}x{} to {}x{} patches".format(*source, *config.patch_grid)
        changed["pos_embed"] = what
        notes.append(f"pos_embed was {what}")


def _fit_heads(
    flat: dict[str, Any],
    config: AViTConfig,
    classes_given: bool,
    notes: list[str],
    changed: dict[str, str],
) -> None:
    """Heads for this number of classes: the checkpoint's, or new ones where num_classes was asked for."""
    bias = flat.get("head.bias")
    found = bias.shape[0] if bias is not None and bias.ndim == 1 else None
    reads_tanh = any(name.startswith("pre_logits.") for name in flat)
    if (found or 0) == config.num_classes and not reads_tanh:
        return
    if not classes_given:
        if reads_tanh:
            raise ValueError(
                "its head reads a tanh layer (pre_logits), which AViT has not: pass num_classes for a new head, or 0 "
                "for none"
            )
        if found is None:
            raise ValueError("the checkpoint has no head: pass num_classes for a new one, or 0 for none")
        raise ValueError(
            f"the checkpoint has {found} classes and the model {config.num_classes}: pass num_classes="
            f"{config.num_classes} for a new head, or num_classes={found} for the checkpoint's"
        )
    scale = flat.get("norm.scale")
    if scale is None or scale.shape != (config.embed_dim,):
        return  # said where shapes are compared; a new head of a width that is not there could be huge
    for name in [name for name in flat if name.startswith(("pre_logits.", "head.", "head_dist."))]:
        del flat[name]
    if not config.num_classes:
        notes.append("the head was left out, as num_classes is 0: logits are what it would read")
        return
    for name in ("head", "head_dist") if config.distilled else ("head",):
        new = nnx.to_pure_dict(nnx.state(linear(config.head_inputs, config.num_classes, "float32", nnx.Rngs(0))))
        for part, value in new.items():
            flat[f"{name}.{part}"] = value
            changed[f"{name}.{part}"] = "new"
    was = "no head" if found is None else f"{found} classes" + (" behind a tanh layer" if reads_tanh else "")
    notes.append(f"the head is new and untrained: the checkpoint has {was}, the model {config.num_classes} classes")


def _filled(config: AViTConfig, flat: dict[str, Any]) -> AViT:
    """The model with these parameters, each used and each filled."""
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: AViT(config, rngs=nnx.Rngs(0))))
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
    for name, target in targets.items():  # one after the other, so that no second copy of all stays alive
        arrays[name] = jnp.asarray(flat.pop(name), target.dtype)
    nnx.replace_by_pure_dict(abstract, unflatten_dict(arrays, sep="."))
    return nnx.merge(graphdef, abstract)


def _some(names: list[str]) -> str:
    shown = [f"{name:.100}" for name in names[:20]]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"{shown or 'none'}{more}"
