"""python -m avit_jax.convert IN OUT: convert checkpoints from and to PyTorch, and print a table of the parameters."""

import argparse
import dataclasses
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from flax import nnx

from avit_jax.checkpoints.convert import Conversion
from avit_jax.checkpoints.convert.state_dict import save_torch, torch_name
from avit_jax.checkpoints.model_folder import load_conversion, save
from avit_jax.model.config import INTERPOLATIONS, POOLS, Preprocessing

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
# Suffixes of other programs' files: a folder with such a name would be mistaken for one.
OTHER_FORMATS = (".onnx", ".npz", ".npy", ".h5", ".hdf5", ".keras", ".msgpack", ".ckpt", ".pkl", ".tflite", ".json")


def main(arguments: list[str] | None = None) -> int:
    """Convert a checkpoint; returns the exit status: 1, with one sentence on stderr, for errors that the user can fix.

    arguments: those of the command line if None.
    """
    parser = argparse.ArgumentParser(prog="python -m avit_jax.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", help=".pth, .safetensors, .npz, a Hugging Face folder, or avit_jax's")
    parser.add_argument("target", metavar="OUT", help=".pth or .safetensors for PyTorch; else a folder for avit_jax")
    parser.add_argument("--preset", help="such as avit_tiny_patch16_224: architecture and gate")
    parser.add_argument("--num-classes", type=int, help="if it differs from the checkpoint's: a new head")
    parser.add_argument("--image-size", type=_image_size, help="224 or HEIGHTxWIDTH: positions are resized")
    parser.add_argument("--num-heads", type=int, help="needed if neither preset nor width determines it")
    parser.add_argument("--gate-scale", type=float, help="with --gate-center: makes an A-ViT; PyTorch files do not say")
    parser.add_argument("--gate-center", type=float)
    parser.add_argument("--pool", choices=POOLS, help="what the head reads, if the file does not say")
    parser.add_argument("--mean", type=_numbers, help="such as 0.5,0.5,0.5: subtracted from each channel (0..1)")
    parser.add_argument("--std", type=_numbers, help="such as 0.5,0.5,0.5: each channel is divided by it")
    parser.add_argument("--crop-fraction", type=float, help="the part of the resized image that the model sees")
    parser.add_argument("--interpolation", choices=INTERPOLATIONS)
    parser.add_argument("--ema", action="store_true", help="use the moving average's weights")
    options = vars(parser.parse_args(arguments))
    source, target = options.pop("source"), Path(options.pop("target"))
    preset, ema = options.pop("preset"), options.pop("ema")
    overrides: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    preprocessing = {field.name: overrides.pop(field.name, None) for field in dataclasses.fields(Preprocessing)}
    preprocessing = {name: value for name, value in preprocessing.items() if value is not None}
    if preprocessing:
        overrides["preprocessing"] = preprocessing
    try:
        if target.suffix.lower() in OTHER_FORMATS:
            raise ValueError(
                f"{target}: {target.suffix} files cannot be written: give {', '.join(TORCH_SUFFIXES)} for PyTorch, or "
                "a name without such a suffix for a folder of avit_jax"
            )
        if target.exists():
            raise ValueError(f"{target} exists already: choose another path or remove it")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
            conversion = load_conversion(source, preset, ema=ema, **overrides)
        (save_torch if target.suffix in TORCH_SUFFIXES else save)(conversion.model, target)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_conversion(conversion))
    print(f"written: {target}")
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 0.5,0.5,0.5") from None


def _image_size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor HEIGHTxWIDTH")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def format_conversion(conversion: Conversion) -> str:
    """A table with a row for every parameter: our name and shape (blocks stacked), PyTorch's name, what was done."""
    rows = [("avit_jax", "shape", "PyTorch", "")]
    total = 0
    for path, param in nnx.to_flat_state(nnx.state(conversion.model, nnx.Param)):
        name = ".".join(map(str, path))
        total += param.size
        theirs = torch_name(name, conversion.model.config.pool).replace("blocks.", "blocks.*.", 1)
        rows.append((name, "x".join(map(str, param.shape)), theirs, conversion.changed.get(name, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    config = conversion.model.config
    gate = "no gate" if config.rule_in_force is None else config.rule_in_force.describe()
    summary = f"{total:,} parameters in {len(rows) - 1} arrays; layout: {conversion.layout}; {gate}"
    return "\n".join([*lines, summary, *conversion.notes])
