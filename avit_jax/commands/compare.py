"""The command that compares rules without training: python -m avit_jax.compare --checkpoint=PATH"""

from collections.abc import Mapping

from absl import flags

from avit_jax.commands.command_line import define_config_flag, run_main
from avit_jax.commands.config_files import DEFAULT_CONFIG
from avit_jax.commands.run_config import config_of_checkpoint
from avit_jax.runtime.mesh import check_platform

READS = ("data", "model")  # of the config
ABOUT = "Compare every rule that needs no training on a static checkpoint: accuracy, work and measured speed."


def main() -> None:
    """Compare rules on a data set with labels, or on photographs without them."""
    config = define_config_flag()
    checkpoint = flags.DEFINE_string("checkpoint", None, "The static checkpoint; a rule that it has is left out.")
    images = flags.DEFINE_string("images", None, "A folder of photographs, without labels, instead of a data set.")
    out = flags.DEFINE_string("out", None, "Folder of rows, pictures and table; runs/compare/NAME by default.")
    rules = flags.DEFINE_string(
        "rules", None, "Rules to compare, such as tome,confidence(threshold=1.0,first_layer=3); all by default."
    )
    budgets = flags.DEFINE_list("budgets", None, "Shares of the static model's work, such as 0.82,0.6; ten by default.")
    most = flags.DEFINE_integer("most", 50_000, "Images to evaluate, at most; they are spread over the data.")
    batches = flags.DEFINE_list("batches", None, "Batches of which each rule is timed at its best; 50,200 by default.")
    rounds = flags.DEFINE_integer("rounds", 11, "Rounds of timing.")

    def command() -> None:
        check_platform()
        if not checkpoint.value:
            raise ValueError("there is no checkpoint to compare rules on: give --checkpoint=PATH")
        from avit_jax.commands.compare_checkpoint import compare_checkpoint, comparison_from

        chosen = comparison_from(rules.value, budgets.value, batches.value, rounds.value)
        for line in compare_checkpoint(
            config.value, checkpoint.value, chosen, images=images.value, out=out.value, most=most.value
        ):
            print(line)

    run_main(command, [checkpoint, images, out, rules, budgets, most, batches, rounds], ABOUT, _default_config, READS)


def _default_config(options: Mapping[str, str]) -> str:
    """The config of the run that the checkpoint is from; photographs need no data set."""
    if options.get("images") or not options.get("checkpoint"):
        return DEFAULT_CONFIG
    return config_of_checkpoint(options["checkpoint"])
