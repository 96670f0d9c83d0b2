"""The settings of a training run: what a config holds, typed; each section belongs to the room that reads it."""

import dataclasses

from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.halting.prior import AViTLoss
from avit_jax.model.settings import ModelSettings
from avit_jax.runtime.mesh import MeshSettings
from avit_jax.runtime.settings import Settings, part, setting
from avit_jax.train.gate_start import GateStartSettings
from avit_jax.train.objective import ClassificationLoss
from avit_jax.train.optim import OptimSettings

ON_NAN = ("stop", "roll back")


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What one training step reads of a run's settings; see TrainSettings for each."""

    classification: ClassificationLoss = part(ClassificationLoss)
    halting_loss: AViTLoss = part(AViTLoss)
    augment: AugmentSettings = part(AugmentSettings)
    seed: int = 0
    accumulation: int = 1
    ema_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainSettings(Settings):
    """A whole run. Raises ValueError, naming the key and the fix, for values that no run can work with."""

    name: str = setting("experiment", "What the run is called; its folder is runs/NAME unless --workdir is given.")
    seed: int = setting(0, "Seed of weights, order of images, augmentation and dropout.")
    data: DataSettings = part(DataSettings)
    augment: AugmentSettings = part(AugmentSettings)
    model: ModelSettings = part(ModelSettings)
    init_from: str = setting("", "A checkpoint to start from, which is the table's other row; empty: random weights.")
    gate_start: GateStartSettings = part(GateStartSettings)
    teacher: str = setting("", "A checkpoint that loss.distillation follows; empty: none.")
    classification: ClassificationLoss = part(ClassificationLoss)
    halting_loss: AViTLoss = part(AViTLoss)
    optim: OptimSettings = part(OptimSettings)
    mesh: MeshSettings = part(MeshSettings)
    accumulation: int = setting(1, "Parts that a batch is worked on in, one after the other, to save memory.", least=1)
    on_nan: str = setting(
        "stop",
        "At a loss that is not finite: stop, or roll back once to the last checkpoint and skip the data since.",
        resume="free",
        choices=ON_NAN,
    )
    peak_tflops: float = setting(
        0.0, "Peak of a device in 10^12 operations a second, to report its share (mfu); 0: no report.", resume="free"
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
    keep_checkpoints: int = setting(2, "The last checkpoints that are kept.", resume="free", least=1)
    keep_every: int = setting(0, "Checkpoints of every so many steps are kept too; 0: none.", resume="free", least=0)
    keep_best: int = setting(
        0, "So many of the best checkpoints by top-1 on the validation images are kept too.", resume="free", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"config.batch_size {self.batch_size} is no multiple of config.accumulation {self.accumulation}"
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
        """What a training step reads."""
        return StepSettings(
            classification=self.classification,
            halting_loss=self.halting_loss,
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
