"""What each rule keeps of a few images at the same budget: maps of token depth side by side."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Images
from avit_jax.evaluate.curves import curves
from avit_jax.evaluate.rows import GROUPS, Row
from avit_jax.evaluate.training_free import STARTED
from avit_jax.execution.compiled import predict
from avit_jax.model.vit import AViT
from avit_jax.report.depth_colours import COLOURS, scale, ticks
from avit_jax.report.frontier import SAME_BUDGET
from avit_jax.report.method_style import STYLE, label
from avit_jax.report.pictures import depth_map, save_picture, show_image
from avit_jax.rules import rule_from_json

_IMAGES = 3


def draw_kept(rows: Sequence[Row], model: AViT, test: Images, path: Path, started: AViT | None = None) -> list[Path]:
    """Draw a few images, each beside its map of token depths under every training-free rule at the same budget.

    model: whose weights the rows are of. test: the images, of which some are chosen, evenly spread. started: the model
    as an A-ViT with a started gate; None: rows of that rule are left out. Returns the path, or nothing if no row has a
    rule.
    """
    chosen = [(curve.method, curve.nearest(SAME_BUDGET).rows[0]) for curve in curves(rows) if curve.group == GROUPS[0]]
    models = [(method, started if method == STARTED else model, row["rule"]) for method, row in chosen]
    shown = [(method, own.with_config(rule=rule_from_json(rule))) for method, own, rule in models if own and rule]
    if not shown:
        return []
    count = min(_IMAGES, len(test))
    places = np.linspace(0, len(test) - 1, count + 2).round().astype(int)[1:-1]
    pictures = evaluation_images(test, places, model.config)
    images = normalize(pictures, model.config)
    depth = model.config.depth
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(1.15 * (len(shown) + 1) + 0.9, 1.25 * count + 0.5), layout="constrained")
        panels = figure.subplots(count, len(shown) + 1, squeeze=False)
        for axes, picture in zip(panels[:, 0], pictures, strict=True):
            show_image(axes, picture)
        panels[0][0].set_title("image", fontsize=8)
        for column, (method, own) in enumerate(shown, start=1):
            maps = np.asarray(predict(own, images).token_depth)
            panels[0][column].set_title(label(method), fontsize=8)
            for axes, depths in zip(panels[:, column], maps, strict=True):
                axes.imshow(depth_map(depths, model.config), cmap=COLOURS, norm=scale(depth))
        for axes in panels.flat:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(ScalarMappable(scale(depth), cmap=COLOURS), ax=panels, ticks=ticks(depth), shrink=0.8)
        bar.set_label("layers that computed the token", fontsize=8)
        return [save_picture(figure, path)]
