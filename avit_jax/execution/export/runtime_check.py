"""Whether the ONNX Runtime that is installed here runs a file, and gives what the model gives."""

import importlib.util
from pathlib import Path

import numpy as np

from avit_jax.execution.compiled import predict
from avit_jax.model.vit import AViT
from avit_jax.runtime.text import first_line

_TOLERANCE = 1e-3  # of logits whose largest is 1; float32 stays far below it


def check_in_runtime(path: Path, model: AViT, batch_size: int | None) -> float:
    """Run a drawn batch through the file in ONNX Runtime; returns the largest difference of its logits from JAX's.

    The file must take images, not pictures. Raises ValueError if ONNX Runtime is not installed, if it lacks an operator
    or the opset, and if the logits differ.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ValueError("checking needs the package onnxruntime, which is not there: pip install onnxruntime")
    import onnxruntime

    shape = (batch_size or 2, *model.config.image_shape, model.config.in_channels)
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        found = session.run(["logits"], {"images": images})[0]
    except Exception as error:  # ONNX Runtime has a kind of error for each of its status codes
        raise ValueError(
            f"{path} is written, but ONNX Runtime {onnxruntime.__version__}, which is installed here, cannot run it: "
            f"{first_line(error)}; update it, or export with another opset (--opset)"
        ) from error
    wanted = np.asarray(predict(model, images).logits)
    difference = float(np.abs(found - wanted).max())
    if not difference <= _TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise ValueError(
            f"{path} is written, but its logits in ONNX Runtime {onnxruntime.__version__} differ from JAX's by "
            f"{difference:.3g}: do not use it there"
        )
    return difference
