"""Shrinking execution: if a rule leaves every image the same number of tokens, arrays simply get shorter.

Shapes are known ahead, so the same program runs in training and at inference, without a mask. A layer that reduces its
tokens is compiled on its own; the layers between two such layers are one lax.scan.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from avit_jax.execution.compiled import CompiledForward
from avit_jax.execution.work import Executed, executed_shrinking_gmacs, shortens_last_layer
from avit_jax.model.layers import Block, checkpointed, split_layers
from avit_jax.model.rule import Keys
from avit_jax.model.seen import Facts, Seen, of_attention
from avit_jax.model.vit import AViT, AViTOutput
from avit_jax.reduction.groups import Groups, Reduction, reduce


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduced:
    """What became of an image's N tokens: the slot that each of them is in after every layer."""

    slots: tuple[Int[Array, "b n"], ...]  # for each layer; the layer's number of tokens stands for dropped
    sizes: tuple[Float[Array, "b _"], ...]  # for each layer: patches that each of its tokens stands for


def forward(
    model: AViT,
    images: Shaped[Array | np.ndarray, "..."],
    rule: Reduction | None,
    *,
    key: PRNGKeyArray | None = None,
    short_last_layer: bool = False,
    positions: Int[Array, "b p 2"] | None = None,
) -> AViTOutput:
    """The model's output under a reduction rule (None: no rule), for images that check_images accepts.

    key: draws dropout and stochastic depth as in masked execution; None: neither. short_last_layer: if the logits only
    read the first tokens, the last layer computes only these; the result is the same. positions: where patches are cut,
    without a rule perhaps fewer than the grid has; None: on the grid.

    token_depth counts the layers in which a token led a slot of its own: a token that is merged stops at the layer that
    merges it, and the token that it joins goes on. ponder_cost is token_depth + 1 and halting_scores are 0. A mean over
    patches is the mean over all patches of the image, each with the value of the token that stands for it, so tokens
    are weighted by size.

    Raises ValueError if the rule does not fit the model or the number of patches.
    """
    return run(model, images, rule, key=key, short_last_layer=short_last_layer, positions=positions)[0]


def follow_tokens(model: AViT, images: Shaped[Array | np.ndarray, "..."], rule: Reduction) -> Reduced:
    """Which tokens a rule merges or drops, layer by layer: for pictures of merged tokens, and for tests."""
    return run(model, images, rule)[1]


def run(
    model: AViT,
    images: Shaped[Array | np.ndarray, "..."],
    rule: Reduction | None,
    *,
    key: PRNGKeyArray | None = None,
    short_last_layer: bool = False,
    positions: Int[Array, "b p 2"] | None = None,
) -> tuple[AViTOutput, Reduced, Float[Array, "heads b f"]]:
    """The results of `forward` and `follow_tokens`, and what each head reads; arguments as for `forward`."""
    graphdef, params = nnx.split(model)
    grid = model.config.num_tokens - model.config.num_special
    if rule is not None and positions is not None and positions.shape[1] != grid:
        raise ValueError(
            f"the rule {rule.name} fixes the number of tokens for {grid} patches and there are {positions.shape[1]}: "
            "give as many, or a model without this rule"
        )
    return _program(graphdef, rule, short_last_layer, params, jnp.asarray(images), key, positions)


# Jitted, because outside jit each operation would be compiled for each of a dozen shapes.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(
    graphdef: nnx.GraphDef,
    rule: Reduction | None,
    short_last_layer: bool,
    params: Any,
    images: Float[Array, "b h w c"],
    key: PRNGKeyArray | None,
    positions: Int[Array, "b p 2"] | None,
) -> tuple[AViTOutput, Reduced, Float[Array, "heads b f"]]:
    model = nnx.merge(graphdef, params)
    config = model.config
    acts = () if rule is None else rule.acts_in(config)
    short = short_last_layer and shortens_last_layer(config, rule) and key is None
    layers = _Layers(model, rule, key, None if rule is None else model.draw(rule, images, key))

    x = model.embed(images, key, positions)
    count, num_tokens, _ = x.shape
    size = jnp.ones((count, num_tokens))
    slot = jnp.broadcast_to(jnp.arange(num_tokens)[None], (count, num_tokens))
    leads = jnp.ones((count, num_tokens), bool)
    token_depth = jnp.zeros((count, num_tokens), jnp.int32)
    slots, sizes = [], []
    parts = stretches(config.depth, acts, short)
    stacked = split_layers(nnx.state(model.blocks), [stop - start for start, stop in parts])
    for (start, stop), weights in zip(parts, stacked, strict=True):
        if rule is not None and rule.place == "before the layer" and start in acts:
            x, groups = layers.reduced(rule, start, x, size)
            if groups is not None:
                size, slot, leads = groups.size, *_followed(groups, slot, leads)
        # While nothing has been reduced, all sizes are 1.
        mass = size if rule is not None and rule.proportional and size.shape[1] < num_tokens else None
        token_depth += (stop - start) * leads.astype(jnp.int32)
        if short and stop == config.depth:
            x = layers.short_last(x, mass, weights)
        elif rule is not None and rule.place != "before the layer" and start in acts:
            x, groups = layers.reducing(rule, start, x, size, mass, weights)
            if groups is not None:
                size, slot, leads = groups.size, *_followed(groups, slot, leads)
        else:
            x = layers.plain(start, stop, x, mass, weights)
        slots += [slot] * (stop - start)
        sizes += [size] * (stop - start)

    scores = jnp.zeros((config.depth, count, num_tokens))
    weight = size if size.shape[1] < num_tokens else None
    features = model.pooled(x[:, : config.num_outputs], weight)
    logits = model.classified(features)
    output = AViTOutput(logits.mean(0), logits, token_depth, token_depth + 1.0, scores)
    return output, Reduced(tuple(slots), tuple(sizes)), jnp.stack(features)


def stretches(depth: int, acts: tuple[int, ...], short_last_layer: bool) -> list[tuple[int, int]]:
    """Layers as (start, stop): a layer that reduces its tokens is alone, those between two such layers are together.

    acts: the layers that reduce. short_last_layer: the last layer is alone too.
    """
    alone = {*acts, depth - 1} if short_last_layer else set(acts)
    ends = sorted({0, depth, *alone, *(layer + 1 for layer in alone)})
    return list(itertools.pairwise(ends))


def _followed(groups: Groups, slot: Array, leads: Array) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """The slots of the original tokens after a reduction, and which of them still lead one."""
    count, tokens = groups.leader.shape[1], groups.into.shape[1]
    leader = jnp.take_along_axis(groups.leader, jnp.minimum(groups.into, count - 1), axis=1)
    stays = (groups.into < count) & (leader == jnp.arange(tokens)[None])
    # One more place, for dropped tokens.
    into = jnp.pad(groups.into, ((0, 0), (0, 1)), constant_values=count)
    stays = jnp.pad(stays, ((0, 0), (0, 1)))
    return jnp.take_along_axis(into, slot, axis=1), leads & jnp.take_along_axis(stays, slot, axis=1)


class _Layers:
    """The layers of a model, run as they are, shortened, or with a reduction between attention and MLP."""

    def __init__(self, model: AViT, rule: Reduction | None, key: PRNGKeyArray | None, draw: Keys | None) -> None:
        self.config = model.config
        self.rule_module = model.rule_module
        self.draw = draw
        self.graphdef = nnx.graphdef(model.blocks)
        self.key = key
        self.rates = jnp.linspace(0, self.config.drop_path_rate, self.config.depth)

    def _layer(self, index: Any) -> tuple[Array | None, PRNGKeyArray | None]:
        """The rate of stochastic depth in a layer, and its random key: the same as in masked execution."""
        if self.key is None:
            return None, None
        rate = self.rates[index] if self.config.drop_path_rate else None
        return rate, jax.random.fold_in(self.key, index)

    def plain(self, start: int, stop: int, x: Array, mass: Array | None, weights: Any) -> Array:
        """Layers that keep all their tokens."""

        def layer(x: Array, inputs: Any) -> tuple[Array, None]:
            params, index = inputs
            return nnx.merge(self.graphdef, params)(x, mass, *self._layer(index)), None

        return jax.lax.scan(checkpointed(layer, self.config), x, (weights, jnp.arange(start, stop)))[0]

    def reduced(self, rule: Reduction, index: int, x: Array, size: Array) -> tuple[Array, Groups | None]:
        """The tokens that enter a layer, reduced before it, and the groups by which they were."""
        groups = self._groups(rule, index, {"before": x, "size": size})
        return x if groups is None else reduce(x, groups), groups

    def reducing(
        self, rule: Reduction, index: int, x: Array, size: Array, mass: Array | None, weights: Any
    ) -> tuple[Array, Groups | None]:
        """A layer that reduces its tokens, and the groups by which it did."""
        reads = of_attention(rule.reads)

        def layer(x: Array, size: Array, mass: Array | None, params: Any) -> tuple[Array, Groups | None]:
            block: Block = nnx.merge(self.graphdef, params)
            known = {"before": x, "size": size}
            if rule.place == "before the values":
                y, groups = block.attend_reduced(
                    x, mass, *self._layer(index), reads, lambda facts: self._groups(rule, index, known | facts)
                )
            else:
                y, facts = block.attend(x, mass, *self._layer(index), reads)
                groups = self._groups(rule, index, {"tokens": y, **known, **facts})
                y = y if groups is None else reduce(y, groups)
            return block.transform(y, *self._layer(index)), groups

        if self.config.remat:
            layer = jax.checkpoint(layer)
        return layer(x, size, mass, jax.tree.map(lambda p: p[0], weights))

    def _groups(self, rule: Reduction, index: int, known: Facts) -> Groups | None:
        seen = Seen(**{name: value for name, value in known.items() if name in rule.reads})
        draw = None if self.draw is None else jax.vmap(jax.random.fold_in, (0, None))(self.draw, index)
        module = self.rule_module
        return rule.groups(seen, layer=index, num_special=self.config.num_special, draw=draw, module=module)

    def short_last(self, x: Array, mass: Array | None, weights: Any) -> Array:
        """The last layer for only the tokens that the logits read; merging the others would change nothing."""
        block: Block = nnx.merge(self.graphdef, jax.tree.map(lambda p: p[0], weights))
        return block.read(x, mass, self.config.num_outputs)


class ShrinkingModel(CompiledForward):
    """Shrinking execution of up to `batch_size` images; the last layer computes only what the logits read."""

    execution = "shrinking"

    def __init__(self, model: AViT, batch_size: int, mesh: Mesh | None = None) -> None:
        super().__init__(model, batch_size, _to_the_logits, mesh)

    def executed(self, token_depth: Int[np.ndarray, "b n"], images: int, output: AViTOutput | None = None) -> Executed:
        """The same for every image, whatever the depths: the tokens that each layer reads, and the rule's own work."""
        rule, config = self.config.reduction, self.config
        counts = (config.num_tokens,) * config.depth if rule is None else rule.counts(config)
        first = rule is not None and rule.place == "before the layer"
        slots = sum(counts if first else (config.num_tokens, *counts[:-1]))
        return Executed(images * slots, executed_shrinking_gmacs(config))


def _to_the_logits(model: AViT, images: Array) -> AViTOutput:
    return forward(model, images, model.config.reduction, short_last_layer=True)
