"""Images per second and core from JPEG files of ImageNet's size to batches, compared with timm in a PyTorch DataLoader.

    python benchmarks/input_pipeline.py                            everything, about 8 minutes on 2 cores
    python benchmarks/input_pipeline.py --parts=speed --rounds=5
    pip install scikit-image tensorflow-datasets==4.9.10           requirements; for timm also torch, timm==1.0.31, and
                                                                   torchvision with --no-deps

speed: 500x375 JPEGs (parts of scikit-image's photographs) go through DeiT's training augmentation and through
evaluation, in one process (images per CPU second) and in one worker process per core. All variants run in turn, and
medians are reported; for timm, also the median of the ratios of each round. Both read, decode, crop and augment. Our
pipeline returns uint8 and leaves normalisation and erasing to the step on the device; timm does both on the host, as in
DeiT's code.
stages: the time of each stage for one image, with one thread.
memory: this process's memory over 10,000 images.
start: seconds to the first batch of 128, in a fresh process.
Writes runs/benchmarks/input_pipeline.json.
"""

import argparse
import functools
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image, features

from avit_jax import PRESETS
from avit_jax.data.crop import RandomFlip, RandomResizedCrop
from avit_jax.data.elements import BadImages, Decode, EvaluationCrop, ToArray
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_batches, training_batches
from avit_jax.data.randaugment import RandAugment
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.runtime.files import write_json
from avit_jax.runtime.mesh import available_cores

PARTS = ("speed", "stages", "memory", "start")
FILES, CLASSES, BATCH = {"train": 2000, "val": 1000}, 4, 50
LINKS = 25  # names of each training file, because shuffling a few images is slower than shuffling many
MODEL = PRESETS["avit_tiny_patch16_224"]
DEIT = AugmentSettings(crop_scale=(0.08, 1.0), flip=0.5, randaugment="rand-m9-mstd0.5-inc1")
MAKE_TFDS = """
import sys
from pathlib import Path
import tensorflow_datasets as tfds

class Photographs(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=sorted(p.name for p in Path(sys.argv[1], "train").iterdir()))
        features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": label}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples("train"), "validation": self._generate_examples("val")}

    def _generate_examples(self, purpose):
        for file in sorted(Path(sys.argv[1], purpose).glob("*/*")):
            yield file.name, {"image": file, "label": file.parent.name}

Photographs(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""
START = """
import sys, time
sys.path.insert(0, ".")
from benchmarks.input_pipeline import opened
began = time.perf_counter()
batches = opened("{source}", "train", {workers}, 128)
next(batches)
print(time.perf_counter() - began)
batches.close()
"""


def make_photographs(root: Path) -> None:
    """Make 500x375 JPEGs in train/ and val/, in 4 classes, and the same as ArrayRecord, unless root exists."""
    if root.exists():
        return
    from skimage import data

    rng = np.random.default_rng(0)
    sources = [Image.fromarray(make()) for make in (data.astronaut, data.coffee, data.chelsea, data.rocket)]
    for purpose, count in FILES.items():
        for i in range(count):
            picture = sources[i % CLASSES]
            width = int(rng.integers(300, min(picture.width, picture.height * 4 // 3) + 1))
            left = int(rng.integers(picture.width - width + 1))
            top = int(rng.integers(picture.height - width * 3 // 4 + 1))
            part = picture.crop((left, top, left + width, top + width * 3 // 4)).resize((500, 375))
            folder = root / purpose / f"class{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            part.save(folder / f"{purpose}_{i:04}.JPEG", quality=95)
    if importlib.util.find_spec("tensorflow_datasets"):
        command = [sys.executable, "-c", MAKE_TFDS, str(root), str(root / "tfds")]
        subprocess.run(command, check=True, capture_output=True)
    for file in sorted((root / "train").glob("*/*")):
        for copy in range(1, LINKS):
            os.link(file, file.with_name(f"{copy:02}_{file.name}"))


def opened(source: str, purpose: str, workers: int, batch: int = BATCH, threads: int = 0) -> Iterator[dict[str, Any]]:
    """Our batches; with 0 workers, threads of this process make them."""
    path, name = (str(ROOT), "") if source == "folder" else (str(ROOT / "tfds"), "photographs")
    settings = DataSettings(source=source, path=path, name=name, workers=workers, threads=threads)
    dataset = open_dataset(settings)
    if purpose == "train":
        return training_batches(dataset.train, MODEL, batch_size=batch, seed=0, augment=DEIT)
    return evaluation_batches(dataset.val, MODEL, batch)


def ours(source: str, purpose: str, workers: int, images: int) -> float:
    """Images per second in steady state. The consumer takes each batch at once, so nothing waits in a buffer.

    Without workers, it is images per CPU second of this process, with one thread.
    """
    batches = opened(source, purpose, workers, threads=1)
    for _ in range(2 * max(workers, 1)):
        next(batches)
    clock = time.perf_counter if workers else time.process_time
    began = clock()
    for _ in range(images // BATCH):
        next(batches)
    seconds = clock() - began
    batches.close()  # type: ignore[attr-defined]
    return images / seconds


def peer(purpose: str, workers: int, images: int) -> float:
    """The same for timm and PyTorch, in a process without JAX, which forks its workers as users' programs do."""
    options = {"purpose": purpose, "workers": workers, "batch": BATCH, "images": images}
    script = str(Path(__file__).with_name("input_peer.py"))
    command = [sys.executable, script, str(ROOT), *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["images_per_second"]


def speed(rounds: int, images: int) -> dict[str, Any]:
    """Run every variant in turn; medians of images per second."""
    sources = ["folder"] + ["tfds"] * (ROOT / "tfds").exists()
    has_peer = all(importlib.util.find_spec(name) for name in ("torch", "timm", "torchvision"))
    if not has_peer:
        print("timm, torch or torchvision is not installed: no comparison")
    variants: dict[tuple[str, str, int], Callable[[], float]] = {}
    for purpose in ("train", "eval"):
        for workers in (0, available_cores()):
            for source in sources:
                variants[source, purpose, workers] = functools.partial(ours, source, purpose, workers, images)
            if has_peer:
                variants["timm", purpose, workers] = functools.partial(peer, purpose, workers, images)
    found: dict[tuple[str, str, int], list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            found[name].append(run())
    print("\nworkers -: in one process, images per CPU second")
    print(f"{'':10}{'purpose':>9}{'workers':>9}{'images/s':>10}{'per core':>10}{'of timm':>9}")
    rows = []
    for (variant, purpose, workers), values in found.items():
        median = statistics.median(values)
        row = {"variant": variant, "purpose": purpose, "workers": workers, "images_per_second": median, "runs": values}
        row["per_core"] = median / (workers or 1)
        other = found.get(("timm", purpose, workers))
        # The ratio is taken in each round, because the machine's speed drifts by more than the two differ.
        ratios = [a / b for a, b in zip(values, other, strict=True)] if other else None
        row["of_timm"] = statistics.median(ratios) if ratios else None
        rows.append(row)
        ratio = f"{row['of_timm']:.2f}" if ratios else "-"
        print(f"{variant:10}{purpose:>9}{workers or '-':>9}{median:>10.1f}{row['per_core']:>10.1f}{ratio:>9}")
    return {"rows": rows}


def stages(images: int) -> dict[str, Any]:
    """Mean milliseconds of one image in each stage, with one thread."""
    split = open_dataset(DataSettings(source="folder", path=str(ROOT))).train
    rng, fill = np.random.default_rng(0), (124, 116, 104)
    bad = BadImages(split, MODEL, skip=False)
    crop = RandomResizedCrop((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    augment = RandAugment(9, 2, 0.5, 0.5, fill)
    steps: dict[str, dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
        "train": {
            "decode": Decode(bad).map,
            "crop": lambda e: crop.random_map(e, rng),
            "flip": lambda e: RandomFlip(0.5).random_map(e, rng),
            "RandAugment": lambda e: augment.random_map(e, rng),
            "array": ToArray().map,
        },
        "eval": {
            "decode": Decode(bad).map,
            "crop": EvaluationCrop(bad).map,
            "array": ToArray().map,
        },
    }
    found: dict[str, dict[str, float]] = {}
    for purpose, named in steps.items():
        seconds = dict.fromkeys([*named, "batch"], 0.0)
        pending = []
        for i in range(images):
            element = split[i % len(split)] | {"index": i % len(split)}
            for name, step in named.items():
                began = time.perf_counter()
                element = step(element)
                seconds[name] += time.perf_counter() - began
            pending.append(element["image"])
            if len(pending) == BATCH:
                began = time.perf_counter()
                np.stack(pending)
                seconds["batch"] += time.perf_counter() - began
                pending.clear()
        found[purpose] = {name: value / images * 1e3 for name, value in seconds.items()}
        whole = sum(found[purpose].values())
        shares = ", ".join(f"{name} {value:.2f} ({value / whole:.0%})" for name, value in found[purpose].items())
        print(f"\n{purpose}: ms an image, one thread: {shares}; in all {whole:.2f}")
    return found


def memory(images: int) -> dict[str, Any]:
    """Resident memory of this process in MB while its threads make batches, by the number of images so far."""
    batches = opened("folder", "train", 0)
    found = {}
    for batch in range(1, images // BATCH + 1):
        next(batches)
        if batch * BATCH in (1000, images // 2, images):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found[str(batch * BATCH)] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    batches.close()  # type: ignore[attr-defined]
    print("\nresident memory in MB, by number of images:", {name: round(value) for name, value in found.items()})
    return found


def start() -> dict[str, Any]:
    """Seconds from opening the data set to its first batch of 128, after the imports."""
    found = {}
    for source, workers in (("folder", 0), ("folder", available_cores()), ("tfds", 0)):
        if source == "tfds" and not (ROOT / "tfds").exists():
            continue
        code = START.format(source=source, workers=workers)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        who = f"{workers} workers" if workers else "threads"
        found[f"{source}, {who}"] = float(done.stdout.splitlines()[-1])
    print("\nseconds to the first batch of 128:", {name: round(value, 1) for name, value in found.items()})
    return found


ROOT = Path(__file__).parents[1] / "runs/benchmarks/photographs"


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=600, help="images of one measurement of speed, at most 800")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}: choose from {', '.join(PARTS)}")
    make_photographs(ROOT)
    codec = f"Pillow {Image.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
    machine = f"{platform.machine()}, {available_cores()} cores, {codec}"
    print(machine)
    path = Path("runs/benchmarks/input_pipeline.json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine
    for part in parts:
        results[part] = {
            "speed": lambda: speed(arguments.rounds, arguments.images),
            "stages": lambda: stages(arguments.images),
            "memory": lambda: memory(10_000),
            "start": start,
        }[part]()
        write_json(path, results)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
