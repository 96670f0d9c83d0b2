"""Predictions for a user's own pictures: the answer, its probability, and the depths of the patches."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from avit_jax.checkpoints.model_folder import load
from avit_jax.data.decode import BadImage, decode
from avit_jax.data.preprocessing import denormalize, normalize, preprocess
from avit_jax.execution.program import AUTO, compile, suited
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.report.gallery import side_by_side
from avit_jax.runtime.files import shown, writable_folder

_BATCH = 32
_WIDEST = 60  # characters of the column of file names; longer names push their line to the right
_SUFFIX = ".depth.png"
_LONGEST, _KEPT = 255, 200  # bytes of a file name that file systems take, and those that are kept of a longer one


def predict_checkpoint(
    checkpoint: str | Path,
    images: str | Path,
    *,
    folder: str | Path | None = None,
    class_names: str | Path | None = None,
    ema: bool = False,
    execution: str = AUTO,
    baseline: str | None = None,
    sweep: str | None = None,
) -> Iterator[str]:
    """Lines to print: one for each image (file, class, probability, mean depth), the unreadable ones, and a summary.

    images: a file, or a folder with its subfolders. folder: for each picture with its depths beside it; by default
    runs/<name of the checkpoint>/images; a model that never halts writes none. class_names: a file with one name a
    line. Raises ValueError if there is no image, and for baseline and sweep, which need a data set.
    """
    if baseline or sweep:
        raise ValueError(f"--{'sweep' if sweep else 'baseline'} compares models on a data set: leave --images out")
    files, root = find_images(Path(images))
    model = load(checkpoint, ema=ema)
    if model.config.in_channels not in (1, 3):
        raise ValueError(f"the model takes {model.config.in_channels} channels and picture files have 1 or 3")
    if class_names:
        model = model.with_config(class_names=read_class_names(class_names, model.config))
    has_depths = model.config.rule_in_force is not None
    out = writable_folder(folder or Path("runs", Path(checkpoint).name, "images")) if has_depths else None
    yield from predict_files(model, files, root, out, execution)


def predict_files(model: AViT, files: list[Path], root: Path, out: Path | None, execution: str) -> Iterator[str]:
    """The lines of predict_checkpoint; pictures are read and run a batch at a time, and none is kept.

    root: the folder that file names are shown relative to. out: the folder for pictures with depths; None: none.
    """
    config = model.config
    # Raises its errors here, before they would be blamed on a file.
    normalize(np.zeros((0, *config.image_shape, config.in_channels), np.uint8), config)
    chosen = suited(config, execution).execution
    run = compile(model, min(_BATCH, len(files)), execution=chosen, image_exit=False)
    names = model.config.class_names or tuple(map(str, range(model.config.num_classes)))
    shown_names = {file: shown(file.relative_to(root)) for file in files}
    width = min(max(map(len, shown_names.values())), _WIDEST)
    unreadable = []
    for start in range(0, len(files), _BATCH):
        read = {}
        for file in files[start : start + _BATCH]:
            try:
                read[file] = read_picture(file, shown_names[file], model.config)
            except BadImage as error:
                unreadable.append(shown_names[file])
                yield f"unreadable: {error}"
        if not read:
            continue
        output = run(np.stack(list(read.values())))
        probabilities, depths = np.asarray(jax.nn.softmax(output.logits)), np.asarray(output.token_depth)
        for (file, image), p, depth in zip(read.items(), probabilities, depths, strict=True):
            name, answer = shown_names[file], shown(names[int(p.argmax())])
            yield f"{name:{width}}  {answer}  {p.max():.1%}  depth {depth.mean():.2f} of {model.config.depth}"
            if out is not None:
                path = picture_path(out, file.relative_to(root))
                path.parent.mkdir(parents=True, exist_ok=True)
                side_by_side(denormalize(image[None], model.config)[0], depth, model.config).save(path)
    count = len(files) - len(unreadable)
    if not count:
        raise ValueError(f"none of the {len(files)} files is an image that can be read: {', '.join(unreadable[:10])}")
    yield f"{count} {'image' if count == 1 else 'images'}, no labels: no accuracy" + (
        f"; {len(unreadable)} unreadable: {', '.join(unreadable)}" if unreadable else ""
    )
    yield f"pictures with their depths: {out}" if out else "the model never halts: there are no depths to draw"


def read_picture(file: Path, name: str, model_config: AViTConfig) -> np.ndarray:
    """A file as the model takes it. Raises BadImage for any error in the libraries that read it."""
    try:
        # Turned upright by the camera's tag, which the images of data sets are not.
        return preprocess(decode(file, name, upright=True), model_config)[0]
    except BadImage:
        raise
    except Exception as error:
        reason = shown(str(error).strip()) or type(error).__name__
        raise BadImage(f"{name} cannot be resized ({reason}): replace the file") from error


def picture_path(out: Path, name: Path) -> Path:
    """Where the picture with the depths of an image goes: `<name>.depth.png` below out.

    A part of the name that cannot be printed, or that is too long for a file system, is escaped and cut, with a digest.
    """
    parts = [*name.parts[:-1], name.name + _SUFFIX]
    if len(os.fsencode(name)) > 4 * _LONGEST:  # the whole path has a limit too
        parts = ["_".join(parts)]
    return out.joinpath(*(_safe(part, _SUFFIX * (i == len(parts) - 1)) for i, part in enumerate(parts)))


def _safe(part: str, suffix: str) -> str:
    if part.isprintable() and len(os.fsencode(part)) <= _LONGEST:
        return part
    digest = hashlib.sha256(os.fsencode(part)).hexdigest()[:12]
    kept = shown(part.removesuffix(suffix)).replace("\\", "_").encode()[:_KEPT].decode(errors="ignore")
    return f"{kept}-{digest}{suffix}"


def find_images(path: Path) -> tuple[list[Path], Path]:
    """The files to read, sorted, and the folder that their names are relative to; hidden files are left out.

    Raises ValueError if nothing is at `path`, or no file is in it.
    """
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        raise ValueError(f"--images={path}: there is neither a file nor a folder of that name")
    files = sorted(
        file
        for file in path.rglob("*")
        # Pipes and dangling links too: they are read, refused and counted as any unreadable file.
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"--images={path}: the folder is empty")
    return files, path


def read_class_names(path: str | Path, model_config: AViTConfig) -> tuple[str, ...]:
    """The class names in a file, one a line. Raises ValueError if their number is wrong or the file cannot be read."""
    try:
        names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class_names={path} cannot be read: {error}") from error
    if len(names) != model_config.num_classes:
        raise ValueError(
            f"--class_names={path} has {len(names)} names and the model {model_config.num_classes} classes"
        )
    return names
