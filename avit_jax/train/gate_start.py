"""The start of an A-ViT's gate: channel 0 of a static ViT is freed, then says how much each patch is attended to."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from avit_jax.halting.avit import AViTGate
from avit_jax.model.check_images import check_images
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.settings import Settings, setting
from avit_jax.train.importance import fit_importance

FEATURES = ("hidden", "pixels")


@dataclasses.dataclass(frozen=True)
class GateStartSettings(Settings):
    """config.gate_start. Raises ValueError for a value out of range."""

    section = "gate_start"

    images: int = setting(
        0, "Training images from which the gate of init_from is started; 0: channel 0 stays as it is.", least=0
    )
    target_depth: float = setting(0.0, "Mean token depth that the gate starts at, in layers.")
    deviation: float = setting(0.0, "Standard deviation of that depth between the patches, in layers.")
    features: str = setting(
        "pixels", "What the gate is fitted by: pixels and position, or hidden units too.", choices=FEATURES
    )


# Parameters that write into the residual stream, with its channels on their last axis.
_WRITERS = ("patch_embed.proj", "cls_token", "dist_token", "reg_token", "pos_embed", "attn.proj", "mlp.fc2")


def free_channel_0(model: AViT) -> None:
    """Make channel 0 of every token zero in every layer, in place; a plain ViT's logits stay what they were.

    Every LayerNorm subtracts the mean over a token's channels, so x and x - x[..., 0] are the same to every reader.
    Each writer into the residual stream may therefore subtract its own channel 0 from all its channels.
    """
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if any(writer in ".".join(map(str, path)) for writer in _WRITERS):
            param[...] = param[...] - param[...][..., :1]


def start_gate(
    model: AViT,
    images: Float[Array | np.ndarray, "b h w c"],
    *,
    target_depth: float,
    deviation: float | None = None,
    slope: float = 2.0,
    features: str = "hidden",
) -> None:
    """Make the tokens of any static ViT halt, the less attended ones earlier, without training; in place.

        from pathlib import Path
        from PIL import Image
        import avit_jax

        # An A-ViT preset has a gate. Without one: avit_jax.load("vit.pth", gate_scale=10.0, gate_center=30.0)
        model = avit_jax.load("deit_tiny.pth", "avit_tiny_patch16_224")
        pictures = [Image.open(path) for path in sorted(Path("pictures").glob("*.jpg"))[:300]]
        images = avit_jax.preprocess(pictures, model.config)
        avit_jax.start_gate(model, images, target_depth=9.0)
        print(model(images[:64]).token_depth.mean())  # about 9 layers of 12
        avit_jax.save(model, "deit_tiny_halting")
        fast = avit_jax.compile_packed(model, batch_size=64)

    images: normalised as the model takes them; a few hundred are enough. target_depth: mean token depth on `images`, in
    layers. The lower it is, the more accuracy is lost; fine-tuning from here wins most of it back. deviation: standard
    deviation between patches, in layers; None: half of the layers (docs/results.md). slope: see below. features:
    "hidden" or "pixels".

    A patch is important if the class (and distillation) token attends to it, or all patches do if the pool reads no
    class token: the mean over heads and the last two thirds of the layers, as its rank among all patches of `images`.
    Ridge regression fits this by the pixels and the position of the patch; then the hidden units of the MLP of layer 1
    fit what is left, then those of layer 2, for a quarter of the layers. With z the fit so far, standardised,

        logit(halting score in layer l) = slope * (l - t),  t = centre + deviation * z  (layers)

    is written into the freed channel 0, without a new parameter, so that a token stops at about layer t. centre is
    chosen so that the mean token depth is target_depth; tokens before the patches go through all layers. With
    features="pixels" only pixels and position are fitted, to the attention itself over all layers: depths then differ
    mostly between positions, and accuracy falls sooner (docs/halting.md). Raises ValueError for a model that never
    halts, for a target depth that is not between 1 and L, for other features, and for images that the model does not
    take, or none.
    """
    config = model.config
    if config.gate_scale is None or config.gate_center is None or not isinstance(config.halting, AViTGate):
        raise ValueError(
            "a model that never halts has no gate to start: give it gate_scale and gate_center "
            "(such as 10.0 and 30.0) when it is loaded or created"
        )
    if not 1 < target_depth < config.depth:
        raise ValueError(
            f"target_depth (config.gate_start) is {target_depth}: it must lie between 1 and the {config.depth} layers"
        )
    if deviation is None:
        deviation = config.depth / 2
    if not (deviation >= 0 and slope > 0 and np.isfinite(deviation) and np.isfinite(slope)):
        raise ValueError(f"deviation is {deviation} and slope {slope}: give a deviation of at least 0, a slope above 0")
    if features not in FEATURES:
        raise ValueError(f"features (config.gate_start) is {features!r}: choose {' or '.join(FEATURES)}")
    check_images(images, config)
    images = np.asarray(images)
    if not len(images) or not np.isfinite(images).all():
        raise ValueError("the gate starts from images: give at least one, without NaN or infinity in it")
    fit = fit_importance(model, images, units=max(1, config.depth // 4) if features == "hidden" else 0)
    scale = deviation / max(fit.values[-1].std(), np.finfo(np.float32).tiny)
    mean = fit.values[-1].mean()
    centre = _centre([scale * (value - mean) for value in fit.values], slope, config, target_depth)
    # Special tokens get a score of at most halt_epsilon / 2 in the last layer but one, so they weigh what the static
    # model reads. Hidden units move their score too, so they are given room for the least value that was seen.
    last = config.depth - 1 - (np.log(config.halt_epsilon / 2) - np.log1p(-config.halt_epsilon / 2)) / slope
    stops = np.concatenate([last - scale * fit.least_special, centre + scale * (fit.positions - mean)])
    free_channel_0(model)
    # The same number goes into all channels. The part that is the same for all images goes where float32 is kept.
    model.pos_embed[...] += jnp.asarray((config.gate_center - slope * stops) / config.gate_scale, jnp.float32)[:, None]
    per_layer = slope / config.gate_scale
    model.patch_embed.proj.kernel[...] -= jnp.asarray(per_layer * scale * fit.pixels, jnp.float32)[:, None]
    fc2 = model.blocks.mlp.fc2
    assert fc2.bias is not None
    fc2.bias[...] += per_layer
    for layer, (weights, offset) in enumerate(fit.units):
        written = jnp.asarray(per_layer * scale * weights, jnp.float32)[:, None]
        fc2.kernel[...] = fc2.kernel[...].at[layer].add(-written)
        fc2.bias[...] = fc2.bias[...].at[layer].add(-per_layer * scale * offset)


def _centre(
    offsets: Sequence[Float[np.ndarray, "b p"]], slope: float, model_config: AViTConfig, target_depth: float
) -> float:
    """The centre for which patches that stop `offsets` layers after it have a mean depth nearest to target_depth.

    offsets: as they are known before layer 1, after it, and so on; the last ones hold for the layers that follow.
    """
    wanted = target_depth * model_config.num_tokens - model_config.depth * model_config.num_special

    def depth_of_patches(centre: float) -> float:
        cumulative, depth = np.zeros_like(offsets[0]), np.ones_like(offsets[0])
        for layer in range(1, model_config.depth):
            stops = centre + offsets[min(layer, len(offsets) - 1)]
            cumulative = cumulative + 1 / (1 + np.exp(-slope * (layer - stops)))
            depth += cumulative < 1 - model_config.halt_epsilon
        return float(depth.mean(0).sum())

    low, high = -float(model_config.depth), 2.0 * model_config.depth
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if depth_of_patches(middle) > wanted else (middle, high)
    return low
