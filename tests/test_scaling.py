"""Programs for machines that are not here: compiled for TPU chips, lowered for CUDA; what crosses devices in them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

from avit_jax.commands.typed_config import parse
from avit_jax.execution.packed import packed_program
from avit_jax.execution.plan import default_plan
from avit_jax.model.vit import model_of_shapes
from avit_jax.runtime.mesh import MeshSettings, training_mesh
from avit_jax.train.optim import learning_rate_schedule, make_optimizer
from avit_jax.train.state import TrainState
from avit_jax.train.step import build_train_step
from configs import npz_avit
from tests.harness.builders import small_config
from tests.harness.collectives import Collective, collectives, what_crosses
from tests.harness.devices import run_on_devices


@pytest.mark.slow
def test_eight_devices_give_one_devices_loss_and_gradient() -> None:
    """The halting terms are means over the global batch, not means of the devices' own; also on an fsdp mesh."""
    assert "8 devices agree" in run_on_devices("step_on_devices.py")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -r requirements-tpu.txt"
)
def test_it_compiles_for_a_tpu() -> None:
    """In a new process: its environment tells libtpu that there are no chips, and XLA compiles as for training."""
    script = Path(__file__).parent / "harness" / "compile_for_tpu.py"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "as promised" in done.stdout


@pytest.mark.parametrize("gate", [(None, None), (4.0, 1.0)])
def test_train_step_and_packed_evaluation_lower_for_cuda(gate: tuple[float | None, float | None]) -> None:
    model = small_config(dtype="bfloat16", gate_scale=gate[0], gate_center=gate[1])
    config = npz_avit.get_config("")
    config.loss.distillation, config.teacher = "none", ""
    config.augment.update({"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25})
    settings = parse(config)
    optimizer = make_optimizer(settings.optim, learning_rate_schedule(settings.optim, 1000, epochs=1.0, batch_size=4))
    graphdef, params = nnx.split(model_of_shapes(model), nnx.Param)
    state = TrainState(jax.ShapeDtypeStruct((), "int32"), params, params, jax.eval_shape(optimizer.init, params))
    batch = {"image": jax.ShapeDtypeStruct((4, 12, 8, 2), "float32"), "label": jax.ShapeDtypeStruct((4,), "int32")}
    mesh = training_mesh(MeshSettings(), 1)  # one device
    step = jax.jit(build_train_step(graphdef, optimizer, settings.step, mesh, None), donate_argnums=0)
    exported = jax.export.export(step, platforms=["cuda"])(state, batch, None)
    assert exported.platforms == ("cuda",)
    state_out, metrics = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.map(lambda x: x.shape, state_out.params) == jax.tree.map(lambda x: x.shape, params)
    assert metrics["halting_by_layer"].shape == (4,)
    packed = jax.jit(packed_program(graphdef, default_plan(model, 4, "cuda"), True, None))
    exported = jax.export.export(packed, platforms=["cuda"])(params, batch["image"], jax.ShapeDtypeStruct((), "int32"))
    assert exported.platforms == ("cuda",)
    assert [leaf.shape for leaf in exported.out_avals] == [(4, 5), (1, 4, 5), (4, 7), (4, 7), (4, 4, 7)]


def test_each_part_of_a_batch_is_split_over_all_devices() -> None:
    count = len(jax.devices())
    assert training_mesh(MeshSettings(count), 12 * count, 4).size == count
    with pytest.raises(
        ValueError, match=rf"{12 * count} cannot be split in 5 parts over {count} devices: choose {10 * count}$"
    ):
        training_mesh(MeshSettings(count), 12 * count, 5)


PROGRAM = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %reduced = (bf16[8,4]{1,0}, /*index=1*/f32[]) all-reduce(%x, %one), channel_id=1, to_apply=%add
}

%condition (carry: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[] constant(5)
  %i = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%open (carry: (s32[], f32[8,4])) -> pred[] {
  %any = u32[] get-tuple-element(%carry), index=0
  %all = u32[] all-reduce(%any), channel_id=9, to_apply=%add
  ROOT %true = pred[] bitcast(%all)
}

%unused (p: f32[]) -> f32[] {
  ROOT %never = f32[8,4] all-reduce(%p), channel_id=7, to_apply=%add
}

%fusion.1 (p: f32[5,2]) -> f32[5,8] {
  %p = f32[5,2]{1,0} parameter(0)
  ROOT %gathered.1 = f32[5,8]{1,0} all-gather(%p), channel_id=3, dimensions={1}
}

%fusion.2 (p: f32[5,2]) -> f32[5,8] {
  %p = f32[5,2]{1,0} parameter(0)
  ROOT %gathered.2 = f32[5,8]{1,0} all-gather(%p), channel_id=3, dimensions={1}
}

ENTRY %main (p: f32[1,8]) -> f32[5,8] {
  %p = f32[1,8]{1,0} parameter(0)
  %started = f32[5,8] fusion(%p), kind=kCustom, calls=%fusion.1
  %done = f32[5,8] fusion(%started), kind=kCustom, calls=%fusion.2
  %loop = (s32[], f32[8,4]) while(%done), condition=%condition, body=%body
  %noted = (s32[], f32[8,4]) while(%loop), condition=%open, body=%body, backend_config={"known_trip_count":{"n":"2"}}
  %along = f32[5,8]{1,0} all-gather(%p), channel_id=4, dimensions={0}
  ROOT %moved = f32[5,8]{1,0} all-to-all(%along), channel_id=5
}
"""


def test_collectives_are_counted_as_often_as_they_run() -> None:
    text = PROGRAM.replace("%x = bf16", "%one = f32[] constant(1)\n  %x = bf16")
    found = collectives(text)
    assert sorted((one.kind, one.times) for one in found) == [
        ("all-gather", 1),  # that along the layers
        ("all-gather", 1),  # in two fusions, begun and ended: once
        ("all-reduce", 2),  # the condition of the loop of 2
        ("all-reduce", 7),  # the body: 5 and 2; not the computation that nobody calls
        ("all-to-all", 1),
    ]
    parameters = [("blocks.kernel", (5, 8)), ("head", (8, 4))]
    crossing = what_crosses(found, parameters, layers=5, fsdp=4)
    assert crossing == {
        "gradients": {"count": 7, "bytes": 7 * 2 * 32},
        "scalars": {"count": 9, "bytes": 4 * 9},
        "parameters": {"count": 1, "bytes": 4 * 40},
        "other": {"count": 2, "bytes": 2 * 4 * 40},
    }
    with pytest.raises(ValueError, match="it has no ENTRY"):
        collectives("module {}")


def test_a_loop_that_the_data_end_is_counted_apart() -> None:
    scalar = (("u32", ()), ("u32", ()))
    crossing = what_crosses([Collective("all-reduce", (scalar,), times=0)], [("head", (8,))], layers=5, fsdp=1)
    assert crossing == {"scalars": {"in loops": 1, "bytes": 0}}
    activations = (("f32", (16, 7)), ("f32", (16, 7)))
    assert what_crosses([Collective("all-reduce", (activations,), 1)], [("head", (8,))], 5, 1).keys() == {"other"}
