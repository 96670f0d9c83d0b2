"""AViT: a vision transformer whose tokens halt at their own layers; masked execution (every token computed)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from avit_jax import halting
from avit_jax.config import AViTConfig, config_from

# timm's trunc_normal_(std=0.02) cuts at +-2, not at +-2 deviations.
_INIT = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AViTOutput:
    """What a model says of a batch; N counts the special tokens first."""

    logits: Float[Array, "b c"]  # mean of the heads
    head_logits: Float[Array, "heads b c"]  # class head, then distillation head
    token_depth: Int[Array, "b n"]  # layers that processed the token, 1..L
    ponder_cost: Float[Array, "b n"]  # layers + remainder
    halting_scores: Float[Array, "l b n"]  # 0 where the token had halted


def _linear(inputs: int, outputs: int, config: AViTConfig, rngs: nnx.Rngs, *, use_bias: bool = True) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=jnp.dtype(config.dtype), kernel_init=_INIT, rngs=rngs)


def _layer_norm(config: AViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance E[x^2] - E[x]^2 cancels where a token's mean is large.
    return nnx.LayerNorm(config.embed_dim, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, one linear map each (a convolution with stride = patch)."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.patch_size = config.patch_size
        fan_in = config.patch_size**2 * config.in_channels
        bound = fan_in**-0.5  # PyTorch's default for convolutions, which DeiT leaves in place

        def uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        self.proj = nnx.Linear(
            fan_in,
            config.embed_dim,
            dtype=jnp.dtype(config.dtype),
            kernel_init=uniform,
            bias_init=uniform,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b p d"]:
        batch, height, width, channels = images.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
        return self.proj(patches.reshape(batch, rows * columns, size * size * channels))


class Attention(nnx.Module):
    """Multi-head self-attention in which halted tokens are no keys."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.qkv = _linear(config.embed_dim, 3 * config.embed_dim, config, rngs, use_bias=config.qkv_bias)
        self.proj = _linear(config.embed_dim, config.embed_dim, config, rngs)

    def __call__(self, x: Float[Array, "b n d"], active: Bool[Array, "b n"] | None) -> Array:
        batch, tokens, dim = x.shape
        head_dim = dim // self.num_heads

        def heads(y: Array) -> Array:  # [B, H, N, d]: plain batched matmuls, twice as fast on a CPU as [B, N, H, d]
            return y.reshape(batch, tokens, self.num_heads, head_dim).transpose(0, 2, 1, 3)

        query, key, value = map(heads, jnp.split(self.qkv(x), 3, axis=-1))
        scores = jnp.matmul(query * head_dim**-0.5, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)
        if active is not None:
            # Finite, so that an image without any active token gives no NaN.
            scores = jnp.where(active[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / total
        return self.proj(mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, dim))


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.fc1 = _linear(config.embed_dim, config.mlp_dim, config, rngs)
        self.fc2 = _linear(config.mlp_dim, config.embed_dim, config, rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(self, x: Float[Array, "b n d"], key: PRNGKeyArray | None) -> Array:
        hidden = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(self.drop(hidden, deterministic=key is None, rngs=key))


def drop_path(branch: Float[Array, "b n d"], rate: Float[Array, ""], key: PRNGKeyArray) -> Float[Array, "b n d"]:
    """Stochastic depth (arXiv 1603.09382): the branch of whole images dropped with `rate`, the kept ones scaled up."""
    keep = jax.random.bernoulli(key, 1 - rate, (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / (1 - rate), 0)


class Block(nnx.Module):
    """Pre-norm transformer block; the residual stream stays in float32."""

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.norm1 = _layer_norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = _layer_norm(config, rngs)
        self.mlp = Mlp(config, rngs=rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        active: Bool[Array, "b n"] | None = None,
        drop_path_rate: Float[Array, ""] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "b n d"]:
        """One layer; active None: no token is masked. Without a key nothing is dropped."""
        keys = [None] * 5 if key is None else list(jax.random.split(key, 5))

        def regularise(branch: Array, drop_key: PRNGKeyArray | None, path_key: PRNGKeyArray | None) -> Array:
            if drop_key is None or path_key is None:
                return branch
            branch = self.drop(branch, deterministic=False, rngs=drop_key)
            return branch if drop_path_rate is None else drop_path(branch, drop_path_rate, path_key)

        x = x + regularise(self.attn(self.norm1(x), active).astype(x.dtype), keys[0], keys[1])
        return x + regularise(self.mlp(self.norm2(x), keys[2]).astype(x.dtype), keys[3], keys[4])


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
        self.cls_token = nnx.Param(_INIT(rngs.params(), (1, 1, config.embed_dim)))
        if config.distilled:
            self.dist_token = nnx.Param(_INIT(rngs.params(), (1, 1, config.embed_dim)))
        self.pos_embed = nnx.Param(_INIT(rngs.params(), (1, config.num_tokens, config.embed_dim)))
        self.blocks = _stack_blocks(config, rngs)
        self.norm = _layer_norm(config, rngs)
        self.head = _linear(config.embed_dim, config.num_classes, config, rngs)
        if config.distilled:
            self.head_dist = _linear(config.embed_dim, config.num_classes, config, rngs)
        self.drop = nnx.Dropout(config.drop_rate)

    def __call__(
        self, images: Float[Array, "b h w c"], *, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ) -> AViTOutput:
        """Masked execution: fixed shapes, every token computed, halted ones masked."""
        config = self.config
        check_images(images, config)
        if not deterministic and rngs is None:
            raise ValueError("deterministic=False draws dropout: pass rngs=nnx.Rngs(dropout=key)")
        key = None if deterministic or rngs is None else rngs.dropout()
        x = self.embed(images, key)
        batch, num_tokens, _ = x.shape
        state = None
        if config.halts:
            state = halting.initial_state(batch, num_tokens, config.num_special, config.embed_dim)
        x, state, scores = self._layers(x, state, key)
        if state is None:
            scores = jnp.zeros((config.depth, batch, num_tokens))
            token_depth = jnp.full((batch, num_tokens), config.depth, jnp.int32)
            return self.heads(x[:, : config.num_special], token_depth, token_depth + 1.0, scores)
        return self.heads(state.output, state.token_depth, state.ponder_cost, scores)

    def embed(self, images: Float[Array, "b h w c"], key: PRNGKeyArray | None = None) -> Float[Array, "b n d"]:
        """Special tokens, then patches, with their positions added."""
        patches = self.patch_embed(images).astype(jnp.float32)
        special = [self.cls_token] + ([self.dist_token] if self.config.distilled else [])
        first = [jnp.broadcast_to(token[...], (images.shape[0], 1, self.config.embed_dim)) for token in special]
        x = jnp.concatenate([*first, patches], axis=1) + self.pos_embed[...]
        if key is None:
            return x
        return self.drop(x, deterministic=False, rngs=jax.random.fold_in(key, self.config.depth))

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
            state, score = halting.advance(
                state,
                x,
                gate_scale=config.gate_scale,
                gate_center=config.gate_center,
                halt_epsilon=config.halt_epsilon,
                is_last=index == config.depth - 1,
            )
            return (x, state), score

        if config.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        (x, state), scores = jax.lax.scan(layer, (x, state), (stacked, jnp.arange(config.depth), rates))
        return x, state, scores

    def heads(self, special: Array, token_depth: Array, ponder_cost: Array, scores: Array) -> AViTOutput:
        """The output from the special tokens' final values."""
        special = self.norm(special)
        logits = [self.head(special[:, 0])]
        if self.config.distilled:
            logits.append(self.head_dist(special[:, 1]))
        head_logits = jnp.stack(logits).astype(jnp.float32)
        return AViTOutput(head_logits.mean(0), head_logits, token_depth, ponder_cost, scores)


def check_images(images: Any, config: AViTConfig) -> None:
    """Raises ValueError, with the reason, unless images are floating [B, H, W, C] as the configuration says."""
    height, width = config.image_shape
    wanted = f"float32 [batch, {height}, {width}, {config.in_channels}]"
    shape = tuple(images.shape)
    reason = None
    if not jnp.issubdtype(images.dtype, jnp.floating):
        reason = f"they are {images.dtype}: use avit_jax.preprocess(images, model.config)"
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
    return AViT(config_from(preset, **overrides), rngs=nnx.Rngs(seed))
