"""A person's own pictures: what the model says of each, how sure it is, and where its layers went."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import ImageOps

from avit_jax.checkpoint import load
from avit_jax.config import AViTConfig
from avit_jax.data.decode import BadImage, decode
from avit_jax.evaluation import masked_program
from avit_jax.files import writable_folder
from avit_jax.model import AViT
from avit_jax.packed import compile_packed
from avit_jax.preprocessing import denormalize, preprocess
from avit_jax.report.gallery import side_by_side

_BATCH = 32


def predict_checkpoint(
    checkpoint: str | Path,
    images: str | Path,
    *,
    folder: str | Path | None = None,
    class_names: str | Path | None = None,
    ema: bool = False,
    execution: str = "packed",
    baseline: str | None = None,
    sweep: str | None = None,
) -> Iterator[str]:
    """Lines to print: one for each image (file, class, probability, mean depth), the unreadable ones, and a sum.

    images: a file or a folder, with what lies in its folders. Each picture with its depths beside it goes to `folder`,
    runs/<name of the checkpoint>/images by default; a model that never halts has none. Raises ValueError where there
    is no image, and for baseline and sweep, which need a data set.
    """
    if baseline or sweep:
        raise ValueError(f"--{'sweep' if sweep else 'baseline'} compares models on a data set: leave --images out")
    files, root = find_images(Path(images))
    model = load(checkpoint, ema=ema)
    if model.config.in_channels not in (1, 3):
        raise ValueError(f"the model takes {model.config.in_channels} channels and picture files have 1 or 3")
    if class_names:
        model.config = dataclasses.replace(model.config, class_names=read_class_names(class_names, model.config))
    out = writable_folder(folder or Path("runs", Path(checkpoint).name, "images")) if model.config.halts else None
    yield from predict_files(model, files, root, out, execution)


def predict_files(model: AViT, files: list[Path], root: Path, out: Path | None, execution: str) -> Iterator[str]:
    """The lines of predict_checkpoint; pictures are read, run and forgotten a batch at a time."""
    run = _program(model, min(_BATCH, len(files)), execution)
    names = model.config.class_names or tuple(map(str, range(model.config.num_classes)))
    width = max(len(str(file.relative_to(root))) for file in files)
    unreadable = []
    for start in range(0, len(files), _BATCH):
        read = {}
        for file in files[start : start + _BATCH]:
            try:
                # Upright, as the camera says: a person's pictures are not a data set's.
                picture = ImageOps.exif_transpose(decode(file, str(file.relative_to(root))))
                read[file] = preprocess(picture, model.config)[0]
            except BadImage as error:
                unreadable.append(str(file.relative_to(root)))
                yield f"unreadable: {error}"
        if not read:
            continue
        logits, depths = run(np.stack(list(read.values())))
        probabilities = np.asarray(jax.nn.softmax(logits))
        for (file, image), p, depth in zip(read.items(), probabilities, depths, strict=True):
            name, best = str(file.relative_to(root)), int(p.argmax())
            yield f"{name:{width}}  {names[best]}  {p[best]:.1%}  depth {depth.mean():.2f} of {model.config.depth}"
            if out is not None:
                path = out / f"{name}.depth.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                side_by_side(denormalize(image[None], model.config)[0], depth, model.config).save(path)
    count = len(files) - len(unreadable)
    if not count:
        raise ValueError(f"none of the {len(files)} files is an image that can be read: {', '.join(unreadable[:10])}")
    yield f"{count} {'image' if count == 1 else 'images'}, no labels: no accuracy" + (
        f"; {len(unreadable)} unreadable: {', '.join(unreadable)}" if unreadable else ""
    )
    yield f"pictures with their depths: {out}" if out else "the model never halts: there are no depths to draw"


def _program(model: AViT, batch_size: int, execution: str) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Logits and token depths, which are the rule's, of up to batch_size images."""
    packed = execution == "packed" and model.config.halts
    program = compile_packed(model, batch_size, image_exit=False) if packed else masked_program(model)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = len(images)
        output = program(np.pad(images, ((0, batch_size - count), (0, 0), (0, 0), (0, 0))))
        return np.asarray(output.logits)[:count], np.asarray(output.token_depth)[:count]

    return run


def find_images(path: Path) -> tuple[list[Path], Path]:
    """The files to read, sorted, and the folder that their names are told from; hidden ones are left out.

    Raises ValueError where there is nothing at `path`, or no file in it.
    """
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        raise ValueError(f"--images={path}: there is neither a file nor a folder of that name")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not files:
        raise ValueError(f"--images={path}: the folder is empty")
    return files, path


def read_class_names(path: str | Path, config: AViTConfig) -> tuple[str, ...]:
    """One name a line, as many as the model has classes. Raises ValueError for another number, or no such file."""
    try:
        names = tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class_names={path} cannot be read: {error}") from error
    if len(names) != config.num_classes:
        raise ValueError(f"--class_names={path} has {len(names)} names and the model {config.num_classes} classes")
    return names
