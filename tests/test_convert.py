"""Weights from elsewhere: layouts, architecture, positions, heads, and back to PyTorch; without torch."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax.commands.convert import main
from avit_jax.model.positions import resize_positions
from tests.harness.builders import small_config, spread_gate

DATA = Path(__file__).parent / "data"
State = dict[str, np.ndarray]


def timm_state(*, distilled: bool = False, seed: int = 0, **changes: Any) -> State:
    """A timm state dict of 3 layers, width 16, 24 x 24 pixels, patch 8, 5 classes; no two parameters alike."""
    model = spread_gate(
        small_config(image_size=24, patch_size=8, depth=3, in_channels=3, distilled=distilled, **changes), seed
    )
    rng = np.random.default_rng(seed)
    state = avit_jax.to_torch_state_dict(model)
    return {name: value + rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in state.items()}


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(2, *(shape or (24, 24)), 3)).astype(np.float32)


def logits(state: State, **fields: Any) -> np.ndarray:
    fields = {"num_heads": 2, "gate_scale": None} | fields
    model = avit_jax.from_torch_state_dict(state, **fields)
    return np.asarray(model(images(*model.config.image_shape)).logits)


# Independent of the code under test: a ViT in NumPy, reading AugReg's names.
def augreg_logits(p: State, x: np.ndarray, patch: int, depth: int) -> np.ndarray:
    def norm(v: np.ndarray, name: str) -> np.ndarray:
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)
        return v * p[f"{name}/scale"] + p[f"{name}/bias"]

    def gelu(v: np.ndarray) -> np.ndarray:
        return v * 0.5 * (1 + np.vectorize(__import__("math").erf)(v / 2**0.5))

    rows = []
    for i in range(0, x.shape[1], patch):
        for j in range(0, x.shape[2], patch):
            cut = x[:, i : i + patch, j : j + patch]
            rows.append(np.einsum("bhwc,hwcd->bd", cut, p["embedding/kernel"]) + p["embedding/bias"])
    v = np.stack(rows, 1)
    if "cls" in p:
        v = np.concatenate([np.repeat(p["cls"], len(x), 0), v], 1)
    v = v + p["Transformer/posembed_input/pos_embedding"]
    for layer in range(depth):
        block = f"Transformer/encoderblock_{layer}"
        y = norm(v, f"{block}/LayerNorm_0")
        attention = f"{block}/MultiHeadDotProductAttention_1"
        q, k, u = (
            np.einsum("bnd,dhe->bnhe", y, p[f"{attention}/{part}/kernel"]) + p[f"{attention}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        scores = np.exp(np.einsum("bnhe,bmhe->bhnm", q, k) / q.shape[-1] ** 0.5)
        mixed = np.einsum("bhnm,bmhe->bnhe", scores / scores.sum(-1, keepdims=True), u)
        v = v + np.einsum("bnhe,hed->bnd", mixed, p[f"{attention}/out/kernel"]) + p[f"{attention}/out/bias"]
        y = norm(v, f"{block}/LayerNorm_2")
        hidden = gelu(y @ p[f"{block}/MlpBlock_3/Dense_0/kernel"] + p[f"{block}/MlpBlock_3/Dense_0/bias"])
        v = v + hidden @ p[f"{block}/MlpBlock_3/Dense_1/kernel"] + p[f"{block}/MlpBlock_3/Dense_1/bias"]
    v = norm(v, "Transformer/encoder_norm")
    return (v[:, 0] if "cls" in p else v.mean(1)) @ p["head/kernel"] + p["head/bias"]


def augreg_state(width: int = 12, heads: int = 3, depth: int = 2, classes: int = 4, patch: int = 8) -> State:
    rng = np.random.default_rng(0)
    d, mlp = width // heads, 2 * width
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, width),
        "embedding/kernel": (patch, patch, 3, width),
        "embedding/bias": (width,),
        "Transformer/posembed_input/pos_embedding": (1, 10, width),
        "Transformer/encoder_norm/scale": (width,),
        "Transformer/encoder_norm/bias": (width,),
        "head/kernel": (width, classes),
        "head/bias": (classes,),
    }
    for layer in range(depth):
        block = f"Transformer/encoderblock_{layer}"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{name}/scale": (width,), f"{block}/{name}/bias": (width,)}
        for name in ("query", "key", "value"):
            shapes[f"{block}/MultiHeadDotProductAttention_1/{name}/kernel"] = (width, heads, d)
            shapes[f"{block}/MultiHeadDotProductAttention_1/{name}/bias"] = (heads, d)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/kernel"] = (heads, d, width)
        shapes[f"{block}/MultiHeadDotProductAttention_1/out/bias"] = (width,)
        for name, a, b in (("Dense_0", width, mlp), ("Dense_1", mlp, width)):
            shapes |= {f"{block}/MlpBlock_3/{name}/kernel": (a, b), f"{block}/MlpBlock_3/{name}/bias": (b,)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def test_augreg_checkpoints_compute_what_their_authors_defined(tmp_path: Path) -> None:
    state = augreg_state()
    np.savez(tmp_path / "augreg.npz", **state)
    model = avit_jax.load(tmp_path / "augreg.npz")
    assert (model.config.num_heads, model.config.depth, model.config.mlp_ratio, model.config.image_size) == (
        3,
        2,
        2,
        24,
    )
    np.testing.assert_allclose(model(images()).logits, augreg_logits(state, images(), 8, 2), atol=1e-5)


def test_a_tanh_layer_before_the_head_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    state = augreg_state() | {"pre_logits/kernel": np.zeros((12, 12)), "pre_logits/bias": np.zeros(12)}
    with pytest.raises(ValueError, match=r"reads a tanh layer \(pre_logits\).*pass num_classes for a new head"):
        avit_jax.from_torch_state_dict(state)
    avit_jax.from_torch_state_dict(state, num_classes=4)
    assert "the head is new and untrained: the checkpoint has 4 classes behind a tanh layer" in capsys.readouterr().out


@pytest.mark.parametrize("wrapper", ["module.", "model.", "_orig_mod.", "module.model."])
def test_wrappers_of_names_change_nothing(wrapper: str) -> None:
    state = timm_state()
    wrapped = {wrapper + name: value for name, value in state.items()}
    np.testing.assert_array_equal(logits(state), logits(wrapped))


@pytest.mark.parametrize("names", [("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")])
def test_layer_scale_is_folded(names: tuple[str, str]) -> None:
    state = timm_state()
    rng = np.random.default_rng(2)
    scaled, expected = dict(state), dict(state)
    for layer in range(3):
        for name, target in zip(names, ("attn.proj", "mlp.fc2"), strict=True):
            gamma = rng.normal(1, 0.5, 16).astype(np.float32)
            scaled[f"blocks.{layer}.{name}"] = gamma
            # Row by row, as diag(gamma) times the branch's last map.
            diagonal = np.diag(gamma)
            expected[f"blocks.{layer}.{target}.weight"] = diagonal @ state[f"blocks.{layer}.{target}.weight"]
            expected[f"blocks.{layer}.{target}.bias"] = diagonal @ state[f"blocks.{layer}.{target}.bias"]
    np.testing.assert_allclose(logits(scaled), logits(expected), atol=1e-5)
    assert np.abs(logits(scaled) - logits(state)).max() > 0.01


def test_architecture_is_told_by_the_shapes() -> None:
    model = avit_jax.from_torch_state_dict(timm_state(distilled=True, qkv_bias=False), num_heads=2, gate_scale=None)
    config = model.config
    assert (config.embed_dim, config.depth, config.patch_size, config.image_size) == (16, 3, 8, 24)
    assert (config.num_classes, config.in_channels, config.distilled, config.qkv_bias) == (5, 3, True, False)
    assert not config.halts


def test_the_gate_comes_from_preset_or_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    state = timm_state()
    gated = avit_jax.from_torch_state_dict(state, num_heads=2, gate_scale=5.0, gate_center=10.0)
    assert (gated.config.gate_scale, gated.config.gate_center) == (5.0, 10.0)
    assert "never halts" not in capsys.readouterr().out
    assert not avit_jax.from_torch_state_dict(state, num_heads=2).config.halts
    assert "neither preset nor gate_scale is given: this model never halts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the number of heads is not known for width 16: give num_heads or a preset"):
        avit_jax.from_torch_state_dict(state)


def test_every_source_key_is_used_and_every_target_filled() -> None:
    state = timm_state()
    del state["norm.bias"]
    state["blocks.1.norm3.weight"] = state["surprise"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"norm3.scale is there for layers \[1\], but the model has 3 layers"):
        avit_jax.from_torch_state_dict(state, num_heads=2)
    del state["blocks.1.norm3.weight"]
    with pytest.raises(ValueError, match=r"unused \['surprise'\], unfilled \['norm.bias'\]"):
        avit_jax.from_torch_state_dict(state, num_heads=2)


def test_known_extras_are_named_in_a_warning() -> None:
    state = timm_state() | {"mask_token": np.zeros((1, 1, 16))}
    with pytest.warns(UserWarning, match="left out, because the model has no such part: mask_token"):
        with_extra = logits(state)
    np.testing.assert_array_equal(with_extra, logits(timm_state()))
    distilled = timm_state(distilled=True)
    with pytest.warns(UserWarning, match="dist_token, row 1 of pos_embed, head_dist.weight, head_dist.bias"):
        model = avit_jax.from_torch_state_dict(distilled, num_heads=2, distilled=False)
    np.testing.assert_array_equal(model.pos_embed[...], np.delete(distilled["pos_embed"], 1, axis=1))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fc_norm.weight", "two LayerNorms before its head"),
        ("norm_pre.weight", "before the first block"),
        ("blocks.0.attn.q_norm.weight", "qk-norm"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
    ],
)
def test_another_architecture_is_named(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"is unsupported \({name}\): .*{reason}"):
        avit_jax.from_torch_state_dict(timm_state() | {name: np.zeros(16)}, num_heads=2)


@pytest.mark.parametrize("name", ["conv1.weight", "layer1.0.conv1.weight"])
def test_an_unknown_layout_shows_its_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"match no known layout .*: {re.escape(name)}"):
        avit_jax.from_torch_state_dict({name: np.zeros(3)})


def test_another_number_of_classes(capsys: pytest.CaptureFixture[str]) -> None:
    state = timm_state(distilled=True)
    wanted = {"num_heads": 2, "gate_scale": None}
    tiny = avit_jax.to_torch_state_dict(avit_jax.create("deit_tiny_patch16_224", num_classes=5))
    with pytest.raises(ValueError, match=r"has 5 classes and the model 1000: pass num_classes=1000.*or num_classes=5"):
        avit_jax.from_torch_state_dict(tiny, "avit_tiny_patch16_224")
    model = avit_jax.from_torch_state_dict(state, num_classes=7, **wanted)
    assert "the head is new and untrained: the checkpoint has 5 classes, the model 7" in capsys.readouterr().out
    assert model(images()).head_logits.shape == (2, 2, 7)
    np.testing.assert_array_equal(model.head.bias[...], 0)
    without = {name: value for name, value in state.items() if not name.startswith("head")}
    headless = {name: value for name, value in tiny.items() if not name.startswith("head")}
    with pytest.raises(ValueError, match="the checkpoint has no head: pass num_classes for a new one, or 0 for none"):
        avit_jax.from_torch_state_dict(headless, "deit_tiny_patch16_224")
    assert avit_jax.from_torch_state_dict(without, num_classes=7, **wanted).config.num_classes == 7


def test_positions_without_special_tokens_and_of_other_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    state = timm_state()
    bare = state | {"pos_embed": state["pos_embed"][:, 1:]}  # timm's no_embed_class
    zero_first = state | {"pos_embed": state["pos_embed"] * (np.arange(10) > 0)[:, None]}
    np.testing.assert_array_equal(logits(bare), logits(zero_first))
    resized = avit_jax.from_torch_state_dict(state, num_heads=2, gate_scale=None, image_size=(40, 16))
    assert resized.pos_embed.shape == (1, 11, 16)
    np.testing.assert_array_equal(resized.pos_embed[0, 0], state["pos_embed"][0, 0])
    assert "pos_embed was resized from 3x3 to 5x2 patches" in capsys.readouterr().out
    crooked = state | {"pos_embed": state["pos_embed"][:, :8]}
    with pytest.raises(ValueError, match="8 position embeddings do not fit a square image: give image_size"):
        avit_jax.from_torch_state_dict(crooked, num_heads=2)
    with pytest.raises(ValueError, match="8 position embeddings fit neither the 10 tokens"):
        avit_jax.from_torch_state_dict(crooked, num_heads=2, image_size=24)


def test_resizing_keeps_constants_special_rows_and_sizes() -> None:
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(1, 2 + 12, 5)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(positions, 2, (3, 4), (3, 4)), positions)
    larger = resize_positions(positions, 2, (3, 4), (7, 5))
    assert larger.shape == (1, 2 + 35, 5)
    np.testing.assert_array_equal(larger[:, :2], positions[:, :2])
    np.testing.assert_allclose(resize_positions(np.ones_like(positions), 2, (3, 4), (9, 2)), 1, atol=1e-6)


@pytest.mark.parametrize("distilled", [False, True])
def test_back_to_pytorch_and_again(distilled: bool, tmp_path: Path) -> None:
    model = spread_gate(small_config(distilled=distilled, class_names=tuple("abcde")))
    state = avit_jax.to_torch_state_dict(model)
    assert state["patch_embed.proj.weight"].shape == (16, 2, 4, 4)
    assert state["blocks.3.attn.qkv.weight"].shape == (48, 16)
    np.testing.assert_array_equal(state["blocks.2.mlp.fc1.weight"], model.blocks.mlp.fc1.kernel[2].T)
    avit_jax.save_torch(model, tmp_path / "model.safetensors")
    again = avit_jax.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(again)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_saving_for_pytorch_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = spread_gate(small_config())
    with pytest.raises(ValueError, match="model.onnx: the suffix sets the format, give one of .safetensors, .pth"):
        avit_jax.save_torch(model, tmp_path / "model.onnx")
    (tmp_path / "there.safetensors").touch()
    with pytest.raises(ValueError, match=r"there.safetensors exists already"):
        avit_jax.save_torch(model, tmp_path / "there.safetensors")


def test_the_command_line_converts_in_both_directions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = DATA / "micro-10-30.pth", tmp_path / "model"
    gate = ["--num-heads=3", "--gate-scale=10", "--gate-center=30"]
    assert main([str(source), str(out), *gate, "--num-classes=4", "--image-size=48x32"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"head.kernel +48x4 +head.weight +new", table)
    assert re.search(r"pos_embed +1x97x48 +pos_embed +resized from 8x8 to 12x8 patches", table)
    assert "layout: timm; gate 10 / 30" in table
    assert main([str(out), str(tmp_path / "back.safetensors")]) == 0
    there, back = avit_jax.load(out), avit_jax.load(tmp_path / "back.safetensors")
    assert there.config == back.config
    np.testing.assert_array_equal(there(images(48, 32)).logits, back(images(48, 32)).logits)


def test_flags_of_the_command_line_change_the_preprocessing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, flags = str(DATA / "micro-10-30.pth"), ["--num-heads=3"]
    assert main([source, str(tmp_path / "assumed"), *flags]) == 0
    out = capsys.readouterr().out
    assert "the file does not say, so DeiT's values are assumed (timm's AugReg ViTs expect mean and std 0.5" in out
    assert "the file does not say what its head reads: the class token is assumed" in out
    flags += ["--mean=0.5,0.4,0.3", "--crop-fraction=0.9", "--interpolation=bilinear", "--pool=norm_mean"]
    assert main([source, str(tmp_path / "given"), *flags]) == 0
    assert "does not say" not in capsys.readouterr().out
    config = avit_jax.load(tmp_path / "given").config
    seen = config.preprocessing
    assert (seen.mean, seen.std, seen.crop_fraction) == ((0.5, 0.4, 0.3), (0.229, 0.224, 0.225), 0.9)
    assert (seen.interpolation, config.pool) == ("bilinear", "norm_mean")
    assert main([str(tmp_path / "given"), str(tmp_path / "again"), "--crop-fraction=0.5"]) == 0
    again = avit_jax.load(tmp_path / "again").config.preprocessing
    assert (again.mean, again.crop_fraction) == ((0.5, 0.4, 0.3), 0.5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{}/nothing.pth", "{}/out"], "the file is missing, and nothing is downloaded"),
        (["google/vit-base-patch16-224", "{}/out"], "run `hf download google/vit-base-patch16-224 --local-dir DIR`"),
        (["{}/micro-10-30.pth", "{}/out.onnx"], "out.onnx: .onnx files cannot be written: give .pth"),
        (["{}/micro-10-30.pth", "{}/out", "--num-heads=3", "--std=0,1,1"], "give a number above 0 for every channel"),
        (["{}/README.md", "{}/out"], "README.md cannot be read as a checkpoint: it is neither"),
        (["{}/micro-10-30.pth", "{}"], "exists already"),
        (["{}/micro-10-30.pth", "{}/out"], "the number of heads is not known for width 48"),
        (["{}/micro-10-30.pth", "{}/out", "--preset=avit_tinny_patch16_224"], "did you mean 'avit_tiny_patch16_224'"),
        (["{}/micro-10-30.pth", "{}/out", "--num-heads=3", "--image-size=30"], "not divisible by patch_size 4"),
        (["{}/micro-10-30.pth", "{}/out", "--num-heads=3", "--ema"], "no moving average: leave ema out"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(DATA) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert not (DATA / "out").exists()
    assert not (DATA / "out.onnx").exists()


def test_a_place_that_cannot_be_written_to_is_one_sentence(model: avit_jax.AViT) -> None:
    for name in ("/proc/nothing/x.safetensors", "/proc/x.safetensors"):
        with pytest.raises(ValueError, match=r"/proc.* cannot be written to .*: give another folder"):
            avit_jax.save_torch(model, name)


def test_more_positions_than_any_image_has_are_refused() -> None:
    state = timm_state()
    state["pos_embed"] = np.broadcast_to(np.float32(0), (1, 2**20 + 1, state["pos_embed"].shape[-1]))
    with pytest.raises(ValueError, match=r"pos_embed has shape \(1, 1048577, 16\): at most 131072 tokens are allowed"):
        avit_jax.from_torch_state_dict(state, num_heads=2)
