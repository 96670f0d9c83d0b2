"""Train a model and show what it does: python train.py --config=configs/mnist_avit.py"""

import time

BEGAN = time.perf_counter()  # before the imports, which the user waits for too

from pathlib import Path  # noqa: E402

from absl import flags  # noqa: E402

from avit_jax.cli import define_config_flag, run_main  # noqa: E402

CONFIG = define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config.name> by default.")
RESUME = flags.DEFINE_bool("resume", True, "Continue the run in the folder; --noresume refuses one that has begun.")


def main() -> None:
    """What the flags ask for."""
    from avit_jax.experiment import run

    run(CONFIG.value, WORKDIR.value or f"runs/{CONFIG.value.name}", resume=RESUME.value, began=BEGAN)


if __name__ == "__main__":
    run_main(main, Path(__file__).parent / "configs" / "mnist_avit.py")
