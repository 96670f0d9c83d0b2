"""Checkpoints by the literal names and shapes of published files (tests/data/names), against the architectures."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import avit_jax
from avit_jax.checkpoints.convert import convert
from avit_jax.commands import evaluate_checkpoint as checkpoint_evaluation
from avit_jax.commands.config_files import load_config
from avit_jax.commands.convert import main
from tests.harness.peers import import_peer
from tests.harness.published_names import NAMES, images, published_state
from tests.test_convert import augreg_logits

IMAGENET, HALF = (0.485, 0.456, 0.406), (0.5, 0.5, 0.5)
# family: kind of head, registers, class token, classes, LayerNorm's epsilon, mean, crop, interpolation
EXPECTED: dict[str, tuple[Any, ...]] = {
    "augreg": ("token", 0, True, 5, 1e-6, HALF, 0.9, "bicubic"),
    "augreg_gap": ("norm_mean", 0, False, 5, 1e-6, HALF, 0.9, "bicubic"),
    "deit3": ("token", 0, True, 5, 1e-6, IMAGENET, 1.0, "bicubic"),
    "deit_distilled": ("token", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dino": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dino_checkpoint": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dinov2": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dinov2_chunks": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dinov2_classifier": ("token_and_mean", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "dinov2_registers": ("token", 4, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "huggingface_deit": ("token", 0, True, 5, 1e-12, IMAGENET, 0.875, "bicubic"),
    "huggingface_deit_teacher": ("token", 0, True, 5, 1e-12, IMAGENET, 0.875, "bicubic"),
    "huggingface_dinov2": ("token_and_mean", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "huggingface_dinov2_backbone": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "huggingface_dinov2_registers": ("token_and_mean", 4, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "huggingface_vit": ("token", 0, True, 5, 1e-12, HALF, 1.0, "bilinear"),
    "huggingface_vit_backbone": ("token", 0, True, 0, 1e-12, HALF, 1.0, "bilinear"),
    "mae_pretrain": ("token", 0, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_deit3": ("token", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_fc_norm": ("mean_norm", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_gap": ("norm_mean", 0, False, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_registers": ("token", 4, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_registers_no_embed_class": ("token", 4, True, 0, 1e-6, IMAGENET, 0.875, "bicubic"),
    "timm_vit": ("token", 0, True, 5, 1e-6, IMAGENET, 0.875, "bicubic"),
    "torchvision": ("token", 0, True, 5, 1e-6, IMAGENET, 0.875, "bilinear"),
    "torchvision_old": ("token", 0, True, 5, 1e-6, IMAGENET, 0.875, "bilinear"),
}
REFUSED = {"timm_vit_old": "tanh layer", "augreg_pre_logits": "tanh layer"}
# What a file under these names cannot tell.
IN_DOUBT = {"timm_vit", "timm_deit3", "timm_fc_norm", "timm_gap", "timm_registers", "timm_registers_no_embed_class"}
IN_DOUBT |= {"dino", "dino_checkpoint", "torchvision", "torchvision_old", "huggingface_vit", "huggingface_vit_backbone"}


def loaded(state: dict[str, np.ndarray], **fields: Any) -> Any:
    """The conversion, without warnings about what was left out."""
    fields = {"image_size": 24} | fields  # 9 rows may be of 2x2 patches and 5 other tokens; no published size is so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(dict(state), **({"num_heads": 2, "gate_scale": None} | fields))


def test_every_family_is_expected_or_refused() -> None:
    assert {path.stem for path in NAMES.glob("*.txt")} == EXPECTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("family", EXPECTED)
def test_published_names_tell_the_model(family: str) -> None:
    conversion = loaded(published_state(family))
    config = conversion.model.config
    seen = config.preprocessing
    found = (config.pool, config.num_registers, config.class_token, config.num_classes, config.norm_epsilon)
    assert (*found, seen.mean, seen.crop_fraction, seen.interpolation) == EXPECTED[family]
    assert (config.embed_dim, config.depth, config.patch_size, config.image_size) == (24, 2, 8, 24)
    assert config.distilled == (family in ("deit_distilled", "huggingface_deit", "huggingface_deit_teacher"))
    (line,) = [note for note in conversion.notes if note.startswith("preprocessing: ")]
    assert ("does not say" in line) == (family in IN_DOUBT)
    head_in_doubt = family in ("timm_vit", "timm_deit3", "timm_registers")
    assert any("does not say what its head reads" in note for note in conversion.notes) == head_in_doubt


@pytest.mark.parametrize("family", REFUSED)
def test_other_published_names_are_refused_with_the_reason(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]):
        loaded(published_state(family))


@pytest.mark.parametrize("family", ["timm_vit", "huggingface_vit", "torchvision", "huggingface_vit_backbone"])
@pytest.mark.parametrize("prefix", ["net.", "encoder.", "student.backbone.", "module.model.vision.0."])
def test_any_common_prefix_comes_off(family: str, prefix: str) -> None:
    state = published_state(family)
    plain = avit_jax.to_torch_state_dict(loaded(state).model)
    prefixed = avit_jax.to_torch_state_dict(loaded({prefix + name: value for name, value in state.items()}).model)
    assert plain.keys() == prefixed.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(value, prefixed[name])


def test_torchs_averaged_model_loads_without_its_counter() -> None:
    state = published_state("timm_vit")
    averaged = {f"module.{name}": value for name, value in state.items()} | {"n_averaged": np.array(3)}
    model = loaded(averaged).model
    np.testing.assert_array_equal(model(images()).logits, loaded(state).model(images()).logits)


def test_a_model_without_learned_positions_is_refused_by_name() -> None:
    state = {name: value for name, value in published_state("timm_vit").items() if name != "pos_embed"}
    with pytest.raises(ValueError, match="pos_embed is missing: its architecture has no learned positions"):
        convert(state, num_heads=2)


def test_a_teacher_is_taken_before_its_student_and_other_models_are_not_guessed() -> None:
    teacher, student = published_state("dino"), published_state("dino", seed=1)
    both = {f"student.backbone.{n}": v for n, v in student.items()}
    both |= {f"teacher.backbone.{n}": v for n, v in teacher.items()}
    conversion = loaded(both)
    np.testing.assert_array_equal(conversion.model.cls_token[...], teacher["cls_token"])
    assert "the student's weights were left out" in conversion.notes
    two = {f"a.{n}": v for n, v in student.items()} | {f"b.{n}": v for n, v in teacher.items()}
    with pytest.raises(ValueError, match=r"it holds 2 models, under a\., b\.: keep one of them"):
        loaded(two)
    with pytest.raises(ValueError, match=r"is under 'net.', but it has 1 more tensors: projector.weight"):
        loaded({f"net.{n}": v for n, v in teacher.items()} | {"projector.weight": np.zeros((3, 3))})


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["visual.conv1.weight", "visual.class_embedding", "logit_scale"], "CLIP"),
        (["module.visual.transformer.resblocks.0.ln_1.weight"], "CLIP"),
        (["vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm.weight"], "CLIP"),
        (["vision_model.embeddings.patch_embedding.weight", "vision_model.head.probe"], "SigLIP"),
        (["visual.trunk.patch_embed.proj.weight", "visual.trunk.attn_pool.latent"], "SigLIP"),
        (["visual.trunk.patch_embed.proj.weight", "text.positional_embedding"], "OpenCLIP"),
        (["patch_embed.proj.weight", "blocks.0.attn.relative_position_bias_table"], "BEiT"),
        (["beit.embeddings.patch_embeddings.projection.weight"], "BEiT"),
        (["patch_embed.proj.weight", "layers.0.blocks.0.attn.relative_position_bias_table"], "Swin"),
        (["swin.embeddings.patch_embeddings.projection.weight"], "Swin"),
        (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "ConvNeXt"),
        (["patch_embed.proj.weight", "blocks_token_only.0.norm1.weight"], "CaiT"),
        (["embeddings.patch_embeddings.weight", "layer.0.norm1.weight"], "DINOv3"),
        (["patch_embed.proj.weight", "blocks.0.mlp.w12.weight"], "SwiGLU"),
        (["embeddings.patch_embeddings.projection.weight", "encoder.layer.0.mlp.weights_in.weight"], "SwiGLU"),
        (["patch_embed.proj.weight", "blocks.0.attn.q_norm.weight"], "qk-norm"),
        (["patch_embed.backbone.stem.conv.weight", "patch_embed.proj.weight"], "hybrid"),
        (["conv_root/kernel", "embedding/kernel"], "hybrid"),
        (["params/embedding/kernel", "params/MAPHead_0/probe"], "pools with attention"),
    ],
)
def test_another_architecture_is_refused_by_its_name(names: list[str], architecture: str) -> None:
    with pytest.raises(ValueError, match=f"its architecture is unsupported .*{architecture}"):
        loaded({name: np.zeros((2, 2), np.float32) for name in names})


def test_a_gated_mlp_is_told_by_its_shapes_where_names_are_plain() -> None:
    state = published_state("timm_vit")
    for layer in range(2):
        state[f"blocks.{layer}.mlp.fc2.weight"] = np.zeros((24, 48), np.float32)
    with pytest.raises(ValueError, match="gated"):
        loaded(state)


def test_a_classifier_on_several_layers_is_refused() -> None:
    state = published_state("dinov2_classifier") | {"linear_head.weight": np.zeros((5, 5 * 24), np.float32)}
    with pytest.raises(ValueError, match=r"its head reads 120 features, 5 times the width \(DINOv2's classifier"):
        loaded(state)


@pytest.mark.parametrize("name", ["blocks.99999.norm1.weight", "blocks.999999999.norm1.weight"])
def test_a_layer_number_alone_takes_no_memory(name: str) -> None:
    state = published_state("timm_vit") | {name: np.zeros(24, np.float32)}
    with pytest.raises(ValueError, match=r"layers reach up to blocks.99999, but blocks.2 is missing|unused"):
        loaded(state)


@pytest.mark.parametrize("family", ["augreg", "huggingface_dinov2_registers"])
def test_tensors_of_other_shapes_are_one_sentence(family: str) -> None:
    state = published_state(family)
    shapes: list[tuple[int, ...]] = [(), (0,), (2, 2), (1, 0, 24), (24, 3, 8, 8, 1)]
    for number, name in enumerate(name for name in state if not name.endswith("mask_token")):
        for shape in (shapes[number % 5], shapes[(number + 1) % 5]):
            with pytest.raises(ValueError, match=r"^.{10,1000}$"):
                loaded(state | {name: np.zeros(shape, np.float32)})


def test_too_many_tensors_are_refused_before_their_names_are_read() -> None:
    state = published_state("timm_vit") | {f"x.{i}": np.zeros(1, np.float32) for i in range(10_000)}
    with pytest.raises(ValueError, match="tensors: no vision transformer has more than 10000"):
        loaded(state)


def test_preprocessing_asked_for_replaces_what_was_published() -> None:
    state = published_state("augreg")
    changed = loaded(state, preprocessing={"crop_fraction": 0.5}).model.config.preprocessing
    assert (changed.mean, changed.crop_fraction) == (HALF, 0.5)
    whole = loaded(state, preprocessing=avit_jax.Preprocessing())
    assert whole.model.config.preprocessing.mean == IMAGENET
    assert not any(note.startswith("preprocessing: ") for note in whole.notes)
    with pytest.raises(ValueError, match="preprocessing is .*: give some of crop_fraction, interpolation, mean, std"):
        loaded(state, preprocessing={"crop": 0.5})


def test_a_preset_leaves_the_layouts_preprocessing_and_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = avit_jax.AViTConfig(24, 8, 3, 5, 24, 2, 2, gate_scale=4.0, gate_center=1.0)
    monkeypatch.setitem(avit_jax.PRESETS, "avit_here", preset)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = convert(published_state("huggingface_vit"), "avit_here").model.config
        registers = convert(published_state("dinov2_registers"), "avit_here", num_classes=0).model.config
    assert (config.preprocessing.mean, config.norm_epsilon, config.gate_scale) == (HALF, 1e-12, 4.0)
    assert (registers.num_registers, registers.gate_scale, registers.preprocessing.mean) == (4, 4.0, IMAGENET)


def torch_images() -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(images().transpose(0, 3, 1, 2).copy())


def as_torch(state: dict[str, np.ndarray]) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    return {name: torch.from_numpy(value.copy()) for name, value in state.items()}


CLASSIFIER = {
    "huggingface_vit": ("ViTForImageClassification", "ViTConfig", 1e-12),
    "huggingface_deit": ("DeiTForImageClassification", "DeiTConfig", 1e-12),
    "huggingface_deit_teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", 1e-12),
    "huggingface_dinov2": ("Dinov2ForImageClassification", "Dinov2Config", 1e-6),
    "huggingface_dinov2_registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        1e-6,
    ),
    "huggingface_vit_backbone": ("ViTModel", "ViTConfig", 1e-12),
    "huggingface_dinov2_backbone": ("Dinov2Model", "Dinov2Config", 1e-6),
}


@pytest.mark.parametrize("family", CLASSIFIER)
def test_hugging_face_folders_and_files_give_its_logits(family: str, tmp_path: Path) -> None:
    """Published names, read by transformers itself and by us; what it writes again, in memory and on disk, too."""
    torch, transformers = pytest.importorskip("torch"), import_peer("transformers")
    kind, config, epsilon = CLASSIFIER[family]
    fields: dict[str, Any] = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "image_size": 24,
        "patch_size": 8,
        "layer_norm_eps": epsilon,
    }
    if not family.endswith("backbone"):
        fields["id2label"] = {i: name for i, name in enumerate(("cat", "dog", "owl", "cow", "ant"))}
    getattr(transformers, config)(**fields, architectures=[kind]).save_pretrained(tmp_path / "published")
    safetensors.numpy.save_file(
        published_state(family), tmp_path / "published" / "model.safetensors", metadata={"format": "pt"}
    )
    model, report = getattr(transformers, kind).from_pretrained(tmp_path / "published", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        output = model.eval()(pixel_values=torch_images())
    expected = output.logits if hasattr(output, "logits") else output.last_hidden_state[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = avit_jax.load(tmp_path / "published")
        assert ours.config.num_heads == 2
        assert ours.config.norm_epsilon == epsilon
        if not family.endswith("backbone"):
            assert ours.config.class_names == ("cat", "dog", "owl", "cow", "ant")
        np.testing.assert_allclose(ours(images()).logits, expected, atol=2e-5)
        model.save_pretrained(tmp_path / "again")
        torch.save(model.state_dict(), tmp_path / "memory.pth")
        for path in (tmp_path / "again", tmp_path / "again" / "model.safetensors", tmp_path / "memory.pth"):
            again = avit_jax.to_torch_state_dict(avit_jax.load(path, num_heads=2))
            for name, value in avit_jax.to_torch_state_dict(ours).items():
                np.testing.assert_array_equal(value, again[name], err_msg=f"{path} {name}")


def test_a_checkpoint_of_dinos_training_gives_the_teacher(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    student, teacher = published_state("dino_checkpoint"), published_state("dino_checkpoint", seed=1)
    teacher = {name.removeprefix("module."): value for name, value in teacher.items()}
    content = {"student": as_torch(student), "teacher": as_torch(teacher), "epoch": 3, "args": {"arch": "vit_base"}}
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.warns(
        UserWarning, match=r"left out, because the model has no such part: head.mlp.0.weight, .*last_layer"
    ):
        model = avit_jax.load(tmp_path / "checkpoint.pth", num_heads=2)
    np.testing.assert_array_equal(model.cls_token[...], teacher["backbone.cls_token"])


TIMM: dict[str, dict[str, Any]] = {
    "timm_vit": {},
    "timm_fc_norm": {"global_pool": "avg"},
    "timm_gap": {"global_pool": "avg", "class_token": False, "init_values": 1e-5, "qkv_bias": False, "fc_norm": False},
    "timm_registers": {"reg_tokens": 4},
    "timm_registers_no_embed_class": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1.0, "num_classes": 0},
    "timm_deit3": {"init_values": 1e-6, "no_embed_class": True},
    "deit3": {"init_values": 1e-6, "no_embed_class": True},
    "deit_distilled": {"distilled": True},
    "dino": {"num_classes": 0},
    "dino_checkpoint": {"num_classes": 0},
    "mae_pretrain": {"num_classes": 0},
    "dinov2": {"init_values": 1.0, "num_classes": 0},
    "dinov2_chunks": {"init_values": 1.0, "num_classes": 0},
    "dinov2_classifier": {"init_values": 1.0, "num_classes": 0},
    "dinov2_registers": {"init_values": 1.0, "no_embed_class": True, "num_classes": 0, "reg_tokens": 4},
}


def timm_model(**changes: Any) -> Any:
    timm = import_peer("timm")
    fields = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | changes
    if fields.pop("distilled", False):
        return timm.models.deit.VisionTransformerDistilled(**fields).eval()
    return timm.models.vision_transformer.VisionTransformer(**fields).eval()


@pytest.mark.parametrize("family", TIMM)
def test_timms_names_and_those_of_papers_give_its_logits(family: str) -> None:
    torch, timm = pytest.importorskip("torch"), import_peer("timm")
    state = published_state(family)
    model = timm_model(**TIMM[family])
    theirs = {
        re.sub(r"^(module\.|teacher\.)?backbone\.", "", name)
        .replace("gamma_1", "ls1.gamma")
        .replace("gamma_2", "ls2.gamma"): value
        for name, value in as_torch(state).items()
        if not re.search(r"decoder|(^|\.)head\.(mlp|last)|dino_head|linear_head", name)
    }
    theirs = {re.sub(r"^blocks\.0\.(\d)\.", r"blocks.\1.", name): value for name, value in theirs.items()}
    if family == "mae_pretrain":
        del theirs["mask_token"]  # timm takes it for a sign of DINOv2
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(theirs, model), strict=True)
    with torch.no_grad():
        if family == "dinov2_classifier":
            tokens = model.forward_features(torch_images()).numpy()
            features = np.concatenate([tokens[:, 0], tokens[:, 1:].mean(1)], axis=1)
            expected = features @ state["linear_head.weight"].T + state["linear_head.bias"]
        else:
            expected = model(torch_images()).numpy()
    np.testing.assert_allclose(loaded(state).model(images()).logits, expected, atol=2e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"reg_tokens": 4},
        {"reg_tokens": 2, "global_pool": "avg", "class_token": False},
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_timm_reads_back_strictly_what_we_write(fields: dict[str, Any], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    theirs = timm_model(**fields)
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    pool = {"pool": "norm_mean"} if fields.get("fc_norm") is False else {}
    ours = avit_jax.load(tmp_path / "timm.pth", num_heads=2, gate_scale=None, **pool)
    with torch.no_grad():
        np.testing.assert_allclose(ours(images()).logits, theirs(torch_images()), atol=2e-5)
    avit_jax.save_torch(ours, tmp_path / "ours.pth")
    assert avit_jax.load(tmp_path / "ours.pth").config == ours.config
    timm_model(**fields).load_state_dict(torch.load(tmp_path / "ours.pth"), strict=True)


def test_augreg_with_the_mean_of_patches() -> None:
    state = published_state("augreg_gap")
    expected = augreg_logits(state, images(), 8, 2)
    np.testing.assert_allclose(loaded(state).model(images()).logits, expected, atol=2e-5)
    token = published_state("augreg")
    expected = augreg_logits(token, images(), 8, 2)
    for prefix in ("", "opt/target/", "params/"):
        model = loaded({prefix + name: value for name, value in token.items()}).model
        np.testing.assert_allclose(model(images()).logits, expected, atol=2e-5)


@pytest.mark.parametrize("family", ["torchvision", "torchvision_old"])
def test_torchvisions_names_give_its_logits(family: str) -> None:
    """torchvision's documented architecture, written once more with torch's own attention and its names."""
    torch = pytest.importorskip("torch")
    nn = torch.nn
    keys = ("0", "3") if family == "torchvision" else ("linear_1", "linear_2")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(24, eps=1e-6), nn.LayerNorm(24, eps=1e-6)
            self.self_attention = nn.MultiheadAttention(24, 2, batch_first=True)
            self.mlp = nn.ModuleDict({keys[0]: nn.Linear(24, 96), keys[1]: nn.Linear(96, 24)})

        def forward(self, x: Any) -> Any:
            y = self.ln_1(x)
            x = x + self.self_attention(y, y, y, need_weights=False)[0]
            return x + self.mlp[keys[1]](nn.functional.gelu(self.mlp[keys[0]](self.ln_2(x))))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_proj = nn.Conv2d(3, 24, 8, 8)
            self.class_token = nn.Parameter(torch.zeros(1, 1, 24))
            self.encoder = nn.Module()
            self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 10, 24))
            self.encoder.layers = nn.ModuleDict({f"encoder_layer_{i}": Layer() for i in range(2)})
            self.encoder.ln = nn.LayerNorm(24, eps=1e-6)
            self.heads = nn.ModuleDict({"head": nn.Linear(24, 5)})

        def forward(self, x: Any) -> Any:
            x = self.conv_proj(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.encoder.pos_embedding
            for layer in self.encoder.layers.values():
                x = layer(x)
            return self.heads["head"](self.encoder.ln(x)[:, 0])

    state = published_state(family)
    model = Model().eval()
    model.load_state_dict(as_torch(state), strict=True)
    with torch.no_grad():
        expected = model(torch_images()).numpy()
    np.testing.assert_allclose(loaded(state).model(images()).logits, expected, atol=2e-5)


def write_folder(path: Path, family: str = "huggingface_vit", **config: Any) -> Path:
    """A Hugging Face folder by hand, with these fields of config.json replaced."""
    fields = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 24,
        "patch_size": 8,
        "num_channels": 3,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "id2label": {str(i): f"LABEL_{i}" for i in range(5)},
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields | config))
    safetensors.numpy.save_file(published_state(family), path / "model.safetensors")
    return path


PROCESSORS = [
    ({"size": 24, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (HALF, 1.0, "bilinear")),
    (
        {"size": {"height": 24, "width": 24}, "image_mean": [0.1] * 3, "image_std": [1, 1, 1]},
        ((0.1,) * 3, 1.0, "bilinear"),
    ),
    (
        {
            "size": {"shortest_edge": 32},
            "do_center_crop": True,
            "crop_size": {"height": 24, "width": 24},
            "resample": 3,
            "image_mean": list(IMAGENET),
            "image_std": [0.2] * 3,
        },
        (IMAGENET, 0.75, "bicubic"),
    ),
    ({"size": 24, "do_normalize": False}, ((0.0,) * 3, 1.0, "bilinear")),
]


@pytest.mark.parametrize(("processor", "expected"), PROCESSORS)
def test_a_folders_preprocessing_is_its_own(
    processor: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = avit_jax.load(folder).config
    seen = config.preprocessing
    assert (seen.mean, seen.crop_fraction, seen.interpolation) == expected
    assert (config.num_heads, config.class_names) == (2, None)
    assert "as the JSON beside the weights says" in capsys.readouterr().out
    assert avit_jax.load(folder, preprocessing={"crop_fraction": 0.5}).config.preprocessing.crop_fraction == 0.5


@pytest.mark.parametrize(
    ("processor", "squeezes"),
    [
        ({"size": 32, "crop_size": 24, "do_center_crop": True}, True),  # facebook/deit-base-patch16-224's form
        ({"size": {"height": 32, "width": 32}, "crop_size": 24, "do_center_crop": True}, True),
        ({"size": {"shortest_edge": 32}, "crop_size": 24, "do_center_crop": True}, False),
        ({"size": 32, "crop_size": 24, "do_center_crop": True, "image_processor_type": "BitImageProcessor"}, False),
    ],
)
def test_a_processor_that_squeezes_images_into_a_square_is_told(
    processor: dict[str, Any], squeezes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "deit")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert avit_jax.load(folder).config.preprocessing.crop_fraction == 0.75
    assert ("transformers squeezes whole images into a square" in capsys.readouterr().out) is squeezes


def test_evaluation_shows_a_folder_its_published_images_unless_the_config_states_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 24, "image_mean": [0.1] * 3}))
    for name in "abcde":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (30, 30)).save(tmp_path / "pictures" / name / f"{i}.png")
    config = load_config(f"folder:dense,{tmp_path / 'pictures'}")
    monkeypatch.setattr(
        checkpoint_evaluation, "format_evaluation", lambda _, config, how: str(config.preprocessing.mean)
    )
    assert checkpoint_evaluation.evaluate_checkpoint(config, folder, execution="masked") == "(0.1, 0.1, 0.1)"
    config.data.mean, config.data.std = (0.3,) * 3, (0.4,) * 3
    assert checkpoint_evaluation.evaluate_checkpoint(config, folder, execution="masked") == "(0.3, 0.3, 0.3)"


def test_the_command_line_converts_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "vit", id2label=dict(zip("01234", "abcde", strict=True)))
    assert main([str(folder), str(tmp_path / "ours")]) == 0
    assert "layout: Hugging Face; no gate" in capsys.readouterr().out
    assert avit_jax.load(tmp_path / "ours").config.class_names == tuple("abcde")
    assert main([str(folder), str(tmp_path / "other"), "--num-classes=7"]) == 0
    assert avit_jax.load(tmp_path / "other").config.class_names is None


def test_positions_are_resized_to_what_the_preprocessor_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "vit")
    crop = {"size": {"shortest_edge": 64}, "do_center_crop": True, "crop_size": 48}
    (folder / "preprocessor_config.json").write_text(json.dumps(crop))
    assert avit_jax.load(folder).config.image_size == 48
    out = capsys.readouterr().out
    assert "config.json says image_size 24 and preprocessor_config.json 48, which is used" in out
    assert "pos_embed was resized from 3x3 to 6x6 patches" in out


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_shards_are_read_with_their_index(form: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "vit")
    whole = avit_jax.to_torch_state_dict(avit_jax.load(folder))
    (folder / "model.safetensors").unlink()
    state = published_state("huggingface_vit")
    names, weight_map = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = form.replace(".", f"-0000{number}-of-00002.")
        weight_map |= dict.fromkeys(part, file)
        if form.endswith(".bin"):
            pytest.importorskip("torch").save(as_torch({n: state[n] for n in part}), folder / file)
        else:
            safetensors.numpy.save_file({n: state[n] for n in part}, folder / file)
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, value in avit_jax.to_torch_state_dict(avit_jax.load(folder)).items():
        np.testing.assert_array_equal(value, whole[name])
    (folder / weight_map[names[0]]).unlink()
    with pytest.raises(ValueError, match=r"00001-of-00002.* is missing: .*index.json names it as one of 2 shards"):
        avit_jax.load(folder)
    for hostile in ("../secret", "/etc/passwd", "a/b.bin", "..", "x\\y", 7, None, {"a": 1}):
        (folder / f"{form}.index.json").write_text(json.dumps({"weight_map": {"x": hostile}}))
        with pytest.raises(ValueError, match="is not a plain file name"):
            avit_jax.load(folder)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "swin"}, r"architecture is unsupported \(model_type 'swin'\)"),
        ({"model_type": ["vit"]}, r"architecture is unsupported \(model_type a list\)"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new', but AViT has only the exact gelu"),
        ({"use_swiglu_ffn": True}, "gated MLP"),
        ({"hidden_size": 48}, "says embed_dim 48, but the weights have 24"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, it must be a whole number"),
        ({"num_hidden_layers": 3}, "says depth 3, but the weights have 2"),
        ({"patch_size": "8"}, "patch_size is '8', it must be a whole number"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_attention_heads": 7}, "embed_dim 24 is not divisible by num_heads 7"),
        ({"image_size": [24, 24, 24]}, "it must be one number or height and width"),
        ({"image_size": {"height": {}, "width": 3}}, "image_size is a dict"),
        ({"image_size": 80_000}, "says image size 80000x80000, 100000000 patches, but pos_embed has 10 rows"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12', it must lie between 0 and 1"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ],
)
def test_a_config_that_cannot_be_is_one_sentence(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        avit_jax.load(write_folder(tmp_path / "vit", **config))


@pytest.mark.parametrize(
    ("processor", "sentence"),
    [
        ({"image_mean": "0.5"}, "mean is '0.5', it must be a number for each channel"),
        ({"image_mean": [0.5] * 3, "image_std": [0, 0, 0]}, "give a number above 0 for every channel"),
        ({"image_mean": [[1]]}, "mean is a list"),
        ({"resample": 5}, "resample is 5"),
        ({"resample": [2]}, r"resample is \[2\]"),
        ({"size": {"shortest_edge": 10**12}}, "shortest_edge is 1000000000000"),
        ({"size": {"shortest_edge": 100_000}, "do_center_crop": True, "crop_size": 24}, "the crop is 0.00024"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ],
)
def test_a_preprocessor_that_cannot_be_is_one_sentence(
    processor: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=sentence):
        avit_jax.load(folder)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '"vit"', "{", "\ud800".encode("utf-8", "surrogatepass"), "1" * 9999]
)
def test_damaged_json_is_one_sentence(text: str | bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "vit")
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|holds a)"):
        avit_jax.load(folder)


def test_class_names_that_name_no_classes_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, labels in enumerate(({"0": "a", "2": "b"}, ["a"], {str(i): [i] for i in range(5)}, {})):
        assert avit_jax.load(write_folder(tmp_path / str(number), id2label=labels)).config.class_names is None
        assert "class names were left out" in capsys.readouterr().out


@pytest.mark.parametrize(("pool", "expected"), [("token", "token"), ("avg", "norm_mean")])
def test_a_timm_folder_says_what_its_head_reads(pool: str, expected: str, tmp_path: Path) -> None:
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 5,
        "global_pool": pool,
        "pretrained_cfg": {
            "input_size": [3, 24, 24],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
        },
    }
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(published_state("timm_vit"), tmp_path / "timm" / "model.safetensors")
    model = avit_jax.load(tmp_path / "timm", num_heads=2)
    assert model.config.pool == expected
    assert (model.config.preprocessing.mean, model.config.preprocessing.crop_fraction) == (HALF, 0.9)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("google/vit-base-patch16-224", r"hf download google/vit-base-patch16-224 --local-dir DIR"),
        ("deit_tiny_patch16_224.pth", r"nothing is downloaded: .*github.com/facebookresearch/deit"),
        ("weights/dinov2_vitb14.pth", r"nothing is downloaded: .*github.com/facebookresearch/dinov2"),
        ("B_16.npz", r"nothing is downloaded: .*google-research/vision_transformer"),
    ],
)
def test_what_is_missing_is_not_downloaded_and_its_page_is_named(path: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"there is no checkpoint at {path}: the .* is missing.*{sentence}"):
        avit_jax.load(path)
