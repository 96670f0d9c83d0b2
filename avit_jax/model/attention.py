"""Attention in which every key has a mass; over one batch, or part of its queries."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from avit_jax.model.config import AViTConfig
from avit_jax.model.fused import Implementation, cudnn_is_here, cudnn_takes, fused_attention
from avit_jax.model.linear import linear, matmul
from avit_jax.model.seen import Facts
from avit_jax.reduction.groups import Groups, reduce, spread

# Weight of each key in attention: whether the token is there (bool) or how much it counts (float). None: all the same.
Mass = Bool[Array, "b n"] | Float[Array, "b n"] | None
# Facts that need the attention weights, which a fused kernel never writes.
_FROM_WEIGHTS = frozenset({"class_attention", "attention_received"})
_LOW = -1e30  # a score whose weight is 0; bfloat16 has it too


def of_channels(heads: Float[Array, "b h"], channels: int) -> Float[Array, "b 1 d"]:
    """Each head's factor for all its channels."""
    return jnp.repeat(heads, channels // heads.shape[1], axis=1)[:, None]


class Attention(nnx.Module):
    """Multi-head self-attention in which every key has a mass.

    Query i gives key n the weight mass[n] * exp(score[i, n]) / sum_m mass[m] * exp(score[i, m]). A boolean mass leaves
    out keys, such as halted tokens. A float mass is the number of patches that a token stands for, or the probability
    that it is kept.
    """

    def __init__(self, config: AViTConfig, *, rngs: nnx.Rngs) -> None:
        self.num_heads = config.num_heads
        self.attention = config.attention
        self.class_rows = config.class_token + config.distilled
        self.qkv = linear(config.embed_dim, 3 * config.embed_dim, config.dtype, rngs, use_bias=config.qkv_bias)
        self.proj = linear(config.embed_dim, config.embed_dim, config.dtype, rngs)

    def query_key_value(self, x: Float[Array, "b n d"]) -> tuple[Array, Array, Array]:
        """Query, key and value, each [B, H, N, d]; on a CPU, batched matmuls are twice as fast as with [B, N, H, d]."""
        query, key, value = self._cut(self.columns(x))
        return query, key, value

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mass: Mass = None,
        reads: frozenset[str] = frozenset(),
        *,
        self_visible: bool = False,
    ) -> tuple[Float[Array, "b n d"], Facts]:
        """The attention output of every token, and the facts that `reads` names (fields of Seen).

        mass: None: all 1. self_visible: a query sees its own key with mass 1 (DynamicViT's training).
        """
        columns = self.columns(x)
        if self_visible and mass is not None:
            query, key, value = self._cut(columns)
            weights, total = _self_visible_weights(query, key, mass)
            return self._projected(weights, total, value), self._facts(weights, total, key, value, reads)
        mixed, facts = self.attended(columns, mass, reads)
        return self.proj(mixed), facts

    def columns(self, x: Float[Array, "... d"]) -> Float[Array, "... e"]:
        """Query, key and value of every token, side by side."""
        return self.qkv(x).astype(self.qkv.dtype)

    def attended(
        self, columns: Float[Array, "b n e"], mass: Mass, reads: frozenset[str]
    ) -> tuple[Float[Array, "b n d"], Facts]:
        """The mean of the values that each query attends to, and the facts; by a fused kernel where there is one."""
        query, key, value = self._cut(columns)
        kernel = _kernel(self.attention, query, mass, reads)
        if kernel is not None:
            return fused_attention(query, key, value, mass, kernel), self._facts(None, None, key, value, reads)
        weights, total = _attention_weights(query, key, mass)
        return self._mixed(weights, total, value), self._facts(weights, total, key, value, reads)

    def gated(
        self, x: Float[Array, "b n d"], on: Bool[Array, "b n"], heads: Float[Array, "b h"]
    ) -> Float[Array, "b n d"]:
        """The attention output if some tokens and heads are off; no row of tokens that are off means anything.

        on: tokens that are seen. heads: a factor for each head, 0 or 1; its gradient goes through query, key, value and
        the output of attention. A token that is off sees itself alone, which decides the gradient of its gate.
        """
        columns = self.columns(x)
        columns = columns * jnp.tile(of_channels(heads, x.shape[-1]), 3).astype(columns.dtype)
        mixed, _ = self.attended(columns, on, frozenset())
        alone = columns[..., -x.shape[-1] :].astype(mixed.dtype)  # the values
        mixed = jnp.where(on[..., None], mixed, alone)
        return self.proj(mixed * of_channels(heads, mixed.shape[-1]))

    def read(self, x: Float[Array, "b n d"], mass: Mass, queries: int) -> Float[Array, "b q d"]:
        """The attention output of the first `queries` tokens; for the others only key and value are computed."""
        (query,) = self._heads(x[:, :queries], 0, 1)
        key, value = self._heads(x, 1, 3)
        return self._projected(*_attention_weights(query, key, mass), value)

    def weights(
        self, x: Float[Array, "b n d"], mass: Mass, reads: frozenset[str]
    ) -> tuple[Float[Array, "b h n n"], Float[Array, "b h n 1"], Facts]:
        """The weight of each key for each query, their sum, and the facts that `reads` names but value_norm."""
        query, key = self._heads(x, 0, 2)
        weights, total = _attention_weights(query, key, mass)
        return weights, total, self._facts(weights, total, key, None, reads)

    def mixed(
        self,
        weights: Float[Array, "b h n n"],
        total: Float[Array, "b h n 1"],
        x: Float[Array, "b k d"],
        groups: Groups | None,
    ) -> Float[Array, "b k d"]:
        """The attention output of the shorter sequence x, by the weights of the longer one.

        groups: how the longer one became x; None: x is the longer one.

        The attention matrix of the shorter sequence has the weighted mean of a slot's queries and the sum of a slot's
        keys. It is not computed: each key has the value of its slot, and the outputs of a slot's queries are averaged.
        """
        columns = self._some_columns(x, 2, 3)
        if groups is None:
            return self._projected(weights, total, self._cut(columns)[0])
        (value,) = self._cut(spread(columns, groups))
        return self.proj(reduce(self._mixed(weights, total, value), dataclasses.replace(groups, mean=True)))

    def _some_columns(self, rows: Float[Array, "b n d"], first: int, last: int) -> Float[Array, "b n _"]:
        """Query, key and value (parts 0, 1 and 2) from the first part to before the last one, side by side."""
        kernel, bias = self.qkv.kernel[...], self.qkv.bias[...] if self.qkv.bias is not None else None
        columns = slice(first * rows.shape[-1], last * rows.shape[-1])
        rows = rows.astype(self.qkv.dtype)
        y = matmul(rows, kernel[:, columns].astype(rows.dtype))
        y = y if bias is None else y + bias[None, None, columns].astype(rows.dtype)
        return y.astype(rows.dtype)

    def _cut(self, columns: Float[Array, "b n _"]) -> list[Float[Array, "b h n c"]]:
        """Columns cut into heads: one array for each of query, key and value that is there."""
        parts = jnp.split(columns, columns.shape[-1] // (self.qkv.out_features // 3), axis=-1)
        # The gradient of a split is a concatenation; that of slices is a sum of padded arrays.
        width = self.qkv.out_features // 3 // self.num_heads
        return [part.reshape(*part.shape[:2], self.num_heads, width).transpose(0, 2, 1, 3) for part in parts]

    def _heads(self, rows: Float[Array, "b n d"], first: int, last: int) -> list[Float[Array, "b h n c"]]:
        return self._cut(self._some_columns(rows, first, last))

    def _projected(self, weights: Array, total: Array, value: Array) -> Array:
        return self.proj(self._mixed(weights, total, value))

    def _mixed(self, weights: Array, total: Array, value: Array) -> Float[Array, "b q d"]:
        mixed = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / total
        batch, heads, queries, width = mixed.shape
        return mixed.transpose(0, 2, 1, 3).reshape(batch, queries, heads * width)

    def _facts(
        self, weights: Array | None, total: Array | None, key: Array, value: Array | None, reads: frozenset[str]
    ) -> Facts:
        facts: Facts = {}
        if weights is not None and total is not None:
            if "class_attention" in reads:
                rows = slice(self.class_rows)
                facts["class_attention"] = (weights[:, :, rows] / total[:, :, rows]).mean((1, 2))
            if "attention_received" in reads:
                facts["attention_received"] = (weights / total).mean((1, 2))
        if "key_mean" in reads:
            facts["key_mean"] = key.astype(jnp.float32).mean(1)
        if "value_norm" in reads and value is not None:
            facts["value_norm"] = jnp.sqrt(jnp.square(value.astype(jnp.float32)).sum((1, 3)))
        return facts


def _kernel(setting: str, query: Array, mass: Mass, reads: frozenset[str]) -> Implementation | None:
    """The one place that chooses how attention is computed: the fused kernel; None: by its weights, as below.

    setting: AViTConfig.attention. A kernel is for keys that are there or not, and for rules that do not read weights.
    One query has no matrix of weights that would be worth a kernel. The platform is that of JAX's default device while
    the program is traced.
    """
    if setting == "plain" or reads & _FROM_WEIGHTS or query.shape[2] == 1 or (mass is not None and mass.dtype != bool):
        return None
    if setting == "xla":
        return "xla"
    takes = setting == "cudnn" or (cudnn_takes(query.dtype, query.shape[-1]) and cudnn_is_here())
    return "cudnn" if takes else None


def _has_mass(mass: Bool[Array, "b n"] | Float[Array, "b n"]) -> Bool[Array, "b n"]:
    return mass if mass.dtype == bool else mass > 0


def _attention_weights(query: Array, key: Array, mass: Mass) -> tuple[Array, Array]:
    """mass * exp(score - maximum) for every query and key, and its sum over the keys; [B, H, Q, N] and [B, H, Q, 1]."""
    seen = None if mass is None else _has_mass(mass)
    scores = _scores(query * query.shape[-1] ** -0.5, key, seen)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    if mass is not None and mass.dtype != bool:
        weights = weights * mass[:, None, None, :]
        # If no key has any mass, the weights and their sum are 0.
        return weights, jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return weights, weights.sum(-1, keepdims=True)


@jax.custom_vjp
def _scores(query: Array, key: Array, seen: Bool[Array, "b n"] | None) -> Float[Array, "b h q n"]:
    """The score of every key for every query; a very low number for keys that are not seen. seen: None: all are."""
    return jax.lax.platform_dependent(query, key, seen, tpu=_scores_with_a_channel, default=_scores_with_a_mask)


def _scores_forward(query: Array, key: Array, seen: Bool[Array, "b n"] | None) -> tuple[Array, Any]:
    # With the backward pass the mask takes a TPU less time, by the compiler's estimate.
    return jax.vjp(lambda query, key: _scores_with_a_mask(query, key, seen), query, key)


def _scores_backward(backward: Any, gradient: Array) -> tuple[Array, Array, None]:
    return (*backward(gradient), None)


_scores.defvjp(_scores_forward, _scores_backward)


def _scores_with_a_mask(query: Array, key: Array, seen: Bool[Array, "b n"] | None) -> Float[Array, "b h q n"]:
    scores = _products(query, key)
    # Finite, so that an image without any active token gives no NaN.
    return scores if seen is None else jnp.where(seen[:, None, None, :], scores, jnp.finfo(jnp.float32).min)


def _scores_with_a_channel(query: Array, key: Array, seen: Bool[Array, "b n"] | None) -> Float[Array, "b h q n"]:
    """With one more channel: 1 in every query, and a very low number in the keys that are not seen.

    A TPU fuses softmax with these scores better. The channel is free there: a head's 64 fill half a register.
    """
    low = jnp.zeros(key.shape[::2]) if seen is None else jnp.where(seen, 0, _LOW)
    low = jnp.broadcast_to(low.astype(key.dtype)[:, None, :, None], (*key.shape[:-1], 1))
    one = jnp.ones((*query.shape[:-1], 1), query.dtype)
    return _products(jnp.concatenate([query, one], axis=-1), jnp.concatenate([key, low], axis=-1))


def _products(query: Float[Array, "b h q c"], key: Float[Array, "b h n c"]) -> Float[Array, "b h q n"]:
    return jnp.matmul(query, key.swapaxes(-1, -2), preferred_element_type=jnp.float32)


def _self_visible_weights(query: Array, key: Array, mass: Float[Array, "b n"]) -> tuple[Array, Array]:
    """As _attention_weights, but query i gives its own key the mass 1, and every key a trace of attention.

    (exp(score - maximum) * allow + 1e-6 / N) / (its sum + 1e-6), maximum over all keys, as in DynamicViT's published
    code, so that a token without mass still has a value of its own.
    """
    scores = _products(query * query.shape[-1] ** -0.5, key)
    tokens = mass.shape[1]
    allow = mass[:, None, :] + (1 - mass[:, None, :]) * jnp.eye(tokens)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))) * allow[:, None]
    return weights + 1e-6 / tokens, weights.sum(-1, keepdims=True) + 1e-6
