"""AViT: a vision transformer whose rule decides which tokens go on; masked execution (every token computed)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from avit_jax.halting.rule import Halting, State, Teacher, Trace, drop_halted
from avit_jax.model.check_images import check_images
from avit_jax.model.config import WEIGHTS_DEPEND_ON, AViTConfig, changed
from avit_jax.model.layers import Block, PatchEmbed, checkpointed
from avit_jax.model.linear import INIT, layer_norm, linear
from avit_jax.model.output import AViTOutput
from avit_jax.model.positions import resize_positions
from avit_jax.model.presets import config_from
from avit_jax.model.random_patches import check_positions, config_of_tokens, cut, interpolated
from avit_jax.model.rule import Keys, Rule, image_keys
from avit_jax.model.seen import Facts, Seen, of_attention, of_tokens
from avit_jax.runtime.mesh import check_platform


@functools.lru_cache(maxsize=256)
def _block_graph(config: AViTConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))


def _stack_blocks(config: AViTConfig, rngs: nnx.Rngs) -> Block:
    """One Block whose parameters carry a leading layer axis: lax.scan compiles a single layer, whatever the depth."""

    def parameters(key: PRNGKeyArray) -> nnx.State:
        return nnx.state(Block(config, rngs=nnx.Rngs(key)))

    return nnx.merge(_block_graph(config), jax.vmap(parameters)(jax.random.split(rngs.params(), config.depth)))


class AViT(nnx.Module):
    """Vision transformer with the rule of its configuration: A-ViT's gate (arXiv 2112.07658), another rule, or none.

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
        # Heads are always float32: bfloat16 would round 1,000 logits into ties.
        if config.num_classes:
            self.head = linear(config.head_inputs, config.num_classes, "float32", rngs)
            if config.distilled:
                self.head_dist = linear(config.head_inputs, config.num_classes, "float32", rngs)
        self.drop = nnx.Dropout(config.drop_rate)
        # The rule's own parameters, as a submodule that checkpoints and the optimiser include.
        rule = config.rule_in_force
        self.rule_module = rule.module(self) if rule is not None else None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and "config" in vars(self):
            raise AttributeError(
                "the configuration of a model is fixed, since its layers are made for it: model.with_config(...) gives "
                "the same weights with other settings"
            )
        super().__setattr__(name, value)

    def __call__(
        self, images: Shaped[Array | np.ndarray, "..."], *, deterministic: bool = True, rngs: nnx.Rngs | None = None
    ) -> AViTOutput:
        """The output for a batch, by masked execution, or by shrinking execution under a reduction rule.

        Under gates it is a GatedOutput.

        images: float32 [B, H, W, C], as avit_jax.preprocess returns them. deterministic: False in training, which draws
        dropout and stochastic depth from rngs.dropout. Raises ValueError for other images, or if rngs is missing.
        """
        check_images(images, self.config)
        if not deterministic and rngs is None:
            raise ValueError("deterministic=False draws dropout: pass rngs=nnx.Rngs(dropout=key)")
        return self.forward(images, None if deterministic or rngs is None else rngs.dropout())[0]

    def forward(
        self,
        images: Shaped[Array | np.ndarray, "b h w c"],
        key: PRNGKeyArray | None = None,
        positions: Int[Array, "b p 2"] | None = None,
    ) -> tuple[AViTOutput, Trace, State | None]:
        """The output, the halting rule's trace of every layer (stacked), and its final state (None: no halting rule).

        key: given in training. It draws dropout and stochastic depth, and a rule may then compute every token.
        positions: where patches are cut (random_patches.draw_positions), perhaps fewer than the grid has; None: the
        grid. Raises ValueError for fewer patches if a reduction rule runs.
        """
        config, rule = self.config, self.config.halting
        images = jnp.asarray(images)
        if config.gates is not None:
            from avit_jax.execution import gated  # imported here, because it imports this module

            return gated.forward(self, images, key, positions)
        if config.reduction is not None:
            rule = config.reduction.in_training(config) if key is not None else None
            if rule is None:
                from avit_jax.execution import shrinking  # imported here, because it imports this module

                return shrinking.forward(self, images, config.reduction, key=key, positions=positions), Trace(), None
        x = self.embed(images, key, positions)
        draw = None if rule is None else self.draw(rule, images, key)
        seen = config_of_tokens(config, x.shape[1] - config.num_special)
        x, state, trace = self._layers(x, rule, None if rule is None else rule.initial(len(x), seen, draw), key)
        if rule is None or state is None:
            token_depth = jnp.full(x.shape[:2], config.depth, jnp.int32)
            active = jnp.zeros(x.shape[:2], bool)
            return self.output(None, State(active, token_depth, x[:, : config.num_outputs]), trace), trace, None
        if rule.teacher_tokens and key is not None:
            state = dataclasses.replace(state, of_tokens=state.of_tokens | {"normed": self.norm(x)})
        return self.output(rule, state, trace), trace, state

    def draw(self, rule: Rule, images: Float[Array, "b h w c"], key: PRNGKeyArray | None = None) -> Keys | None:
        """A random key for each image, if the rule draws: from its pixels, or in training from the step's key."""
        if not rule.draws:
            return None
        if key is None:
            return image_keys(images)
        return jax.random.split(jax.random.fold_in(key, self.config.depth + 1), len(images))

    def teach(self, images: Float[Array, "b h w c"]) -> Teacher:
        """What this model says as a teacher that computes every token, whatever its rule."""
        x, _, _ = self._layers(self.embed(images), None, None, None)
        return Teacher(self.head_logits(x[:, : self.config.num_outputs]).mean(0), self.norm(x))

    def embed(
        self,
        images: Float[Array, "b h w c"],
        key: PRNGKeyArray | None = None,
        positions: Int[Array, "b p 2"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Special tokens, then patches, with their position embeddings added.

        key: draws dropout; None: no dropout. positions: where patches are cut, in pixels; None: on the grid. Raises
        ValueError for positions of another shape or outside the image.
        """
        config, places = self.config, self.pos_embed[...]
        if config.gates is not None and not config.gates.train_positions:
            places = jax.lax.stop_gradient(places)
        if positions is None:
            patches = self.patch_embed(images)
        else:
            check_positions(positions, len(images), config)
            patches = self.patch_embed.proj(cut(images, positions, config.patch_size))
            before = jnp.repeat(places[:, : config.num_special], len(images), axis=0)
            table = places[0, config.num_special :]
            places = jnp.concatenate([before, interpolated(table, positions, config)], axis=1)
        patches = patches.astype(jnp.float32)
        special = [self.cls_token] if config.class_token else []
        special += [self.dist_token] if config.distilled else []
        special += [self.reg_token] if config.num_registers else []
        first = [jnp.broadcast_to(token[...], (images.shape[0], *token.shape[1:])) for token in special]
        x = jnp.concatenate([*first, patches], axis=1) + places
        if key is None:
            return x
        return self.drop(x, deterministic=False, rngs=jax.random.fold_in(key, config.depth))

    def _layers(
        self, x: Array, rule: Halting | None, state: State | None, key: PRNGKeyArray | None
    ) -> tuple[Array, State | None, Trace]:
        config = self.config
        graphdef, stacked = nnx.split(self.blocks)
        rates = jnp.linspace(0, config.drop_path_rate, config.depth) if key is not None else None

        def layer(carry: Any, inputs: Any) -> tuple[Any, Trace]:
            x, state = carry
            params, index, rate = inputs
            block = nnx.merge(graphdef, params)
            layer_key = None if key is None else jax.random.fold_in(key, index)
            if config.drop_path_rate == 0:
                rate = None
            if rule is None:
                return (block(x, None, rate, layer_key), None), Trace()
            masked = rule.masks_in_training or key is None
            before = drop_halted(x, state.active) if masked else x
            mass = rule.mass(state) if masked else None
            reads = of_attention(rule.reads)
            y, facts = block.attend(before, mass, rate, layer_key, reads, self_visible=rule.self_visible)
            x = block.transform(y, rate, layer_key)
            facts |= of_tokens(x, config.num_outputs) | ({"before": before} if "before" in rule.reads else {})
            seen = self.seen(rule, state.active, facts)
            last = index == config.depth - 1
            state, trace = rule.advance(state, seen, layer=index, is_last=last, module=self.rule_module)
            return (x, state), trace

        (x, state), trace = jax.lax.scan(
            checkpointed(layer, config), (x, state), (stacked, jnp.arange(config.depth), rates)
        )
        return x, state, trace

    def seen(self, rule: Halting, active: Bool[Array, "b n"], facts: Facts) -> Seen:
        """What a rule sees after a layer. active: tokens that the layer computed. facts: at least `outputs`."""
        logits = self.head_logits(facts["outputs"]) if "logits" in rule.reads else None
        return Seen(active=active, logits=logits, **facts)

    def output(self, rule: Halting | None, state: State, trace: Trace) -> AViTOutput:
        """The model's output from the rule's final state and the stacked traces of all layers."""
        token_depth = state.token_depth
        # Without a rule, and with one that has no scores or ponder cost, these are the values of a plain ViT.
        ponder_cost = state.of_tokens.get("ponder_cost", token_depth + 1.0)
        scores = trace.of_tokens.get("halting_score", jnp.zeros((self.config.depth, *token_depth.shape)))
        head_logits = rule.head_logits(state) if rule is not None else None
        if head_logits is None:
            head_logits = self.head_logits(state.output)
        return AViTOutput(head_logits.mean(0), head_logits, token_depth, ponder_cost, scores)

    def head_logits(
        self, outputs: Float[Array, "b s d"], size: Float[Array, "b k"] | None = None
    ) -> Float[Array, "heads b c"]:
        """The logits of each head from the final values of the first num_outputs tokens, or of all if fewer are left.

        size: the patches that each token stands for, if tokens were merged; None: 1 each.
        """
        return self.classified(self.pooled(outputs, size))

    def classified(self, features: list[Array]) -> Float[Array, "heads b c"]:
        """The logits of each head from what it reads."""
        logits = list(features)
        if self.config.num_classes:
            logits[0] = self.head(features[0])
            if self.config.distilled:
                logits[1] = self.head_dist(features[1])
        return jnp.stack(logits).astype(jnp.float32)

    def pooled(self, outputs: Float[Array, "b s d"], size: Float[Array, "b k"] | None) -> list[Array]:
        """The features that each head reads, [b, head_inputs]."""
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

    def with_config(self, **changes: Any) -> "AViT":
        """The same weights with other settings, such as gate, rule, dtype, image size or drop rates; arrays are shared.

        changes: fields of AViTConfig; **NO_RULE (model.config) makes a plain ViT. A smaller depth leaves out the last
        layers, so that every token stops earlier. Positions are resized for another image size, as `load` does. The new
        rule's own parameters are those of this model if its rule is of the same kind; otherwise they are made from the
        norm and heads. Raises ValueError for an unknown field, and for one that the shapes of the weights depend on.
        """
        config = changed(self.config, **changes)
        shorter = config.depth < self.config.depth
        fixed = [name for name in WEIGHTS_DEPEND_ON if getattr(config, name) != getattr(self.config, name)]
        if shorter:
            fixed.remove("depth")
        if fixed:
            raise ValueError(
                f"with_config cannot change {fixed[0]}: the weights are those of {fixed[0]} "
                f"{getattr(self.config, fixed[0])}; make another model with avit_jax.create, or avit_jax.load"
            )
        graphdef, abstract = nnx.split(model_of_shapes(config))
        arrays = nnx.to_pure_dict(nnx.state(self))
        if config.patch_grid != self.config.patch_grid:
            grids = self.config.patch_grid, config.patch_grid
            antialias = config.num_registers > 0
            resized = resize_positions(arrays["pos_embed"], config.num_special, *grids, antialias=antialias)
            arrays["pos_embed"] = jnp.asarray(resized)
        if shorter:
            arrays["blocks"] = jax.tree.map(lambda p: p[: config.depth], arrays["blocks"])
        own = arrays.pop("rule_module", None)
        rule, before = config.rule_in_force, self.config.rule_in_force
        if rule is not None and "rule_module" in nnx.to_pure_dict(abstract):
            needed = nnx.to_pure_dict(abstract)["rule_module"]
            if own is None or before is None or type(rule) is not type(before):
                own = nnx.to_pure_dict(nnx.state(rule.module(self)))
            if shorter and jax.tree.map(jnp.ndim, own) == jax.tree.map(jnp.ndim, needed):  # some are stacked by layer
                own = jax.tree.map(lambda p, shape: p[: shape.shape[0]] if shape.ndim else p, own, needed)
            if jax.tree.map(jnp.shape, own) != jax.tree.map(jnp.shape, needed):
                had = (before or rule).describe()
                raise ValueError(
                    f"this model's parameters of the rule {had!r} do not fit {rule.describe()!r}: "
                    "with_config(rule=None) leaves them out, and the new rule then makes its own"
                )
            arrays["rule_module"] = own
        nnx.replace_by_pure_dict(abstract, arrays)
        return nnx.merge(graphdef, abstract)


@functools.lru_cache(maxsize=256)
def _structure(config: AViTConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: AViT(config, rngs=nnx.Rngs(0))))


def model_of_shapes(config: AViTConfig) -> AViT:
    """A model whose parameters are shapes (jax.ShapeDtypeStruct). Tracing one takes 0.1 s, so structures are kept."""
    return nnx.merge(*_structure(config))


def create(preset: str, *, seed: int = 0, **overrides: Any) -> AViT:
    """A model with random weights from a preset, such as "avit_tiny_patch16_224"; overrides are AViTConfig fields.

    seed: of the random weights. Raises ValueError for an unknown preset or field, naming the nearest one.
    """
    model_config = config_from(preset, **overrides)
    check_platform()
    return AViT(model_config, rngs=nnx.Rngs(seed))
