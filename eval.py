"""Evaluate a checkpoint on a test set: python eval.py --config=configs/mnist_avit.py --checkpoint=runs/mnist_avit"""

from pathlib import Path

from absl import flags

from avit_jax.cli import define_config_flag, run_main

CONFIG = define_config_flag(str(Path(__file__).parent / "configs" / "mnist_avit.py"))
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to evaluate; runs/<config.name> by default.")


def main() -> None:
    """What the flags ask for."""
    from avit_jax.experiment import evaluate_checkpoint

    config = CONFIG.value
    print(evaluate_checkpoint(config, CHECKPOINT.value or f"runs/{config.name}"))


if __name__ == "__main__":
    run_main(main)
