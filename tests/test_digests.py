"""Damage on disk: a flipped bit is refused, or lies where nothing is read; it never changes what is loaded."""

import hashlib
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import avit_jax
from avit_jax.checkpoints.digests import check_digests, json_digest, tree_digests
from avit_jax.checkpoints.model_folder import add_digests
from avit_jax.checkpoints.run_checkpoints import RunCheckpoints
from tests.harness.builders import small_config, spread_gate
from tests.test_model_folder import ITEMS, write_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    avit_jax.save(spread_gate(small_config(class_names=tuple("abcde"))), path)
    return path


def flip(file: Path, rng: random.Random) -> None:
    """Flip one bit at a random place."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def largest(folder: Path) -> Path:
    """The file that holds the arrays."""
    return max(files_of(folder), key=lambda file: (folder / file).stat().st_size)


def test_a_flipped_bit_in_a_model_is_refused_or_changes_nothing(saved: Path, tmp_path: Path) -> None:
    rng, original = random.Random(0), avit_jax.load(saved)
    files = [*files_of(saved), *[largest(saved)] * 20]
    refused = []
    for file in files:
        damaged = tmp_path / "damaged"
        shutil.copytree(saved, damaged)
        flip(damaged / file, rng)
        try:
            found = avit_jax.load(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            assert "\n" not in str(error)
            refused.append(file)
        else:
            assert found.config == original.config
            for a, b in zip(*(jax.tree.leaves(nnx.state(model)) for model in (original, found)), strict=True):
                np.testing.assert_array_equal(a, b)
        shutil.rmtree(damaged)
    assert refused.count(files[-1]) >= 15, "most of this file is weights"


def test_a_run_goes_back_from_a_flipped_bit_or_it_changes_nothing(tmp_path: Path) -> None:
    rng, whole = random.Random(0), tmp_path / "whole"
    write_steps(whole, {1: 0.0, 2: 0.0}, keep=2)
    target = {name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS}
    places = [file for file in files_of(whole / "2") if "commit_success" not in file.name]
    went_back = set()
    for file in places:
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        flip(run / "2" / file, rng)
        with RunCheckpoints(run, keep=2) as checkpoints:
            found = checkpoints.restore_newest(target)
        assert found is not None
        assert (found.progress, found.data) == ({"step": found.step}, {"next_index": found.step})
        for name in ITEMS:
            np.testing.assert_array_equal(found.items[name]["weights"], found.step)
        if found.step == 1:
            went_back.add(file.parts[0])
            assert (run / "damaged-2").is_dir()
        shutil.rmtree(run)
    assert went_back == {*ITEMS, "step", "data", "config", "digests"}


def test_the_refusal_names_the_parameter(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model" / "digests.json"
    digests = json.loads(file.read_text())
    digests["params"]["head.bias"] = hashlib.sha256(b"other values").hexdigest()
    file.write_text(json.dumps(digests))
    with pytest.raises(ValueError, match=r"model/params is damaged: head.bias is not what was written"):
        avit_jax.load(tmp_path / "model")


def test_a_changed_config_is_refused_and_a_changed_layout_of_it_is_not(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content, indent=7, sort_keys=True))
    avit_jax.load(tmp_path / "model")
    content["model"]["gate_scale"] = 5.0
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"its config.json is not what was written .* if you changed it yourself"):
        avit_jax.load(tmp_path / "model")


def test_a_folder_without_digests_loads_with_a_line(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(saved, path)
    (path / "digests.json").unlink()
    avit_jax.load(path)
    assert "written without digests, so damage cannot be detected" in capsys.readouterr().out
    add_digests(path)
    assert (path / "digests.json").read_bytes() == (saved / "digests.json").read_bytes()
    avit_jax.load(path)
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="has digests already"):
        add_digests(path)
    with pytest.raises(ValueError, match="is not a folder that avit_jax.save wrote"):
        add_digests(tmp_path)


def test_the_checkpoints_of_this_repository_have_digests(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [path for path in (Path(__file__).parents[1] / "checkpoints").iterdir() if path.is_dir()]
    assert len(folders) >= 3
    for folder in folders:
        avit_jax.load(folder)
    assert "digests" not in capsys.readouterr().out


def test_a_run_from_before_digests_goes_on_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_steps(tmp_path / "run", {1: 0.0}, keep=2)
    shutil.rmtree(tmp_path / "run" / "1" / "digests")
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        found = checkpoints.restore_newest({name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS})
    assert found is not None
    assert "written without digests, so damage cannot be detected" in capsys.readouterr().out


def test_damage_to_what_orbax_says_of_a_checkpoint_is_a_sentence(tmp_path: Path) -> None:
    write_steps(tmp_path / "run", {1: 0.0}, keep=2)
    (tmp_path / "run" / "1" / "_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(ValueError, match=r"the checkpoints in .*run cannot be read: .*; move the damaged STEP folder"):
        RunCheckpoints(tmp_path / "run", keep=2)


def test_a_step_that_is_damaged_twice_is_set_aside_twice(tmp_path: Path) -> None:
    target = {name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS}
    write_steps(tmp_path / "run", {1: 0.0}, keep=2)
    for _ in range(2):
        write_steps(tmp_path / "run", {2: 0.0}, keep=2)
        (tmp_path / "run" / "2" / "step" / "metadata").write_text("{}")
        with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
            found = checkpoints.restore_newest(target)
        assert found is not None and found.step == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["1", "damaged-2", "damaged-2-2"]
    (tmp_path / "run" / "1" / "step" / "metadata").write_text("{}")
    with (
        RunCheckpoints(tmp_path / "run", keep=2) as checkpoints,
        pytest.raises(ValueError, match=r"run/1 is damaged: step is not what was written .*; no intact checkpoint is"),
    ):
        checkpoints.restore_newest(target)


def test_damaged_json_in_a_checkpoint_without_digests_is_passed_over(tmp_path: Path) -> None:
    target = {name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS}
    for item in ("step", "data"):
        run = tmp_path / item
        write_steps(run, {1: 0.0, 2: 0.0}, keep=2)
        shutil.rmtree(run / "2" / "digests")
        (run / "2" / item / "metadata").write_text("[3]")
        with RunCheckpoints(run, keep=2) as checkpoints:
            found = checkpoints.restore_newest(target)
        assert found is not None and found.step == 1
        assert (run / "damaged-2").is_dir()


def test_a_digest_is_of_name_dtype_shape_and_little_endian_bytes() -> None:
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    expected = hashlib.sha256(b"layer.kernel int32 (2, 3)\n" + values.astype("<i4").tobytes()).hexdigest()
    for array in (values, jnp.asarray(values), np.asfortranarray(values)):
        assert tree_digests({"layer": {"kernel": array}}) == {"layer.kernel": expected}
    others = [{"layer.bias": values}, {"layer.kernel": values.reshape(3, 2)}, {"layer.kernel": values.view(np.float32)}]
    assert all(expected not in tree_digests(other).values() for other in others)
    small = {"a": jnp.zeros((), jnp.int32), "b": jnp.ones((3, 0)), "c": jnp.ones(3, jnp.bfloat16)}
    assert len(set(tree_digests(small).values())) == 3


def test_a_json_digest_is_of_the_content() -> None:
    assert json_digest({"b": (1, 2.5), "a": None}) == json_digest({"a": None, "b": [1, 2.5]})
    assert json_digest({"a": 1.0}) != json_digest({"a": 1.0 + 2**-52})


@pytest.mark.parametrize("written", [None, [], {}, {"a": 3}, {"a": "short"}, {"a": "0" * 64, "b": "0" * 64}])
def test_digests_that_are_no_digests_are_damage(tmp_path: Path, written: object) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        check_digests(tmp_path, {"a": "0" * 64}, written)
    check_digests(tmp_path, {"a": "0" * 64}, {"a": "0" * 64})


def test_what_grows_while_a_checkpoint_is_written_is_not_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """orbax writes JSON in the background, sometimes after the run has gone on and its lists have grown."""
    handed: list[dict] = []
    json_save = ocp.args.JsonSave
    monkeypatch.setattr(ocp.args, "JsonSave", lambda content: handed.append(content) or json_save(content))
    items = {name: {"weights": jnp.zeros((3, 2), jnp.float32)} for name in ITEMS}
    window = [{"loss": 0.5}]
    with RunCheckpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(1, items, {"window": window}, {}, small_config(), 0.0)
        window.append({"loss": 0.25})
    assert {"window": [{"loss": 0.5}]} in handed
