"""Models as files that other programs run."""

from collections.abc import Sequence
from pathlib import Path

from avit_jax.execution.compiled import check_batch_size
from avit_jax.execution.export.halting import Compaction
from avit_jax.execution.export.onnx_file import OPSET, write_onnx
from avit_jax.execution.export.stablehlo import PLATFORMS, Lowering, write_stablehlo
from avit_jax.execution.plan import PackedPlan
from avit_jax.execution.stages import PlannedPlan
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import expanded
from avit_jax.runtime.numbers import is_whole

FORMATS = ("onnx", "stablehlo")


def export(
    model: AViT,
    path: str | Path,
    format: str = "onnx",
    *,
    batch_size: int | None = None,
    image_exit: bool = True,
    preprocess: bool = False,
    count_step: int = 1,
    opset: int = OPSET,
    execution: str = "auto",
    plan: PackedPlan | PlannedPlan | None = None,
    weights: str = "inside",
    platforms: Sequence[str] = PLATFORMS,
    overwrite: bool = False,
) -> None:
    """Write the model as a file that runs without this project: ONNX, or a StableHLO program (jax.export).

    Both take `images`, float32 [batch, height, width, channels] as avit_jax.preprocess returns them, and give `logits`
    [batch, classes] and `token_depth` [batch, tokens], int32. Class names, preprocessing and configuration are written
    too: into the ONNX file, or beside the program (path + ".json").

    In ONNX halted tokens are removed layer by layer: after each layer the images of a batch are cut to the active
    tokens of the fullest one, the others are filled up with tokens that nothing sees, and matrix products are in
    float32. Weights above 2 GiB go to a second file (path + ".data"). The depths are those of packed execution.
    StableHLO has the program of an execution, as `compile` runs it on one device.

    batch_size: of every call; None: free. In ONNX nothing is filled up with 1; packed and planned programs need a
    number. image_exit: an image ends once the tokens with a head have halted; not for masked programs. overwrite:
    replace files that exist.
    For ONNX: preprocess: the file takes `pictures` instead, uint8 [batch, height, width, channels] of any size, and
    resizes, crops and normalises them itself. count_step: the number of tokens that are left is rounded up to a
    multiple of it, for runtimes that compile a program for each shape. opset: of the operators, from 18.
    For StableHLO: execution and plan: as for compile, but "auto" is masked for a halting rule without a plan. weights:
    "inside" the program, or "beside" it in path + ".safetensors", as the first argument. platforms: what it is for.

    Raises ValueError for an unknown format, an option of the other format, a rule that has no form in it, a path that
    exists, an opset that is too old, weights that one file cannot hold, and without the package onnx or flatbuffers.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: choose {' or '.join(FORMATS)}")
    if batch_size is not None:
        check_batch_size(batch_size)
    if not is_whole(count_step, 1):
        raise ValueError(f"count_step is {count_step}: give a whole number of tokens from 1")
    if not is_whole(opset, 1):
        raise ValueError(f"opset is {opset!r}: give a whole number from {OPSET}")
    given = {
        "onnx": {"preprocess": preprocess, "count_step": count_step != 1, "opset": opset != OPSET},
        "stablehlo": {
            "execution": execution != "auto",
            "plan": plan is not None,
            "weights": weights != "inside",
            "platforms": tuple(platforms) != PLATFORMS,
        },
    }
    for other, options in given.items():
        named = [name for name, is_given in options.items() if is_given]
        if other != format and named:
            raise ValueError(f"{named[0]} is an option of the format {other!r}: leave it out, or give format={other!r}")
    if format == "stablehlo":
        lowering = Lowering(execution, plan, image_exit, weights, platforms)
        write_stablehlo(model, expanded(path), batch_size, lowering, overwrite=overwrite)
        return
    how = Compaction(image_exit, one_image=batch_size == 1, step=count_step)
    write_onnx(model, expanded(path), batch_size, how, preprocess=preprocess, opset=opset, overwrite=overwrite)
