"""Images per second of exported models on a CPU: ONNX Runtime and OpenVINO, dense and adaptive, float32 and int8.

    python benchmarks/export.py                                    everything
    python benchmarks/export.py --models=tiny --batches=1 --only=ONNX --rounds=5

Weights are random, and the images determine the depths (benchmarks/drawn.py): the published mean depth of 0.60 of 12
layers for Tiny and 0.78 for Small. "adaptive" is avit_jax.export of the A-ViT, "dense" of the same weights without the
gate, and "step 32" rounds numbers of tokens up to a multiple of 32. int8 is onnxruntime.quantization: dynamic for ONNX
Runtime, static (QDQ) for OpenVINO. Beside them run PyTorch's eager dense DeiT and packed execution of this project.
All variants of a batch size run in turn in one process, each on a cycle of different images; medians are reported.
Writes runs/benchmarks/export.json.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

import avit_jax
from avit_jax import PRESETS, AViT
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import available_cores, data_mesh, use_all_cores
from benchmarks.drawn import dense_parts, drawn_images, drawn_model
from benchmarks.results import save_results
from benchmarks.throughput import MODELS, Profile, Variant, measure, packed_variant

IMAGES = 64  # drawn for each model; they run in turn


class _Calibration(CalibrationDataReader):
    def __init__(self, images: np.ndarray) -> None:
        self.feeds = iter([{"images": image[None]} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next image as the quantiser feeds it; None at the end."""
        return next(self.feeds, None)


def in_int8(path: Path, static: bool, images: np.ndarray) -> Path:
    """The file with the linear layers of its blocks in int8 by ONNX Runtime's quantiser.

    Attention, gate and patch embedding stay in float32: the drawn depths are in the mean of each patch.
    """
    result = path.with_suffix(".static.onnx" if static else ".dynamic.onnx")
    first = ["embed/MatMul"]
    if static:
        options = {"MatMulConstBOnly": True}
        quantize_static(
            path,
            result,
            _Calibration(images),
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=first,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )
    else:
        quantize_dynamic(path, result, op_types_to_quantize=["MatMul"], nodes_to_exclude=first, per_channel=True)
    return result


def onnx_runtime(path: Path) -> Callable[[np.ndarray], Any]:
    """A function that runs images in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cores()
    # Otherwise its threads keep spinning after a run and take the cores from whatever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": np.asarray(images)})


def openvino(path: Path) -> Callable[[np.ndarray], Any]:
    """A function that runs images in OpenVINO, in float32 where the file is (its CPU default may be bfloat16)."""
    from openvino import Core

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = Core().compile_model(str(path), "CPU", hints | {"INFERENCE_NUM_THREADS": available_cores()})
    request = compiled.create_infer_request()
    return lambda images: request.infer({"images": images})


def variants(name: str, batch: int, folder: Path) -> Iterator[Variant]:
    """Everything that is measured for a model and a batch size."""
    preset, fraction = MODELS[name]
    config = dataclasses.replace(PRESETS[preset], gate_scale=40.0, gate_center=20.0)
    profile = Profile("published", fraction)
    model = drawn_model(config, profile.class_depth(config))
    images = drawn_images(config, profile.depths(config)[:IMAGES])
    calibration = drawn_images(config, profile.depths(config)[-8:])

    def cycled(run: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
        batches = itertools.cycle(np.split(images, IMAGES // batch))
        return lambda: run(next(batches))

    def written(kind: str, model: AViT, **options: Any) -> Path:
        path = folder / f"{name}-{batch}-{kind.replace(' ', '-')}.onnx"
        avit_jax.export(model, path, batch_size=1 if batch == 1 else None, **options)
        return path

    files = {
        "dense": written("dense", dense_parts(model)),
        "adaptive": written("adaptive", model),
        "adaptive, step 32": written("step 32", model, count_step=32),
    }
    eager = _eager(config)
    yield Variant("PyTorch eager, dense", batch, cycled(lambda images: eager(_channels_first(images))))
    by_torch = onnx_runtime(_exported_by_torch(eager, _channels_first(images[:batch]), folder))
    yield Variant(
        "ONNX Runtime, dense, PyTorch's file", batch, cycled(lambda images: by_torch(_channels_first(images)))
    )
    yield packed_variant("packed, adaptive", model, images[:batch], data_mesh(batch))
    for kind, path in files.items():
        if "step" not in kind:
            yield Variant(f"ONNX Runtime, {kind}", batch, cycled(onnx_runtime(path)))
            yield Variant(f"ONNX Runtime, {kind}, int8", batch, cycled(onnx_runtime(in_int8(path, False, calibration))))
        if importlib.util.find_spec("openvino"):
            yield Variant(f"OpenVINO, {kind}", batch, cycled(openvino(path)))
            yield Variant(f"OpenVINO, {kind}, int8", batch, cycled(openvino(in_int8(path, True, calibration))))


def _eager(config: avit_jax.AViTConfig) -> Any:
    import torch

    from benchmarks.torch_vit import torch_vit

    torch.set_num_threads(available_cores())
    torch.set_grad_enabled(False)
    return torch_vit(config).eval()


def _channels_first(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _exported_by_torch(model: Any, images: Any, folder: Path) -> Path:
    import torch

    path = folder / "torch.onnx"
    torch.onnx.export(model, (images,), str(path), input_names=["images"], opset_version=17, dynamo=False)
    return path


def _mean_depth(variant: Variant) -> float:
    """The mean token depth of all images: int8 may change it."""
    outputs = [variant.run() for _ in range(IMAGES // variant.batch)]
    if hasattr(outputs[0], "token_depth"):  # packed execution has one batch
        return float(np.mean(outputs[0].token_depth))
    return float(np.mean([list(output.values() if hasattr(output, "values") else output)[1] for output in outputs]))


def main() -> None:
    """Print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny,small", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,16", type=lambda text: [int(b) for b in text.split(",")])
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    use_all_cores()
    logging.disable(logging.WARNING)  # the quantiser advises its own preprocessing
    where = machine()
    print(where)
    rows: list[dict[str, Any]] = []
    for name, batch in itertools.product(options.models, options.batches):
        with tempfile.TemporaryDirectory() as folder:
            measured = [v for v in variants(name, batch, Path(folder)) if options.only in v.name]
            measure(measured, options.rounds)
            depths = {variant.name: _mean_depth(variant) for variant in measured if "adaptive" in variant.name}
        speed = {variant.name: variant.images_per_second for variant in measured}
        for variant, found in speed.items():
            dense = speed.get(variant.replace("adaptive, step 32", "dense").replace("adaptive", "dense"))
            row: dict[str, Any] = {"model": name, "batch": batch, "variant": variant, "images_per_second": found}
            rows.append(row | ({"to_dense": found / dense} if dense else {}))
            ratio = f"  {found / dense:.2f} x dense" if dense else ""
            depth = f"  mean depth {depths[variant]:.2f}" if variant in depths else ""
            print(f"{name:6} {batch:3}  {variant:36} {found:7.1f} images/s{ratio}{depth}")
    save_results(Path("runs/benchmarks/export.json"), {"machine": where, "rows": rows})


if __name__ == "__main__":
    main()
