"""Against PyTorch and Hugging Face, live: needs requirements-peers.txt, skipped without."""

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import avit_jax
from avit_jax.checkpoints.convert.weight_files import read_weight_file
from avit_jax.model.positions import resize_positions
from tests.harness.builders import answers, small_config, spread_gate
from tests.harness.peers import import_peer

torch = pytest.importorskip("torch")
transformers = import_peer("transformers")

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
PLAIN, TEACHER, SINGLE = (
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForImageClassification",
)


@functools.lru_cache(maxsize=3)
def hugging_face(kind: str, size: str, image_size: int) -> Any:
    width, heads = SIZES[size]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": 12 if size == "tiny" else 3,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "image_size": image_size,
        "layer_norm_eps": 1e-6,
        "num_labels": 11,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = (transformers.ViTConfig if kind == PLAIN else transformers.DeiTConfig)(**fields)
        model = getattr(transformers, kind)(config).eval()
    for parameter in model.parameters():  # biases and positions begin at zero, where a mistake would not show
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def compare(model: Any, path: Path, image_size: int, atol: float) -> None:
    x = np.random.default_rng(0).normal(size=(2, image_size, image_size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    ours = avit_jax.load(path, gate_scale=None, norm_epsilon=1e-6)
    assert ours.config.image_size == image_size
    np.testing.assert_allclose(answers(ours, x).logits, expected, atol=atol)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("kind", [PLAIN, TEACHER, SINGLE])
def test_tiny_models_have_the_same_logits(kind: str, form: str, tmp_path: Path) -> None:
    model = hugging_face(kind, "tiny", 224)
    path = tmp_path / f"model.{form}"
    if form == "safetensors":
        __import__("safetensors.torch").torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    compare(model, path, 224, 1e-5)


@pytest.mark.parametrize(
    ("size", "image_size", "kind"),
    [
        ("tiny", 384, PLAIN),
        ("small", 224, TEACHER),
        ("small", 384, SINGLE),
        ("base", 224, PLAIN),
        ("base", 384, TEACHER),
    ],
)
def test_larger_models_have_the_same_logits(size: str, image_size: int, kind: str, tmp_path: Path) -> None:
    """Except for tiny, three layers: all layers are one program, whose width is what differs."""
    model = hugging_face(kind, size, image_size)
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "model.pth")
    compare(model, tmp_path / "model.pth", image_size, 1e-5 if size == "tiny" else 1e-4)


def test_dinov2s_layer_scale(tmp_path: Path) -> None:
    """Hugging Face's own Dinov2 gives the class token after the last LayerNorm; an identity head shows ours."""
    width = 32
    config = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=4,
        image_size=28,
        patch_size=14,
        layer_norm_eps=1e-6,
        layerscale_value=0.7,
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2))).last_hidden_state[:, 0].numpy()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    state |= {"classifier.weight": np.eye(width, dtype=np.float32), "classifier.bias": np.zeros(width, np.float32)}
    with pytest.warns(UserWarning, match="embeddings.mask_token"):
        ours = avit_jax.from_torch_state_dict(state, num_heads=2, gate_scale=None)
    np.testing.assert_allclose(ours(x).logits, expected, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("special", [1, 2])
@pytest.mark.parametrize(
    ("source", "target"),
    [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((14, 14), (10, 31)), ((7, 5), (1, 12)), ((3, 3), (3, 9))],
)
def test_positions_are_resized_as_pytorch_does(
    source: tuple[int, int], target: tuple[int, int], special: int, antialias: bool
) -> None:
    positions = np.random.default_rng(0).normal(size=(1, special + source[0] * source[1], 8)).astype(np.float32)
    grid = torch.from_numpy(positions[:, special:].reshape(1, *source, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=target, mode="bicubic", antialias=antialias)
    resized = resize_positions(positions, special, source, target, antialias=antialias)
    np.testing.assert_allclose(resized[:, special:], expected.permute(0, 2, 3, 1).reshape(1, -1, 8), atol=1e-5)
    np.testing.assert_array_equal(resized[:, :special], positions[:, :special])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("distilled", [False, True])
def test_what_we_write_pytorch_loads_strictly_and_gives_back(suffix: str, distilled: bool, tmp_path: Path) -> None:
    model = spread_gate(small_config(distilled=distilled))
    avit_jax.save_torch(model, tmp_path / f"ours{suffix}")
    ours = avit_jax.to_torch_state_dict(model)

    class Holder(torch.nn.Module):
        """Parameters under timm's names: what load_state_dict(strict=True) compares with."""

        def __init__(self) -> None:
            super().__init__()
            for name, value in ours.items():
                *parents, leaf = name.split(".")
                module: Any = self
                for parent in parents:
                    if not hasattr(module, parent):
                        module.add_module(parent, torch.nn.Module())
                    module = getattr(module, parent)
                module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(value.shape)))

    holder = Holder()
    if suffix == ".pth":
        state = torch.load(tmp_path / "ours.pth", weights_only=True)
    else:
        state = __import__("safetensors.torch").torch.load_file(tmp_path / "ours.safetensors")
    holder.load_state_dict(state, strict=True)
    torch.save({"model": holder.state_dict()}, tmp_path / "theirs.pth")
    for name, value in read_weight_file(tmp_path / "theirs.pth").state.items():
        np.testing.assert_array_equal(value, ours[name])
    again = avit_jax.load(tmp_path / f"ours{suffix}")
    assert again.config == model.config
    theirs = avit_jax.load(tmp_path / "theirs.pth", num_heads=2, image_size=(12, 8), gate_scale=4.0, gate_center=1.0)
    for loaded in (again, theirs):
        for name, value in avit_jax.to_torch_state_dict(loaded).items():
            np.testing.assert_array_equal(value, ours[name])


@pytest.mark.parametrize("average", ["model_ema", "state_dict_ema"])
def test_an_argument_chooses_between_raw_and_average(average: str, tmp_path: Path, capsys: Any) -> None:
    raw, ema = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    torch.save({"model": raw, average: ema, "optimizer": {"state": {}}}, tmp_path / "both.pth")
    torch.save({average: ema}, tmp_path / "average.pth")
    np.testing.assert_array_equal(read_weight_file(tmp_path / "both.pth").state["w"], 0)
    np.testing.assert_array_equal(read_weight_file(tmp_path / "both.pth", ema=True).state["w"], 1)
    alone = read_weight_file(tmp_path / "average.pth")
    np.testing.assert_array_equal(alone.state["w"], 1)
    assert alone.notes == [f"it has only the moving average ({average}), which is used"]
