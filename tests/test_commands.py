"""train.py and eval.py as a person runs them, and what they say to bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import avit_jax
from tests.harness.builders import quick_start, toy_arrays
from tests.harness.command_server import run_command

ROOT = Path(__file__).parents[1]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, environment=os.environ | quick_start() | {"JAX_PLATFORMS": "cpu"})


def in_a_new_process(*arguments: str, platform: str = "cpu") -> subprocess.CompletedProcess[str]:
    """As a person starts it; a few tests are enough to know that the others' forks start as it does."""
    environment = os.environ | quick_start() | {"JAX_PLATFORMS": platform}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(path, class_names=np.array(["top", "middle", "bottom"]), **toy_arrays())
    return path


def small(toy: Path, workdir: Path) -> list[str]:
    return [
        f"--config=configs/npz_avit.py:{toy}",
        f"--workdir={workdir}",
        "--config.init_from=",
        "--config.teacher=",
        "--config.loss.distillation=none",
        "--config.model.embed_dim=16",
        "--config.model.depth=2",
        "--config.model.num_heads=2",
        "--config.batch_size=12",
        "--config.epochs=1",
        "--config.optim.warmup_steps=2",
        "--config.checkpoint_every=3",
    ]


def test_train_evaluate_and_run_again(toy: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    trained = in_a_new_process("train.py", *small(toy, workdir), "--profile=2:2")
    assert trained.returncode == 0, trained.stderr
    assert "A-ViT" in trained.stdout
    assert f"trace of steps 2 to 3: {workdir / 'profile'}" in trained.stderr
    traces = [path.name for path in (workdir / "profile").rglob("*.*") if path.stat().st_size > 1000]
    assert any(name.endswith(".xplane.pb") for name in traces), "for TensorBoard"
    assert "perfetto_trace.json.gz" in traces
    assert "picture:" in trained.stdout
    assert re.search(r"^step (\d+) of \1: loss", trained.stdout, re.MULTILINE), "a line for the last step"
    summary = json.loads((workdir / "summary.json").read_text())
    assert 0 <= summary["avit"]["top1"] <= 1

    # Written by a process in which every core is a device, read by this one, which has a single device.
    assert avit_jax.load(workdir).config.class_names == ("top", "middle", "bottom")

    again = command("train.py", *small(toy, workdir))
    assert again.returncode == 0, again.stderr
    table = trained.stdout[trained.stdout.index("top-1   top-5") : trained.stdout.index("picture:")].strip()
    assert table in again.stdout, "the saved table is printed"
    assert "training" not in again.stdout + again.stderr

    evaluated = command("eval.py", *small(toy, workdir)[:1], *small(toy, workdir)[2:8], f"--checkpoint={workdir}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert f"top-1              {summary['avit']['top1']:.2%}" in evaluated.stdout
    for word in ("top-5", "loss", "mean depth", "class token depth", "GMACs per image"):
        assert word in evaluated.stdout

    other = command(
        "eval.py",
        *small(toy, workdir)[:1],
        *small(toy, workdir)[2:5],
        "--config.model.embed_dim=32",
        f"--checkpoint={workdir}",
    )
    assert other.returncode == 1
    assert "run: blocks.attn.proj.bias has shape (2, 16) in the checkpoint and (" in one_sentence(other.stderr)


def test_convert_is_a_module_to_start(tmp_path: Path) -> None:
    done = in_a_new_process("-m", "avit_jax.convert", "checkpoints/mnist_dense", str(tmp_path / "dense.safetensors"))
    assert done.returncode == 0, done.stderr
    assert f"written: {tmp_path / 'dense.safetensors'}" in done.stdout
    again = command("-m", "avit_jax.convert", "checkpoints/mnist_dense", str(tmp_path / "dense.safetensors"))
    assert again.returncode == 1
    assert "dense.safetensors exists already" in one_sentence(again.stderr)


def one_sentence(stderr: str) -> str:
    """What a user reads; nothing but one error line, and never a traceback."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("script", "arguments", "sentence"),
    [
        ("train.py", ["--config=configs/mnist_avti.py"], "no config file 'configs/mnist_avti.py': did you mean 'configs/mnist_avit.py'?"),
        ("train.py", ["--config.optim.learning_rat=1"], "config.optim has no key 'learning_rat': did you mean 'learning_rate'?"),
        ("train.py", ["--config.batch_size=many"], "batch_size"),
        ("train.py", ["--confg=x"], "no option --confg: did you mean 'config'?"),
        ("train.py", ["--config=configs/npz_avit.py:x", "--config.model.gate_centre=1"], "config.model has no key 'gate_centre': did you mean 'gate_center'?"),
        ("train.py", ["--config.model.embed_dim.x=1"], "config.model.embed_dim is a value and has no key 'x'"),
        ("train.py", ["--config.log_every=0"], "config.log_every is 0: it must be at least 1"),
        ("train.py", ["--config.loss.distillation=none"], "give a teacher and hard or soft, or neither"),
        ("train.py", ["--profile=20"], "--profile or config.profile '20' is not START:STEPS: give two numbers from 1, as 20:5"),
        ("train.py", ["mnist_avit"], "'mnist_avit' is not an option"),
        ("train.py", ["--config.model.patch_size=5"], "image height 28 is not divisible by patch_size 5"),
        ("train.py", ["--config.model.num_heads=5"], "embed_dim 64 is not divisible by num_heads 5"),
        ("train.py", ["--config.batch_size=3601"], "config.batch_size 3601 is larger than the 3600 training images"),
        ("train.py", ["--config.init_from=runs/nothing"], "there is no checkpoint at"),
        ("train.py", ["--config.data.source=cifar"], "config.data.source 'cifar' is unknown"),
        ("train.py", ["--config=configs/npz_avit.py:/tmp/none.npz"], "config.data.path '/tmp/none.npz' is not a file"),
        ("train.py", ["--epochs=3"], "there is no option --epochs: did you mean --config.epochs?"),
        ("eval.py", ["--checkpoint=runs/nothing"], "there is no checkpoint at runs/nothing: nothing of that name is there"),
        ("eval.py", ["--checkpoint=README.md"], "README.md does not say which data to evaluate it on: give --config"),
        ("eval.py", ["--reprot=x"], "no option --reprot: did you mean 'report'?"),
        ("eval.py", ["--checkpoint=checkpoints/mnist_dense", "--sweep=gate_center:9,10"], "--sweep is shown in the report: give --report=FOLDER too"),
        ("eval.py", ["--checkpoint=checkpoints/mnist_dense", "--report=README.md/page"], "README.md/page cannot be written to (Not a directory): give another folder"),
        ("eval.py", ["--checkpoint=README.md", "--config=mnist_avit"], "README.md cannot be read as a checkpoint: it is neither a zip file, nor a pickle, nor safetensors"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(tmp_path: Path, script: str, arguments: list[str], sentence: str) -> None:
    workdir = [f"--workdir={tmp_path / 'run'}"] if script == "train.py" else []
    done = command(script, *workdir, *arguments)
    assert done.returncode == 1
    assert sentence in one_sentence(done.stderr)


def test_noresume_refuses_a_run_that_has_begun(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "36").mkdir(parents=True)
    done = command("train.py", f"--workdir={tmp_path / 'run'}", "--noresume")
    assert done.returncode == 1
    assert "holds a run already: leave --noresume out" in one_sentence(done.stderr)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what setup finds, which is what a wheel holds; no index is asked."""
    folder = tmp_path_factory.mktemp("build")
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q"]
    build += ["egg_info", "--egg-base", str(folder), "build", "--build-base", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_the_installed_package_has_all_its_parts(installed: Path) -> None:
    built = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "avit_jax").rglob("*") if path.is_file()}
    configs = {f"avit_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert built == {name for name in own if "__pycache__" not in name} | configs


@pytest.mark.parametrize(
    ("module", "arguments", "sentence"),
    [
        ("avit_jax.train", ["--config=configs/mnist_avit.py"], "there is no checkpoint at checkpoints/mnist_dense (config.init_from): it comes with the repository"),
        ("avit_jax.eval", ["--config=folder:dense,none"], "there is no checkpoint at runs/none_dense"),
    ],
)  # fmt: skip
def test_the_installed_commands_run_anywhere(
    installed: Path, tmp_path: Path, module: str, arguments: list[str], sentence: str
) -> None:
    env = os.environ | quick_start() | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(installed), env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 1
    assert sentence in one_sentence(done.stderr)


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = in_a_new_process("train.py", f"--workdir={tmp_path / 'run'}", platform="rocket")
    assert done.returncode == 1
    assert "JAX cannot use the platform 'rocket' (JAX_PLATFORMS) here" in one_sentence(done.stderr)
