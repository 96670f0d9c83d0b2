"""Models as StableHLO: a process that has JAX and nothing of this project computes what the model computes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

import avit_jax
from avit_jax import ConfidenceExit, Gates, PackedPlan, RandomDrop, ToMe
from avit_jax.execution.export import stablehlo
from avit_jax.model.config import NO_RULE
from tests.harness.builders import answers, small_config, spread_gate

pytest.importorskip("flatbuffers")

# Loads and runs an artifact; avit_jax, flax and orbax cannot be imported there.
ELSEWHERE = """
import sys
for name in ("avit_jax", "flax", "orbax"):
    sys.modules[name] = None
import json, pathlib, jax, numpy
import safetensors.numpy
path, images, out = sys.argv[1:]
exported = jax.export.deserialize(bytearray(pathlib.Path(path).read_bytes()))
arguments = [numpy.load(images)]
if json.loads(pathlib.Path(path + ".json").read_text())["arguments"] == ["weights", "images"]:
    arguments.insert(0, safetensors.numpy.load_file(path + ".safetensors"))
numpy.savez(out, **jax.jit(exported.call)(*arguments))
"""


def elsewhere(path: Path, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of an artifact for images, computed in a new process that has no avit_jax."""
    np.save(path.with_suffix(".npy"), images)
    out = path.with_suffix(".npz")
    command = [sys.executable, "-I", "-c", ELSEWHERE, path, path.with_suffix(".npy"), out]
    subprocess.run(command, check=True, cwd=path.parent, timeout=300)
    with np.load(out) as found:
        return dict(found)


def here(path: Path, images: np.ndarray) -> dict[str, Any]:
    arguments = [images]
    if path.with_name(path.name + ".safetensors").exists():
        arguments.insert(0, safetensors.numpy.load_file(path.with_name(path.name + ".safetensors")))
    return jax.export.deserialize(bytearray(path.read_bytes())).call(*arguments)


def images_for(config: avit_jax.AViTConfig, count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, *config.image_shape, config.in_channels)).astype(np.float32)


def check(found: dict[str, Any], wanted: avit_jax.AViTOutput) -> None:
    np.testing.assert_allclose(found["logits"], wanted.logits, atol=1e-5)
    np.testing.assert_array_equal(found["token_depth"], wanted.token_depth)
    assert found["token_depth"].dtype == np.int32


def planned(model: avit_jax.AViT, images: np.ndarray, batch: int) -> avit_jax.PlannedPlan:
    return avit_jax.plan(model, images, batch, mesh=jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]))


def options_for(execution: str, model: avit_jax.AViT, images: np.ndarray) -> dict[str, Any]:
    if execution == "masked":
        return {}
    more = {"plan": planned(model, images, len(images))} if execution == "planned" else {"execution": execution}
    return more | {"batch_size": len(images), "image_exit": False}


@pytest.mark.parametrize("weights", ["inside", "beside"])
@pytest.mark.parametrize("execution", ["masked", "packed", "planned"])
def test_a_process_without_avit_jax_runs_it(execution: str, weights: str, tmp_path: Path) -> None:
    model = spread_gate(small_config())
    images = images_for(model.config, 6)
    wanted = answers(model, images)
    assert len(np.unique(wanted.token_depth)) > 2
    path = tmp_path / "model.stablehlo"
    avit_jax.export(model, path, "stablehlo", weights=weights, **options_for(execution, model, images))
    check(elsewhere(path, images), wanted)
    about = json.loads((tmp_path / "model.stablehlo.json").read_text())
    assert about["execution"] == execution and about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["batch_size"] == ("free" if execution == "masked" else 6)
    assert avit_jax.AViTConfig.from_json(about["config"]) == model.config
    assert (np.asarray(model.pos_embed[...]).tobytes() in path.read_bytes()) == (weights == "inside")


@pytest.mark.parametrize(
    ("changes", "execution"),
    [
        ({"distilled": True}, "masked"),
        ({"rule": ConfidenceExit(0.3)}, "packed"),
        ({"rule": ToMe(1)}, "shrinking"),
        ({"rule": RandomDrop(0.5, (1,))}, "shrinking"),
        ({"rule": Gates(token_bias=0.0, bias=0.0)}, "masked"),
        ({"rule": Gates(token_bias=0.0, bias=0.0)}, "packed"),
        (NO_RULE, "masked"),
        (NO_RULE | {"pool": "norm_mean"}, "shrinking"),
        ({"dtype": "bfloat16"}, "packed"),
    ],
    ids=str,
)
def test_every_kind_of_rule(changes: dict[str, Any], execution: str, tmp_path: Path) -> None:
    model = spread_gate(small_config(**changes))
    images = images_for(model.config, 3)
    path = tmp_path / "model.stablehlo"
    fixed = {"batch_size": 3, "execution": execution, "image_exit": False} if execution == "packed" else {}
    avit_jax.export(model, path, "stablehlo", **fixed)
    said = json.loads((tmp_path / "model.stablehlo.json").read_text())["execution"]
    assert said == ("masked" if execution == "shrinking" and model.config.reduction is None else execution)
    check(here(path, images), answers(model, images))
    if not fixed:
        check(here(path, images[:1]), answers(model, images[:1]))  # the batch is free


def test_a_batch_that_does_not_fit_its_plan(tmp_path: Path) -> None:
    model = spread_gate(small_config())
    images = images_for(model.config, 6)
    plan = planned(model, images, 6)
    few = type(plan)(plan.num_tokens, plan.depth, 6, 6, (type(plan.stages[0])(0, (2,)),))
    path = tmp_path / "model.stablehlo"
    avit_jax.export(model, path, "stablehlo", batch_size=6, plan=few, image_exit=False)
    check(here(path, images), answers(model, images))


def test_image_exit_and_one_platform(tmp_path: Path) -> None:
    model = spread_gate(small_config())
    images = images_for(model.config, 5)
    path = tmp_path / "model.stablehlo"
    plan = PackedPlan(7, 2**20, (4, 7))
    avit_jax.export(model, path, "stablehlo", batch_size=5, plan=plan, platforms=("cpu",))
    np.testing.assert_array_equal(here(path, images)["token_depth"], avit_jax.compile(model, 5)(images).token_depth)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu",)
    assert str(2**20) not in exported.mlir_module(), "no group is larger than the batch"


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread_gate(small_config())
    path = tmp_path / "model.stablehlo"
    plan = planned(model, images_for(model.config, 6), 6)
    for options, sentence in (
        (
            {"execution": "packed"},
            r"packed execution has the shapes of one batch size: give batch_size \(--batch-size\)",
        ),
        ({"execution": "planned", "batch_size": 6}, "planned execution needs a plan of its shapes"),
        ({"plan": plan, "batch_size": 4}, "the plan is for .* 6 images on a device"),
        ({"plan": PackedPlan(5, 1, (5,)), "batch_size": 6}, "the plan is for 5 tokens and the model has 7"),
        ({"plan": plan, "execution": "masked"}, "the plan is for planned execution and this one is masked"),
        ({"execution": "shrinking"}, "shrinking execution cannot run the rule 'avit'"),
        ({"execution": "eager"}, "execution 'eager' is unknown"),
        ({"weights": "away"}, "weights is 'away': choose inside or beside"),
        ({"platforms": ("cpu", "rocm")}, r"platforms is \('cpu', 'rocm'\): give some of cpu, cuda, tpu"),
        ({"platforms": ()}, r"platforms is \(\): give some of cpu"),
        ({"preprocess": True}, "preprocess is an option of the format 'onnx': leave it out, or give format='onnx'"),
        ({"count_step": 4}, "count_step is an option of the format 'onnx'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            avit_jax.export(model, path, "stablehlo", **options)
    for options, name in (
        ({"execution": "packed"}, "execution"),
        ({"plan": plan}, "plan"),
        ({"weights": "beside"}, "weights"),
    ):
        with pytest.raises(ValueError, match=f"{name} is an option of the format 'stablehlo': leave it out"):
            avit_jax.export(model, path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(stablehlo, "LARGEST_PROGRAM", 1000)
        with pytest.raises(ValueError, match="its weights take .* GiB .*weights='beside'"):
            avit_jax.export(model, path, "stablehlo")
    with monkeypatch.context() as patch:
        patch.setattr(stablehlo.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="needs the package flatbuffers, which is not there: pip install"):
            avit_jax.export(model, path, "stablehlo")
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.stablehlo.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model\.stablehlo\.json exists already: choose another path"):
        avit_jax.export(model, path, "stablehlo")
    avit_jax.export(model, path, "stablehlo", overwrite=True)
    assert path.exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from avit_jax.commands.export import main

    model = spread_gate(small_config())
    images = images_for(model.config, 6)
    avit_jax.save(model, tmp_path / "model")
    planned(model, images, 6).save(tmp_path / "plan.json")
    path = tmp_path / "model.stablehlo"
    arguments = [str(tmp_path / "model"), str(path), "--format=stablehlo", "--batch-size=6", "--platforms=cpu"]
    assert main([*arguments, f"--plan={tmp_path / 'plan.json'}", "--weights=beside", "--no-image-exit"]) == 0
    check(here(path, images), answers(model, images))
    assert main([*arguments, f"--plan={tmp_path / 'nowhere.json'}"]) == 1
    assert "nowhere.json" in capsys.readouterr().err
