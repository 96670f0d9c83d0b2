"""Random erasing, mixup, cutmix and random patches inside the jitted training step; image i is mixed with i XOR 1.

Both images of a pair are on one device, so no data moves between devices. Each pair draws its own weight or rectangle.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import AugmentSettings
from avit_jax.model.config import AViTConfig
from avit_jax.model.random_patches import draw_positions

ERASED_AREA = (0.02, 1 / 3)  # least and most of the image's area (arXiv 1708.04896, with timm's upper limit)
ERASED_RATIO = (0.3, 1 / 0.3)  # height / width
ATTEMPTS = 10


def augment_on_device(
    key: PRNGKeyArray,
    images: UInt8[Array, "b h w c"] | Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    augment: AugmentSettings,
    model_config: AViTConfig,
    *,
    label_smoothing: float = 0.0,
    weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """The augmentation that training_batches leaves to the device; returns normalised images and soft labels.

    images: uint8, which are normalised, or float32, which are already. labels: class indices. model: image size,
    preprocessing and number of classes. weight: images with weight 0 (on_bad_image "skip") are not mixed. Raises
    ValueError if an odd batch is to be mixed.
    """
    erase_key, mix_key = jax.random.split(key)
    pixels = normalize(images, model_config) if images.dtype == jnp.uint8 else images
    pixels = random_erasing(erase_key, pixels, augment.erasing)
    return mix_batch(
        mix_key,
        pixels,
        labels,
        num_classes=model_config.num_classes,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        switch=augment.mix_switch,
        probability=augment.mix_probability,
        label_smoothing=label_smoothing,
        weight=weight,
    )


def training_positions(
    key: PRNGKeyArray, images: int, augment: AugmentSettings, model_config: AViTConfig
) -> Int[Array, "b n 2"]:
    """Where the patches of a training batch are cut, by config.augment.random_*; the key that augment_on_device takes.

    Each image draws from the key and its number in the batch, so a run is the same on every mesh.
    """
    own = jax.random.fold_in(key, 2)  # splitting the key in two gives what fold_in(key, 0) and fold_in(key, 1) give
    keys = jax.vmap(jax.random.fold_in, (None, 0))(own, jnp.arange(images))
    return draw_positions(
        keys,
        model_config,
        tokens=augment.random_tokens,
        law=augment.random_law,
        probability=augment.random_patches,
    )


def mix_batch(
    key: PRNGKeyArray,
    images: Float[Array, "b h w c"],
    labels: Int[Array, " b"],
    *,
    num_classes: int,
    mixup: float,
    cutmix: float,
    switch: float = 0.5,
    probability: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b classes"]]:
    """Mix each image with its neighbour, by mixup or cutmix, and their labels in the same proportion.

    mixup (arXiv 1710.09412): x = s x_i + (1 - s) x_j, s ~ Beta(mixup, mixup). cutmix (arXiv 1905.04899): a rectangle
    with sqrt(1 - s) of the image's sides, s ~ Beta(cutmix, cutmix), and a uniformly drawn centre is taken from x_j; s
    is then the fraction of x_i's area that is left. 0 turns either off. If both are on, a pair takes cutmix with
    probability `switch`. A pair is mixed with `probability`, and never if one of its images has weight 0. Labels are
    smoothed first, as optax.smooth_labels does. Raises ValueError for an odd batch, unless both are off.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)
    if not (mixup or cutmix):
        return images, targets
    count, height, width, _ = images.shape
    if count % 2:
        raise ValueError(f"a batch of {count} images cannot be mixed in pairs: choose an even batch size")
    pairs = count // 2
    mix_key, switch_key, share_key, box_key = jax.random.split(key, 4)
    mixed = jax.random.uniform(mix_key, (pairs,)) < probability
    if weight is not None:
        mixed &= (weight.reshape(pairs, 2) > 0).all(1)
    chance = switch if mixup and cutmix else float(cutmix > 0)
    cut = jax.random.uniform(switch_key, (pairs,)) < chance
    concentration = jnp.where(cut, cutmix or 1.0, mixup or 1.0)
    share = jax.random.beta(share_key, concentration, concentration)
    inside = _boxes(box_key, jnp.sqrt(1 - share), height, width)
    share = jnp.where(cut, 1 - inside.mean((1, 2)), share)
    own = jnp.where(cut[:, None, None], 1 - inside, share[:, None, None])
    share, own = jnp.where(mixed, share, 1.0), jnp.where(mixed[:, None, None], own, 1.0)
    return _blend(images, own[:, None, :, :, None]), _blend(targets, share[:, None, None])


def _blend(values: Float[Array, "b ..."], own: Float[Array, "p ..."]) -> Float[Array, "b ..."]:
    """own * values[i] + (1 - own) * values[i XOR 1]."""
    paired = values.reshape(-1, 2, *values.shape[1:])
    return (own * paired + (1 - own) * paired[:, ::-1]).reshape(values.shape)


def _boxes(key: PRNGKeyArray, side: Float[Array, " p"], height: int, width: int) -> Bool[Array, "p h w"]:
    """Masks of rectangles with `side` times the image's sides and uniformly drawn centres, cut off at the edge."""
    row_key, column_key = jax.random.split(key)
    rows = _span(jax.random.randint(row_key, side.shape, 0, height), (height * side).astype(jnp.int32), height)
    columns = _span(jax.random.randint(column_key, side.shape, 0, width), (width * side).astype(jnp.int32), width)
    return rows[:, :, None] & columns[:, None, :]


def _span(center: Int[Array, " p"], length: Int[Array, " p"], size: int) -> Bool[Array, "p n"]:
    places, half = jnp.arange(size), length // 2
    return (places >= (center - half)[:, None]) & (places < (center + half)[:, None])


def random_erasing(key: PRNGKeyArray, images: Float[Array, "b h w c"], probability: float) -> Float[Array, "b h w c"]:
    """Replace a random rectangle in some images by standard normal noise, drawn for each pixel (arXiv 1708.04896).

    images: normalised, so that the noise has their scale. probability: of erasing, for each image. Area and aspect
    ratio are drawn up to ten times until the rectangle fits; if it never fits, the image stays unchanged.
    """
    if not probability:
        return images
    count, height, width, _ = images.shape
    chance_key, area_key, ratio_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    area = jax.random.uniform(area_key, (count, ATTEMPTS), minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = jnp.log(jnp.array(ERASED_RATIO))
    ratio = jnp.exp(jax.random.uniform(ratio_key, (count, ATTEMPTS), minval=low, maxval=high))
    rows = jnp.round(jnp.sqrt(area * height * width * ratio))
    columns = jnp.round(jnp.sqrt(area * height * width / ratio))
    fits = (rows < height) & (columns < width)
    first = fits.argmax(1)[:, None]
    rows, columns = (jnp.take_along_axis(sides, first, 1) for sides in (rows, columns))
    top = jnp.floor(jax.random.uniform(top_key, (count, 1)) * (height - rows + 1))
    left = jnp.floor(jax.random.uniform(left_key, (count, 1)) * (width - columns + 1))
    y, x = jnp.arange(height), jnp.arange(width)
    inside = ((y >= top) & (y < top + rows))[:, :, None] & ((x >= left) & (x < left + columns))[:, None, :]
    erased = fits.any(1) & (jax.random.uniform(chance_key, (count,)) < probability)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where((inside & erased[:, None, None])[..., None], noise, images)
