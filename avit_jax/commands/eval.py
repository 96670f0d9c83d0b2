"""The command that evaluates: python eval.py, or python -m avit_jax.eval where the package is installed."""

from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from avit_jax.commands.command_line import define_config_flag, run_main
from avit_jax.commands.config_files import DEFAULT_CONFIG
from avit_jax.commands.run_config import config_of_checkpoint
from avit_jax.runtime.mesh import check_platform

READS = ("name", "data", "model", "eval_batch_size")  # of the config
DEFAULT_RUN = f"runs/{DEFAULT_CONFIG}"


def main() -> None:
    """Evaluate a checkpoint on a test set, or on pictures."""
    config = define_config_flag()
    checkpoint = flags.DEFINE_string("checkpoint", None, "What to evaluate; runs/<config.name> by default.")
    ema = flags.DEFINE_bool("ema", False, "Evaluate the moving average of a training checkpoint.")
    execution = flags.DEFINE_enum(
        "execution",
        "auto",
        ["auto", "packed", "masked"],
        "How to run a halting model (auto: packed on a CPU, masked elsewhere); any other model has one way.",
    )
    report = flags.DEFINE_string("report", None, "Folder for report.html, a page that shows what the model did.")
    baseline = flags.DEFINE_string("baseline", None, "A checkpoint to compare with in the report.")
    sweep = flags.DEFINE_string(
        "sweep",
        None,
        "Settings to compare in the report, same weights: gate_center:8,9,10 or gate_center:8:12:5 (first, last, "
        "count); also gate_scale, and for other rules threshold or r.",
    )
    images = flags.DEFINE_string(
        "images",
        None,
        "An image or a folder of images instead of a data set; pictures go to --report or runs/NAME/images.",
    )
    class_names = flags.DEFINE_string(
        "class_names", None, "A text file with one name a line, instead of the checkpoint's."
    )

    def command() -> None:
        check_platform()
        path = checkpoint.value or f"runs/{config.value.name}"
        settings: dict[str, Any] = {"ema": ema.value, "execution": execution.value, "class_names": class_names.value}
        comparison: dict[str, Any] = {"baseline": baseline.value, "sweep": sweep.value}
        if images.value:
            from avit_jax.commands.predict_images import predict_checkpoint

            for line in predict_checkpoint(path, images.value, folder=report.value, **settings, **comparison):
                print(line)
            return
        from avit_jax.commands.evaluate_checkpoint import evaluate_checkpoint

        changed = config_flags.get_override_values(flags.FLAGS["config"])
        model = {name.removeprefix("model."): value for name, value in changed.items() if name.startswith("model.")}
        print(evaluate_checkpoint(config.value, path, report=report.value, model=model, **settings, **comparison))

    options = [checkpoint, ema, execution, report, baseline, sweep, images, class_names]
    run_main(command, options, "Evaluate a checkpoint on a test set, or on pictures.", _default_config, READS)


def _default_config(options: Mapping[str, str]) -> str:
    """The config of the run that the checkpoint is from.

    Pictures need no data set, so any config will do for them. --help_config works before there is a run.
    """
    if options.get("images") or ("help_config" in options and not options.get("checkpoint")):
        return DEFAULT_CONFIG
    return config_of_checkpoint(options.get("checkpoint") or DEFAULT_RUN)
