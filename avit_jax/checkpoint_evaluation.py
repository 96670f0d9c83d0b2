"""What eval.py does: any checkpoint on a data set, as a table and as a page."""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from avit_jax.checkpoint import load
from avit_jax.checks import check_values
from avit_jax.config import AViTConfig
from avit_jax.convert.weight_files import read_config
from avit_jax.data.open import open_dataset
from avit_jax.data.settings import DataSettings
from avit_jax.evaluation import Evaluation, evaluate
from avit_jax.experiment import model_config
from avit_jax.files import writable_folder
from avit_jax.mesh import data_mesh
from avit_jax.model import AViT
from avit_jax.predict_images import read_class_names
from avit_jax.report.numbers import only_layer
from avit_jax.report.writer import Subject, write_report
from avit_jax.sweep import parse_sweep

# What decides the shapes of the parameters; the gate and the preprocessing are the checkpoint's own.
SHAPE_FIELDS = [
    "image_size",
    "patch_size",
    "in_channels",
    "num_classes",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "qkv_bias",
    "distilled",
]


def evaluate_checkpoint(
    config: ConfigDict,
    path: str | Path,
    *,
    ema: bool = False,
    execution: str = "packed",
    report: str | Path | None = None,
    baseline: str | Path | None = None,
    sweep: str | None = None,
    class_names: str | Path | None = None,
) -> str:
    """Any checkpoint on the test images of config.data; a folder brings its own gate. Returns the table.

    report: a folder for report.html and report.json; baseline: a checkpoint to compare with in it; sweep: gate settings
    to try, as sweep.parse_sweep takes them; class_names: a file, one name a line. Raises ValueError where the
    checkpoint and config.model differ in shape, or the checkpoint and the data, and for a folder that is not writable.
    """
    check_values(config)
    if (baseline or sweep) and not report:
        raise ValueError(f"--{'sweep' if sweep else 'baseline'} is shown in the report: give --report=FOLDER too")
    settings = parse_sweep(sweep) if sweep else None
    folder = writable_folder(report) if report else None
    dataset = open_dataset(DataSettings.from_config(dict(config.data)))
    wanted = model_config(config, dataset)
    mesh = data_mesh(config.eval_batch_size)

    def subject(path: str | Path, ema: bool) -> Subject:
        model = _evaluable(path, wanted, ema)
        names = read_class_names(class_names, wanted) if class_names else model.config.class_names
        model.config = dataclasses.replace(model.config, class_names=names or wanted.class_names)
        result = evaluate(model, dataset.test, config.eval_batch_size, execution, mesh)
        return Subject(Path(path).name, model, result)

    ours = subject(path, ema)
    if settings and not ours.model.config.halts:
        raise ValueError(f"--sweep moves a gate and {path} has none: it never halts; leave --sweep out")
    lines = [format_evaluation(ours.result, ours.model.config)]
    if folder:
        page = write_report(
            folder,
            ours,
            dataset.test,
            data=f"the test set of {Path(config.data.path).name or config.data.source}",
            batch_size=config.eval_batch_size,
            baseline=subject(baseline, False) if baseline else None,
            sweep=settings,
        )
        lines.append(f"report: {page}")
    return "\n".join(lines)


def _evaluable(path: str | Path, wanted: AViTConfig, ema: bool) -> AViT:
    """The checkpoint, checked against what the data want."""
    # A foreign file knows nothing but weights; ours knows itself, and is only held against the config's shapes.
    foreign = Path(path).is_file() and read_config(Path(path)) is None
    known = list(wanted.__dataclass_fields__) if foreign else SHAPE_FIELDS
    # Not the classes: asking for them would make a new head where the checkpoint has other ones.
    fields = {name: getattr(wanted, name) for name in known if name not in ("num_classes", "class_names")}
    model = load(path, ema=ema, **fields)
    if model.config.num_classes != wanted.num_classes:
        raise ValueError(
            f"the checkpoint {path} has {model.config.num_classes} classes and the data {wanted.num_classes}: "
            "evaluate it on the data it was trained for, or train a new head with config.init_from"
        )
    return model


def format_evaluation(result: Evaluation, config: AViTConfig) -> str:
    """The table that eval.py prints."""
    lines = [f"images             {result.images}"]
    if result.labelled:
        lines += [
            f"top-1              {result.top1:.2%}",
            f"top-5              {result.top5:.2%}",
            f"loss               {result.loss:.4f} nats",
        ]
    else:
        lines.append("no labels          no accuracy, no loss")
    lines += [
        f"mean depth         {result.mean_depth:.2f} of {config.depth} layers ({result.depth_fraction:.0%})",
        f"  deviation        {result.depth_std_tokens:.2f} between tokens, {result.depth_std_images:.2f} of images",
        *([f"class token depth  {result.class_token_depth:.2f}"] if getattr(config, "class_token", True) else []),
        f"GMACs per image    {result.gmacs:.4f}",
        f"  executed         {result.executed_gmacs:.4f}, mean depth {result.executed_depth:.2f}",
    ]
    if layer := only_layer(result.depth_histogram):
        return "\n".join([*lines, f"all tokens stop at layer {layer}"])
    lines.append("depth  tokens")
    most = max(result.depth_histogram)
    for layer, share in enumerate(result.depth_histogram, start=1):
        lines.append(f"{layer:5}  {share:6.1%}  {'#' * round(40 * share / most)}")
    return "\n".join(lines)
