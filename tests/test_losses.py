"""The objective against scipy, torch-free references and finite differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from avit_jax.halting import avit_losses as avit
from avit_jax.train import objective
from tests.harness.builders import small_config, spread_gate

H = np.array([0.02, 0.001, 0.1, 0.3, 0.2, 0.15, 0.02, 0.3, 0.25, 0.4, 0.1, 0.05], np.float32)


@pytest.mark.parametrize(("target", "deviation"), [(3.0, 1.0), (7.2, 1.0), (9.0, 2.5), (30.0, 1.0)])
def test_kl_prior_is_the_divergence_that_scipy_computes(target: float, deviation: float) -> None:
    q = H.astype(np.float64) / H.sum(dtype=np.float64)
    p = scipy.stats.norm.pdf(np.arange(1, 13), target, deviation)
    expected = scipy.stats.entropy(q, p)  # KL(q || p / sum(p))
    np.testing.assert_allclose(avit.prior_loss(jnp.asarray(H), "kl", target, deviation), expected, rtol=1e-5)


def test_kl_prior_is_zero_on_target_and_positive_elsewhere() -> None:
    p = scipy.stats.norm.pdf(np.arange(1, 8), 4.0, 1).astype(np.float32)
    assert abs(avit.prior_loss(jnp.asarray(p), "kl", 4.0)) < 1e-6
    assert avit.prior_loss(jnp.asarray(p), "kl", 5.0) > 0.1


@pytest.mark.parametrize("length", [12, 24])
def test_official_prior_agrees_with_scipy(length: int) -> None:
    halting = np.resize(H, length).astype(np.float64)
    q = np.clip(halting / halting.sum(), 0.01, 0.99)
    density = scipy.stats.norm.pdf(np.arange(length), 8, 1)
    p = density * 0.98 / density[:8].sum()
    expected = (scipy.special.xlogy(p, p) - p * np.log(q)).sum() / length
    assert expected > 0
    np.testing.assert_allclose(avit.prior_loss(jnp.asarray(halting, jnp.float32), "official"), expected, rtol=1e-5)


def test_official_prior_counts_only_when_positive() -> None:
    # With p summing to 3.26 the divergence is positive for any q <= 1 at 12 layers; at 4 layers p is tiny.
    few = jnp.asarray([0.4, 0.3, 0.2, 0.9], jnp.float32)
    density = scipy.stats.norm.pdf(np.arange(4), 8, 1)
    p = density * 0.98 / density.sum()
    q = np.asarray(few) / np.asarray(few).sum()
    value = (p * (np.log(p) - np.log(q))).sum() / 4
    np.testing.assert_allclose(avit.prior_loss(few, "official"), max(value, 0), atol=1e-6)
    assert avit.prior_loss(jnp.asarray(p / 50, jnp.float32), "official") >= 0


@pytest.mark.parametrize("kind", avit.PRIORS)
@pytest.mark.parametrize("center", [30.0, 75.0, 105.0])
def test_gradients_are_finite_at_far_gates(kind: str, center: float) -> None:
    def loss(gate_input: jax.Array) -> jax.Array:
        return avit.prior_loss(jax.nn.sigmoid(10 * gate_input - center).mean(1), kind, 7.0)

    gate_input = jax.random.normal(jax.random.key(0), (12, 50)) * 0.02
    value, gradient = jax.value_and_grad(loss)(gate_input)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_halting_terms_reach_the_parameters_through_a_far_gate() -> None:
    from flax import nnx

    graphdef, params = nnx.split(spread_gate(small_config(gate_scale=10.0, gate_center=105.0)))

    def loss(params: nnx.State) -> jax.Array:
        output = nnx.merge(graphdef, params)(jnp.ones((2, 12, 8, 2)))
        return sum(
            avit.halting_losses(
                output.halting_scores, output.ponder_cost, avit.AViTLoss(1.0, 1.0, "official", prior_target_depth=3.0)
            )
        )

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(params)))


@pytest.mark.parametrize("batch", [1, 3])
def test_halting_terms_are_weighted_means_over_all_images_and_tokens(batch: int) -> None:
    """Every image counts, the first too, and a batch of one is as good as any (the published code leaves it out)."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.5, (6, batch, 5)).astype(np.float32)
    scores[:, 0] *= np.arange(1, 7)[:, None] / 6  # the first image is unlike the others
    cost = rng.uniform(1, 7, (batch, 5)).astype(np.float32)
    settings = avit.AViTLoss(ponder_weight=0.3, prior_weight=0.2, prior="kl", prior_target_depth=4.5)
    ponder, prior = avit.halting_losses(jnp.asarray(scores), jnp.asarray(cost), settings)
    mean = [sum(float(scores[layer, b, n]) for b in range(batch) for n in range(5)) for layer in range(6)]
    divergence = scipy.stats.entropy(mean, scipy.stats.norm.pdf(np.arange(1, 7), 4.5, 1))
    np.testing.assert_allclose(ponder, 0.3 * cost.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(prior, 0.2 * divergence, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_classification_of_labels_and_soft_targets(smoothing: float) -> None:
    logits = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 4, 0])
    one_hot = np.eye(5, dtype=np.float32)[labels]
    smooth = one_hot * (1 - smoothing) + smoothing / 5
    expected = -(smooth * scipy.special.log_softmax(logits, 1)).sum(1).mean()
    for targets in (jnp.asarray(labels), jnp.asarray(one_hot)):
        value = objective.classification_loss(jnp.asarray(logits), targets, smoothing)
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_soft_targets_mix_linearly() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    a, b = jnp.eye(5)[:4], jnp.eye(5)[1:]
    mixed = objective.classification_loss(logits, 0.3 * a + 0.7 * b)
    apart = 0.3 * objective.classification_loss(logits, a) + 0.7 * objective.classification_loss(logits, b)
    np.testing.assert_allclose(mixed, apart, rtol=1e-6)


def test_hard_distillation_follows_the_teachers_decision() -> None:
    heads = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    teacher = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    labels = np.array([0, 1, 2, 3, 4, 0])
    log_p = scipy.special.log_softmax(heads, -1)
    own = -log_p[0][np.arange(6), labels].mean()
    taught = -log_p[1][np.arange(6), teacher.argmax(1)].mean()
    value = objective.distillation_loss(
        jnp.asarray(heads), jnp.asarray(labels), jnp.asarray(teacher), kind="hard", weight=0.3
    )
    np.testing.assert_allclose(value, 0.7 * own + 0.3 * taught, rtol=1e-6)


def test_soft_distillation_is_the_tempered_divergence() -> None:
    heads = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    teacher = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)
    labels = np.zeros(6, np.int64)
    p, q = scipy.special.softmax(teacher / 3, -1), scipy.special.softmax(heads[1] / 3, -1)
    expected = 9 * scipy.special.rel_entr(p, q).sum(1).mean()
    value = objective.distillation_loss(
        jnp.asarray(heads), jnp.asarray(labels), jnp.asarray(teacher), kind="soft", weight=1.0, temperature=3.0
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_without_a_teacher_the_mean_of_the_heads_is_judged() -> None:
    heads = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 5)), jnp.float32)
    labels = jnp.arange(6) % 5
    np.testing.assert_allclose(
        objective.distillation_loss(heads, labels), objective.classification_loss(heads.mean(0), labels)
    )


@pytest.mark.parametrize("kind", objective.DISTILLATIONS)
def test_a_share_weighs_the_loss_of_each_image(kind: str) -> None:
    rng = np.random.default_rng(3)
    heads, teacher = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 6, 5), (6, 5)))
    labels, share = jnp.arange(6) % 5, jnp.asarray(rng.uniform(size=6), jnp.float32)
    counts = jnp.array([1.0, 1, 0, 1, 1, 0])

    def loss(images: Any, **more: Any) -> Any:
        return objective.distillation_loss(
            heads[:, images], labels[images], teacher[images], kind=kind, weight=0.3, temperature=2.0, **more
        )

    alone = np.array([loss(slice(i, i + 1)) for i in range(6)])
    np.testing.assert_allclose(loss(slice(None), share=share), (alone * share).mean(), rtol=1e-6)
    weighted = loss(slice(None), share=share, image_weight=counts)
    np.testing.assert_allclose(weighted, (alone * share * counts).sum() / 4, rtol=1e-6)


def test_unknown_names_are_refused() -> None:
    heads, labels = jnp.zeros((1, 2, 3)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="'gauss' is unknown: choose one of official, kl"):
        avit.prior_loss(jnp.asarray(H), "gauss")
    with pytest.raises(ValueError, match="'mild' is unknown"):
        objective.distillation_loss(heads, labels, kind="mild")
    with pytest.raises(ValueError, match="needs the teacher's logits"):
        objective.distillation_loss(heads, labels, kind="hard")
