"""config.data and config.augment: every key, its default and its unit."""

import dataclasses
from pathlib import Path

from avit_jax.model.config import INTERPOLATIONS, MIN_CROP_FRACTION
from avit_jax.model.random_patches import LAWS
from avit_jax.runtime.settings import Settings, setting

SOURCES = ("mnist", "npz", "idx", "folder", "tfds", "scattered")
ON_BAD_IMAGE = ("raise", "skip")


@dataclasses.dataclass(frozen=True)
class DataSettings(Settings):
    """What is read, and by whom. Raises ValueError for values that cannot be."""

    section = "data"

    source: str = setting(
        "mnist",
        "mnist, npz or idx: arrays in memory; folder or tfds: images read when they are needed; "
        "scattered: pictures of several images of an idx folder.",
        choices=SOURCES,
    )
    path: str = setting(
        "",
        "npz: the file; idx, folder, scattered: the folder; tfds: its data_dir. Where it is empty: scattered: "
        "Debian's Fashion-MNIST; tfds: ~/tensorflow_datasets.",
        resume="free",
    )
    name: str = setting("", "tfds: the data set, as imagenet2012 or cifar10:3.0.2.")
    train_images: int = setting(
        0,
        "Train on so many of the training images, evenly spread over them; 0: all.",
        least=0,
    )
    class_names: tuple[str, ...] = setting((), "idx, scattered: the names of the classes, which the files do not hold.")
    mean: tuple[float, ...] = setting(
        (), "By channel, of 0..1 pixels; (): ImageNet's for images read from disk, else the training images' own."
    )
    std: tuple[float, ...] = setting((), "Standard deviation by channel, of 0..1 pixels; () as for mean.")
    crop_fraction: float = setting(
        0.875,
        "folder, tfds, scattered: the part of the resized image that evaluation sees; 0.875 is 224 of 256 pixels.",
    )
    interpolation: str = setting("bicubic", "How images are resized.", choices=INTERPOLATIONS)
    workers: int = setting(0, "Processes that read and augment images; 0: threads of this one.", resume="free")
    threads: int = setting(
        0,
        "Threads that read and augment images; 0: one for arrays in memory, else one for each core.",
        resume="free",
    )
    on_bad_image: str = setting(
        "raise",
        "skip: an image that cannot be read keeps its place, with weight 0; more than 1 % of them stop the run.",
        choices=ON_BAD_IMAGE,
    )
    repeated_augmentation: int = setting(
        1, "How often each image is in a pass over the data, augmented anew each time.", least=1
    )

    @property
    def shown_name(self) -> str:
        """The data in a few words, for tables and rows."""
        found = Path(self.path).name or self.name or self.source
        return f"scattered {found}" if self.source == "scattered" and found != self.source else found

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("std", not self.std or min(self.std) > 0, "above 0 for every channel")
        good_crop = MIN_CROP_FRACTION <= self.crop_fraction <= 1
        self.check("crop_fraction", good_crop, f"at least {MIN_CROP_FRACTION} and at most 1")
        self.check("workers", 0 <= self.workers <= 1000, "0 (threads) or a number of processes up to 1,000")
        self.check("threads", 0 <= self.threads <= 1000, "0 (one a core) or a number of threads up to 1,000")


@dataclasses.dataclass(frozen=True)
class AugmentSettings(Settings):
    """What training images go through, in this order; every default leaves them alone.

    On the host, image by image: crop, flip, RandAugment (or, where it is off, colour jitter), affine changes.
    On the device, in the training step (data/mix.py): erasing, then mixup or cutmix, then random patches. DeiT's values
    are in configs/imagenet_deit.py. Raises ValueError for values that cannot be.
    """

    section = "augment"

    crop_scale: tuple[float, ...] = setting(
        (), "Least and most of the image's area that a random crop has, as (0.08, 1.0); (): evaluation's crop."
    )
    crop_ratio: tuple[float, ...] = setting((3 / 4, 4 / 3), "Least and most width / height of a random crop.")
    flip: float = setting(0.0, "Probability that left and right change places.")
    randaugment: str = setting("", "RandAugment in timm's notation, as rand-m9-mstd0.5-inc1; empty: off.")
    color_jitter: float = setting(
        0.0, "Where RandAugment is off: brightness, contrast and saturation change by factors 1 - x to 1 + x.", least=0
    )
    rotate: float = setting(0.0, "Rotation by up to so many degrees, to either side.")
    scale: float = setting(0.0, "Change of size, as a fraction: 0.1 means 0.9 to 1.1.")
    shear: float = setting(0.0, "Shear, as the fraction of the height that the top moves.")
    translate: float = setting(0.0, "Shift by up to so many pixels, to either side.")
    erasing: float = setting(0.0, "Probability that a rectangle of the image becomes noise.")
    mixup: float = setting(
        0.0, "a of the Beta(a, a) distribution that an image's weight is drawn from; 0: no mixup.", least=0
    )
    cutmix: float = setting(
        0.0, "a of the Beta(a, a) distribution that the area kept is drawn from; 0: no cutmix.", least=0
    )
    mix_switch: float = setting(0.5, "Probability of cutmix where mixup is on too.")
    mix_probability: float = setting(1.0, "Probability that a pair of images is mixed at all.")
    random_patches: float = setting(
        0.0, "Probability that an image's patches are cut at random places instead of the grid (RaViTT)."
    )
    random_law: str = setting(
        "uniform",
        "Where random patches are: uniform, anywhere; jitter, up to half a patch beside the grid; grid, on it.",
        choices=LAWS,
    )
    random_tokens: int = setting(
        0, "Patches of a training image, drawn anew for each; 0: as many as the grid has.", least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, limits in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio)):
            good = len(limits) == 2 and 0 < limits[0] <= limits[1]
            self.check(name, good or (name == "crop_scale" and not limits), "(least, most), both above 0")
        self.check("crop_scale", not self.crop_scale or self.crop_scale[1] <= 1, "at most 1, the whole image")
        for name in ("flip", "erasing", "mix_switch", "mix_probability", "random_patches"):
            self.check(name, 0 <= getattr(self, name) <= 1, "a probability, 0 to 1")

    @property
    def affine(self) -> dict[str, float]:
        """The limits of RandomAffine."""
        return {name: getattr(self, name) for name in ("rotate", "scale", "shear", "translate")}

    @property
    def cuts(self) -> bool:
        """Whether training cuts patches elsewhere than on the grid, or fewer of them."""
        return bool(self.random_patches or self.random_tokens)

    @property
    def needs_pictures(self) -> bool:
        """Whether images pass through Pillow's operations."""
        return bool(self.crop_scale or self.flip or self.randaugment or self.color_jitter)
