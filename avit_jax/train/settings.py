"""The settings of a training run: a config, typed. Each section is defined in the subpackage that reads it."""

import dataclasses

from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.model.settings import ModelSettings
from avit_jax.rules import RuleLosses
from avit_jax.runtime.mesh import MeshSettings
from avit_jax.runtime.settings import Settings, part, setting
from avit_jax.train.gate_start import GateStartSettings
from avit_jax.train.objective import ClassificationLoss
from avit_jax.train.optim import OptimSettings

ON_NAN = ("stop", "roll back")
EXECUTIONS = ("masked", "planned", "auto")


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The part of a run's settings that one training step reads; see TrainSettings for each field."""

    classification: ClassificationLoss = part(ClassificationLoss)
    rule_loss: RuleLosses = part(RuleLosses)
    augment: AugmentSettings = part(AugmentSettings)
    seed: int = 0
    accumulation: int = 1
    ema_decay: float = 0.0
    counts: bool = False  # whether the metrics have what plans are made from


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """The settings of a whole run. Raises ValueError, naming the key and the fix, for values that cannot work."""

    name: str = setting("experiment", "Name of the run; its folder is runs/NAME unless --workdir is given.")
    seed: int = setting(0, "Seed of weights, order of images, augmentation and dropout.")
    data: DataSettings = part(DataSettings)
    augment: AugmentSettings = part(AugmentSettings)
    model: ModelSettings = part(ModelSettings)
    init_from: str = setting("", "Checkpoint to start from, and the table's other row; empty: random weights.")
    gate_start: GateStartSettings = part(GateStartSettings)
    teacher: str = setting("", "Checkpoint of the teacher for loss.distillation; empty: none.")
    classification: ClassificationLoss = part(ClassificationLoss)
    rule_loss: RuleLosses = part(RuleLosses)
    optim: OptimSettings = part(OptimSettings)
    mesh: MeshSettings = part(MeshSettings)
    accumulation: int = setting(1, "Parts in which a batch is processed, one after the other, to save memory.", least=1)
    execution: str = setting(
        "auto",
        "masked: every token is computed; planned: halted tokens are gone; auto: planned for long runs on a CPU.",
        choices=EXECUTIONS,
    )
    on_nan: str = setting(
        "stop",
        "At a loss that is not finite: stop, or roll back once to the last checkpoint and skip the data since.",
        resume="free",
        choices=ON_NAN,
    )
    peak_tflops: float = setting(
        0.0, "Peak of a device in 10^12 operations/s, to report the fraction in use (mfu); 0: no report.", resume="free"
    )
    profile: str = setting(
        "", "START:STEPS, a trace of those steps for TensorBoard or Perfetto; empty: none.", resume="free"
    )
    epochs: float = setting(100.0, "Passes over the training images.", least=0)
    batch_size: int = setting(100, "Images in a training step, over all devices.", least=1)
    eval_batch_size: int = setting(200, "Images in a batch of evaluation.", resume="log", least=1)
    log_every: int = setting(50, "Steps between two lines of the log.", resume="log", least=1)
    eval_every: int = setting(500, "Steps between two evaluations on the validation images.", resume="log", least=1)
    checkpoint_every: int = setting(500, "Steps between two checkpoints.", resume="free", least=1)
    keep_checkpoints: int = setting(2, "Number of last checkpoints to keep.", resume="free", least=1)
    keep_every: int = setting(0, "Also keep the checkpoint of every so many steps; 0: none.", resume="free", least=0)
    keep_best: int = setting(
        0, "Also keep this many checkpoints with the best top-1 on the validation images.", resume="free", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"config.batch_size {self.batch_size} is not a multiple of config.accumulation {self.accumulation}"
            )
        parse_profile(self.profile)
        distillation = self.classification.distillation
        if (distillation == "none") != (not self.teacher):
            raise ValueError(
                f"config.teacher is {self.teacher!r} and config.loss.distillation {distillation!r}: "
                "give a teacher and hard or soft, or neither"
            )

    @property
    def step(self) -> StepSettings:
        """The settings that a training step reads."""
        return StepSettings(
            classification=self.classification,
            rule_loss=self.rule_loss,
            augment=self.augment,
            seed=self.seed,
            accumulation=self.accumulation,
            ema_decay=self.optim.ema_decay,
        )

    def steps(self, images: int) -> int:
        """The number of steps in `epochs` of so many training images, at least 1."""
        return max(1, round(self.epochs * images / self.batch_size))


def parse_profile(text: str) -> tuple[int, int]:
    """ "START:STEPS" as numbers; "" is no trace. Raises ValueError for anything else."""
    if not text:
        return 0, 0
    first, _, steps = text.partition(":")
    if not (first.isdigit() and steps.isdigit() and int(first) >= 1 and int(steps) >= 1):
        raise ValueError(f"--profile or config.profile {text!r} is not START:STEPS: give two numbers from 1, as 20:5")
    return int(first), int(steps)
