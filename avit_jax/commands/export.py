"""python -m avit_jax.export CHECKPOINT OUT.onnx: write a model as a file that runs without JAX."""

import argparse
import sys
from pathlib import Path

from avit_jax.checkpoints.model_folder import load
from avit_jax.execution.export.formats import FORMATS, export


def main(arguments: list[str] | None = None) -> int:
    """Export a checkpoint; returns the exit status: 1, with one sentence on stderr, for errors that the user can fix.

    arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(prog="python -m avit_jax.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a model folder, or a PyTorch file")
    parser.add_argument("target", metavar="OUT", help="the file to write, such as model.onnx")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    parser.add_argument("--preset", help="such as avit_tiny_patch16_224, for a file without a configuration")
    parser.add_argument("--ema", action="store_true", help="use the moving average's weights")
    parser.add_argument("--batch-size", type=int, help="of every call; by default it is free")
    parser.add_argument("--no-image-exit", action="store_true", help="go on when the class token has halted")
    parser.add_argument("--preprocess", action="store_true", help="take uint8 pictures of any size")
    parser.add_argument("--count-step", type=int, default=1, help="round numbers of tokens up to a multiple of this")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    options = parser.parse_args(arguments)
    try:
        export(
            load(options.checkpoint, options.preset, ema=options.ema),
            options.target,
            options.format,
            batch_size=options.batch_size,
            image_exit=not options.no_image_exit,
            preprocess=options.preprocess,
            count_step=options.count_step,
            overwrite=options.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.target} ({Path(options.target).expanduser().stat().st_size / 1e6:.1f} MB)")
    return 0
