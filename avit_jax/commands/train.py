"""The command that trains: python train.py, or python -m avit_jax.train where the package is installed."""

import time

_BEGAN = time.perf_counter()  # before the imports, which the user waits for too

from absl import flags  # noqa: E402

from avit_jax.commands.command_line import define_config_flag, run_main  # noqa: E402


def main(began: float = _BEGAN) -> None:
    """Train a model and show what it does; began: time.perf_counter() when this process started."""
    config = define_config_flag()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config.name> by default.")
    distributed = flags.DEFINE_bool(
        "distributed", False, "Run as one of several processes; automatic under SLURM and on TPU pods."
    )
    coordinator = flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, if the cluster does not provide it."
    )
    num_processes = flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator.")
    process_id = flags.DEFINE_integer("process_id", None, "Number of this process, from 0, with --coordinator.")
    dry = flags.DEFINE_bool("dry_run", False, "Print what the run would be, and take two steps on made-up data.")
    profile = flags.DEFINE_string("profile", None, "START:STEPS, a trace of those steps; sets config.profile.")
    resume = flags.DEFINE_bool("resume", True, "Continue the run in the folder; --noresume refuses an old run.")

    def command() -> None:
        from avit_jax.runtime.mesh import check_platform
        from avit_jax.runtime.processes import start_distributed

        if profile.value is not None:
            config.value.profile = profile.value
        processes = coordinator.value, num_processes.value, process_id.value
        start_distributed(distributed.value or any(value is not None for value in processes), *processes)
        check_platform()
        if dry.value:
            from avit_jax.commands.dry_run import dry_run

            for line in dry_run(config.value):
                print(line, flush=True)
            return
        from avit_jax.commands.run import run
        from avit_jax.train.loop import Stopped

        try:
            run(config.value, workdir.value or f"runs/{config.value.name}", resume=resume.value, began=began)
        except Stopped as stopped:
            print(stopped)

    options = [workdir, distributed, coordinator, num_processes, process_id, dry, profile, resume]
    run_main(command, options, "Train a model and show what it does.")
