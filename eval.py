"""Evaluate a checkpoint on a test set: python eval.py --config=configs/mnist_avit.py --checkpoint=runs/mnist_avit"""

from pathlib import Path
from typing import Any

from absl import flags

from avit_jax.cli import define_config_flag, run_main

CONFIG = define_config_flag()
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "What to evaluate; runs/<config.name> by default.")
EMA = flags.DEFINE_bool("ema", False, "Evaluate the moving average of a training checkpoint.")
EXECUTION = flags.DEFINE_enum(
    "execution", "packed", ["packed", "masked"], "How an A-ViT runs; a model that never halts runs whole."
)
REPORT = flags.DEFINE_string("report", None, "Folder for report.html, a page that shows what the model did.")
BASELINE = flags.DEFINE_string("baseline", None, "A checkpoint to compare with in the report.")
SWEEP = flags.DEFINE_string(
    "sweep",
    None,
    "Gate settings for the report, same weights: gate_center:8,9,10 or gate_center:8:12:5 (first, last, count); "
    "gate_scale likewise.",
)
IMAGES = flags.DEFINE_string(
    "images", None, "An image or a folder of images instead of a data set; pictures go to --report or runs/NAME/images."
)
CLASS_NAMES = flags.DEFINE_string("class_names", None, "A text file with one name a line, instead of the checkpoint's.")


def main() -> None:
    """What the flags ask for."""
    path = CHECKPOINT.value or f"runs/{CONFIG.value.name}"
    settings: dict[str, Any] = {"ema": EMA.value, "execution": EXECUTION.value, "class_names": CLASS_NAMES.value}
    comparison: dict[str, Any] = {"baseline": BASELINE.value, "sweep": SWEEP.value}
    if IMAGES.value:
        from avit_jax.predict_images import predict_checkpoint

        for line in predict_checkpoint(path, IMAGES.value, folder=REPORT.value, **settings, **comparison):
            print(line)
    else:
        from avit_jax.checkpoint_evaluation import evaluate_checkpoint

        print(evaluate_checkpoint(CONFIG.value, path, report=REPORT.value, **settings, **comparison))


if __name__ == "__main__":
    run_main(main, Path(__file__).parent / "configs" / "mnist_avit.py")
