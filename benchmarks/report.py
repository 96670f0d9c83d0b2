"""Seconds, page size and peak memory of eval.py --report for two numbers of images. Memory must not grow with them.

    python benchmarks/report.py                      28x28 at 2,000 and 10,000, 224x224 at 2,000 and 6,000; 5 min

Images are noise of several brightnesses, in 10 and 1,000 classes. The 224x224 images are BMP files that are made when
they are read, like a data set on disk. The 28x28 model has the MNIST model's architecture and a gate that spreads
depths. The 224x224 model has the same layers with patches of 32 pixels, so that 2 cores can process 6,000 images; what
is kept of an image is the same for any model. Each size runs in its own process. "report" is the time of the page
beyond evaluation: pictures, intervals, images/s, charts. Writes runs/benchmarks/report.json.
"""

import argparse
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from flax import nnx
from PIL import Image

from avit_jax import AViT, AViTConfig, Preprocessing
from avit_jax.data.settings import DataSettings
from avit_jax.data.sources import Images, Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.report.throughput import environment
from avit_jax.report.writer import Subject, write_report
from avit_jax.runtime.mesh import data_mesh, use_all_cores
from benchmarks.results import save_results

SIZES = ((28, 2_000), (28, 10_000), (224, 2_000), (224, 6_000))
BATCH = 200


class Drawn:
    """A data set without its images in memory (sources.Images): image i is drawn from seed i."""

    settings = DataSettings()

    def __init__(self, count: int, model_config: AViTConfig) -> None:
        self.labels = (np.arange(count) % model_config.num_classes).astype(np.int32)
        self._shape = (*model_config.image_shape, model_config.in_channels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(int(index))
        top = rng.integers(2, 256)
        pixels = rng.integers(0, top, self._shape, dtype=np.uint8)
        return {"image": _file(pixels) if pixels.shape[-1] == 3 else pixels, "label": self.labels[index]}

    def name(self, index: int) -> str:
        """The image's number."""
        return f"image {index}"


def _file(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    return stream.getvalue()


def drawn(count: int, model_config: AViTConfig) -> Images:
    """A data set of small images in memory, like MNIST, or of large ones that are drawn when they are read."""
    lazy = Drawn(count, model_config)
    if model_config.in_channels == 3:
        return lazy
    return Split(np.stack([lazy[i]["image"] for i in range(count)]), lazy.labels)


def model_for(size: int) -> AViT:
    """A model with random weights, scaled up so that tokens stop at many layers."""
    small = size == 28
    channels = 1 if small else 3
    config = AViTConfig(
        image_size=size,
        patch_size=4 if small else 32,
        in_channels=channels,
        num_classes=10 if small else 1000,
        embed_dim=64,
        num_heads=4,
        gate_scale=4.0,
        gate_center=3.0,
        preprocessing=Preprocessing((0.5,) * channels, (0.3,) * channels, crop_fraction=1.0),
    )
    model = AViT(config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: 3 * x if x.ndim >= 2 else x, nnx.state(model, nnx.Param)))
    return model


def measure(size: int, count: int, folder: Path) -> dict[str, float]:
    """Make one report; peak resident memory is in MB, after the first evaluated batch and at the end."""
    use_all_cores()
    model = model_for(size)
    split = drawn(count, model.config)
    mesh = data_mesh(BATCH)
    evaluate(model, drawn(BATCH, model.config), BATCH, "packed", mesh)
    first = _peak_mb()
    began = time.perf_counter()
    result = evaluate(model, split, BATCH, "packed", mesh)
    evaluated = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    subject = Subject(f"drawn {size}", model, result)
    page = write_report(folder, subject, split, data=f"{count} drawn images", batch_size=BATCH)
    done = time.perf_counter()
    return {
        "size": size,
        "images": count,
        "evaluation_seconds": evaluated - began,
        "report_seconds": done - evaluated,
        "page_kb": page.stat().st_size / 1e3,
        "first_batch_mb": first,
        "peak_mb": _peak_mb(),
        "mean_depth": result.mean_depth,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure all sizes, each in its own process, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, type=int, metavar=("SIZE", "COUNT"), help="one size, as JSON")
    arguments = parser.parse_args()
    out = Path("runs/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        size, count = arguments.one
        print(json.dumps(measure(size, count, out / f"report_{size}_{count}")))
        return
    print(f"{'images':>16}{'evaluate s':>12}{'report s':>10}{'page kB':>9}{'first MB':>10}{'peak MB':>9}{'depth':>7}")
    rows = []
    for size, count in SIZES:
        command = [sys.executable, __file__, "--one", str(size), str(count)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{count:>7} {size}x{size:<4}{row['evaluation_seconds']:>11.1f}{row['report_seconds']:>10.1f}"
            f"{row['page_kb']:>9.0f}{row['first_batch_mb']:>10.0f}{row['peak_mb']:>9.0f}{row['mean_depth']:>7.2f}",
            flush=True,
        )
    save_results(out / "report.json", {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
