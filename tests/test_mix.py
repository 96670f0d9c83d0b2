"""Erasing, mixup and cutmix on the device."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from avit_jax import AViTConfig, Preprocessing
from avit_jax.data.mix import augment_on_device, mix_batch, random_erasing
from avit_jax.data.settings import AugmentSettings
from tests.harness.arrays import read_npz

KEY = jax.random.key(5)
SIZE = 16


def told_apart(count: int) -> tuple[jax.Array, jax.Array]:
    """Even images are 0, odd ones 1 everywhere: a pixel is its image's share of the odd one. Two classes."""
    odd = jnp.arange(count) % 2
    return jnp.broadcast_to(odd[:, None, None, None], (count, SIZE, SIZE, 1)).astype(jnp.float32), odd


@functools.cache
def mixed(count: int = 8000, **settings: float) -> tuple[np.ndarray, np.ndarray]:
    images, labels = told_apart(count)
    program = jax.jit(functools.partial(mix_batch, num_classes=2, **({"mixup": 0.0, "cutmix": 0.0} | settings)))
    images, targets = program(KEY, images, labels)
    return np.asarray(images)[..., 0], np.asarray(targets)


def test_images_are_mixed_with_their_neighbour_and_labels_by_the_same_share() -> None:
    images, targets = mixed(mixup=0.8, cutmix=1.0)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(images.mean((1, 2)), targets[:, 1], atol=1e-5)
    np.testing.assert_allclose(images[::2] + images[1::2], 1, atol=1e-6)
    assert len(np.unique(targets[::2, 0])) > 1000, "every pair draws its own"


def test_mixups_share_is_beta_distributed() -> None:
    images, targets = mixed(mixup=0.8)
    assert np.ptp(images, axis=(1, 2)).max() < 1e-6, "the whole image has one share"
    assert stats.kstest(targets[::2, 0], stats.beta(0.8, 0.8).cdf).pvalue > 0.01


def test_statistics_are_timms() -> None:
    """timm's Mixup (one draw for a pair, as here) and RandomErasing on the same 16 x 16 pixels, recorded."""
    recorded = json.loads(str(read_npz(Path(__file__).parent / "data/timm_augment.npz")["statistics"]))
    images, _ = mixed(mixup=0.8, cutmix=1.0)
    own = 1 - images[::2].reshape(4000, -1)
    whole = (own == 1).all(1)
    cut = ((own == 0) | (own == 1)).all(1) & ~whole
    share = own.mean(1)
    found = {
        "cut": cut.mean(),
        "whole": whole.mean(),
        "mixup_mean": share[~cut & ~whole].mean(),
        "mixup_deviation": share[~cut & ~whole].std(),
        "cut_mean": share[cut].mean(),
        "cut_deviation": share[cut].std(),
    }
    gone = (
        np.asarray(jax.jit(random_erasing, static_argnums=2)(KEY, jnp.full((4000, SIZE, SIZE, 3), 7.0), 0.25)) != 7
    ).all(-1)
    area = gone[gone.any((1, 2))].mean((1, 2))
    found |= {"erased": len(area) / len(gone), "erased_mean": area.mean(), "erased_deviation": area.std()}
    assert found.keys() == recorded.keys()
    for name, value in found.items():
        assert value == pytest.approx(recorded[name], abs=0.025), name


def boxes_of_the_paper(count: int, rng: np.random.Generator) -> np.ndarray:
    """A loop that follows arXiv 1905.04899 (and timm's whole pixels): the areas of the rectangles."""
    areas = []
    for _ in range(count):
        side, (y, x) = np.sqrt(1 - rng.beta(1.0, 1.0)), rng.integers(0, SIZE, 2)
        half = int(SIZE * side) // 2
        rows = min(y + half, SIZE) - max(y - half, 0)
        areas.append(rows * (min(x + half, SIZE) - max(x - half, 0)) / SIZE**2)
    return np.asarray(areas)


def test_cutmixs_rectangle_has_the_papers_area() -> None:
    images, targets = mixed(cutmix=1.0)
    assert set(np.unique(images)) == {0, 1}
    for image in images[:40:2]:
        rows, columns = image.any(1), image.any(0)
        np.testing.assert_array_equal(image, np.outer(rows, columns), "one rectangle")
        assert np.abs(np.diff(np.flatnonzero(rows))).max(initial=1) == 1
    expected = boxes_of_the_paper(20_000, np.random.default_rng(0))
    assert stats.ks_2samp(targets[::2, 1], expected).pvalue > 0.01
    centre = images[::2].mean(0)
    np.testing.assert_allclose(centre, centre[::-1], atol=0.06)
    np.testing.assert_allclose(centre, centre.T, atol=0.06)


def test_the_switch_and_the_probability_of_mixing() -> None:
    switch = 0.2
    images, _ = mixed(mixup=0.8, cutmix=1.0, switch=switch, probability=0.7)
    is_whole = (images[::2] == 0).all((1, 2))
    is_cut = np.isin(images[::2], (0, 1)).all((1, 2)) & ~is_whole
    nothing_cut = (boxes_of_the_paper(20_000, np.random.default_rng(0)) == 0).mean()
    assert is_cut.mean() == pytest.approx(0.7 * switch * (1 - nothing_cut), abs=0.04)
    assert is_whole.mean() == pytest.approx(0.3 + 0.7 * switch * nothing_cut, abs=0.04)


def test_nothing_is_mixed_where_it_is_off_or_a_neighbour_is_bad() -> None:
    images, labels = told_apart(8)
    same, targets = mix_batch(KEY, images, labels, num_classes=2, mixup=0.0, cutmix=0.0, label_smoothing=0.1)
    np.testing.assert_array_equal(same, images)
    np.testing.assert_allclose(targets[0], [0.95, 0.05], atol=1e-6)
    weight = jnp.ones(8).at[3].set(0)
    program = jax.jit(functools.partial(mix_batch, num_classes=2, mixup=0.8, cutmix=0.0))
    found, _ = program(KEY, images, labels, weight=weight)
    changed = np.asarray(found != images).any((1, 2, 3))
    assert changed.tolist() == [True, True, False, False, True, True, True, True]
    with pytest.raises(ValueError, match="a batch of 7 images cannot be mixed in pairs"):
        mix_batch(KEY, images[:7], labels[:7], num_classes=2, mixup=0.8, cutmix=0.0)


def erasures_of_the_paper(count: int, rng: np.random.Generator) -> np.ndarray:
    """A loop that follows arXiv 1708.04896, its upper limit 1/3: the erased areas."""
    areas = []
    for _ in range(count):
        for _ in range(10):
            area, ratio = rng.uniform(0.02, 1 / 3) * SIZE**2, np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            rows, columns = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if rows < SIZE and columns < SIZE:
                areas.append(rows * columns / SIZE**2)
                break
    return np.asarray(areas)


def test_erasing_fills_rectangles_with_normal_noise() -> None:
    images = jnp.full((4000, SIZE, SIZE, 3), 7.0)
    found = np.asarray(jax.jit(random_erasing, static_argnums=2)(KEY, images, 0.25))
    inside = (found != 7).all(-1)
    assert inside.any((1, 2)).mean() == pytest.approx(0.25, abs=0.03)
    np.testing.assert_array_equal(inside, (found != 7).any(-1), "all channels of a pixel")
    erased = inside[inside.any((1, 2))]
    for mask in erased[:40]:
        np.testing.assert_array_equal(mask, np.outer(mask.any(1), mask.any(0)), "one rectangle")
    assert stats.ks_2samp(erased.mean((1, 2)), erasures_of_the_paper(10_000, np.random.default_rng(0))).pvalue > 0.01
    noise = found[inside]
    assert stats.kstest(noise.ravel()[:20_000], "norm").pvalue > 0.01
    assert np.corrcoef(noise.T)[0, 1] == pytest.approx(0, abs=0.03), "each channel has its own noise"
    place = erased.mean(0)
    np.testing.assert_allclose(place, place[::-1, ::-1], atol=0.08)
    np.testing.assert_array_equal(random_erasing(KEY, images[:2], 0.0), images[:2])


def test_bytes_are_normalised_then_erased_then_mixed() -> None:
    model = AViTConfig(image_size=SIZE, num_classes=2, preprocessing=Preprocessing((0.5,) * 3, (0.25,) * 3))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3)).astype(np.uint8))
    labels = jnp.array([0, 1, 1, 0])
    program = jax.jit(functools.partial(augment_on_device, label_smoothing=0.1), static_argnums=(3, 4))
    plain, targets = program(KEY, images, labels, AugmentSettings(), model)
    np.testing.assert_allclose(plain, (np.asarray(images) / 255 - 0.5) / 0.25, atol=1e-5)
    np.testing.assert_allclose(targets[0], [0.95, 0.05], atol=1e-6)
    again, _ = program(KEY, plain, labels, AugmentSettings(), model)
    np.testing.assert_array_equal(again, plain)
    settings = AugmentSettings(erasing=1.0, mixup=0.8)
    both, _ = program(KEY, images, labels, settings, model)
    erased, _ = program(KEY, images, labels, AugmentSettings(erasing=1.0), model)
    np.testing.assert_allclose(both[0] + both[1], erased[0] + erased[1], atol=1e-4)
    assert (both[0] != erased[0]).mean() > 0.9


CROSSING = """
import jax, jax.numpy as jnp, re
jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import NamedSharding, PartitionSpec
from avit_jax.data.mix import mix_batch, random_erasing
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
def step(images, labels):
    images = random_erasing(jax.random.key(0), images, 0.25)
    return mix_batch(jax.random.key(1), images, labels, num_classes=10, mixup=0.8, cutmix=1.0)
shapes = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32)
text = jax.jit(step, in_shardings=(split, split), out_shardings=(split, split)).lower(*shapes).compile().as_text()
for line in text.splitlines():
    if re.search(r"= .*(all-gather|all-to-all|collective-permute|all-reduce)\\(", line):
        shapes = re.findall(r"\\w\\[([\\d,]*)\\]", line.split("(")[0])
        sizes = [eval(shape.replace(",", "*") or "1") for shape in shapes]
        print(max(sizes))
"""


@pytest.mark.slow
def test_images_do_not_cross_devices() -> None:
    """The program for four devices moves a draw for each pair at most (8 pairs), no pixels (3,072 in all)."""
    found = subprocess.run([sys.executable, "-c", CROSSING], capture_output=True, text=True, check=True).stdout
    assert max(map(int, found.split()), default=0) <= 4 * 8
