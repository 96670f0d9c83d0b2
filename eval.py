"""Evaluate a checkpoint on a test set: python eval.py --config=configs/mnist_avit.py --checkpoint=runs/mnist_avit"""

from pathlib import Path

from absl import flags

from avit_jax.cli import define_config_flag, run_main

CONFIG = define_config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to evaluate; runs/<config.name> by default.")
EMA = flags.DEFINE_bool("ema", False, "Evaluate the moving average of a training checkpoint.")
EXECUTION = flags.DEFINE_enum(
    "execution", "packed", ["packed", "masked"], "How an A-ViT runs; a model that never halts runs whole."
)


def main() -> None:
    """What the flags ask for."""
    from avit_jax.experiment import evaluate_checkpoint

    path = CHECKPOINT.value or f"runs/{CONFIG.value.name}"
    print(evaluate_checkpoint(CONFIG.value, path, ema=EMA.value, execution=EXECUTION.value))


if __name__ == "__main__":
    run_main(main, Path(__file__).parent / "configs" / "mnist_avit.py")
