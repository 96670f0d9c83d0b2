"""A model with gates, by masked execution: every layer computes everything, and what is off adds nothing."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from avit_jax.gated.gates import Choice
from avit_jax.halting.rule import State, Trace
from avit_jax.model.attention import of_channels
from avit_jax.model.layers import Block, checkpointed
from avit_jax.model.output import GatedOutput
from avit_jax.model.vit import AViT


def forward(
    model: AViT,
    images: Float[Array, "b h w c"],
    key: PRNGKeyArray | None = None,
    positions: Int[Array, "b p 2"] | None = None,
    forced: Choice | None = None,
) -> tuple[GatedOutput, Trace, State]:
    """The output of a model whose rule is Gates, the gates of all layers, and a state for the losses.

    key: given in training; it draws the noise of the gates. positions: where patches are cut; None: on the grid.
    forced: the choice of every layer, [l b ..], instead of the gates' own.
    """
    config, rule = model.config, model.config.gates
    assert rule is not None
    blocks, stacked = nnx.split(model.blocks)
    gates, maps = nnx.split(rule.maps(model))

    def layer(x: Array, inputs: Any) -> tuple[Array, Choice]:
        params, of_layer, index, choice = inputs
        block = nnx.merge(blocks, params)
        seen = block.norm1(x)
        if choice is None:
            choice = rule.choose(
                nnx.merge(gates, of_layer),
                seen.astype(jnp.float32),
                x,
                layer=index,
                num_special=config.num_special,
                key=None if key is None else jax.random.fold_in(key, index),
            )
        return gated_layer(block, x, seen, choice), choice

    inputs = stacked, maps, jnp.arange(config.depth), forced
    x, choices = jax.lax.scan(checkpointed(layer, config), model.embed(images, key, positions), inputs)
    output = gated_output(model, x, choices)
    trace = Trace({"token_gate": choices.tokens}, {"head_gate": choices.heads, "sublayer_gate": choices.sublayers})
    state = State(jnp.zeros(x.shape[:2], bool), output.token_depth, x[:, : config.num_outputs])
    return output, trace, state


def gated_layer(
    block: Block, x: Float[Array, "b n d"], seen: Float[Array, "b n d"], choice: Choice
) -> Float[Array, "b n d"]:
    """The tokens after a layer. x: as they enter. seen: after the first LayerNorm. choice: of this layer.

    y = x + s_1 t Attention(seen), x' = y + s_2 t MLP(h LN(y)), with gates t of tokens, s of sublayers, and h of heads,
    each for its channels. (Factors, not a selection: they carry the gradients of the gates.)
    """
    on, heads = choice.tokens[..., None], choice.heads
    attention, mlp = jnp.moveaxis(choice.sublayers, 1, 0)[..., None, None]
    branch = block.attn.gated(seen, jax.lax.stop_gradient(choice.tokens) > 0.5, heads)
    y = x + attention * (on * branch.astype(x.dtype))
    branch = block.mlp(block.norm2(y) * of_channels(heads, y.shape[-1]), None)
    return y + mlp * (on * branch.astype(x.dtype))


def gated_output(model: AViT, x: Float[Array, "b n d"], choices: Choice) -> GatedOutput:
    """The output from the tokens after the last layer and the choices of all layers."""
    runs = choices.sublayers.sum(-1, keepdims=True) > 0
    token_depth = ((choices.tokens > 0.5) & runs).sum(0, dtype=jnp.int32)
    logits = model.head_logits(x[:, : model.config.num_outputs])
    scores = jnp.zeros((model.config.depth, *token_depth.shape))
    gates = choices.tokens, choices.heads, choices.sublayers
    return GatedOutput(logits.mean(0), logits, token_depth, token_depth + 1.0, scores, *gates)
