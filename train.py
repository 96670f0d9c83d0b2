"""Train a model and show what it does: python train.py --config=configs/mnist_avit.py"""

from pathlib import Path

from absl import flags

from avit_jax.cli import define_config_flag, run_main

CONFIG = define_config_flag(str(Path(__file__).parent / "configs" / "mnist_avit.py"))
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config.name> by default.")
RESUME = flags.DEFINE_bool("resume", True, "Continue the run in the folder; --noresume refuses one that has begun.")


def main() -> None:
    """What the flags ask for."""
    from avit_jax.experiment import run

    config = CONFIG.value
    run(config, WORKDIR.value or f"runs/{config.name}", resume=RESUME.value)


if __name__ == "__main__":
    run_main(main)
