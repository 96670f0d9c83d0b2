"""Run by test_scaling with libtpu: a small train step and packed and planned evaluation, compiled for a TPU v5e."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from flax import nnx

from avit_jax.commands.typed_config import parse
from avit_jax.execution.stages import PlannedPlan, Stage
from avit_jax.model.vit import model_of_shapes
from configs import imagenet_avit
from tests.harness.collectives import said
from tests.harness.tpu_cycles import counted
from tests.harness.tpu_programs import (
    bytes_needed,
    check_crossing,
    compile_masked_evaluation,
    compile_packed_evaluation,
    compile_planned_evaluation,
    compile_train_step,
    model_of,
    topology_mesh,
)

config = imagenet_avit.get_config("tiny")
config.batch_size = 64
config.augment.update({"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0})  # half of the compile time
config.model.update({"image_size": 32, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 10})
settings = parse(config)
model = model_of(settings)
_, params = nnx.split(model_of_shapes(model), nnx.Param)
state = 4 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # weights, average, two moments, float32

step = compile_train_step(settings, topology_mesh("v5e:2x4", fsdp=2))
crossing = check_crossing(step, model, {"gradients", "parameters", "scalars", "statistics", "counts"}, fsdp=2)
print(said(crossing), f"{bytes_needed(step) / 1e6:.1f} MB, state {state / 1e6:.1f} MB")
assert crossing["statistics"] == {"count": 1, "bytes": 4 * 2}
# Each parameter is gathered once, kernels as bfloat16, and its gradient summed once.
assert state / 16 * 2 <= crossing["parameters"]["bytes"] <= state / 16 * 4
assert state / 16 * 2 <= crossing["gradients"]["bytes"] <= state / 16 * 4
# A half of the state on each chip, but for what is too short to split and is padded to tiles.
arguments = step.memory_analysis().argument_size_in_bytes
assert state / 2 <= arguments <= state, arguments

packed = compile_packed_evaluation(model, 16, topology_mesh("v5e:2x4"))
assert not check_crossing(packed, model, set(), fsdp=1)


def run_always(compiled: Any) -> list[str]:
    """The operations of a run in which each conditional takes its first branch; for planned: every image fits."""
    text = compiled.as_text()
    assert not any(code in text for code in ("infeed(", "outfeed(", " send(", " recv(", "callback")), "no host"
    return [row.operation.code for row in counted(text, lambda n, _: [1.0] + [0.0] * (n - 1)) if row.times]


# Planned execution has one conditional, for a batch that does not fit: in inference and in training.
chip = topology_mesh("v5e:1x1")
plan = PlannedPlan(model.num_tokens, model.depth, 16, 8, (Stage(0, (5, 5)), Stage(1, (2, 4))))
planned = run_always(compile_planned_evaluation(model, plan, chip))
config.batch_size, config.execution = 16, "planned"
training = run_always(compile_train_step(parse(config), chip, plan))
for codes in (planned, training):
    assert codes.count("conditional") == 1, codes.count("conditional")
assert planned.count("sort") >= 4, "tokens are moved by sorting"

# More layers cost more cycles, and their loop has as many trips.
cycles = []
for depth in (2, 4):
    deeper = dataclasses.replace(model, depth=depth, gate_scale=None, gate_center=None)
    rows = counted(compile_masked_evaluation(deeper, 16, chip).as_text(), lambda n, _: [1 / n] * n)
    assert max(row.times for row in rows) == depth
    cycles.append(sum(row.estimated for row in rows))
assert cycles[0] * 1.1 < cycles[1] < cycles[0] * 2, cycles
print("as promised")
