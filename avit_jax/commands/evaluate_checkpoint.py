"""What eval.py does: it evaluates any checkpoint on a data set, as a table and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from avit_jax.checkpoints.model_folder import is_foreign, load, no_checkpoint
from avit_jax.commands.predict_images import read_class_names
from avit_jax.commands.typed_config import parse
from avit_jax.data.open import open_dataset
from avit_jax.data.sources import Dataset, Split
from avit_jax.evaluate.figures import Evaluation, evaluate
from avit_jax.evaluate.sweep import parse_sweep, rule_with
from avit_jax.execution.program import AUTO, Choice, suited
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report.numbers import only_layer
from avit_jax.report.writer import Subject, write_report
from avit_jax.rules import parse_rule
from avit_jax.runtime.files import shown, writable_folder
from avit_jax.runtime.mesh import data_mesh
from avit_jax.train.settings import TrainSettings
from avit_jax.train.start import fields_for_foreign, stated_preprocessing


def evaluate_checkpoint(
    config: ConfigDict,
    path: str | Path,
    *,
    ema: bool = False,
    execution: str = AUTO,
    report: str | Path | None = None,
    baseline: str | Path | None = None,
    sweep: str | None = None,
    class_names: str | Path | None = None,
    model: Mapping[str, Any] | None = None,
) -> str:
    """Evaluate any checkpoint on the test images of config.data. Returns the table, after a warning if there is one.

    A checkpoint that carries its configuration keeps it, gate and preprocessing included; a foreign file takes
    config.model. model: fields of AViTConfig that the user asked for. report: a folder for report.html and report.json.
    baseline: a checkpoint to compare with in the report. sweep: settings of the rule to try, as sweep.parse_sweep takes
    them. class_names: a file, one name a line. Raises ValueError if the checkpoint and the data differ in shape or
    number of classes, for a baseline with other classes, and for a folder that is not writable.
    """
    settings = parse(config)
    if (baseline or sweep) and not report:
        raise ValueError(f"--{'sweep' if sweep else 'baseline'} is shown in the report: give --report=FOLDER too")
    gates = parse_sweep(sweep) if sweep else None
    for checkpoint in (path, baseline):
        if checkpoint and not Path(checkpoint).exists():
            raise no_checkpoint(checkpoint)
    folder = writable_folder(report) if report else None
    dataset = open_dataset(settings.data)
    mesh = data_mesh(settings.eval_batch_size)
    model_fields = dict(model or {})
    rule = model_fields.pop("rule", None)  # text; the baseline keeps its own rule

    def loaded(path: str | Path, ema: bool, **fields: Any) -> AViT:
        found = load_for_data(path, settings, dataset, ema, model_fields | fields)
        if class_names:
            return found.with_config(class_names=read_class_names(class_names, found.config))
        return found

    def subject(path: str | Path, found: AViT) -> Subject:
        result = evaluate(found, dataset.test, settings.eval_batch_size, execution, mesh)
        return Subject(Path(path).name, found, result)

    ours = loaded(path, ema, **({} if rule is None else {"rule": parse_rule(rule)}))
    other = loaded(baseline, False) if baseline else None
    doubt = None if class_names else _compare_names(path, ours.config, baseline, other, dataset.class_names)
    ours = _named(ours, dataset.class_names)
    other = _named(other, dataset.class_names) if other else None
    if gates and ours.config.rule_in_force is None:
        raise ValueError(f"--sweep changes a rule and {path} has none: it never halts; leave --sweep out")
    if gates:
        for value in gates.values:  # errors come before the minutes of evaluation
            rule_with(ours.config, gates.field, value)
    evaluated = subject(path, ours)
    lines = [f"warning: {doubt}"] if doubt else []
    lines.append(format_evaluation(evaluated.result, ours.config, suited(ours.config, execution)))
    if folder:
        page = write_report(
            folder,
            evaluated,
            dataset.test,
            data=f"the test set of {settings.data.shown_name}" + (f"; {doubt}" if doubt else ""),
            batch_size=settings.eval_batch_size,
            baseline=subject(baseline, other) if baseline and other else None,
            sweep=gates,
        )
        lines.append(f"report: {page}")
    return "\n".join(lines)


def _named(model: AViT, names: tuple[str, ...]) -> AViT:
    return model if model.config.class_names is not None else model.with_config(class_names=names)


def _compare_names(
    path: str | Path, ours: AViTConfig, baseline: str | Path | None, other: AViT | None, of_data: tuple[str, ...]
) -> str | None:
    """A sentence if the checkpoint's class names differ from the data's, else None.

    A checkpoint without names does not count. Raises ValueError if the baseline's classes are different.
    """
    named = ours.class_names or of_data
    theirs = None if other is None else other.config.class_names
    if theirs is not None and tuple(theirs) != tuple(named):
        raise ValueError(
            f"the baseline {baseline} has the classes {_listed(theirs)} and {path} {_listed(named)}: compare models of "
            "the same classes, or give --class_names=FILE if they are the same"
        )
    if tuple(named) == tuple(of_data):
        return None
    if sorted(named) == sorted(of_data):
        return f"{path} has the data's classes in another order ({_listed(named)}): its figures mean nothing here"
    return (
        f"{path} was trained for the classes {_listed(named)} and the data have {_listed(of_data)}: the figures mean "
        "something only if these are the same classes in the same order"
    )


def _listed(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(shown(name, 50) for name in names[:most]) + (", ..." if len(names) > most else "")


def load_for_data(
    path: str | Path, settings: TrainSettings, dataset: Dataset, ema: bool, asked: dict[str, Any]
) -> AViT:
    """The checkpoint, checked against the data; asked: fields of AViTConfig that it must have."""
    if Path(path).is_file() and is_foreign(path):  # it holds only weights
        preset, fields = fields_for_foreign(settings.model, settings.data, dataset)
    else:
        fields = dict(asked)
        preset = fields.pop("preset", None)  # load refuses it for a checkpoint of ours
        if is_foreign(path) and (stated := stated_preprocessing(settings.data)):
            fields["preprocessing"] = stated
        if isinstance(dataset.train, Split):  # images from disk are resized to what the model takes
            _, height, width, channels = dataset.train.images.shape
            fields |= {"image_size": height if height == width else (height, width), "in_channels": channels}
    # Not the classes: load would make a new head if the checkpoint has others.
    own = ("num_classes", "class_names")
    found = load(path, preset, ema=ema, **{name: value for name, value in fields.items() if name not in own})
    if found.config.num_classes != len(dataset.class_names):
        raise ValueError(
            f"the checkpoint {path} has {found.config.num_classes} classes and the data {len(dataset.class_names)}: "
            "evaluate it on the data it was trained for, or train a new head with config.init_from"
        )
    return found


def format_evaluation(result: Evaluation, model_config: AViTConfig, how: Choice) -> str:
    """The table that eval.py prints. how: the execution that ran."""
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
        f"mean depth         {result.mean_depth:.2f} of {model_config.depth} layers ({result.depth_fraction:.0%})",
        f"  deviation        {result.depth_std_tokens:.2f} between tokens, {result.depth_std_images:.2f} of images",
        *([f"class token depth  {result.class_token_depth:.2f}"] if model_config.class_token else []),
        f"GMACs per image    {result.gmacs:.4f}",
        f"  executed         {result.executed_gmacs:.4f}, mean depth {result.executed_depth:.2f}",
        f"execution          {how.execution}: {how.reason}",
    ]
    if layer := only_layer(result.depth_histogram):
        said = f"{layer} layers compute every token" if model_config.gates else f"all tokens stop at layer {layer}"
        return "\n".join([*lines, said])
    lines.append("depth  tokens")
    shares = [result.never_computed, *result.depth_histogram]
    most = max(shares)
    for layer, share in enumerate(shares):
        if layer == 0 and not share:
            continue
        lines.append(f"{layer:5}  {share:6.1%}  {'#' * round(40 * share / most)}")
    return "\n".join(lines)
