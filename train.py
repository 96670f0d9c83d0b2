"""Train a model and show what it does: python train.py --config=configs/mnist_avit.py"""

import time

BEGAN = time.perf_counter()  # before the imports, which the user waits for too

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from avit_jax.cli import define_config_flag, run_main  # noqa: E402

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config.name> by default.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; by itself under SLURM and on TPU pods."
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, where the cluster does not tell it.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are, with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0, with --coordinator.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what the run would be, and take two steps on made-up data.")
PROFILE = flags.DEFINE_string("profile", None, "START:STEPS, a trace of those steps; sets config.profile.")
RESUME = flags.DEFINE_bool("resume", True, "Continue the run in the folder; --noresume refuses one that has begun.")


def main() -> None:
    """What the flags ask for."""
    from avit_jax.distributed import start_distributed

    if PROFILE.value is not None:
        CONFIG.value.profile = PROFILE.value
    processes = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    start_distributed(DISTRIBUTED.value or any(value is not None for value in processes), *processes)
    if DRY_RUN.value:
        from avit_jax.dry_run import dry_run

        print(dry_run(CONFIG.value))
        return
    from avit_jax.experiment import run
    from avit_jax.training import Stopped

    try:
        run(CONFIG.value, WORKDIR.value or f"runs/{CONFIG.value.name}", resume=RESUME.value, began=BEGAN)
    except Stopped as stopped:
        print(stopped)


if __name__ == "__main__":
    run_main(main, Path(__file__).parent / "configs" / "mnist_avit.py")
