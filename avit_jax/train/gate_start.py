"""The start of an A-ViT's gate: channel 0 of a static ViT is freed, then says how much each patch is attended to."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from avit_jax.halting.avit import AViTGate
from avit_jax.model.check_images import check_images
from avit_jax.model.config import AViTConfig
from avit_jax.model.vit import AViT
from avit_jax.runtime.settings import Settings, setting


@dataclasses.dataclass(frozen=True)
class GateStartSettings(Settings):
    """config.gate_start. Raises ValueError for a value out of range."""

    section = "gate_start"

    images: int = setting(
        0, "Training images from which the gate of init_from is started; 0: channel 0 stays as it is.", least=0
    )
    target_depth: float = setting(0.0, "Mean token depth that the gate starts at, in layers.")
    deviation: float = setting(0.0, "Standard deviation of that depth between the patches, in layers.")


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
    deviation between patches, in layers; None: a sixth of the layers. slope: see below.

    The attention that each patch gets from the class (and distillation) token, or from all patches if the pool reads no
    class token, is averaged over layers and heads. Ridge regression on `images` fits it by the patch's pixels and
    position. With z the standardised fit,

        logit(halting score in layer l) = slope * (l - t),  t = centre + deviation * z  (layers)

    is written into the freed channel 0, without a new parameter, so that a token stops at about layer t. centre is
    chosen so that the mean token depth is target_depth; tokens before the patches go through all layers. Raises
    ValueError for a model that never halts, for a target depth that is not between 1 and L, and for images that the
    model does not take, or none.
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
        deviation = config.depth / 6
    if not (deviation >= 0 and slope > 0 and np.isfinite(deviation) and np.isfinite(slope)):
        raise ValueError(f"deviation is {deviation} and slope {slope}: give a deviation of at least 0, a slope above 0")
    check_images(images, config)
    images = np.asarray(images)
    if not len(images) or not np.isfinite(images).all():
        raise ValueError("the gate starts from images: give at least one, without NaN or infinity in it")
    patches = np.asarray(model.patch_embed.patches(jnp.asarray(images)), np.float64)
    pixels, positions = _fit(patches, _attention_to_patches(model, images))
    fit = patches @ pixels + positions
    scale = deviation / max(fit.std(), np.finfo(np.float32).tiny)
    pixels, positions = scale * pixels, scale * (positions - fit.mean())
    centre = _centre(patches @ pixels + positions, slope, config, target_depth)
    # Special tokens get a score of halt_epsilon / 2 in the last layer but one, so they weigh what the static model
    # reads.
    last = config.depth - 1 - (np.log(config.halt_epsilon / 2) - np.log1p(-config.halt_epsilon / 2)) / slope
    stops = np.concatenate([np.full(config.num_special, last), centre + positions])
    free_channel_0(model)
    # The same number goes into all channels. The part that is the same for all images goes where float32 is kept.
    model.pos_embed[...] += jnp.asarray((config.gate_center - slope * stops) / config.gate_scale, jnp.float32)[:, None]
    model.patch_embed.proj.kernel[...] -= jnp.asarray(slope * pixels / config.gate_scale, jnp.float32)[:, None]
    bias = model.blocks.mlp.fc2.bias
    assert bias is not None
    bias[...] += slope / config.gate_scale


def _fit(
    patches: Float[np.ndarray, "b p v"], attention: Float[np.ndarray, "b p"]
) -> tuple[Float[np.ndarray, " v"], Float[np.ndarray, " p"]]:
    """Ridge regression of the attention: a weight for every pixel of a patch, an offset for every position."""
    # Centred by position: the offset of a position fits its mean.
    centred = (patches - patches.mean(0)).reshape(-1, patches.shape[-1])
    gram = centred.T @ centred
    # Above 0, so that the matrix can be inverted for blank borders and flat images too.
    ridge = 1e-3 * np.trace(gram) / len(gram) + np.finfo(np.float32).tiny
    pixels = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (attention - attention.mean(0)).ravel())
    return pixels, attention.mean(0) - patches.mean(0) @ pixels


def _centre(offsets: Float[np.ndarray, "b p"], slope: float, model_config: AViTConfig, target_depth: float) -> float:
    """The centre for which patches that stop `offsets` layers after it have a mean depth nearest to target_depth."""
    layers = np.arange(1, model_config.depth)
    wanted = target_depth * model_config.num_tokens - model_config.depth * model_config.num_special

    def depth_of_patches(centre: float) -> float:
        scores = 1 / (1 + np.exp(-slope * (layers - (centre + offsets[..., None]))))
        goes_on = np.cumsum(scores, axis=-1) < 1 - model_config.halt_epsilon
        return (1 + goes_on.sum(-1)).mean(0).sum()

    low, high = -float(model_config.depth), 2.0 * model_config.depth
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if depth_of_patches(middle) > wanted else (middle, high)
    return low


def _looking(model_config: AViTConfig) -> slice:
    """The tokens whose attention is fitted: class and distillation token if the logits read them, else all patches."""
    first = sum(model_config.tokens_read[: model_config.num_special])  # registers, which are not read, come after them
    return slice(first) if first else slice(model_config.num_special, None)


@functools.partial(jax.jit, static_argnums=0)
def _attention_step(graphdef: nnx.GraphDef, params: Any, images: Array) -> Array:
    model = nnx.merge(graphdef, params)
    blocks, stacked = nnx.split(model.blocks)
    num_special, looking = model.config.num_special, _looking(model.config)

    def layer(x: Array, params: Any) -> tuple[Array, Array]:
        block = nnx.merge(blocks, params)
        query, key, _ = block.attn.query_key_value(block.norm1(x))
        scores = query[:, :, looking] @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        attention = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)[..., num_special:]
        return block(x), attention.mean((1, 2))

    return jax.lax.scan(layer, model.embed(images), stacked)[1].mean(0)


def _attention_to_patches(
    model: AViT, images: Float[np.ndarray, "b h w c"], batch_size: int = 100
) -> Float[np.ndarray, "b p"]:
    """The attention that patches get from the `_looking` tokens, mean over layers and heads, without halting."""
    graphdef, params = nnx.split(model)
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([np.asarray(_attention_step(graphdef, params, batch), np.float64) for batch in batches])
