"""Models as files that other programs run."""

from pathlib import Path

from avit_jax.execution.compiled import check_batch_size
from avit_jax.execution.export.halting import Compaction
from avit_jax.execution.export.onnx_file import write_onnx
from avit_jax.model.vit import AViT
from avit_jax.runtime.files import expanded
from avit_jax.runtime.numbers import is_whole

FORMATS = ("onnx",)


def export(
    model: AViT,
    path: str | Path,
    format: str = "onnx",
    *,
    batch_size: int | None = None,
    image_exit: bool = True,
    preprocess: bool = False,
    count_step: int = 1,
    overwrite: bool = False,
) -> None:
    """Write the model as a file that runs without JAX: ONNX, in which halted tokens are removed layer by layer.

    The file takes `images`, float32 [batch, height, width, channels] as avit_jax.preprocess returns them. It gives
    `logits` [batch, classes] and `token_depth` [batch, tokens], int32: those of packed execution, up to rounding. After
    each layer the images of a batch are cut to the active tokens of the fullest one; the others are filled up with
    tokens that nothing sees. Matrix products are in float32, whatever the model's dtype. Class names and preprocessing
    are in the file's metadata. Weights above 2 GiB go to a second file, named like the first with ".data" at its end.

    batch_size: of every call; None: free. With 1 nothing is filled up. image_exit: an image ends once the tokens with a
    head have halted; only those are left then. preprocess: the file takes `pictures` instead, uint8 [batch, height,
    width, channels] of any size, and resizes, crops and normalises them itself. count_step: the number of tokens that
    are left is rounded up to a multiple of it, for runtimes that compile a program for each shape. overwrite: replace a
    file that exists.

    Raises ValueError for an unknown format, a rule that has no form in it, a path that exists, and without the package
    `onnx`.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: choose {' or '.join(FORMATS)}")
    if batch_size is not None:
        check_batch_size(batch_size)
    if not is_whole(count_step, 1):
        raise ValueError(f"count_step is {count_step}: give a whole number of tokens from 1")
    how = Compaction(image_exit, one_image=batch_size == 1, step=count_step)
    write_onnx(model, expanded(path), batch_size, how, preprocess=preprocess, overwrite=overwrite)
