"""Every count of work, in multiply-adds (arXiv 2112.07658; papers call it FLOPs).

Patch embedding, blocks, heads, and what a rule computes of its own. Norms, softmax, GELU, means over patches, sorting
and matching do not count, as in the papers.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from avit_jax.gated.gates import Choice
from avit_jax.gated.work import layer_macs, published_macs
from avit_jax.model.config import AViTConfig
from avit_jax.model.output import AViTOutput, GatedOutput
from avit_jax.reduction.groups import Place, Reduction


@dataclasses.dataclass(frozen=True)
class Executed:
    """What an execution did for a batch of images."""

    slots: int  # tokens times layers, over all images, without padding
    gmacs: float  # 10^9 multiply-adds for each image, padding included


def block_macs(
    active: Float[Array | np.ndarray, "..."], embed_dim: int, mlp_dim: int
) -> Float[Array | np.ndarray, "..."]:
    """Multiply-adds of one block with n active tokens: n * (4 d^2 + 2 d m) linear, 2 n^2 d in attention."""
    return active * (4 * embed_dim**2 + 2 * embed_dim * mlp_dim) + 2 * active**2 * embed_dim


def last_block_macs(
    active: Float[Array | np.ndarray, "..."], num_read: int, embed_dim: int, mlp_dim: int
) -> Float[Array | np.ndarray, "..."]:
    """Multiply-adds of the last block if only num_read tokens are read; the active ones serve as keys and values."""
    keys_and_values = active * 2 * embed_dim**2
    read = 2 * embed_dim**2 + 2 * embed_dim * mlp_dim + 2 * active * embed_dim
    return keys_and_values + num_read * read * (active > 0)


def reducing_block_macs(
    entering: int, leaving: int, embed_dim: int, mlp_dim: int, place: Place = "before the MLP"
) -> int:
    """Multiply-adds of a block that merges or drops tokens at a place; what follows only computes those that leave."""
    if place == "before the layer":
        entering = leaving
    mixing = leaving if place == "before the values" else entering  # tokens with a value and an output of attention
    queries_and_keys = entering * 2 * embed_dim**2 + entering**2 * embed_dim
    values_and_output = mixing * 2 * embed_dim**2 + mixing**2 * embed_dim
    return queries_and_keys + values_and_output + leaving * 2 * embed_dim * mlp_dim


def embedding_macs(config: AViTConfig) -> int:
    """Multiply-adds of the patch embedding of one image."""
    patches = config.num_tokens - config.num_special
    return patches * config.patch_size**2 * config.in_channels * config.embed_dim


def head_macs(config: AViTConfig) -> int:
    """Multiply-adds of the heads for one image."""
    return (1 + config.distilled) * config.head_inputs * config.num_classes


def image_gmacs(
    config: AViTConfig, token_depth: Int[Array, "b n"], *, short_last_layer: bool = False
) -> Float[Array, " b"]:
    """10^9 multiply-adds of each image by the model's rule, without padding.

    token_depth: layers that computed each token, special tokens first, as in AViTOutput. With a halting rule every
    block counts its active tokens. With a reduction rule all images cost the same, whatever their depths.
    short_last_layer: the last layer computes only the tokens that the logits read, if these are the first ones. Raises
    ValueError for a model with gates, whose work does not follow from depths.
    """
    if config.gates is not None:
        raise ValueError("the work of a model with gates does not follow from depths: use work.output_gmacs")
    if config.reduction is not None:
        return jnp.full(len(token_depth), shrinking_gmacs(config, short_last_layer=short_last_layer))
    macs = _macs_of_depths(config, token_depth, short_last_layer and config.pool == "token")
    if config.halting is not None:
        macs = macs + config.halting.extra_macs(config, token_depth)
    return macs / 1e9


def output_gmacs(
    config: AViTConfig, output: AViTOutput, *, short_last_layer: bool = False
) -> Float[Array | np.ndarray, " b"]:
    """10^9 multiply-adds of each image by the model's rule: image_gmacs, or from the gates if the model has them."""
    if config.gates is None:
        return image_gmacs(config, output.token_depth, short_last_layer=short_last_layer)
    layers = layer_macs(config, _choice(output), short_last_layer=short_last_layer)
    return (layers.sum(0) + embedding_macs(config) + head_macs(config)) / 1e9


def published_gmacs(config: AViTConfig, output: AViTOutput) -> Float[Array, " b"]:
    """The work of each image of a model with gates as its authors' table counts it, for comparison only.

    Raises ValueError for the output of a model without gates.
    """
    if not isinstance(output, GatedOutput):
        raise ValueError("published_gmacs counts the work of gates and this output has none: take output_gmacs")
    return (published_macs(config, _choice(output)).sum(0) + embedding_macs(config) + head_macs(config)) / 1e9


def _choice(output: AViTOutput) -> Choice:
    assert isinstance(output, GatedOutput)
    return Choice(*map(jnp.asarray, (output.token_gates, output.head_gates, output.sublayer_gates)))


def whole_gmacs(config: AViTConfig) -> float:
    """10^9 multiply-adds of an image in the same architecture without a rule: every layer computes every token."""
    return float((_macs_of_depths(config, _full_depth(config)) / 1e9)[0])


def masked_gmacs(config: AViTConfig) -> float:
    """10^9 multiply-adds of an image in masked execution: every token in every layer, and the rule's own work."""
    if config.gates is not None:
        everything = (config.num_tokens, config.num_heads, 2)
        choice = Choice(*(jnp.ones((config.depth, 1, count)) for count in everything))
        return float(layer_macs(config, choice).sum() + embedding_macs(config) + head_macs(config)) / 1e9
    return float(image_gmacs(config, _full_depth(config))[0])


def _full_depth(config: AViTConfig) -> Int[Array, "1 n"]:
    return jnp.full((1, config.num_tokens), config.depth, jnp.int32)


def _macs_of_depths(
    config: AViTConfig, token_depth: Int[Array, "b n"], short_last_layer: bool = False
) -> Float[Array, " b"]:
    layers = jnp.arange(1, config.depth + 1)
    active = (token_depth[:, :, None] >= layers).sum(1).astype(jnp.float32)
    blocks = block_macs(active, config.embed_dim, config.mlp_dim)
    if short_last_layer:
        last = last_block_macs(active[:, -1], config.num_outputs, config.embed_dim, config.mlp_dim)
        blocks = jnp.concatenate([blocks[:, :-1], last[:, None]], axis=1)
    return blocks.sum(-1) + embedding_macs(config) + head_macs(config)


def shortens_last_layer(config: AViTConfig, rule: Reduction | None) -> bool:
    """Whether the last layer can compute only the tokens that the logits read.

    It cannot if the heads read a mean over tokens, or if the layer reduces tokens before its values.
    """
    if config.pool != "token":
        return False
    last = config.depth - 1
    return rule is None or rule.place != "before the values" or last not in rule.acts_in(config)


def shrinking_gmacs(config: AViTConfig, *, short_last_layer: bool) -> float:
    """10^9 multiply-adds of an image under the model's reduction rule, as papers count: predictors, but not matching.

    short_last_layer: the last layer computes only the tokens that the logits read, if that is possible. Raises
    ValueError if the rule does not fit the model.
    """
    rule = config.reduction
    counts = (config.num_tokens,) * config.depth if rule is None else rule.counts(config)
    entering = (config.num_tokens, *counts[:-1])
    d, m, place = config.embed_dim, config.mlp_dim, "before the MLP" if rule is None else rule.place
    blocks = [reducing_block_macs(n, left, d, m, place) for n, left in zip(entering, counts, strict=True)]
    if short_last_layer and shortens_last_layer(config, rule):
        keys = counts[-1] if place == "before the layer" else entering[-1]
        blocks[-1] = int(last_block_macs(np.array([keys], np.float64), config.num_outputs, d, m)[0])
    own = 0 if rule is None else rule.extra_macs(config)
    return (sum(blocks) + own + embedding_macs(config) + head_macs(config)) / 1e9


def executed_shrinking_gmacs(config: AViTConfig) -> float:
    """10^9 multiply-adds of an image in shrinking execution: a short last layer, and what papers leave out."""
    rule = config.reduction
    matching = () if rule is None else rule.matching_macs(config)
    if shortens_last_layer(config, rule) and rule is not None and rule.place != "before the layer":
        matching = matching[:-1]  # the short last layer reduces nothing
    mixing = 0
    if rule is not None and rule.place == "before the values":
        # Attention.mixed weights the values of all tokens that enter, papers those that leave.
        counts = rule.counts(config)
        mixing = config.embed_dim * sum(n**2 - k**2 for n, k in zip((config.num_tokens, *counts), counts, strict=False))
    return shrinking_gmacs(config, short_last_layer=True) + (sum(matching) + mixing) / 1e9


def packed_gmacs(
    config: AViTConfig,
    tokens: Int[np.ndarray, "batches l groups"],
    group_size: int,
    images: int,
    *,
    image_exit: bool = True,
) -> float:
    """10^9 multiply-adds that packed or planned execution performs for each of `images` images.

    tokens: the capacity with which each group of group_size images runs (padded_loads, PlannedPlan.capacities).
    image_exit: without it the last layer computes every token.
    """
    rule, padded = config.halting, tokens.astype(np.float64)
    first = np.asarray(block_macs(padded[:, :-1], config.embed_dim, config.mlp_dim)).sum()
    if not image_exit or config.pool != "token" or (rule is not None and rule.reads_last_layer):
        last = block_macs(padded[:, -1], config.embed_dim, config.mlp_dim)
    else:
        last = last_block_macs(padded[:, -1], config.num_outputs, config.embed_dim, config.mlp_dim)
    blocks = first + np.asarray(last).sum()
    # A rule's own work is not packed: it looks at every image after every layer.
    own = 0.0 if rule is None else float(rule.extra_macs(config, _full_depth(config))[0])
    return float(blocks * group_size / images + embedding_macs(config) + head_macs(config) + own) / 1e9


def gated_packed_gmacs(
    config: AViTConfig,
    attention: Int[np.ndarray, "devices l groups"],
    mlp: Int[np.ndarray, "devices l groups"],
    group_size: int,
    images: int,
) -> float:
    """10^9 multiply-adds that packed execution of a model with gates performs for each of `images` images.

    attention, mlp: the capacity with which each group of group_size images runs the sublayer. Heads are masks, which
    save nothing.
    """
    d, n = config.embed_dim, attention.astype(np.float64)
    blocks = (4 * n * d**2 + 2 * n**2 * d).sum() + 2 * d * config.mlp_dim * float(mlp.sum())
    nothing = Choice(*(jnp.zeros((config.depth, 1, count)) for count in (config.num_tokens, config.num_heads, 2)))
    gates = float(layer_macs(config, nothing).sum())
    return float(blocks * group_size / images + embedding_macs(config) + head_macs(config) + gates) / 1e9
