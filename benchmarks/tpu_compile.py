"""Compile the train step and packed evaluation for real TPU topologies, without chips: memory, collectives, time.

    pip install -r requirements-tpu.txt
    python benchmarks/tpu_compile.py                            everything, about 40 minutes of one core
    python benchmarks/tpu_compile.py --models=tiny --topologies=v5e:2x4 --programs=train,fsdp

libtpu's compiler runs on this machine's CPU; nothing runs on a TPU. Memory is what the compiler reserves on a chip, and
collectives are those of the program. The train step is that of configs/imagenet_avit.py (bfloat16, remat, mixup, EMA),
with its batch of 1024 on one chip (in parts) and on v5e:2x4, and of 4096 on v5e:16x16; "fsdp" splits the state over 4
chips. Packed evaluation has 256 images per chip, or 128 with Base. It is an error if a program does not fit into a v5e
chip's 16 GB, or if anything but gradients, scalars, [L] statistics and (fsdp) parameters crosses chips. Writes
runs/benchmarks/tpu_compile.json, row by row, and keeps the rows of earlier runs with the same compiler.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from avit_jax.commands.typed_config import parse
from avit_jax.model.presets import config_from
from avit_jax.runtime.files import write_json
from avit_jax.train.settings import TrainSettings
from configs import imagenet_avit
from tests.harness.collectives import said
from tests.harness.tpu_programs import (
    bytes_needed,
    check_crossing,
    compile_packed_evaluation,
    compile_train_step,
    model_of,
    topology_mesh,
)

GLOBAL_BATCH = {"v5e:1x1": 1024, "v5e:2x4": 1024, "v5e:16x16": 4096}
IMAGES_AT_ONCE = {"tiny": 256, "small": 256, "base": 128}  # on a chip; larger batches are processed in parts
FSDP = 4
CHIP_BYTES = 16e9  # of a v5e
OUT = Path("runs/benchmarks/tpu_compile.json")


def experiment(size: str, topology: str) -> TrainSettings:
    """configs/imagenet_avit.py at a sensible batch size, in parts if there are too many images for a chip."""
    config = imagenet_avit.get_config(size)
    config.batch_size = GLOBAL_BATCH[topology]
    config.accumulation = max(1, config.batch_size // (topology_mesh(topology).size * IMAGES_AT_ONCE[size]))
    return parse(config)


def compiled_row(program: str, size: str, topology: str) -> dict[str, Any]:
    """Compile one program and report it. Raises ValueError if it needs too much memory or communication."""
    fsdp = FSDP if program == "fsdp" else 1
    mesh = topology_mesh(topology, fsdp)
    began = time.perf_counter()
    if program == "packed":
        model = config_from(f"avit_{size}_patch16_224", dtype="bfloat16")
        images, parts, allowed = IMAGES_AT_ONCE[size], 1, set[str]()
        compiled = compile_packed_evaluation(model, images, mesh)
    else:
        settings = experiment(size, topology)
        model, images, parts = model_of(settings), settings.batch_size // mesh.size, settings.accumulation
        allowed = {"gradients", "scalars", "statistics", "counts"} | ({"parameters"} if fsdp > 1 else set())
        compiled = compile_train_step(settings, mesh)
    seconds = time.perf_counter() - began
    row = {"program": program, "model": size, "topology": topology, "images_a_chip": images, "parts": parts}
    needed = bytes_needed(compiled)
    if needed > CHIP_BYTES:
        raise ValueError(f"{row} needs {needed / 1e9:.1f} GB per chip, but there are only {CHIP_BYTES / 1e9:.0f}")
    crossing = check_crossing(compiled, model, allowed, fsdp)
    print(
        f"{program:8}{size:7}{topology:11}{images:6}{parts:6}{needed / 1e9:9.2f}{seconds:8.0f}   {said(crossing)}",
        flush=True,
    )
    return row | {"gigabytes": needed / 1e9, "compile_seconds": seconds, "crossing": crossing}


def main() -> None:
    """Compile, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--models", default=list(IMAGES_AT_ONCE), type=several)
    parser.add_argument("--topologies", default=list(GLOBAL_BATCH), type=several)
    parser.add_argument("--programs", default=["train", "fsdp", "packed"], type=several)
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    earlier = json.loads(OUT.read_text()) if OUT.is_file() else {}
    rows = earlier.get("rows", []) if earlier.get("versions") == versions else []
    OUT.parent.mkdir(parents=True, exist_ok=True)
    print("program model  topology   images parts GB a chip seconds   what crosses chips in a step")
    for size in options.models:
        for topology in options.topologies:
            for program in options.programs:
                if program == "fsdp" and topology.endswith("1x1"):
                    continue
                row = compiled_row(program, size, topology)
                named = ("program", "model", "topology")
                rows = [other for other in rows if any(other[name] != row[name] for name in named)] + [row]
                write_json(OUT, {"versions": versions, "rows": rows})
    print(f"written: {OUT}")


if __name__ == "__main__":
    main()
