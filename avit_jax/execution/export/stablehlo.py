"""A model as a StableHLO program (jax.export): it runs in any process that has JAX, without this project."""

import dataclasses
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from avit_jax.execution import shrinking
from avit_jax.execution.compiled import split_model
from avit_jax.execution.export.metadata import check_targets, metadata
from avit_jax.execution.gated_packed import gated_packed_program
from avit_jax.execution.packed import packed_program
from avit_jax.execution.plan import PackedPlan, default_plan
from avit_jax.execution.planned_model import planned_program
from avit_jax.execution.program import choose
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import writing

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = ("inside", "beside")
LARGEST_PROGRAM = 2**31 - 2**24  # bytes; the format counts them in 32 bits, and the program itself takes some


@dataclasses.dataclass(frozen=True)
class Lowering:
    """How the program is made; see export. Raises ValueError for settings that cannot work."""

    execution: str = "auto"
    plan: PackedPlan | PlannedPlan | None = None
    image_exit: bool = True
    weights: str = "inside"
    platforms: Sequence[str] = PLATFORMS

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights is {self.weights!r}: choose {' or '.join(WEIGHTS)}")
        unknown = [name for name in self.platforms if name not in PLATFORMS]
        if unknown or not self.platforms or isinstance(self.platforms, str):
            raise ValueError(f"platforms is {self.platforms!r}: give some of {', '.join(PLATFORMS)}")


def write_stablehlo(model: AViT, path: Path, batch_size: int | None, how: Lowering, *, overwrite: bool) -> None:
    """Write the program; see export. Beside it lie its metadata (path + ".json"), and the weights if not inside."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("writing StableHLO needs the package flatbuffers, which is not there: pip install flatbuffers")
    beside = how.weights == "beside"
    names = [*([path.name + ".safetensors"] if beside else []), path.name + ".json", path.name]
    check_targets(path, names, overwrite)
    execution, config = _execution(model, how, batch_size), model.config
    if config.attention != "xla":
        model = model.with_config(attention="plain")  # cuDNN's kernel runs on one platform only
    forward, params = _program(model, execution, batch_size, how)
    size = sum(value.nbytes for value in params.values())
    if not beside and size > LARGEST_PROGRAM:
        raise ValueError(
            f"its weights take {size / 2**30:.1f} GiB and a StableHLO file holds less than 2: put them into a file of "
            "their own, weights='beside' (--weights=beside)"
        )
    exported = _exported(forward, params, model, batch_size, how)
    about = metadata(config, inside=False) | {
        "execution": execution,
        "batch_size": "free" if batch_size is None else batch_size,
        "platforms": exported.platforms,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "arguments": ["weights", "images"] if beside else ["images"],
    }
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        if beside:
            safetensors.numpy.save_file(params, Path(folder, names[0]))
        Path(folder, path.name + ".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        Path(folder, path.name).write_bytes(exported.serialize())
        for name in names:
            os.replace(Path(folder, name), path.with_name(name))


def _execution(model: AViT, how: Lowering, batch_size: int | None) -> str:
    """The execution of the program: of those that fit the rule and the plan, the one that suits every platform."""
    # What "auto" takes on a platform of which nothing is known.
    execution = choose(model.config, how.execution, how.plan, platform="any").execution
    if execution == "planned" and how.plan is None:
        raise ValueError("planned execution needs a plan of its shapes: make one with avit_jax.plan")
    if execution in ("packed", "planned") and batch_size is None:
        raise ValueError(f"{execution} execution has the shapes of one batch size: give batch_size (--batch-size)")
    if isinstance(how.plan, PlannedPlan) and batch_size is not None:
        how.plan.check(model.config, batch_size)
    return execution


def _program(model: AViT, execution: str, batch_size: int | None, how: Lowering) -> tuple[Any, dict[str, np.ndarray]]:
    """(weights by name, images) -> the model's output; and the weights."""
    graphdef, params = split_model(model, None)
    flat = {name: np.asarray(value) for name, value in flatten_dict(params, sep=".").items()}
    run: Any
    if execution == "packed":
        assert batch_size is not None
        on = "cpu" if "cpu" in how.platforms else "gpu"  # packed execution is for CPUs
        plan = how.plan if isinstance(how.plan, PackedPlan) else default_plan(model.config, batch_size, on)
        plan = plan.fitted(model.config, batch_size)
        if model.config.gates is not None:
            run = gated_packed_program(graphdef, plan, None)
        else:
            run = packed_program(graphdef, plan, how.image_exit, None)
    elif execution == "planned":
        assert isinstance(how.plan, PlannedPlan)
        planned = planned_program(graphdef, how.plan, how.image_exit, None)

        def run(params: Any, images: Array, count: Array) -> Any:
            return planned(params, images, count)[0]  # what does not fit the plan has been computed in full
    else:

        def run(params: Any, images: Array, count: Array) -> Any:
            merged = nnx.merge(graphdef, params)
            if execution == "shrinking":
                return shrinking.forward(merged, images, model.config.reduction, short_last_layer=True)
            return merged(images)

    def forward(weights: dict[str, Any], images: Array) -> dict[str, Array]:
        output = run(unflatten_dict(weights, sep="."), images, jnp.int32(batch_size or 0))
        return {"logits": output.logits, "token_depth": output.token_depth.astype("int32")}

    if batch_size is not None:
        return forward, flat

    def for_each(weights: dict[str, Any], images: Array) -> dict[str, Array]:
        """One image at a time, batched by vmap: Python then sees no length that is not a number."""
        outputs = jax.vmap(lambda image: forward(weights, image[None]))(images)
        return {name: values[:, 0] for name, values in outputs.items()}

    return for_each, flat


def _exported(
    forward: Any, params: dict[str, np.ndarray], model: AViT, batch_size: int | None, how: Lowering
) -> jax.export.Exported:
    (batch,) = jax.export.symbolic_shape("batch") if batch_size is None else (batch_size,)
    images = jax.ShapeDtypeStruct((batch, *model.config.image_shape, model.config.in_channels), "float32")
    if how.weights == "beside":
        weights = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
        return jax.export.export(jax.jit(forward), platforms=tuple(how.platforms))(weights, images)

    def inside(images: Array) -> dict[str, Array]:
        return forward({name: jnp.asarray(value) for name, value in params.items()}, images)

    return jax.export.export(jax.jit(inside), platforms=tuple(how.platforms))(images)
