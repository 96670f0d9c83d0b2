"""Write what the page needs besides its own files: the models as ONNX, and a JSON file that says what they are.

python examples/browser/prepare.py                 models/, a few seconds
python examples/browser/prepare.py --pictures      pictures/ again, ten test images of each dataset in a row
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from PIL import Image

import avit_jax
from avit_jax.data.open import open_dataset
from avit_jax.data.settings import DataSettings

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parents[1] / "checkpoints"
MODELS = {"digits": "mnist", "clothes": "fashion_mnist"}  # the page's names, and those of the checkpoints


def write_models(folder: Path) -> None:
    """Export every A-ViT and its dense model for one image, with preprocessing inside, and write models.json."""
    folder.mkdir(exist_ok=True)
    about = {}
    for name, stem in MODELS.items():
        for file, kind in ((f"{name}.onnx", "avit"), (f"{name}_dense.onnx", "dense")):
            model = avit_jax.load(CHECKPOINTS / f"{stem}_{kind}")
            avit_jax.export(model, folder / file, batch_size=1, preprocess=True, overwrite=True)
            print(f"{folder / file}: {(folder / file).stat().st_size / 1e6:.1f} MB")
        config = avit_jax.load(CHECKPOINTS / f"{stem}_avit").config
        about[name] = {
            "class_names": config.class_names,
            "layers": config.depth,
            "patches": config.patch_grid,
            "special_tokens": config.num_special,
        }
    (folder / "models.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """Write the first test image of each class, side by side."""
    from configs import fashion_mnist, mnist_avit

    folder.mkdir(exist_ok=True)
    for name, config in (("digits", mnist_avit), ("clothes", fashion_mnist)):
        test = open_dataset(DataSettings.from_config(dict(config.get_config().data))).test
        labels = np.asarray(test.labels)
        firsts = [np.flatnonzero(labels == label)[0] for label in range(10)]
        row = np.concatenate([np.asarray(test.images[first])[..., 0] for first in firsts], axis=1)
        Image.fromarray(row).save(folder / f"{name}.png", optimize=True)


def main() -> None:
    """Write the models, or the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="write pictures/ instead")
    parser.add_argument("--to", metavar="FOLDER", type=Path, default=HERE / "models", help="write models/ elsewhere")
    options = parser.parse_args()
    if options.pictures:
        write_pictures(HERE / "pictures")
    else:
        write_models(options.to)


if __name__ == "__main__":
    main()
