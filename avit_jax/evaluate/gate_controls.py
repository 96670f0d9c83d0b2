"""Does a model with gates look at the image? Its figures beside those of random and of fixed gates."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from avit_jax.data.pipeline import evaluation_images
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.rows import as_bits
from avit_jax.execution import gated
from avit_jax.execution.work import output_gmacs, published_gmacs
from avit_jax.gated.gates import Choice
from avit_jax.gated.work import layer_macs
from avit_jax.model.output import GatedOutput
from avit_jax.model.vit import AViT

_HALVINGS = 40  # of the search for a threshold


def image_gates(model: AViT, split: Split, batch_size: int = 200) -> Choice:
    """The gates of every image of a split in memory, 1 or 0; [l b n], [l b h] and [l b 2].

    Raises ValueError for a model without gates, and for a split without images.
    """
    found = []
    for pixels, count in _batches(model, split, batch_size):
        output = _run(*nnx.split(model), pixels, None)
        gates = output.token_gates, output.head_gates, output.sublayer_gates
        found.append([np.asarray(gate)[:, :count] for gate in gates])
    return Choice(*(jnp.asarray(np.concatenate(parts, axis=1)) for parts in zip(*found, strict=True)))


def gate_rates(gates: Choice) -> Choice:
    """How often each gate is on, 0..1; [l 1 n], [l 1 h] and [l 1 2]. gates: of image_gates."""
    return jax.tree.map(lambda gate: gate.mean(1, keepdims=True), gates)


def gates_of_other_images(gates: Choice) -> Choice:
    """Every image with the gates of the image before it: the same policy and work, and nothing to do with the image."""
    return jax.tree.map(lambda gate: jnp.roll(gate, 1, axis=1), gates)


def random_gates(rates: Choice, num_special: int, images: int, seed: int = 0) -> Choice:
    """Gates that are on by chance, for each image anew, with the mean rate of their layer.

    rates: of gate_rates. Attention and MLP have a rate each. Special tokens are always on.
    """
    depth = rates.tokens.shape[0]
    shares = {
        "tokens": rates.tokens[..., num_special:].mean(-1, keepdims=True),
        "heads": rates.heads.mean(-1, keepdims=True),
        "sublayers": rates.sublayers,
    }
    drawn = {}
    for at, (name, share) in enumerate(shares.items()):
        width = getattr(rates, name).shape[-1]
        key = jax.random.fold_in(jax.random.key(seed), at)
        drawn[name] = jax.random.bernoulli(key, share, (depth, images, width)).astype(jnp.float32)
    drawn["tokens"] = drawn["tokens"].at[..., :num_special].set(1)
    return Choice(**drawn)


def fixed_gates(rates: Choice, model: AViT, gmacs: float) -> Choice:
    """The same gates for every image: those that are on most often, as many as this work allows.

    rates: of gate_rates. gmacs: that the layers of an image may cost, gates included, in 10^9 multiply-adds, with a
    short last layer. A gate is on if its rate is above a threshold, which is one number for the whole model.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        costs = float(layer_macs(model.config, _above(rates, middle), short_last_layer=True).sum()) / 1e9
        low, high = (middle, high) if costs > gmacs else (low, middle)
    return _above(rates, high)


def _above(rates: Choice, threshold: float) -> Choice:
    # A gate that is always on stays on at every threshold.
    return jax.tree.map(lambda rate: ((rate > threshold) | (rate >= 1)).astype(jnp.float32), rates)


def gate_figures(
    model: AViT, split: Split, forced: Choice | None = None, *, seed: int | None = None, batch_size: int = 200
) -> dict[str, Any]:
    """Top-1, work and use of a model with gates on a split in memory, each image counted once.

    forced: the gates of all images together, [l 1 ..], or of each one, [l b ..]; None: the model's own. seed: with it,
    `forced` are rates, from which each image draws its gates (random_gates). "correct" has the images that are answered
    rightly (correct_images reads it). "gmacs" are true multiply-adds with a short last layer, "published_gmacs" those
    of the authors' table. "use" has the mean share of gates that are on, "disagreement" how likely two images differ in
    a gate, 2 p (1 - p) for a gate with rate p, mean over gates: 0 for fixed ones. Raises ValueError for a model without
    gates, and for a split without images.
    """
    config, found = model.config, []
    first = min(1, config.depth - 1)  # from here on heads and sublayers have gates
    for number, (pixels, count) in enumerate(_batches(model, split, batch_size)):
        choice = forced
        if forced is not None and seed is not None:
            choice = random_gates(forced, config.num_special, batch_size, seed + 1000 * number)
        elif forced is not None:
            choice = _of_batch(forced, number * batch_size, batch_size, len(split))
        output = _run(*nnx.split(model), pixels, choice)
        parts = {
            "logits": output.logits,
            "gmacs": output_gmacs(config, output, short_last_layer=True),
            "published": published_gmacs(config, output),
            "tokens": jnp.moveaxis(output.token_gates[..., config.num_special :], 1, 0),
            "heads": jnp.moveaxis(output.head_gates[first:], 1, 0),
            "sublayers": jnp.moveaxis(output.sublayer_gates[first:], 1, 0),
        }
        found.append({name: np.asarray(values)[:count] for name, values in parts.items()})
    of_images = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    correct = of_images["logits"].argmax(1) == split.labels
    rates = {name: of_images[name].mean(0, dtype=np.float64) for name in ("tokens", "heads", "sublayers")}
    return {
        "images": len(split),
        "top1": float(correct.mean()),
        "correct": as_bits(correct),
        "gmacs": float(of_images["gmacs"].mean(dtype=np.float64)),
        "gmacs_deviation": float(of_images["gmacs"].std()),
        "published_gmacs": float(of_images["published"].mean(dtype=np.float64)),
        "use": {name: float(rate.mean()) for name, rate in rates.items()},
        "use_by_layer": {name: rate.mean(1).tolist() for name, rate in rates.items()},
        "disagreement": {name: float((2 * rate * (1 - rate)).mean()) for name, rate in rates.items()},
    }


def _of_batch(gates: Choice, start: int, batch_size: int, images: int) -> Choice:
    """The gates of a batch; those of the last image stand for the images that fill it up."""
    chosen = np.minimum(np.arange(start, start + batch_size), images - 1)
    return jax.tree.map(lambda gate: jnp.take(gate, chosen if gate.shape[1] > 1 else np.zeros_like(chosen), 1), gates)


def _batches(model: AViT, split: Split, batch_size: int) -> Any:
    """The images of a split, normalised and filled up to whole batches, with the number that counts."""
    if model.config.gates is None:
        raise ValueError(f"the model has no gates, its rule is {model.config.rule}: give a model whose rule is Gates")
    if not len(split):
        raise ValueError("the split has no images: give one with images")
    for start in range(0, len(split), batch_size):
        chosen = range(start, min(start + batch_size, len(split)))
        pixels = np.asarray(normalize(evaluation_images(split, chosen, model.config), model.config))
        yield np.pad(pixels, ((0, batch_size - len(pixels)), (0, 0), (0, 0), (0, 0))), len(pixels)


@functools.partial(jax.jit, static_argnums=0)
def _run(
    graphdef: nnx.GraphDef, params: nnx.State, images: Float[Array | np.ndarray, "b h w c"], choice: Choice | None
) -> GatedOutput:
    return gated.forward(nnx.merge(graphdef, params), jnp.asarray(images), forced=choice)[0]
