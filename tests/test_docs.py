"""README and docs: code blocks run, commands have the options and keys they use, files and functions exist."""

import dataclasses
import inspect
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

import avit_jax
from avit_jax.commands import command_line, config_files, typed_config
from avit_jax.rules import parse_rule
from tests.harness import doc_blocks
from tests.harness.doc_blocks import PAGES, ROOT, page_name
from tests.harness.published_names import published_state

WITH_CODE = [page for page in PAGES if doc_blocks.python_blocks(page.read_text())]
SMALL = {"depth": 12, "embed_dim": 24, "num_heads": 2, "image_size": 32}


def random_model(config: avit_jax.AViTConfig) -> avit_jax.AViT:
    """Weights from NumPy: JAX would compile a program for every shape."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: avit_jax.AViT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.1, leaf.shape), "float32"), shapes)
    )


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that code blocks read, under the names that they have there, but small."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "docs").symlink_to(ROOT / "docs")
    digits = avit_jax.AViTConfig(
        image_size=4, patch_size=4, in_channels=1, num_classes=10, embed_dim=16, depth=2, num_heads=2,
        gate_scale=4.0, gate_center=1.0, preprocessing=avit_jax.Preprocessing(mean=(0.5,), std=(0.5,)),
    )  # fmt: skip
    avit_jax.save(random_model(digits), folder / "runs/mnist_avit")
    for path in ("checkpoints/fashion_mnist_avit", "old_model"):
        shutil.copytree(folder / "runs/mnist_avit", folder / path)
    (folder / "old_model/digests.json").unlink()
    static = dataclasses.replace(digits, gate_scale=None, gate_center=None)
    avit_jax.save(random_model(static), folder / "checkpoints/fashion_mnist_dense")
    deit = avit_jax.PRESETS["deit_tiny_patch16_224"]
    avit_jax.save_torch(random_model(dataclasses.replace(deit, **SMALL)), folder / "deit_tiny.pth")
    avit_jax.save_torch(random_model(dataclasses.replace(deit, depth=1)), folder / "vit.safetensors")
    (folder / "vit").mkdir()
    vit = {"model_type": "vit", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
    vit |= {"architectures": ["ViTForImageClassification"], "patch_size": 8, "num_channels": 3, "hidden_act": "gelu"}
    vit |= {"layer_norm_eps": 1e-12, "id2label": {str(i): f"LABEL_{i}" for i in range(5)}}
    (folder / "vit/config.json").write_text(json.dumps(vit))
    safetensors.numpy.save_file(published_state("huggingface_vit"), folder / "vit/model.safetensors")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"pictures/{i}.jpg")
    return folder


def checked_training(train_model: Callable[..., avit_jax.AViT]) -> Callable[..., None]:
    """Takes the arguments and the config as training does, without the minutes: tests/test_training.py trains."""

    def checked(*arguments: Any, **keywords: Any) -> None:
        given = inspect.signature(train_model).bind(*arguments, **keywords)
        typed_config.parse(given.arguments["config"])

    return checked


@pytest.mark.parametrize("page", WITH_CODE, ids=page_name)
@pytest.mark.filterwarnings("ignore::UserWarning")  # load says what it assumed
def test_code_blocks_run(page: Path, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for entry in stand_ins.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    for name in ("avit_tiny_patch16_224", "deit_tiny_patch16_224"):
        monkeypatch.setitem(avit_jax.PRESETS, name, dataclasses.replace(avit_jax.PRESETS[name], **SMALL))
    monkeypatch.setattr(avit_jax, "train_model", checked_training(avit_jax.train_model), raising=False)
    namespace: dict[str, Any] = {}
    for block in doc_blocks.python_blocks(page.read_text()):
        exec(compile(block, page_name(page), "exec"), namespace)


def options(command: str) -> set[str]:
    """The options of train.py, eval.py or avit_jax.compare, by their definitions."""
    source = (ROOT / f"avit_jax/commands/{command}.py").read_text()
    defined = re.findall(r'DEFINE_(\w+)\(\s*"(\w+)"', source)
    return {"config", "help", "help_config", *(name for _, name in defined)} | {
        f"no{n}" for k, n in defined if k == "bool"
    }


OPTIONS = {command: options(command) for command in ("train", "eval", "compare")}


def program(command: list[str]) -> str:
    """train or eval for the commands that train and evaluate, else the words that say what runs."""
    match = re.fullmatch(r"(?:python|pip|pytest|mkdocs|ruff) ?(?:-m )?(.*)", " ".join(command[:3]))
    words = match[1].split() if match else []
    name = words[0] if words else ""
    known = {"train.py": "train", "eval.py": "eval"} | {f"avit_jax.{command}": command for command in OPTIONS}
    return known.get(name, name)


def check_training_command(command: list[str], known: set[str]) -> None:
    arguments = [word for word in command if word.startswith("--")]
    for name in (argument.lstrip("-").partition("=")[0] for argument in arguments):
        assert name.startswith("config.") or name in known, f"there is no option --{name}"
    given = dict(argument.lstrip("-").partition("=")[::2] for argument in arguments)
    spec = given.get("config", config_files.DEFAULT_CONFIG)
    if not re.search("NAME|FILE", spec):
        command_line.check_keys(config_files.load_config(spec), ["train.py", *arguments])
    if "config.model.rule" in given:
        parse_rule(given["config.model.rule"])


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in doc_blocks.commands(page.read_text()):
        name = program(command)
        if name in OPTIONS:
            check_training_command(command, OPTIONS[name])
        elif command[0] == "pip" and "install" in command:
            for word in command[2:]:
                if word.endswith(".txt"):
                    assert Path(word).is_file(), word
                for extra in re.findall(r"^\.\[(\w+)\]", word):
                    assert extra in project["optional-dependencies"], word
        elif name.endswith(".py") or name in ("avit_jax.convert", "avit_jax.export"):
            file = Path(name if name.endswith(".py") else f"avit_jax/commands/{name.removeprefix('avit_jax.')}.py")
            source = file.read_text()
            if "run_rows" in source:  # its options
                source += Path("benchmarks/resumable.py").read_text()
            for option in re.findall(r"(--[\w-]+)", " ".join(command)):
                assert option == "--help" or f'"{option}"' in source, f"{file} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_and_functions_exist(page: Path) -> None:
    for path, name in doc_blocks.mentioned_paths(page.read_text()):
        assert (ROOT / path).exists(), path
        if name:
            assert doc_blocks.has_name(ROOT / path, name), f"{path} has no {name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    """The site's own pages: mkdocs build --strict."""
    for target in doc_blocks.links(page.read_text()):
        assert (ROOT / target).exists(), target


def test_the_readme_is_short_and_has_the_commands_of_the_first_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert "pip install -r requirements.txt && python train.py" in text
    assert "pip install -r requirements-dev.txt && pytest" in text


def test_the_page_of_settings_is_that_of_the_code() -> None:
    from docs import settings_page

    assert settings_page.PAGE.read_text() == settings_page.page(), "run python -m docs.settings_page"


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {avit_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_wrong_pages_are_found() -> None:
    """What the tests above look for, in a page that is wrong in every way."""
    page = "`avit_jax/model/vit.py:AViTT` and `tests/no_such.py`\n\n    python train.py --config.epoch=3\n"
    assert doc_blocks.mentioned_paths(page) == {("avit_jax/model/vit.py", "AViTT"), ("tests/no_such.py", "")}
    assert not doc_blocks.has_name(ROOT / "avit_jax/model/vit.py", "AViTT")
    assert doc_blocks.has_name(ROOT / "avit_jax/model/vit.py", "AViT.embed")
    (command,) = doc_blocks.commands(page)
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        check_training_command(command, OPTIONS["train"])
    with pytest.raises(AssertionError, match="no option --epochs"):
        check_training_command(["python", "train.py", "--epochs=3"], OPTIONS["train"])
