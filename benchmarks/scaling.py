"""The cost of sharding over 1, 2, 4, 8 simulated devices, of asynchronous checkpoints, and of waiting for data.

    python benchmarks/scaling.py                        everything, about 12 minutes on 2 cores
    python benchmarks/scaling.py --parts=devices --models=mnist

devices: the real train step at a fixed global batch. Each number of devices has its own process, because XLA counts
devices when it starts; the processes run in turn. All share this machine's cores, so the ideal is a constant time.
checkpoints: the default job's training loop (configs/mnist_avit.py), in turn with a checkpoint every 18 steps, ten
times as often as in the job, and without. Evaluation and the first log line (compilation) are left out. The share of
this time that is spent waiting for the next batch is reported too.
Medians are reported. Writes runs/benchmarks/scaling.json.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from avit_jax.runtime.mesh import available_cores
from benchmarks.results import save_results

ROOT = Path(__file__).parents[1]
DEVICES = (1, 2, 4, 8)
BATCHES = {"mnist": 96, "tiny224": 16}  # divisible by eight devices, close to those of benchmarks/train_step.py
STEPS = {"mnist": 5, "tiny224": 1}  # in a round
EVERY = 18  # steps between two checkpoints; 180 in the default job


def take_steps(model: str) -> None:
    """The worker process: for each line of standard input, take a round of steps and print the seconds a step."""
    from benchmarks.train_step import MODELS, jax_step

    gated = dataclasses.replace(MODELS[model][0], gate_scale=40.0, gate_center=20.0)
    step = jax_step(gated, BATCHES[model], "masked").run
    for _ in range(2):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(STEPS[model]):
            step()
        print((time.perf_counter() - began) / STEPS[model], flush=True)


def over_devices(model: str, rounds: int) -> dict[int, list[float]]:
    """Seconds per step in each round, by the number of devices."""
    workers = {}
    for count in DEVICES:
        flags = f"--xla_force_host_platform_device_count={count}"
        workers[count] = subprocess.Popen(
            [sys.executable, __file__, f"--take-steps={model}"],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        _answer(workers[count])  # wait until it has compiled, before the next one does
    seconds: dict[int, list[float]] = {count: [] for count in DEVICES}
    for _ in range(rounds):
        for count, worker in workers.items():
            assert worker.stdin is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            seconds[count].append(float(_answer(worker)))
    for worker in workers.values():
        worker.communicate()
    return seconds


def _answer(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a worker ended with status {worker.wait()}: see its message above")
    return line


def trained(checkpoint_every: int, steps: int) -> dict[str, float]:
    """The default job's first steps: seconds of the loop after the first log line, and the shares spent waiting."""
    from avit_jax import load
    from avit_jax.commands.typed_config import parse
    from avit_jax.data.open import open_dataset
    from avit_jax.train.logs import read_metrics
    from avit_jax.train.loop import train
    from avit_jax.train.start import initial_model
    from configs import mnist_avit

    config = mnist_avit.get_config()
    dataset = open_dataset(parse(config).data)
    config.epochs = steps * config.batch_size / len(dataset.train)
    config.optim.warmup_steps = min(config.optim.warmup_steps, steps - 1)
    config.checkpoint_every, config.eval_every = checkpoint_every, steps
    settings = parse(config)
    model, teacher = initial_model(settings, dataset), load(settings.teacher)
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            train(settings, dataset, model, Path(folder), teacher)
        lines = [line for line in read_metrics(Path(folder)) if line["split"] == "train"][1:]
    # images_per_second leaves out checkpoints, but their share is of the whole time.
    seconds = [
        settings.log_every * settings.batch_size / line["images_per_second"] / (1 - line["checkpoint_wait"])
        for line in lines
    ]
    total = sum(seconds)
    waits = {
        name: sum(line[name] * s for line, s in zip(lines, seconds, strict=True)) / total
        for name in ("data_wait", "checkpoint_wait")
    }
    return {"seconds": total, "steps": settings.log_every * len(lines)} | waits


def checkpoints(rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """Runs with checkpoints and without, in turn, in this process."""
    import jax

    from avit_jax.runtime.mesh import use_all_cores

    use_all_cores()
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())  # each run builds its own step
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    runs: dict[str, list[dict[str, float]]] = {"none": [], "checkpoints": []}
    for _ in range(rounds):
        for name, every in (("none", 10 * steps), ("checkpoints", EVERY)):
            runs[name].append(trained(every, steps))
            print(name, runs[name][-1], flush=True)
    return runs


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="devices,checkpoints")
    parser.add_argument("--models", default=",".join(BATCHES))
    parser.add_argument("--rounds", type=int, default=15, help="rounds for the devices")
    parser.add_argument("--runs", type=int, default=3, help="runs with checkpoints, and as many without")
    parser.add_argument("--steps", type=int, default=96, help="steps of a run")
    parser.add_argument("--take-steps", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.take_steps:
        take_steps(options.take_steps)
        return
    out = ROOT / "runs/benchmarks/scaling.json"
    result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    result["machine"] = f"{platform.machine()}, {available_cores()} cores"
    if "devices" in options.parts:
        for model in options.models.split(","):
            seconds = over_devices(model, options.rounds)
            print(f"\n{model}, global batch {BATCHES[model]}, {options.rounds} rounds of {STEPS[model]} steps")
            print(f"{'devices':>8}{'ms a step':>11}{'of one device':>15}")
            # Each is compared with one device in the same round, because the machine's other load changes slowly.
            ratios = {
                count: statistics.median(a / b for a, b in zip(seconds[count], seconds[1], strict=True))
                for count in DEVICES
            }
            for count in DEVICES:
                print(f"{count:8}{1e3 * statistics.median(seconds[count]):11.0f}{ratios[count]:15.2f}")
            result[model] = {"batch": BATCHES[model], "seconds": seconds, "of_one_device": ratios}
    if "checkpoints" in options.parts:
        runs = checkpoints(options.runs, options.steps)
        medians = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
        waits = {
            name: statistics.median(run[name] for run in runs["checkpoints"])
            for name in ("data_wait", "checkpoint_wait")
        }
        ratio = statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(runs["checkpoints"], runs["none"], strict=True)
        )
        print(
            f"\n{runs['none'][0]['steps']:.0f} steps of the default job: {medians['none']:.1f} s without checkpoints, "
            f"{medians['checkpoints']:.1f} s with one every {EVERY} steps ({ratio - 1:+.1%}); waiting for checkpoints "
            f"{waits['checkpoint_wait']:.1%} of the time, for data {waits['data_wait']:.2%}"
        )
        result["checkpoints"] = {"runs": runs, "medians": medians, "ratio": ratio} | waits
    save_results(out, result)


if __name__ == "__main__":
    main()
