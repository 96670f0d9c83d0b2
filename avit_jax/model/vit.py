"""AViT: a vision transformer whose tokens halt at their own layers; masked execution (every token computed)."""

import dataclasses
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from avit_jax.halting import avit as halting
from avit_jax.model.config import AViTConfig, config_from
from avit_jax.model.layers import INIT, Block, PatchEmbed, layer_norm, linear
from avit_jax.runtime.mesh import check_platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AViTOutput:
    """What a model says of a batch; N counts the special tokens first."""

    logits: Float[Array, "b c"]  # mean of the heads; with num_classes 0 what they would read
    head_logits: Float[Array, "heads b c"]  # class head, then distillation head
    token_depth: Int[Array, "b n"]  # layers that processed the token, 1..L
    ponder_cost: Float[Array, "b n"]  # layers + remainder
    halting_scores: Float[Array, "l b n"]  # 0 where the token had halted


def _output_of(aux_data: Any, children: Any) -> AViTOutput:
    """jax.export builds it of shapes, which the constructor's types do not allow."""
    output = object.__new__(AViTOutput)
    for field, child in zip(dataclasses.fields(AViTOutput), children, strict=True):
        object.__setattr__(output, field.name, child)
    return output


# What jax.export needs to write a program that returns it.
jax.export.register_pytree_node_serialization(
    AViTOutput,
    serialized_name="avit_jax.AViTOutput",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
    from_children=_output_of,
)


def _stack_blocks(config: AViTConfig, rngs: nnx.Rngs) -> Block:
    """One Block whose parameters carry a leading layer axis: lax.scan compiles a single layer, whatever the depth."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))

    def parameters(key: PRNGKeyArray) -> nnx.State:
        return nnx.state(Block(config, rngs=nnx.Rngs(key)))

    return nnx.merge(graphdef, jax.vmap(parameters)(jax.random.split(rngs.params(), config.depth)))


class AViT(nnx.Module):
    """Vision transformer with adaptive tokens (arXiv 2112.07658); with gate_scale None the plain ViT / DeiT.

    Raises ValueError for images that are not float32 [B, H, W, C] of the configured size.
    """

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        if config.class_token:
            self.cls_token = nnx.Param(INIT(rngs.params(), (1, 1, config.embed_dim)))
        if config.distilled:
            self.dist_token = nnx.Param(INIT(rngs.params(), (1, 1, config.embed_dim)))
        if config.num_registers:
            self.reg_token = nnx.Param(INIT(rngs.params(), (1, config.num_registers, config.embed_dim)))
        self.pos_embed = nnx.Param(INIT(rngs.params(), (1, config.num_tokens, config.embed_dim)))
        self.blocks = _stack_blocks(config, rngs)
        self.norm = layer_norm(config, rngs)
        # In float32 whatever the matmuls are: bfloat16 would round 1,000 logits into ties.
        if config.num_classes:
            self.head = linear(config.head_inputs, config.num_classes, "float32", rngs)
            if config.distilled:
                self.head_dist = linear(config.head_inputs, config.num_classes, "float32", rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(
        self, images: Shaped[Array | np.ndarray, "..."], *, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ) -> AViTOutput:
        """Masked execution: fixed shapes, every token computed, halted ones masked."""
        config = self.config
        check_images(images, config)
        if not deterministic and rngs is None:
            raise ValueError("deterministic=False draws dropout: pass rngs=nnx.Rngs(dropout=key)")
        key = None if deterministic or rngs is None else rngs.dropout()
        x = self.embed(jnp.asarray(images), key)
        batch, num_tokens, _ = x.shape
        state = None
        if config.halts:
            state = halting.initial_state(batch, num_tokens, config.num_outputs, config.embed_dim)
        x, state, scores = self._layers(x, state, key)
        if state is None or scores is None:
            scores = jnp.zeros((config.depth, batch, num_tokens))
            token_depth = jnp.full((batch, num_tokens), config.depth, jnp.int32)
            return self.heads(x[:, : config.num_outputs], token_depth, token_depth + 1.0, scores)
        return self.heads(state.output, state.token_depth, state.ponder_cost, scores)

    def embed(self, images: Float[Array, "b h w c"], key: PRNGKeyArray | None = None) -> Float[Array, "b n d"]:
        """Special tokens, then patches, with their positions added."""
        patches = self.patch_embed(images).astype(jnp.float32)
        config = self.config
        special = [self.cls_token] if config.class_token else []
        special += [self.dist_token] if config.distilled else []
        special += [self.reg_token] if config.num_registers else []
        first = [jnp.broadcast_to(token[...], (images.shape[0], *token.shape[1:])) for token in special]
        x = jnp.concatenate([*first, patches], axis=1) + self.pos_embed[...]
        if key is None:
            return x
        return self.drop(x, deterministic=False, rngs=jax.random.fold_in(key, config.depth))

    def _layers(
        self, x: Array, state: halting.HaltingState | None, key: PRNGKeyArray | None
    ) -> tuple[Array, halting.HaltingState | None, Array | None]:
        config = self.config
        graphdef, stacked = nnx.split(self.blocks)
        rates = jnp.linspace(0, config.drop_path_rate, config.depth) if key is not None else None

        def layer(carry: Any, inputs: Any) -> tuple[Any, Array | None]:
            x, state = carry
            params, index, rate = inputs
            block = nnx.merge(graphdef, params)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            if config.drop_path_rate == 0:
                rate = None
            if state is None:
                return (block(x, None, rate, layer_key), None), None
            x = block(halting.drop_halted(x, state.active), state.active, rate, layer_key)
            state, score = halting.advance(state, x, **vars(config.halting), is_last=index == config.depth - 1)
            return (x, state), score

        if config.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        (x, state), scores = jax.lax.scan(layer, (x, state), (stacked, jnp.arange(config.depth), rates))
        return x, state, scores

    def heads(
        self,
        outputs: Float[Array, "b s d"],
        token_depth: Array,
        ponder_cost: Array,
        scores: Array,
        size: Float[Array, "b k"] | None = None,
    ) -> AViTOutput:
        """The model's output from the final values of its first num_outputs tokens, or as many as there are.

        size: the patches that each token stands for, where tokens were merged; None: 1.
        """
        features = self._pooled(outputs, size)
        if self.config.num_classes:
            features[0] = self.head(features[0])
            if self.config.distilled:
                features[1] = self.head_dist(features[1])
        head_logits = jnp.stack(features).astype(jnp.float32)
        return AViTOutput(head_logits.mean(0), head_logits, token_depth, ponder_cost, scores)

    def _pooled(self, outputs: Float[Array, "b s d"], size: Float[Array, "b k"] | None) -> list[Array]:
        """What each head reads, [b, head_inputs]."""
        config, first_patch = self.config, self.config.num_special

        def patch_mean(tokens: Array) -> Array:
            patches = tokens[:, first_patch:]
            if size is None:
                return patches.mean(1)
            weight = size[:, first_patch:, None]
            return (weight * patches).sum(1) / weight.sum(1)

        if config.pool == "mean_norm":
            return [self.norm(patch_mean(outputs))]
        outputs = self.norm(outputs)
        if config.pool == "token":
            return [outputs[:, token] for token in range(config.num_outputs)]
        mean = patch_mean(outputs)
        return [mean if config.pool == "norm_mean" else jnp.concatenate([outputs[:, 0], mean], axis=-1)]


def check_images(images: Any, config: AViTConfig) -> None:
    """Raises ValueError, with the reason, unless images are float32 [B, H, W, C] as the configuration says."""
    height, width = config.image_shape
    wanted = f"float32 [batch, {height}, {width}, {config.in_channels}]"
    if not isinstance(images, jax.Array | np.ndarray):
        kind = f"{type(images).__module__}.{type(images).__qualname__}".removeprefix("builtins.")
        raise ValueError(
            f"the model takes images as a NumPy or JAX array, {wanted}, but this is a {kind}: use np.asarray(images) "
            "for a tensor, avit_jax.preprocess(images, model.config) for pictures"
        )
    shape = tuple(images.shape)
    reason = None
    if images.dtype != jnp.float32:
        by = (
            "astype('float32')"
            if jnp.issubdtype(images.dtype, jnp.floating)
            else "avit_jax.preprocess(images, model.config)"
        )
        reason = f"they are {images.dtype}: use {by}"
    elif len(shape) != 4:
        reason = f"their shape is {shape}" + (": add a batch axis" if len(shape) == 3 else "")
    elif shape[1:] == (config.in_channels, height, width):
        reason = f"their shape is {shape}, channels first: use images.transpose(0, 2, 3, 1)"
    elif shape[1:] != (height, width, config.in_channels):
        reason = f"their shape is {shape}: resize with avit_jax.preprocess(images, model.config)"
    if reason:
        raise ValueError(f"the model takes images as {wanted}, but {reason}")


def create(preset: str, *, seed: int = 0, **overrides: Any) -> AViT:
    """A model with random weights from a preset, such as "avit_tiny_patch16_224"; overrides are AViTConfig fields.

    Raises ValueError for an unknown preset or field, naming the nearest one.
    """
    model_config = config_from(preset, **overrides)
    check_platform()
    return AViT(model_config, rngs=nnx.Rngs(seed))
