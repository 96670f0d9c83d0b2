"""python -m avit_jax.export CHECKPOINT OUT: write a model as a file that runs without JAX."""

import argparse
import sys
from pathlib import Path

from avit_jax.checkpoints.model_folder import load
from avit_jax.execution.export.formats import FORMATS, export
from avit_jax.execution.export.onnx_file import OPSET
from avit_jax.execution.export.runtime_check import check_in_runtime
from avit_jax.execution.export.stablehlo import PLATFORMS, WEIGHTS
from avit_jax.execution.plan import PackedPlan
from avit_jax.execution.program import EXECUTIONS
from avit_jax.execution.stages import PlannedPlan
from avit_jax.runtime.files import read_json


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
    parser.add_argument("--opset", type=int, default=OPSET, help=f"of the ONNX file, from {OPSET}")
    parser.add_argument("--check", action="store_true", help="run the ONNX file in ONNX Runtime and compare with JAX")
    parser.add_argument("--execution", default="auto", choices=("auto", *EXECUTIONS), help="of a StableHLO program")
    parser.add_argument("--plan", metavar="FILE", help="of packed or planned execution, as plan.save wrote it")
    parser.add_argument("--weights", choices=WEIGHTS, default=WEIGHTS[0], help="of a StableHLO program")
    parser.add_argument("--platforms", default=",".join(PLATFORMS), help="of a StableHLO program; all three by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    options = parser.parse_args(arguments)
    try:
        if options.check and (options.preprocess or options.format != "onnx"):
            raise ValueError("--check is for ONNX files that take images: leave --preprocess out")
        model = load(options.checkpoint, options.preset, ema=options.ema)
        export(
            model,
            options.target,
            options.format,
            batch_size=options.batch_size,
            image_exit=not options.no_image_exit,
            preprocess=options.preprocess,
            count_step=options.count_step,
            opset=options.opset,
            execution=options.execution,
            plan=None if options.plan is None else _plan(Path(options.plan)),
            weights=options.weights,
            platforms=tuple(options.platforms.split(",")),
            overwrite=options.overwrite,
        )
        if options.check:
            difference = check_in_runtime(Path(options.target).expanduser(), model, options.batch_size)
            print(f"in ONNX Runtime its logits differ from JAX's by {difference:.1g}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.target} ({Path(options.target).expanduser().stat().st_size / 1e6:.1f} MB)")
    return 0


def _plan(path: Path) -> PackedPlan | PlannedPlan:
    """The plan in a file; its fields say of which execution."""
    content = read_json(path)
    planned = isinstance(content, dict) and "stages" in content
    return PlannedPlan.load(path) if planned else PackedPlan.load(path)
