"""What the command line makes of its arguments, without a process: configs, keys, options, --help, and the dry run."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict

import avit_jax
from avit_jax.commands import dry_run as dry_run_module
from avit_jax.commands.command_line import check_keys, check_options, with_config
from avit_jax.commands.config_files import SHIPPED, load_config, shipped_configs
from avit_jax.commands.dry_run import dry_run
from avit_jax.commands.help import help_text
from avit_jax.data.settings import DataSettings
from avit_jax.runtime import memory
from avit_jax.runtime.memory import device_memory, host_memory
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from tests.harness.builders import tiny_experiment


def check(argv: list[str], own: list[str]) -> None:
    check_options(argv, own)
    check_keys(load_config("mnist_avit"), argv)


def lines_until_refused(config: ConfigDict, sentence: str) -> list[str]:
    """What a dry run prints before it raises."""
    lines: list[str] = []

    def collect() -> None:
        for line in dry_run(config):
            lines.append(line)

    with pytest.raises(ValueError, match=sentence):
        collect()
    return lines


def default(options: Mapping[str, str]) -> str:
    return {"runs/x": "npz_dense:x.npz"}.get(options.get("checkpoint", ""), "mnist_avit")


@pytest.mark.parametrize(
    ("arguments", "expected", "rest"),
    [
        ([], "mnist_avit.py", []),
        (["--config=mnist_dense"], "mnist_dense.py", []),
        (["--config", "mnist_dense", "--ema"], "mnist_dense.py", ["--ema"]),
        (["-config=configs/mnist_dense.py", "-workdir", "x"], "mnist_dense.py", ["-workdir", "x"]),
        (["--checkpoint=runs/x"], "npz_dense.py:x.npz", ["--checkpoint=runs/x"]),
        (["--checkpoint", "runs/x"], "npz_dense.py:x.npz", ["--checkpoint", "runs/x"]),
        (["--config=npz_avit:a=b:c,d"], "npz_avit.py:a=b:c,d", []),
        (["--config=npz_avit:"], "npz_avit.py:", []),
        (["--config.data.mean=", "word"], "mnist_avit.py", ["--config.data.mean=()", "word"]),
        (["--config.data.class_names="], "mnist_avit.py", ["--config.data.class_names=()"]),
        (["--config.init_from="], "mnist_avit.py", ["--config.init_from="]),
    ],
)
def test_arguments_become_what_ml_collections_reads(
    arguments: list[str], expected: str, rest: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, config = with_config(["train.py", *arguments], default)
    assert argv == ["train.py", f"--config={SHIPPED / expected}", *rest]
    assert config.name


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--epochs=3", "there is no option --epochs: did you mean --config.epochs?"),
        ("--learning_rate=1", "there is no option --learning_rate: did you mean --config.optim.learning_rate?"),
        ("--model.depth=3", "there is no option --model.depth: did you mean --config.model.depth?"),
        ("--config.depth=3", "config has no key 'depth': did you mean --config.model.depth?"),
        ("--images=3", "there is no option --images: did you mean --config.gate_start.images?"),
        ("--scale", "there is no option --scale: did you mean --config.augment.scale?"),
        ("--wrokdir=x", "there is no option --wrokdir: did you mean 'workdir'?"),
        ("--nothing", "there is no option --nothing: known: config, workdir"),
        ("--config.modle.depth=3", "config has no key 'modle': did you mean 'model'?"),
        ("--config.model.dpeth=3", "config.model has no key 'dpeth': did you mean 'depth'?"),
        ("--config.model.depth.x=3", "config.model.depth is a value and has no key 'x'"),
    ],
)
def test_a_typo_is_told_about_what_was_meant(argument: str, sentence: str) -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011
        check(["train.py", argument], ["config", "workdir"])
    assert str(found.value) == sentence


def test_values_and_options_that_exist_pass() -> None:
    arguments = ["--config.epochs=3", "--config.model.depth=3", "word", "--v=1", "--nologtostderr", "--"]
    check(["train.py", *arguments], ["config"])


@pytest.mark.parametrize("arguments", [["train.py", "--help"], ["eval.py", "--help_config"]])
def test_help_ends_quietly_when_its_reader_has_left(arguments: list[str], tmp_path: Path) -> None:
    """As in `python train.py --help | head -1`; also in a folder without a run."""
    root = SHIPPED.parent
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, str(root / arguments[0]), *arguments[1:]]
    found = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writing)
    assert (found.returncode, found.stderr) == (0, "")


def test_choices_are_shown_once() -> None:
    holder = flags.DEFINE_enum("a_choice_of_this_test", "a", ["a", "b"], "What it does.")
    line = next(line for line in help_text("About.", [holder]).splitlines() if "a_choice_of_this_test" in line)
    assert line.split() == ["--a_choice_of_this_test=a|b", "What", "it", "does.", "(by", "default", "a)"]


def test_the_help_page_tells_configs_keys_and_options() -> None:
    values = flags.FlagValues()
    holder = flags.DEFINE_string("an_option_of_this_test", None, "What it does.")
    page = help_text("About.", [holder])
    del values
    for name, line in shipped_configs().items():
        assert f"{name} " in page
        assert line in page
    for part in (
        "--config=NAME",
        "--config.KEY=VALUE",
        "--config.epochs=3",
        "--an_option_of_this_test",
        "What it does.",
    ):
        assert part in page


@pytest.mark.parametrize("values", [("a", "b"), ("",), (None,), ((0.5,),)])
def test_mean_and_std_are_numbers(values: tuple) -> None:
    with pytest.raises(ValueError, match=r"config\.data\.mean is .*: it must be a list of finite numbers"):
        DataSettings.from_config({"mean": values})


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no\nmore")])
def test_a_platform_that_is_not_there_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        raise error

    monkeypatch.setattr(jax, "local_devices", failing)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    calls = [lambda: avit_jax.create("avit_tiny_patch16_224"), lambda: avit_jax.load("checkpoints/mnist_dense")]
    for call in calls:
        with pytest.raises(ValueError, match=r"^JAX cannot use the platform 'cuda' .*JAX_PLATFORMS=cpu$") as found:
            call()
        assert "\n" not in str(found.value)


# The dry run


def test_a_dry_run_that_does_not_fit_says_so_before_it_takes_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("nothing may be allocated")

    monkeypatch.setattr(dry_run_module, "device_memory", lambda mesh: 1000)
    for name in ("initial_state", "made_up_batch", "teacher_weights"):
        monkeypatch.setattr(dry_run_module, name, forbidden)
    sentence = r"a step needs .* GB a device and 0\.00 GB are free: lower config\.batch_size"
    lines = lines_until_refused(tiny_experiment(tmp_path / "toy.npz"), sentence)
    account = "\n".join(lines)
    for word in ("data ", "model ", "memory ", "of 0.00 that are free", "steps "):
        assert word in account


def test_a_dry_run_names_a_missing_start_after_its_account(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    config.init_from = str(tmp_path / "deit.pth")
    lines = lines_until_refused(config, r"there is no checkpoint at .*deit\.pth \(config\.init_from\)")
    assert lines[-1].endswith("it means nothing")
    assert sum(line.startswith("step ") for line in lines) == 2


def test_data_that_are_there_and_wrong_are_not_made_up(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    (tmp_path / "toy.npz").write_bytes(b"no zip file")
    with pytest.raises(ValueError, match=r"toy\.npz cannot be read as \.npz"):
        next(dry_run(config))
    config = load_config("folder:dense")
    with pytest.raises(ValueError, match="config.data.path '' is not a folder"):
        next(dry_run(config))


def test_a_dry_run_without_a_home_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    config = load_config("folder:dense,~/pictures")
    with pytest.raises(ValueError, match="there is no home folder: write the path in full"):
        next(dry_run(config))


def test_cached_files_count_as_free_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path, "memory.max", "memory.current"),))
    assert host_memory() == 100_000
    (tmp_path / "memory.stat").write_text("anon 200000\nactive_file 300000\ninactive_file 400000\n")
    assert host_memory() == 800_000


def test_free_memory_is_that_of_the_machine_shared_by_its_cores() -> None:
    total = host_memory()
    assert total is not None
    lines = Path("/proc/meminfo").read_text().splitlines()
    machine = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 <= total <= machine
    mesh = training_mesh(MeshSettings(), 12)
    share = device_memory(mesh)
    assert share is not None
    assert share <= machine / mesh.size
