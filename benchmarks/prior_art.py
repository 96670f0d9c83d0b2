"""The fine-tuned rows of the comparison of rules on Fashion-MNIST: one training and one result a row.

    apt-get install dataset-fashion-mnist && python benchmarks/prior_art.py      hours on 2 cores; it may be stopped
    python benchmarks/prior_art.py --list                                        the rows and which of them are there
    python benchmarks/prior_art.py --only tome_0.71_s0                           one row

Each row trains configs/prior_art.py in runs/prior_art/NAME, sets what its rule leaves open on the validation images,
reads the test images once, keeps the model in runs/prior_art/models/NAME and writes the JSON of the row in
benchmarks/prior_art/rows. The search for learning rates trains for half an epoch, reads no test image, and writes
benchmarks/prior_art/rates. A row whose JSON is there is skipped. A row that fails is reported, and the next one starts.
"""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import optax
from flax import nnx
from PIL import Image

import avit_jax
from avit_jax.commands.typed_config import parse
from avit_jax.data.arrays import read_idx
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Dataset, Split
from avit_jax.evaluate.position_share import explained_by_position
from avit_jax.evaluate.rows import STATIC_SHORT, as_bits
from avit_jax.execution.program import AUTO, compile, suited
from avit_jax.execution.work import output_gmacs, shrinking_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.model.vit import AViT, AViTOutput
from avit_jax.rules import RULES, rule_to_json
from avit_jax.runtime.files import read_json, replacing, write_json
from avit_jax.runtime.machine import machine
from avit_jax.runtime.mesh import data_mesh
from avit_jax.runtime.signals import FolderLock
from avit_jax.train.loop import train
from avit_jax.train.run_folder import check_folder
from avit_jax.train.start import initial_model, load_teacher
from benchmarks.resumable import commit, run_rows
from configs import fashion_mnist, prior_art, scattered

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/prior_art"
RUNS = ROOT / "runs/prior_art"
BUDGETS = ("0.71", "0.49")
MAIN = ("avit", "avit_hidden", "tome", "evit", "dynamicvit", "layers")  # with three seeds
SINGLE = (
    *("confidence", "pondernet", "act", "topk", "random", "mctf", "ats", "mass", "similarity", "positions"),
    *("image", "dynamicvit_own", "mctf_own"),
)
TESTED_ELSEWHERE = ("avit_hidden", "tome", "evit")  # as trained at 0.49, at other budgets too: one training, a curve
WORKS = {"layers": {"0.71": "9", "0.6": "8", "0.49": "7"}, "image": {"0.71": "24", "0.49": "20"}}  # the nearest
# Of methods in the results.
NAMES = {
    "static": STATIC_SHORT,
    "layers": "fewer layers",
    "image": "smaller image",
    "dynamicvit_own": "DynamicViT, its own losses",
    "mctf_own": "MCTF, with its second pass",
    "avit_hidden": "A-ViT, gate from hidden units",
}
BATCH = 200


@dataclasses.dataclass(frozen=True)
class Row:
    """One result. With `rate` it belongs to the search for learning rates."""

    method: str  # of configs/prior_art.py
    budget: str = ""
    work: str = ""  # as the config has it
    seed: int = 0
    rate: float | None = None
    sampled: bool = False  # PonderNet
    scattered: bool = False  # Scattered Fashion-MNIST

    @property
    def name(self) -> str:
        """Of its files."""
        method = ("scattered_" if self.scattered else "") + self.method + ("_sampled" if self.sampled else "")
        moved = f"at_{self.budget}" if self.moved else ""
        end = f"s{self.seed}" if self.rate is None else f"rate_{self.rate:g}"
        return "_".join(part for part in (method, self.work or self.budget, moved, end) if part)

    @property
    def moved(self) -> bool:
        """Whether it is a model that was trained for another work."""
        return self.method in scattered.MOVED and self.budget not in ("", self.work)

    @property
    def label(self) -> str:
        """Of its method in the results. On Scattered Fashion-MNIST each method has a single training."""
        name = "PonderNet, sampled" if self.sampled else NAMES.get(self.method, self.method)
        if not self.moved or self.scattered:
            return name
        return f"{RULES[name].label if name in RULES else name}, trained at {float(self.work):.0%}"

    @property
    def run(self) -> str:
        """Of its training, which some rows share."""
        return dataclasses.replace(self, budget="", sampled=False).name if self.rate is None else self.name

    @property
    def result(self) -> Path:
        """Its JSON file."""
        return RESULTS / ("rows" if self.rate is None else "rates") / f"{self.name}.json"

    def config(self) -> Any:
        """The config of its training."""
        config = scattered.get_config(self.method) if self.scattered else self.fashion()
        config.seed = self.seed
        return config

    def fashion(self) -> Any:
        """The config of its training on Fashion-MNIST."""
        config = prior_art.get_config(f"{self.method},{self.work}")
        if self.rate is not None:
            config.epochs = 0.5
        if self.method != "dynamicvit_own":
            config.optim.learning_rate = self.rate or best_rate(self.method)
        return config

    @property
    def static_model(self) -> avit_jax.AViT:
        """What its training starts from."""
        return avit_jax.load(scattered.STATIC_MODEL if self.scattered else fashion_mnist.STATIC_MODEL)


def best_rate(method: str) -> float:
    """The learning rate with the best validation top-1 in the search for the method, or for its relative.

    Raises ValueError if the search is not complete.
    """
    method = prior_art.RELATIVES.get(method, method)
    tried = [row for row in rows() if row.rate is not None and row.method == method]
    missing = [row.name for row in tried if not row.result.exists()]
    if missing:
        raise ValueError(f"the search for the learning rate of {method} lacks {', '.join(missing)}: run them first")
    best = max(tried, key=lambda row: read_json(row.result)["validation_top1"])
    assert best.rate is not None
    return best.rate


def row(method: str, budget: str, **other: Any) -> Row:
    """The row of a method at a budget."""
    work = "" if method == "confidence" else WORKS.get(method, {}).get(budget, budget)
    return Row(method, budget, work, **other)


def rows() -> list[Row]:
    """Every row, the most important ones first."""
    found = [Row("static", rate=rate) for rate in prior_art.RATES_TRIED]
    searched = [method for method in MAIN if method not in prior_art.RELATIVES]
    found += [row(method, "0.6", rate=rate) for method in searched for rate in prior_art.RATES_TRIED]
    for seed in range(3):
        found += [Row("static", seed=seed), *(row(m, b, seed=seed) for b in BUDGETS for m in MAIN)]
        if seed == 0:
            found += [row(method, budget) for method in SINGLE for budget in BUDGETS]
            found += [row("pondernet", budget, sampled=True) for budget in BUDGETS]
    found += [Row(method, budget, "0.49") for method in TESTED_ELSEWHERE for budget in ("0.6", "0.71")]
    found += [row("gates", budget, seed=seed) for seed in range(3) for budget in BUDGETS]
    found += [Row("static", scattered=True), Row("layers", scattered.WORK, str(scattered.LAYERS), scattered=True)]
    found += [Row(m, b, scattered.WORK, scattered=True) for m in scattered.MOVED for b in scattered.BUDGETS]
    return found


def run(row: Row) -> None:
    """Train, evaluate, write the result and the model."""
    model, dataset, seconds = trained(row)
    model = at_budget(row, model, dataset.val)
    checked = figures(model, dataset.val)
    rule = model.config.rule_in_force
    result: dict[str, Any] = {"data": "scattered" if row.scattered else "fashion_mnist", "group": "fine-tuned"}
    result |= {
        "method": row.label if row.rate is None else row.method,
        "rule": None if rule is None else rule_to_json(rule),
    }
    result |= {"budget": float(row.budget) if row.budget else None, "seed": row.seed}
    if row.rate is None:
        result |= figures(model, dataset.test, execution=AUTO)
        folder = RUNS / "models" / row.name
        shutil.rmtree(folder, ignore_errors=True)  # of a row that stopped after it had saved its model
        avit_jax.save(model, folder)
    config = row.config()
    settings = {"config": config.name, "sampled": row.sampled, "epochs": config.epochs}
    settings |= {"optim": config.optim.to_dict(), "loss": config.loss.to_dict()}
    result |= {"seconds": round(seconds, 1), "machine": machine(), "commit": commit(), "settings": settings}
    result |= {"validation_top1": checked["top1"], "validation_gmacs": checked["gmacs"]}
    row.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(row.result, result)
    work = checked["gmacs"] / shrinking_gmacs(row.static_model.config, short_last_layer=False)
    print(f"{row.name}: validation top-1 {checked['top1']:.4f} at {work:.4f} of the work")


def trained(row: Row) -> tuple[AViT, Dataset, float]:
    """The trained model, the data, and the seconds that training took: train.py without its tables and pictures."""
    config, workdir = row.config(), RUNS / row.run
    if row.method == "layers":
        write_first_layers(Path(config.init_from), row.static_model, config.model.depth)
    if row.method == "image":
        write_images(Path(config.data.path), int(row.work))
    if row.method == "positions":
        config.model.rule = as_text(by_position(row))
    dataset = open_dataset(parse(config).data)
    if row.method == "act":
        write_gate(Path(config.init_from), dataset.train, prior_art.ACT_DEPTH[row.work])
    settings = parse(config)
    if (workdir / "model").exists():
        return avit_jax.load(workdir / "model"), dataset, read_json(workdir / "seconds.json")
    with FolderLock(workdir):
        check_folder(settings, workdir, resume=True)
        model = initial_model(settings, dataset)
        teacher = enlarging_teacher() if row.method == "image" else load_teacher(settings.teacher, model.config)
        write_json(workdir / "train_config.json", {"config": settings.to_config()})
        result = train(settings, dataset, model, workdir, teacher)
        write_json(workdir / "seconds.json", result.progress.seconds)
        avit_jax.save(result.model, workdir / "model")
        shutil.rmtree(workdir / "checkpoints")
    return result.model, dataset, result.progress.seconds


def at_budget(row: Row, model: AViT, validation: Split) -> AViT:
    """The model with the setting of its rule at which validation images cost the budget, within 1 %."""
    config = model.config
    rule: Any = config.rule_in_force if row.moved else config.halting or config.gates
    if row.sampled:  # its work follows from the training
        return model.with_config(rule=dataclasses.replace(rule, sampled=True))
    if rule is None:
        return model
    images = pixels(model, validation)[::4]
    return model.with_config(rule=avit_jax.calibrate(model, images, rule, float(row.budget)))


def by_position(row: Row) -> avit_jax.PositionDepths:
    """The mean depths of the trained A-ViT of this work on validation images, shifted so that they cost it.

    On Scattered Fashion-MNIST it is the A-ViT from hidden units, the better one of the two there.
    """
    source = dataclasses.replace(row, method="avit_hidden" if row.scattered else "avit", budget=row.work)
    model = avit_jax.load(RUNS / "models" / source.name)
    images = pixels(model, open_dataset(parse(source.config()).data).val)
    depth = answers(model, images)["token_depth"][:, model.config.num_special :].mean(0)
    rule = avit_jax.PositionDepths(tuple(np.round(depth, 3).tolist()))
    return avit_jax.calibrate(row.static_model, images[:1], rule, float(row.work))


def as_text(rule: Any) -> str:
    """The rule as config.model.rule has it."""
    settings = [f"{field.name}={getattr(rule, field.name)!r}" for field in dataclasses.fields(rule)]
    return f"{rule.name}({', '.join(settings)})"


def write_first_layers(path: Path, static: AViT, layers: int) -> None:
    """The static model's first layers as a checkpoint."""
    if not path.exists():
        avit_jax.save(prior_art.first_layers(static, layers), path)


def write_gate(path: Path, split: Split, depth: float) -> None:
    """The static model with channel 0 as A-ViT's gate starts it, but without the gate."""
    if path.exists():
        return
    model = avit_jax.load(fashion_mnist.STATIC_MODEL, gate_scale=5.0, gate_center=10.0)
    start = fashion_mnist.get_config().gate_start
    chosen = np.linspace(0, len(split) - 1, start.images).astype(int)
    images = normalize(evaluation_images(split, chosen, model.config), model.config)
    avit_jax.start_gate(model, images, target_depth=depth, deviation=start.deviation, features="pixels")
    avit_jax.save(model.with_config(**NO_RULE), path)


def write_images(path: Path, side: int) -> None:
    """Fashion-MNIST with smaller images, in the same order and so in the same parts."""
    if path.exists():
        return
    folder = Path(fashion_mnist.get_config().data.path)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(fashion_mnist.CLASS_NAMES)}
    for start, purpose in (("", "train"), ("test_", "t10k")):
        images = read_idx(next(folder.glob(f"{purpose}-images*")), 3)
        small = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)) for image in images]
        arrays |= {f"{start}images": np.stack(small)}
        arrays |= {f"{start}labels": read_idx(next(folder.glob(f"{purpose}-labels*")), 1).astype(np.int64)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


class Enlarging(AViT):
    """A model that enlarges smaller images to its own size."""

    def __call__(self, images: Any, **other: Any) -> AViTOutput:
        """The output for enlarged images."""
        shape = (len(images), *self.config.image_shape, self.config.in_channels)
        return super().__call__(jax.image.resize(images, shape, "cubic"), **other)


def enlarging_teacher() -> AViT:
    """The static model, which takes smaller images too."""
    static = avit_jax.load(fashion_mnist.STATIC_MODEL)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Enlarging(static.config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(static)))
    return nnx.merge(graphdef, state)


def figures(model: AViT, split: Split, execution: str = "masked") -> dict[str, Any]:
    """Accuracy, loss and work on a split, each image counted once."""
    found = answers(model, pixels(model, split), execution)
    logits, label = found["logits"], split.labels
    correct = logits.argmax(-1) == label
    depth = found["token_depth"][:, model.config.num_special :]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return {
        "images": len(label),
        "top1": float(correct.mean()),
        "loss": float(loss.mean()),
        "gmacs": float(found["gmacs"].mean(dtype=np.float64)),
        "executed_gmacs": found["executed_gmacs"],
        "explained_by_position": explained_by_position(depth) if model.config.halts else None,
        "correct": as_bits(correct),
    }


def pixels(model: AViT, split: Split) -> np.ndarray:
    """The images as the model takes them."""
    return np.asarray(normalize(evaluation_images(split, range(len(split)), model.config), model.config))


def answers(model: AViT, images: np.ndarray, execution: str = "masked") -> dict[str, Any]:
    """Logits, depths and GMACs (last layer short) of each image, and the mean of what was executed."""
    config = model.config
    chosen = suited(config, execution).execution
    program = compile(model, BATCH, execution=chosen, image_exit=False, mesh=data_mesh(BATCH))
    logits, depths, gmacs, executed = [], [], [], 0.0
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        output = program(batch)
        depth = np.asarray(output.token_depth)
        logits.append(np.asarray(output.logits))
        depths.append(depth)
        gmacs.append(np.asarray(output_gmacs(config, output, short_last_layer=True)))
        executed += program.executed(depth, len(batch), output).gmacs * len(batch)
    found = {"logits": logits, "token_depth": depths, "gmacs": gmacs}
    return {name: np.concatenate(parts) for name, parts in found.items()} | {"executed_gmacs": executed / len(images)}


if __name__ == "__main__":
    run_rows(__file__, __doc__, rows(), run, RUNS)
