"""Names from strangers in pictures and in the page, written whole or not at all; one colour for each depth."""

import dataclasses
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from avit_jax import AViT, Preprocessing
from avit_jax.commands.evaluate_checkpoint import format_evaluation
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.execution.compiled import predict
from avit_jax.execution.program import choose
from avit_jax.model.config import AViTConfig
from avit_jax.report import draw_depth_histogram, draw_depth_maps, pictures
from avit_jax.report.depth_colours import coloured, legend, scale
from avit_jax.report.gallery import map_uri
from avit_jax.report.names import class_names, printable, verdict
from avit_jax.report.page import write_page
from avit_jax.runtime.files import CannotWrite
from tests.harness.builders import small_config, spread_gate

HOSTILE = ("$x_{$", r"\frac{\$", "\x1b[31m_\n", "a\ud800\u202eb", "x" * 10_000)
CONFIG = small_config(in_channels=1, class_names=HOSTILE, preprocessing=Preprocessing((0.5,), (0.2,)))


@pytest.fixture(scope="module")
def model() -> AViT:
    return spread_gate(CONFIG)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (10, 12, 8, 1)).astype(np.uint8), (np.arange(10) % 5).astype(np.int32))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, and they are saved too."""
    figures: list[Figure] = []
    save = pictures.save_picture

    def recording(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(pictures, "save_picture", recording)
    return figures


@given(st.text(st.characters(), max_size=40), st.integers(1, 20))
def test_names_can_be_printed_and_have_a_bound(text: str, most: int) -> None:
    whole, short = printable(text), printable(text, most)
    whole.encode("utf-8")
    hidden = [c for c in whole if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"]
    assert hidden == []
    assert short == whole if len(whole) <= most else len(short) == most and short[:-1] == whole[: most - 1]
    assert printable(whole) == whole


def test_names_say_what_they_held() -> None:
    assert printable("\x1b[31m\n\ud800") == r"\x1b[31m\n\ud800"
    assert printable("naïve 猫 👩\u200d🔬 $x$") == "naïve 猫 👩\u200d🔬 $x$"
    many = AViTConfig(num_classes=1000, class_names=("x" * 10_000,) * 1000)
    assert sum(map(len, class_names(many))) <= 80_000


def test_hostile_names_are_drawn_as_text_and_errors_told_as_the_page_tells_them(
    model: AViT, split: Split, tmp_path: Path, drawn: list[Figure]
) -> None:
    result = evaluate(model, split, 10)
    path = draw_depth_maps(model, split, result.image_depths, tmp_path / "maps.png", columns=5)
    assert path.read_bytes()[:4] == b"\x89PNG"
    order = np.argsort(result.image_depths, kind="stable")
    answers = np.asarray(predict(model, normalize(split.images, CONFIG)).logits.argmax(-1))
    names = class_names(CONFIG, 16)
    axes = np.reshape(drawn[0].axes[:20], (4, 5))
    wrong = 0
    for row, chosen in ((0, order[:5]), (2, order[::-1][:5])):
        for axis, image in zip(axes[row], chosen, strict=True):
            answer, label = int(answers[image]), int(split.labels[image])
            said = names[answer] if answer == label else f"answered {names[answer]},\nis {names[label]}"
            assert axis.get_title() == said
            wrong += answer != label
    assert wrong > 0
    assert verdict("dog", "bird", False) == "answered dog, is bird"
    assert verdict("dog", "dog", True) == verdict("dog", None, None) == "dog"


def test_one_colour_is_one_depth_everywhere(model: AViT, split: Split, tmp_path: Path, drawn: list[Figure]) -> None:
    rows = legend(4)
    assert [row["layer"] for row in rows] == [1, 2, 3, 4]
    draw_depth_maps(model, split, evaluate(model, split, 10).image_depths, tmp_path / "maps.png", columns=2)
    (shown,) = drawn[0].axes[2].images  # the first map
    for row in rows:
        depth = int(row["layer"])
        assert to_hex(shown.to_rgba(np.array([[depth]]), bytes=True)[0, 0] / 255) == row["colour"]
        assert to_hex(coloured(np.array([depth]), 4)[0] / 255) == row["colour"]
    # Brightness alone tells the order: for every kind of colour vision, and in grey.
    brightness = coloured(np.arange(1, 25), 24) @ (0.299, 0.587, 0.114)
    assert (np.diff(brightness) > 0).all()
    same = np.full(CONFIG.num_tokens, 2)
    assert map_uri(same, CONFIG) == map_uri(np.where(np.arange(7) < CONFIG.num_special, 4, same), CONFIG)
    assert scale(12)(12) == 1 and scale(1)(1) == 0


def test_where_all_tokens_stop_at_one_layer_the_picture_is_a_sentence(
    model: AViT, split: Split, tmp_path: Path, drawn: list[Figure]
) -> None:
    result = evaluate(model, split, 10)
    draw_depth_histogram(result, tmp_path / "several.png")
    one = dataclasses.replace(result, depth_histogram=(0.0, 0.0, 1.0, 0.0))
    assert draw_depth_histogram(one, tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert len(drawn[0].axes) == 1 and drawn[1].axes == []
    assert [text.get_text() for text in drawn[1].texts] == [
        "All tokens of the 10 images have a depth of 3 of 4 layers."
    ]
    assert format_evaluation(one, CONFIG, choose(CONFIG)).splitlines()[-1] == "all tokens stop at layer 3"
    assert "all tokens" not in format_evaluation(result, CONFIG, choose(CONFIG))


def test_a_page_or_picture_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_page(tmp_path, "<p>old\ud800</p>")
    assert path.read_bytes() == rb"<p>old\ud800</p>"
    picture = tmp_path / "picture.png"
    pictures.save_picture(Figure(), picture)
    old = picture.read_bytes()

    def full(self: Any, file: Any, *_: Any, **__: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(CannotWrite, match="make space there"):
        pictures.save_picture(Figure(), picture)
    assert picture.read_bytes() == old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["picture.png", "report.html"]
