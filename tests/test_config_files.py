"""Configs: found from anywhere, with a key for every field of the model; and the one a run leaves behind."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags
from PIL import Image

import avit_jax
from avit_jax import AViTConfig
from avit_jax.commands.config_files import SHIPPED, find_config, load_config, shipped_configs
from avit_jax.commands.evaluate_checkpoint import evaluate_checkpoint
from avit_jax.commands.run_config import config_of_checkpoint, get_config
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.settings import DataSettings
from avit_jax.evaluate.compare import format_summary
from avit_jax.evaluate.figures import evaluate
from avit_jax.model.settings import ModelSettings
from avit_jax.reduction.tome import ToMe
from avit_jax.runtime.files import write_json
from avit_jax.train.start import check_starts, initial_model, resolve_model_config
from tests.harness.builders import small_config, spread_gate, tiny_experiment

SPECS = [
    "mnist_dense",
    "mnist_avit",
    "fashion_mnist",
    "scattered",
    "imagenet_deit",
    "imagenet_avit",
    "npz_dense:x.npz",
    "npz_avit:x.npz",
]
SPECS += [
    "folder:dense,/data/pictures",
    "folder:avit,/data/pictures",
    "folder:avit,/data/pictures,deit_tiny_patch16_224",
]


def parsed(spec: str, *overrides: str) -> ConfigDict:
    """The config as train.py's flags give it."""
    values = flags.FlagValues()
    argv = ["train.py", *overrides]
    flag = config_flags.DEFINE_config_dict("config", load_config(spec), flag_values=values, sys_argv=argv)
    values(argv)
    return flag.value


def given_fields(config: ConfigDict) -> tuple[str | None, dict[str, Any]]:
    """The preset of config.model, and the fields that it gives a value."""
    section = ModelSettings.from_config(config.model.to_dict())
    return section.preset, section.given


@pytest.mark.parametrize("spec", SPECS)
def test_every_field_of_the_model_is_a_key_in_every_config(spec: str) -> None:
    fields = {field.name for field in dataclasses.fields(AViTConfig)} - {"preprocessing", "class_names"}
    assert set(load_config(spec).model) == fields | {"preset"}


@pytest.mark.parametrize("spec", SPECS)
def test_every_field_can_be_set_on_the_command_line(spec: str) -> None:
    """The values are none of the configs' own, so that each of them must have arrived."""
    values: dict[str, Any] = {"image_size": 96, "patch_size": 3, "depth": 6, "embed_dim": 40, "num_heads": 5}
    values |= {"mlp_ratio": 2.5, "gate_scale": 3.5, "gate_center": 7.5, "halt_epsilon": 0.03, "drop_rate": 0.25}
    values |= {"qkv_bias": False, "distilled": True, "remat": False, "dtype": "bfloat16", "in_channels": 1}
    values |= {"num_classes": 7, "drop_path_rate": 0.35}
    config = parsed(spec, *(f"--config.model.{name}={value}" for name, value in values.items()))
    preset, fields = given_fields(config)
    model = avit_jax.model.presets.config_from(preset, **fields)
    assert {name: getattr(model, name) for name in values} == values


def test_an_image_size_may_have_two_sides() -> None:
    for text, size in (("(32, 48)", (32, 48)), ("(32, 32)", 32), ("[16,8]", (16, 8))):
        assert given_fields(parsed("mnist_dense", f"--config.model.image_size={text}"))[1]["image_size"] == size
    for text in ("abc", "(1, 2, 3)", "-4", "2.5", "True", "()"):
        with pytest.raises(
            ValueError, match=r"config\.model\.image_size is .*: it must be a number, or \(height, width\)"
        ):
            given_fields(parsed("mnist_dense", f"--config.model.image_size={text}"))


def test_what_a_config_leaves_open_is_the_presets() -> None:
    preset, fields = given_fields(load_config("imagenet_avit:tiny"))
    assert avit_jax.model.presets.config_from(preset, **fields).embed_dim == 192
    assert "embed_dim" not in fields


@pytest.mark.parametrize("spec", ["mnist_avit", "mnist_avit.py", "configs/mnist_avit.py", "configs/mnist_avit"])
def test_a_shipped_config_is_found_from_any_folder(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(spec).name == "mnist_avit"
    assert find_config(spec)[0].parent == SHIPPED


def test_a_users_own_file_comes_first_and_may_build_on_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    text = """
from configs import mnist_dense
def get_config(arg="none"):
    config = mnist_dense.get_config()
    config.name = arg
    return config
"""
    for name in ("mine.py", "mnist_avit.py"):
        (tmp_path / "configs" / name).write_text(text)
    assert load_config("mine:a,b:c").name == "a,b:c"
    assert load_config("configs/mnist_avit.py").name == "none"
    assert load_config("mnist_dense").name == "mnist_dense"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("mnist_avti", "there is no config file 'mnist_avti': did you mean 'mnist_avit'"),
        (
            "configs/mnist_avti.py",
            "there is no config file 'configs/mnist_avti.py': did you mean 'configs/mnist_avit.py'",
        ),
        ("", "there is no config file ''"),
        ("README.md", "'README.md' is not a Python file"),
        ("folder:avi,x", "'avi' is neither dense nor avit: write folder:dense,FOLDER"),
        ("broken.py", "'broken.py' fails with ZeroDivisionError"),
    ],
)
def test_a_config_that_cannot_be_had_is_said(
    spec: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").touch()
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_config(spec)


def test_shipped_configs_are_told_in_a_line_each() -> None:
    found = shipped_configs()
    assert set(found) == {file.stem for file in SHIPPED.glob("*.py")}
    assert all(10 < len(line) < 140 for line in found.values())


@pytest.mark.parametrize(
    ("path", "way"),
    [
        ("checkpoints/mnist_dense", "it comes with the repository, not with the installed package"),
        ("runs/pictures_dense/model", "train that model first"),
        ("deit.pth", "give --config.teacher=CHECKPOINT"),
    ],
)
def test_a_missing_start_says_where_it_comes_from(
    path: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(parse(load_config("mnist_avit")), init_from="", teacher=path)
    with pytest.raises(ValueError, match=rf"^there is no checkpoint at {path} \(config.teacher\): .*{way}"):
        check_starts(settings)


def test_an_avit_that_hardly_halts_is_told_what_to_do() -> None:
    row = {
        "top1": 0.5,
        "top5": 0.5,
        "gmacs": 1.0,
        "images_per_second": 9.0,
        "depth_std_tokens": 0,
        "depth_std_images": 0,
    }
    summary = {"images": 7, "batch_size": 1, "seconds": 6.0}
    full = row | {"mean_depth": 11.9, "depth_fraction": 11.9 / 12}
    assert "--config.gate_start.target_depth=9 " in format_summary(summary | {"avit": full})
    half = row | {"mean_depth": 6.0, "depth_fraction": 0.5}
    assert "gate_start" not in format_summary(summary | {"avit": half})
    assert "gate_start" not in format_summary(summary | {"dense": row})


# The config that a run leaves behind


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder as a run of other sizes than any default's leaves it, without the training."""
    config = tiny_experiment(tmp_path / "toy.npz")
    folder = tmp_path / "run"
    settings = parse(config)
    model = resolve_model_config(settings.model, settings.data, open_dataset(settings.data))
    avit_jax.save(spread_gate(model), folder / "model")
    write_json(folder / "train_config.json", {"config": json.loads(config.to_json())})
    return folder


@pytest.mark.parametrize("place", [".", "model", "checkpoints", "checkpoints/8"])
def test_a_checkpoint_of_a_run_brings_the_runs_config(finished: Path, place: str) -> None:
    (finished / place).mkdir(parents=True, exist_ok=True)
    config = load_config(config_of_checkpoint(finished / place))
    there = json.loads((finished / "train_config.json").read_text())["config"]
    assert (config.name, config.eval_batch_size) == (there["name"], 16)
    assert config.data.path == there["data"]["path"]
    assert config.model.embed_dim == 16
    assert "images             24" in evaluate_checkpoint(config, finished, execution="masked")


def test_the_shipped_checkpoints_configs_are_read() -> None:
    """They were written by versions with fewer keys."""
    for name, source in (("mnist_dense", "mnist"), ("fashion_mnist_avit", "idx")):
        config = load_config(config_of_checkpoint(Path(__file__).parents[1] / "checkpoints" / name))
        assert config.data.source == source


def test_the_rule_of_the_command_line_replaces_the_checkpoints(finished: Path) -> None:
    """ToMe merges one token in each of 3 layers; those of the first two miss 2 and 1 layers."""
    config = load_config(config_of_checkpoint(finished))
    tokens = avit_jax.load(finished).config.num_tokens
    merged = (3 * tokens - 3) / tokens
    assert f"mean depth         {merged:.2f} of 3 layers" in evaluate_checkpoint(
        config, finished, model={"rule": "tome(r=1)"}
    )


def test_a_model_without_a_run_keeps_its_architecture_and_asks_for_data(finished: Path, tmp_path: Path) -> None:
    saved = (finished / "model").rename(tmp_path / "converted")
    with pytest.raises(ValueError, match=r"converted does not say which data .*: give --config, .* checkpoint's own"):
        config_of_checkpoint(saved)
    config = load_config(f"npz_dense:{tmp_path / 'toy.npz'}")  # 12 layers of width 64, 4 heads
    assert "of 3 layers" in evaluate_checkpoint(config, saved)
    with pytest.raises(ValueError, match=r"converted: blocks\..* has shape .* in the checkpoint"):
        evaluate_checkpoint(config, saved, model={"embed_dim": 32})
    with pytest.raises(ValueError, match="there is no checkpoint at .*none: nothing"):
        config_of_checkpoint(tmp_path / "none")
    np.savez(tmp_path / "weights.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="give --config, which names data and model"):
        config_of_checkpoint(tmp_path / "weights.npz")


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from([[], {}, [{}, "x"]])
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_of_a_strangers_config_is_taken_or_refused_in_a_sentence(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = json.loads(load_config("fashion_mnist:avit").to_json())
    section = data.draw(st.sampled_from(["data", "model", None]))
    target = config[section] if section else config
    target[data.draw(st.sampled_from([*target, "unheard_of"]))] = data.draw(ODD)
    file = tmp_path_factory.getbasetemp() / "train_config.json"
    write_json(file, {"config": config})
    try:
        found = get_config(str(file))
        parse(found)
    except ValueError as error:
        assert len(str(error)) < 400 + len(str(file))
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": []}', '{"config": {"data": 3}}', "[" * 100_000, "nan", "\udcff"]
)
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train_config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"train_config\.json"):
        get_config(str(file))


# Names of classes


def named(folder: Path, names: tuple[str, ...] | None) -> Path:
    preprocessing = avit_jax.Preprocessing((0.5,), (0.5,))
    config = small_config(image_size=8, in_channels=1, num_classes=3, class_names=names, preprocessing=preprocessing)
    avit_jax.save(spread_gate(config), folder)
    return folder


def test_other_class_names_are_said_before_any_figure(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")  # its classes are 0, 1, 2
    first = {}
    for names in (("0", "1", "2"), None, ("cat", "dog", "fox"), ("2", "1", "0")):
        path = named(tmp_path / f"model{len(first)}", names)
        first[names] = evaluate_checkpoint(config, path, execution="masked").splitlines()[0]
    assert first[("0", "1", "2")] == first[None] == "images             24"
    assert first[("cat", "dog", "fox")].startswith("warning: ")
    assert "trained for the classes cat, dog, fox and the data have 0, 1, 2" in first[("cat", "dog", "fox")]
    assert "in another order (2, 1, 0)" in first[("2", "1", "0")]
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    table = evaluate_checkpoint(config, tmp_path / "model2", execution="masked", class_names=tmp_path / "names.txt")
    assert table.startswith("images"), "the user has said what the classes are"


def test_a_strangers_class_names_reach_no_terminal_raw(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    table = evaluate_checkpoint(config, named(tmp_path / "model", ("cat\x1b[2J", "dog\n", "fox")), execution="masked")
    assert r"the classes cat\x1b[2J, dog\n, fox and" in table.splitlines()[0]


def test_a_preset_asked_for_of_a_model_with_its_own_configuration_is_one_sentence(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    with pytest.raises(ValueError, match="carries its own configuration: leave preset='deit_tiny_patch16_224' out"):
        evaluate_checkpoint(config, named(tmp_path / "model", None), model={"preset": "deit_tiny_patch16_224"})


def test_a_baseline_of_other_classes_is_refused(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    ours, other = named(tmp_path / "ours", ("0", "1", "2")), named(tmp_path / "other", ("cat", "dog", "fox"))
    with pytest.raises(ValueError, match=r"the baseline .*other has the classes cat, dog, fox and .*ours 0, 1, 2"):
        evaluate_checkpoint(config, ours, report=tmp_path / "report", baseline=other)
    with pytest.raises(ValueError, match="there is no checkpoint at .*none"):
        evaluate_checkpoint(config, ours, report=tmp_path / "report", baseline=tmp_path / "none")


# A folder of pictures


def pictures(folder: Path, count: int) -> Path:
    """Red and blue pictures of many sizes."""
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 60, (*rng.integers(9, 40, 2), 3)).astype(np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_a_saved_model_keeps_its_preprocessing_where_the_config_states_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converted checkpoint that expects mean and std 0.5 must not be fine-tuned with ImageNet's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = avit_jax.Preprocessing((0.5,) * 3, (0.5,) * 3, 0.9, "bilinear")
    start = small_config(in_channels=3, num_classes=2, class_names=("blue", "red"), preprocessing=own)
    avit_jax.save(spread_gate(start), tmp_path / "start")
    config = load_config(f"folder:avit,{pictures(tmp_path / 'pictures', 25)}")
    config.update({"init_from": str(tmp_path / "start")})
    fields = ("image_size", "patch_size", "embed_dim", "depth", "num_heads")
    config.model.update({name: getattr(start, name) for name in fields})
    config.gate_start.images = 0
    dataset = open_dataset(parse(config).data)
    assert initial_model(parse(config), dataset).config.preprocessing == own
    config.data.crop_fraction = 1.0
    assert initial_model(parse(config), dataset).config.preprocessing == dataclasses.replace(own, crop_fraction=1.0)


def test_a_folder_of_pictures_needs_no_file_written_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """:avit starts from what :dense writes, at any size of picture, and halts before any training."""
    folder = pictures(tmp_path / "pictures", 25)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    depths = {}
    for kind in ("dense", "avit"):
        config = load_config(f"folder:{kind},{folder}")
        config.model.update({"image_size": 16, "depth": 3, "embed_dim": 16, "num_heads": 2, "remat": False})
        config.gate_start.target_depth = 2.0
        settings = parse(config)
        check_starts(settings)
        dataset = open_dataset(settings.data)
        model = initial_model(settings, dataset)
        assert model.config.class_names == ("blue", "red")
        avit_jax.save(model, f"runs/{config.name}/model")
        depths[kind] = evaluate(model, dataset.test, 10).mean_depth
        if kind == "avit":  # its gate is not started under another rule
            config.model.rule = "tome(r=1)"
            merging = initial_model(parse(config), dataset)
            assert merging.config.rule == ToMe(1)
    assert depths["dense"] == 3
    assert depths["avit"] == pytest.approx(2.0, abs=0.4)
    assert "36 images are for training, 4 for validation and 10 for the test" in capsys.readouterr().out


def test_folders_by_class_alone_are_split_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    settings = DataSettings(source="folder", path=str(pictures(tmp_path / "pictures", 25)))
    first, again = open_dataset(settings), open_dataset(settings)
    parts = [
        (part.name(i), int(part[i]["label"])) for part in (first.train, first.val, first.test) for i in range(len(part))
    ]
    assert parts == [
        (p.name(i), int(p[i]["label"])) for p in (again.train, again.val, again.test) for i in range(len(p))
    ]
    assert len(set(parts)) == 50, "every picture is in one part"
    assert {Path(name).parent.name: label for name, label in parts} == {"blue": 0, "red": 1}
    few = DataSettings(source="folder", path=str(pictures(tmp_path / "few", 2)))
    with pytest.raises(ValueError, match="few has too few images to split: give at least 20 for each class"):
        open_dataset(few)
    # Folders by purpose under other names, and classes that lie deeper, are no classes.
    pictures(tmp_path / "purposes" / "training", 2)
    pictures(tmp_path / "deeper" / "animals", 2)
    for name in ("purposes", "deeper"):
        with pytest.raises(ValueError, match="has no folder train/"):
            open_dataset(DataSettings(source="folder", path=str(tmp_path / name)))
