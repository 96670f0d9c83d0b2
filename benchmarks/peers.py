"""What a user would use instead of this project: the dense DeiT in eager PyTorch, torch.compile, ONNX Runtime."""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from avit_jax import AViTConfig
from avit_jax.runtime.mesh import available_cores


def compiled_peer(model_config: AViTConfig, images: np.ndarray, device: str) -> tuple[Callable[[], Any], float]:
    """A function that runs these images through torch.compile in bfloat16, and the seconds to prepare it.

    device: "cpu", or "cuda" with kernels chosen by measurement and recorded as a CUDA graph. Weights are random.
    """
    import torch

    from benchmarks.torch_vit import torch_vit

    began = time.perf_counter()
    model = torch_vit(model_config).eval().to(device, torch.bfloat16)
    mode = "max-autotune" if device == "cuda" else "default"
    compiled = torch.compile(model, mode=mode, dynamic=False)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device, torch.bfloat16)

    def run() -> Any:
        with torch.inference_mode():
            logits = compiled(x)
        if device == "cuda":
            torch.cuda.synchronize()
        return logits

    for _ in range(3):  # the first calls compile and record
        run()
    return run, time.perf_counter() - began


def peers(model_config: AViTConfig, images: np.ndarray) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """(name, a function that runs these images, seconds to prepare) for each installed peer, with random weights."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    from benchmarks.torch_vit import torch_vit

    torch.set_num_threads(available_cores())
    torch.manual_seed(0)
    model = torch_vit(model_config).eval()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def eager() -> Any:
        with torch.inference_mode():
            return model(x)

    yield "PyTorch eager", eager, 0.0
    yield "torch.compile, bfloat16", *compiled_peer(model_config, images, "cpu")

    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        return
    import onnxruntime

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vit.onnx"
        torch.onnx.export(model, (x,), str(path), input_names=["x"], opset_version=17, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = available_cores()
        # Otherwise its threads keep spinning after a run and take the cores from whatever is measured next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    np.testing.assert_allclose(session.run(None, feed)[0], eager().numpy(), atol=1e-3)
    yield "ONNX Runtime", lambda: session.run(None, feed), time.perf_counter() - began
