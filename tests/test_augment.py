"""Crops, RandAugment and colour jitter against what timm and torchvision made of the same picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avit_jax import AViTConfig, Preprocessing, preprocess
from avit_jax.data.crop import RandomFlip, RandomResizedCrop, random_box
from avit_jax.data.randaugment import OPERATIONS, ColorJitter, RandAugment, adjust, operate
from tests.harness.arrays import read_npz

RECORDED = read_npz(Path(__file__).parent / "data/timm_augment.npz")
PICTURE, PHOTOGRAPH = Image.fromarray(RECORDED["picture"]), Image.fromarray(RECORDED["photograph"])
FILL = (124, 116, 104)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def ours(timm_name: str) -> str:
    """timm names the version too: PosterizeIncreasing, TranslateXRel."""
    return timm_name.removesuffix("Increasing").removesuffix("Rel")


def test_every_operation_gives_timms_picture() -> None:
    recorded = [name.split() for name in RECORDED["operations"]]
    assert {ours(name) for name, _, _ in recorded} == set(OPERATIONS)
    assert len(recorded) == 15 * 5 * 2 - 2
    for (name, level, sign), expected in zip(recorded, RECORDED["results"], strict=True):
        found = operate(PICTURE, ours(name), float(level), int(sign), fill=FILL)
        np.testing.assert_array_equal(np.asarray(found), expected, f"{name} at {level}, direction {sign}")


def test_posterize_to_no_bits_is_black_and_grey_pictures_are_taken() -> None:
    assert not np.asarray(operate(PICTURE, "Posterize", 10.0, 1, fill=FILL)).any()
    for name in OPERATIONS:
        assert operate(PICTURE.convert("L"), name, 9.0, -1, fill=(33,)).mode == "L"
    with pytest.raises(ValueError, match="there is no operation 'Rotat': did you mean 'Rotate'"):
        operate(PICTURE, "Rotat", 9.0, 1, fill=FILL)


@pytest.mark.parametrize("name", sorted(name for name in RECORDED if name.startswith("eval")))
def test_the_evaluation_crop_is_torchvisions(name: str) -> None:
    _, kind, size, fraction = name.split()
    given = {"wide": PHOTOGRAPH, "tall": PHOTOGRAPH.rotate(90, expand=True), "small": PHOTOGRAPH.resize((19, 13))}[kind]
    plain = Preprocessing((0.0,) * 3, (1.0,) * 3, float(fraction))
    model = AViTConfig(image_size=int(size), patch_size=1, preprocessing=plain)
    np.testing.assert_array_equal(np.rint(preprocess(given, model)[0] * 255), RECORDED[name])


def test_a_resized_crop_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same box gives the same pixels; the drawing of boxes is compared below."""
    for seed, box in enumerate(RECORDED["boxes"].tolist()):
        monkeypatch.setattr("avit_jax.data.crop.random_box", lambda *_, box=box: tuple(box))
        crop = RandomResizedCrop((16, 16), SCALE, RATIO)
        found = crop.random_map({"image": PHOTOGRAPH}, np.random.default_rng(0))["image"]
        np.testing.assert_array_equal(np.asarray(found), RECORDED[f"crop {seed}"])


def test_boxes_are_drawn_as_torchvision_draws_them() -> None:
    """Means of 4,000 boxes against 20,000 recorded ones, also where most draws do not fit and the middle is taken."""
    for size, expected in zip(((100, 75), (30, 100), (300, 20)), RECORDED["box statistics"], strict=True):
        rng = np.random.default_rng(0)
        left, top, right, bottom = np.array([random_box(size, SCALE, RATIO, rng) for _ in range(4000)]).T
        assert left.min() >= 0 and top.min() >= 0 and right.max() <= size[0] and bottom.max() <= size[1]
        width, height = (right - left) / size[0], (bottom - top) / size[1]
        middle = (left + right) / 2 / size[0], (top + bottom) / 2 / size[1]
        found = [(width * height).mean(), width.mean(), height.mean(), middle[0].mean(), middle[1].mean()]
        np.testing.assert_allclose(found, expected, atol=0.012)


def test_flips_happen_half_the_time() -> None:
    rng, flip = np.random.default_rng(0), RandomFlip(0.5)
    mirrored = np.asarray(PICTURE)[:, ::-1]
    found = [np.asarray(flip.random_map({"image": PICTURE}, rng)["image"]) for _ in range(1000)]
    share = np.mean([np.array_equal(image, mirrored) for image in found])
    assert share == pytest.approx(0.5, abs=0.05)
    assert share + np.mean([np.array_equal(image, PICTURE) for image in found]) == 1


def test_randaugment_draws_operations_levels_and_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, int]] = []
    monkeypatch.setattr(
        "avit_jax.data.randaugment.operate", lambda p, name, level, sign, **_: drawn.append((name, level, sign)) or p
    )
    transform, rng = RandAugment.from_string("rand-m9-mstd0.5-inc1", fill=FILL), np.random.default_rng(0)
    for _ in range(6000):
        transform.random_map({"image": PICTURE}, rng)
    assert len(drawn) / 6000 == pytest.approx(2 * 0.5, abs=0.03)
    names, levels, signs = (np.array(values) for values in zip(*drawn, strict=True))
    shares = [np.mean(names == name) for name in OPERATIONS]
    np.testing.assert_allclose(shares, 1 / 15, atol=0.015)
    assert levels.mean() == pytest.approx(9, abs=0.03)
    assert levels.std() == pytest.approx(0.5, abs=0.03)
    assert levels.max() == 10
    assert np.mean(levels == 10) == pytest.approx(0.0228, abs=0.01)
    assert signs.mean() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand-m9-mstd0.5-inc1", (9, 2, 0.5, 0.5)),
        ("rand-n3-inc1-m5", (5, 3, 0.0, 0.5)),
        ("rand-inc1-p0.25", (10, 2, 0.0, 0.25)),
    ],
)
def test_timms_notation_is_read(text: str, expected: tuple[float, ...]) -> None:
    found = RandAugment.from_string(text, fill=FILL)
    assert (found.magnitude, found.operations, found.deviation, found.probability) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("random-m9", "must start with rand-"),
        ("rand-m9-inc0", "inc must be given as 1"),
        ("rand-m9", "inc must be given as 1"),
        ("rand-m11-inc1", "m must be from 0 to 10"),
        ("rand-n0-inc1", "n must be a whole number from 1"),
        ("rand-n1.5-inc1", "n must be a whole number from 1"),
        ("rand-m9-q3-inc1", "'q3' is not understood; known: m .magnitude"),
        ("rand-m9-m8-inc1", "gives m twice"),
        ("rand-m9-mstd-inc1", "'mstd' is not understood"),
        ("rand-m9--inc1", "'' is not understood"),
        ("rand-p2-inc1", "p must be at most 1"),
    ],
)
def test_notation_that_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RandAugment.from_string(text, fill=FILL)


def test_colour_jitter_has_torchvisions_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = iter(RECORDED["jitter"])
    for kind in range(3):
        for factor in (0.6, 1.4):
            factors = [factor if i == kind else 1.0 for i in range(3)]
            np.testing.assert_array_equal(np.asarray(adjust(PICTURE, [2, 0, 1], factors)), next(recorded))
    drawn: list[tuple[list[int], list[float]]] = []
    monkeypatch.setattr("avit_jax.data.randaugment.adjust", lambda p, order, factors: drawn.append((order, factors)))
    rng = np.random.default_rng(0)
    for _ in range(1000):
        ColorJitter(0.4).random_map({"image": PICTURE}, rng)
    orders, factors = (np.array(values) for values in zip(*drawn, strict=True))
    assert len({tuple(order) for order in orders}) == 6
    np.testing.assert_allclose(factors.mean(0), 1, atol=0.03)
    np.testing.assert_allclose([factors.min(), factors.max()], [0.6, 1.4], atol=0.01)
