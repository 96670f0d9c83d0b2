"""The rule against its properties and against a slow loop over single tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.halting.avit import AViTGate
from avit_jax.halting.rule import State
from avit_jax.model.seen import Seen, of_tokens

GATE = {"gate_scale": 3.0, "gate_center": 1.0, "halt_epsilon": 0.01}
BATCH, TOKENS, WIDTH, LAYERS = 4, 9, 6, 7


@pytest.fixture
def values() -> np.ndarray:
    """Token values of every layer: [L, B, N, D]."""
    return np.random.default_rng(0).normal(size=(LAYERS, BATCH, TOKENS, WIDTH)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """As much of a configuration as the rule asks for."""

    num_outputs: int = TOKENS
    num_tokens: int = TOKENS
    embed_dim: int = WIDTH


def run(values: np.ndarray, special: int = TOKENS, **gate: float) -> tuple[list[State], np.ndarray]:
    rule = AViTGate(**(GATE | gate))
    state = rule.initial(BATCH, Sizes(special))
    states, scores = [], []
    for layer, tokens in enumerate(values):
        seen = Seen(**of_tokens(jnp.asarray(tokens), special))
        state, trace = rule.advance(state, seen, layer=layer, is_last=layer == len(values) - 1)
        states.append(state)
        scores.append(trace.of_tokens["halting_score"])
    return states, np.stack(scores)


def slow_token(channel: np.ndarray, gate_scale: float, gate_center: float, halt_epsilon: float) -> dict[str, object]:
    """One token, one layer at a time, in float64, straight from the paper."""
    total, weights, scores = 0.0, [], []
    for layer, value in enumerate(channel, start=1):
        score = 1 / (1 + np.exp(-(gate_scale * float(value) - gate_center)))
        scores.append(score)
        if layer == len(channel) or total + score >= 1 - halt_epsilon:
            weights.append(1 - total)
            break
        weights.append(score)
        total += score
    pad = [0.0] * (len(channel) - len(weights))
    return {"depth": len(weights), "remainder": weights[-1], "weights": weights + pad, "scores": scores + pad}


def test_agrees_with_a_slow_loop_over_single_tokens(values: np.ndarray) -> None:
    states, scores = run(values)
    last = states[-1]
    for image in range(BATCH):
        for token in range(TOKENS):
            slow = slow_token(values[:, image, token, 0], **GATE)
            assert last.token_depth[image, token] == slow["depth"]
            np.testing.assert_allclose(last.of_tokens["remainder"][image, token], slow["remainder"], atol=1e-6)
            cost = slow["depth"] + slow["remainder"]
            np.testing.assert_allclose(last.of_tokens["ponder_cost"][image, token], cost, atol=2e-6)
            np.testing.assert_allclose(scores[:, image, token], slow["scores"], atol=1e-6)
            output = np.einsum("l,ld->d", slow["weights"], values[:, image, token])
            np.testing.assert_allclose(last.output[image, token], output, atol=2e-6)
    assert len(np.unique(np.asarray(last.token_depth))) >= 4, "the sample must spread over the layers"


def test_weights_of_every_token_sum_to_one(values: np.ndarray) -> None:
    ones = values.copy()
    ones[..., 1] = 1  # a channel that is 1 at every layer comes out as the sum of the weights
    states, _ = run(ones)
    np.testing.assert_allclose(states[-1].output[..., 1], 1, atol=1e-6)


@pytest.mark.parametrize("center", [-50.0, 0.0, 1.0, 3.0, 80.0])
def test_depths_lie_between_one_and_the_number_of_layers(values: np.ndarray, center: float) -> None:
    states, _ = run(values, gate_center=center)
    depth = np.asarray(states[-1].token_depth)
    assert depth.min() >= 1 and depth.max() <= LAYERS
    assert not np.asarray(states[-1].active).any(), "every token stops at the last layer"


def test_halted_stays_halted(values: np.ndarray) -> None:
    states, _ = run(values)
    for before, after in itertools.pairwise(states):
        assert not np.any(np.asarray(after.active) & ~np.asarray(before.active))


def test_a_gate_that_never_fires_costs_all_layers_and_one(values: np.ndarray) -> None:
    states, scores = run(values, gate_center=1e4)
    np.testing.assert_array_equal(states[-1].token_depth, LAYERS)
    np.testing.assert_array_equal(states[-1].of_tokens["ponder_cost"], LAYERS + 1)
    np.testing.assert_array_equal(states[-1].output, values[-1])
    assert not scores.any()


@pytest.mark.parametrize("poison", [7.0, np.inf, np.nan])
def test_values_of_halted_tokens_change_nothing(values: np.ndarray, poison: float) -> None:
    states, scores = run(values)
    poisoned = values.copy()
    for layer in range(1, LAYERS):
        poisoned[layer][~np.asarray(states[layer - 1].active)] = poison
    assert not np.array_equal(poisoned, values)
    others, other_scores = run(poisoned)
    np.testing.assert_array_equal(scores, other_scores)
    for value, other in zip(jax.tree.leaves(states[-1]), jax.tree.leaves(others[-1]), strict=True):
        np.testing.assert_array_equal(value, other)


def test_gradients_pass_by_halted_nans(values: np.ndarray) -> None:
    states, _ = run(values)
    halted = ~np.asarray(states[2].active)
    poisoned = values[3].copy()
    poisoned[halted] = np.nan

    def loss(tokens: jax.Array) -> jax.Array:
        state, trace = AViTGate(**GATE).advance(states[2], Seen(**of_tokens(tokens, TOKENS)), layer=3, is_last=False)
        return state.output.sum() + state.of_tokens["ponder_cost"].sum() + trace.of_tokens["halting_score"].sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(poisoned)))
    assert np.isfinite(gradient).all() and not gradient[halted].any() and gradient[~halted].any()


def test_output_is_kept_for_the_special_tokens_alone(values: np.ndarray) -> None:
    all_tokens, _ = run(values)
    two, _ = run(values, special=2)
    np.testing.assert_array_equal(two[-1].output, all_tokens[-1].output[:, :2])
