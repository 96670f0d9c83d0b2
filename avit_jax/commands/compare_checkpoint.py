"""What python -m avit_jax.compare does: rows of measurements, pictures and a table, for a checkpoint and its data."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from avit_jax.checkpoints.digests import json_digest, tree_digests
from avit_jax.checkpoints.model_folder import load, no_checkpoint
from avit_jax.commands.evaluate_checkpoint import load_for_data
from avit_jax.commands.predict_images import find_images, read_picture
from avit_jax.commands.typed_config import parse
from avit_jax.data.account import data_account
from avit_jax.data.decode import BadImage
from avit_jax.data.open import open_dataset
from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import denormalize, normalize
from avit_jax.data.sources import Images, Split, spread
from avit_jax.evaluate.rows import GROUPS, read_rows
from avit_jax.evaluate.training_free import STARTED, Comparison, compare_rules
from avit_jax.halting.avit import AViTGate
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report.frontier import draw_comparison
from avit_jax.report.frontier_table import comparison_table
from avit_jax.report.kept import draw_kept
from avit_jax.report.method_style import label
from avit_jax.rules import parse_rule
from avit_jax.runtime.files import replace_text, shown, writable_folder
from avit_jax.train.gate_start import start_gate

CALIBRATION_IMAGES = 2000
GATE_IMAGES = 500  # of them, from which A-ViT's gate is started
GATE_DEPTH = 0.65  # at which it starts, as a share of the layers


def comparison_from(
    rules: str | None, budgets: Sequence[str] | None, batches: Sequence[str] | None, rounds: int
) -> Comparison:
    """The comparison that options describe; None: the default.

    rules: separated by commas, each a name or, with settings to keep, such as "tome(r=0, proportional=False)". Raises
    ValueError for text that is not a rule or not a number.
    """

    def numbers(name: str, texts: Sequence[str], kind: type) -> tuple:
        try:
            return tuple(kind(text) for text in texts)
        except ValueError:
            raise ValueError(f"--{name}={','.join(texts)}: give numbers separated by commas") from None

    default = Comparison()
    named = re.findall(r"[^,()\s]+(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?", rules or "")
    return Comparison(
        tuple(parse_rule(rule) if "(" in rule else rule for rule in named) or default.rules,
        numbers("budgets", budgets, float) if budgets else default.budgets,
        numbers("batches", batches, int) if batches else default.batches,
        rounds,
    )


def compare_checkpoint(
    config: ConfigDict,
    path: str | Path,
    comparison: Comparison,
    *,
    images: str | Path | None = None,
    out: str | Path | None = None,
    most: int = 50_000,
) -> Iterator[str]:
    """Lines to print, the table last; rows, pictures and the table are in the folder `out`.

    Settings are found on validation images of config.data and rows measured on its test images, or both on the
    photographs in the folder `images`. most: images to evaluate. A row that is in the folder already is kept. Raises
    ValueError for a checkpoint that does not fit the data, and for a folder that is not writable.
    """
    if not Path(path).exists():
        raise no_checkpoint(path)
    if most < 1:
        raise ValueError(f"--most is {most}: give at least one image")
    folder = writable_folder(out or Path("runs/compare", Path(path).name))
    test: Images
    if images:
        model = load(path)
        test, unread = photographs(Path(images), model.config, most)
        yield from unread
        chosen, data = spread(test, CALIBRATION_IMAGES), Path(images).name
        account: Any = tree_digests({"images": test.images})
    else:
        settings = parse(config)
        dataset = open_dataset(settings.data)
        model = load_for_data(path, settings, dataset, False, {})
        test, chosen = spread(dataset.test, most), spread(dataset.val, CALIBRATION_IMAGES)
        data, account = settings.data.shown_name, data_account(dataset)
    pixels = normalize(evaluation_images(chosen, range(len(chosen)), model.config), model.config)
    measured_with = {
        "data": data,
        "content": json_digest(account),  # two folders may have the same name
        "weights": json_digest(tree_digests(nnx.to_pure_dict(nnx.state(model)))),
    }
    started, reason = start_for(model, pixels, comparison)
    yield from reason
    _, left_out = compare_rules(model, test, np.asarray(pixels), folder, comparison, measured_with, started)
    yield from left_out
    yield from write_pictures(folder, model, test, started=started, measured_with=measured_with)


def start_for(
    model: AViT, images: Float[Array | np.ndarray, "b h w c"], comparison: Comparison
) -> tuple[AViT | None, list[str]]:
    """The model as an A-ViT, if the comparison has that rule, or the sentence why it cannot be one.

    A gate that the model has stays as it is. Otherwise it is started by some of the images, which are normalised
    (start_gate), with the settings of the comparison's own instance.
    """
    rule = dict(zip(comparison.names, comparison.rules, strict=True)).get(STARTED)
    if rule is None:
        return None, []
    if isinstance(model.config.halting, AViTGate):
        return model, []
    try:
        gate = rule if isinstance(rule, AViTGate) else AViTGate(gate_scale=10.0, gate_center=30.0)
        started = nnx.clone(model.with_config(rule=gate))
        few = images[:: max(1, len(images) // GATE_IMAGES)]
        start_gate(started, few, target_depth=GATE_DEPTH * model.config.depth)
    except ValueError as error:
        return None, [f"{STARTED}: {error}"]
    return started, []


def write_pictures(
    folder: Path,
    model: AViT | None = None,
    test: Images | None = None,
    *,
    started: AViT | None = None,
    reference: str | None = None,
    measured_with: dict[str, Any] | None = None,
) -> Iterator[str]:
    """Draw the pictures of the rows in a folder and write the table; lines to print.

    model, test: for the picture of what each rule keeps; None: it is not drawn. started: the model as an A-ViT with a
    started gate, if there is one. reference: the method that the table compares the others with; None: the static
    model. measured_with: settings that a training-free row must have to take part; others are named. Raises ValueError
    if no row is of `reference`.
    """
    rows = []
    for row in read_rows(folder):
        if row["group"] == GROUPS[0] and measured_with and row["settings"] | measured_with != row["settings"]:
            budget = "" if row["budget"] is None else f" at {row['budget']:g}"
            yield f"left out: {label(row['method'])}{budget} was measured with other weights or data"
        else:
            rows.append(row)
    pictures = draw_comparison(rows, folder)
    if model is not None and test is not None:
        pictures += draw_kept(rows, model, test, folder / "kept.png", started=started)
    table = comparison_table(rows, reference=reference)
    replace_text(folder / "table.md", table + "\n")
    yield table
    yield f"table, pictures and rows: {folder} ({', '.join(picture.name for picture in pictures)})"


def photographs(folder: Path, model_config: AViTConfig, most: int) -> tuple[Split, list[str]]:
    """The pictures of a folder as the model takes them, without labels, and a line for each that cannot be read.

    most: pictures to read, spread over the folder. Raises ValueError if none can be read.
    """
    files, root = find_images(folder)
    found, unread = [], []
    for place in np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)):
        name = shown(files[place].relative_to(root))
        try:
            found.append(denormalize(read_picture(files[place], name, model_config)[None], model_config)[0])
        except BadImage as error:
            unread.append(f"unreadable: {error}")
    if not found:
        raise ValueError(f"--images={folder}: none of the {len(files)} files is an image that can be read")
    return Split(np.stack(found), np.full(len(found), -1)), unread
