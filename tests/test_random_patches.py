"""Patches cut at random places: exact on the grid, a NumPy loop elsewhere, the same training on every mesh."""

import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import avit_jax
from avit_jax import AViT, AViTConfig, AViTOutput
from avit_jax.commands.typed_config import parse
from avit_jax.data import mix
from avit_jax.data.mix import training_positions
from avit_jax.data.open import open_dataset
from avit_jax.data.preprocessing import normalize
from avit_jax.data.settings import AugmentSettings
from avit_jax.evaluate.random_views import evaluate_views
from avit_jax.evaluate.rows import correct_images
from avit_jax.execution.random_views import RandomViews, check_views, random_views
from avit_jax.execution.work import image_gmacs, output_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.model.random_patches import (
    check_positions,
    check_tokens,
    config_of_tokens,
    cut,
    draw_positions,
    interpolated,
)
from avit_jax.train import step
from avit_jax.train.loop import train
from avit_jax.train.setup import prepare
from avit_jax.train.start import initial_model
from tests.harness.builders import answers, shrunk, small_config, spread_gate, tiny_experiment

STATIC = small_config(**NO_RULE)  # 12 x 8 pixels, patch 4: 3 x 2 patches
KEYS = jax.random.split(jax.random.key(3), 400)


def pictures(count: int = 3, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, 12, 8, 2)), jnp.float32)


def forward(model: AViT, images: jax.Array, positions: jax.Array | None = None) -> AViTOutput:
    """As one compiled program: each operation would be one of its own."""
    return _forward(*nnx.split(model), images, positions)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: nnx.GraphDef, state: nnx.State, images: jax.Array, positions: jax.Array | None) -> AViTOutput:
    return nnx.merge(graphdef, state).forward(images, positions=positions)[0]


def on_the_grid(count: int) -> jax.Array:
    rows, columns = np.divmod(np.arange(6), 2)
    return jnp.broadcast_to(4 * np.stack([rows, columns], 1), (count, 6, 2))


@pytest.mark.parametrize("rule", [NO_RULE, {}, {"rule": avit_jax.ToMe(r=1)}], ids=["static", "avit", "tome"])
def test_on_the_grid_nothing_changes(rule: dict[str, Any]) -> None:
    model, images = spread_gate(small_config(**rule)), pictures()
    expected = forward(model, images)
    found = forward(model, images, on_the_grid(3))
    np.testing.assert_array_equal(model.embed(images, positions=on_the_grid(3)), model.embed(images))
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-6)
    np.testing.assert_array_equal(found.token_depth, expected.token_depth)


@pytest.mark.parametrize("side", [7, 14])
def test_the_embedding_of_a_cell_is_its_own_for_every_size_of_patch(side: int) -> None:
    config = small_config(**NO_RULE, image_size=16 * side, patch_size=side)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((256, 16)), jnp.float32)
    cells = side * np.stack(np.divmod(np.arange(256), 16), axis=1)[None]
    found = jax.jit(lambda table, cells: interpolated(table, cells, config))(table, jnp.asarray(cells))
    np.testing.assert_array_equal(found[0], table)


@pytest.mark.parametrize("overrides", [{}, {"distilled": True}, {"num_registers": 3}], ids=str)
def test_tokens_are_those_of_a_slow_loop(overrides: dict[str, Any]) -> None:
    """Every patch from its pixels; its position from the four nearest cells; special tokens keep their own."""
    config = small_config(**NO_RULE, **overrides)
    model, images = spread_gate(config), pictures()
    positions = np.asarray(draw_positions(KEYS[:3], config))
    found = np.asarray(model.embed(images, positions=jnp.asarray(positions)))
    kernel, bias = np.asarray(model.patch_embed.proj.kernel[...]), np.asarray(model.patch_embed.proj.bias[...])
    table, pixels = np.asarray(model.pos_embed[...])[0], np.asarray(images)
    special = config.num_special
    for image in range(3):
        for patch, (top, left) in enumerate(positions[image]):
            token = pixels[image, top : top + 4, left : left + 4].reshape(-1) @ kernel + bias
            down, right = top / 4 - top // 4, left / 4 - left // 4
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                weight = (down if row else 1 - down) * (right if column else 1 - right)
                if weight:
                    token = token + weight * table[special + 2 * (top // 4 + row) + left // 4 + column]
            np.testing.assert_allclose(found[image, special + patch], token, atol=2e-5)
    plain = np.asarray(model.embed(images))
    np.testing.assert_array_equal(found[:, :special], plain[:, :special])


def test_positions_gradient_is_a_finite_difference() -> None:
    positions = draw_positions(KEYS[:2], STATIC)
    table = jnp.asarray(np.random.default_rng(0).standard_normal((6, 16)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((2, 6, 16)), jnp.float32)

    def total(table: jax.Array) -> jax.Array:
        return (interpolated(table, positions, STATIC) * weight).sum()

    gradient = jax.grad(total)(table)
    for cell in range(6):
        moved = table.at[cell, 3].add(0.5)
        assert float(total(moved) - total(table)) / 0.5 == pytest.approx(float(gradient[cell, 3]), abs=2e-4)


def test_the_order_of_patches_does_not_matter() -> None:
    model, images = spread_gate(small_config()), pictures()
    positions = draw_positions(KEYS[:3], STATIC)
    found = forward(model, images, positions)
    turned = forward(model, images, positions[:, ::-1])
    np.testing.assert_allclose(turned.logits, found.logits, atol=1e-5)
    np.testing.assert_array_equal(turned.token_depth[:, :0:-1], found.token_depth[:, 1:])


def test_uniform_places_reach_every_pixel_alike() -> None:
    drawn = np.asarray(draw_positions(KEYS, STATIC))
    assert drawn.shape == (400, 6, 2)
    for axis, places in ((0, 9), (1, 5)):  # 12 - 4 and 8 - 4, both included
        count = np.bincount(drawn[..., axis].ravel(), minlength=places)
        assert len(count) == places
        expected = 2400 / places
        assert ((count - expected) ** 2 / expected).sum() < 30, "chi-squared, 8 degrees of freedom at most"
    assert abs(np.corrcoef(drawn[..., 0].ravel(), drawn[..., 1].ravel())[0, 1]) < 0.07


def test_jitter_stays_near_its_cell_and_in_the_image() -> None:
    drawn = np.asarray(draw_positions(KEYS, STATIC, law="jitter"))
    moved = drawn - np.asarray(on_the_grid(400))
    assert np.abs(moved).max() == 2
    assert drawn.min() == 0 and (drawn.reshape(-1, 2).max(0) == (8, 4)).all()
    assert len(np.unique(moved[:, 2, 0])) == 5, "the middle row moves to both sides"


def test_fewer_patches_are_cells_in_order_without_repetition() -> None:
    drawn = np.asarray(draw_positions(KEYS, STATIC, law="grid", tokens=4)) // 4
    cells = drawn[..., 0] * 2 + drawn[..., 1]
    assert (np.diff(cells, axis=1) > 0).all()
    share = np.bincount(cells.ravel(), minlength=6) / 400
    np.testing.assert_allclose(share, 4 / 6, atol=0.1)


def test_a_part_of_the_images_is_cut_at_random() -> None:
    drawn = np.asarray(draw_positions(KEYS, STATIC, probability=0.3))
    random = (drawn != np.asarray(on_the_grid(400))).any((1, 2))
    assert 0.2 < random.mean() < 0.4
    np.testing.assert_array_equal(draw_positions(KEYS, STATIC, probability=0.0), on_the_grid(400))


def test_fewer_tokens_are_those_tokens_alone() -> None:
    """Four of the six patches: the logits of attention that is told to see only these."""
    model, images = spread_gate(STATIC), pictures()
    cells = jnp.array([0, 2, 3, 5])
    found = forward(model, images, on_the_grid(3)[:, cells])
    x, (graphdef, stacked) = model.embed(images), nnx.split(model.blocks)
    there = jnp.array([True, True, False, True, True, False, True])[None].repeat(3, 0)
    block = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, there))
    for layer in range(4):
        x = block(jax.tree.map(lambda p, layer=layer: p[layer], stacked), x)
    np.testing.assert_allclose(found.logits, model.head(model.norm(x[:, 0])), atol=1e-5)
    assert found.token_depth.shape == (3, 5)


@pytest.mark.parametrize(
    "rule",
    [avit_jax.ACT(4.0, 1.0), avit_jax.ConfidenceExit(0.5), avit_jax.Similarity(0.5), avit_jax.AttentionMass(0.9, (1,))],
    ids=lambda rule: rule.name,
)
def test_halting_rules_run_with_fewer_tokens(rule: Any) -> None:
    model, images = spread_gate(STATIC).with_config(rule=rule), pictures()
    positions = draw_positions(KEYS[:3], STATIC, tokens=4)
    output = forward(model, images, positions)
    assert output.token_depth.shape == (3, 5)
    alone = forward(model, images[1:2], positions[1:2])
    np.testing.assert_allclose(alone.logits[0], output.logits[1], atol=1e-5)


def test_work_of_fewer_tokens() -> None:
    config = config_of_tokens(STATIC, 4)
    assert config.num_tokens == 5
    gmacs = image_gmacs(config, jnp.full((1, 5), 4))
    block = 5 * (4 * 16**2 + 2 * 16 * 64) + 2 * 25 * 16
    assert float(gmacs[0]) * 1e9 == pytest.approx(4 * block + 4 * 32 * 16 + 16 * 5, rel=1e-6)


def test_random_inference_is_repeatable_and_a_mean() -> None:
    model, images = spread_gate(STATIC), pictures(6)
    two = RandomViews(tokens=4, views=2, seed=7)
    found, work = random_views(model, images, two)
    np.testing.assert_array_equal(found, random_views(model, images, two)[0])
    np.testing.assert_allclose(found[2:4], random_views(model, images[2:4], two)[0], atol=1e-6)
    assert np.abs(found - random_views(model, images, dataclasses.replace(two, seed=8))[0]).max() > 1e-3
    one, single = random_views(model, images, dataclasses.replace(two, views=1))
    four, _ = random_views(model, images, dataclasses.replace(two, views=4))
    np.testing.assert_allclose(work, 2 * single)
    assert np.abs(one - found).max() > 1e-3 and np.abs(four - found).max() > 1e-3
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    grid, _ = random_views(model, images, RandomViews(law="grid"))
    np.testing.assert_allclose(grid, jax.nn.softmax(answers(model, images).logits), atol=1e-6)


def test_random_inference_of_a_model_with_gates() -> None:
    rule = avit_jax.Gates(token_bias=0.0, bias=0.0)
    model, images = spread_gate(small_config(**NO_RULE | {"rule": rule})), pictures(6)
    output = answers(model, images)
    grid, work = random_views(model, images, RandomViews(law="grid"))
    np.testing.assert_allclose(grid, jax.nn.softmax(output.logits), atol=1e-6)
    np.testing.assert_allclose(work, output_gmacs(model.config, output, short_last_layer=True), rtol=1e-6)
    assert np.ptp(work) > 0, "gates decide for each image"
    _, fewer = random_views(model, images, RandomViews(tokens=2))
    assert float(fewer.mean()) < float(work.mean())


def test_figures_of_a_split(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    dataset = open_dataset(parse(config).data)
    model = initial_model(parse(config), dataset)
    found = evaluate_views(model, dataset.test, RandomViews(tokens=2, seed=1), batch_size=7)
    other = evaluate_views(model, dataset.test, RandomViews(tokens=2, seed=1), batch_size=24)
    right, losses, work = [], [], []
    for image, label in zip(dataset.test.images, dataset.test.labels, strict=True):  # each image alone
        pixels = normalize(image[None], model.config)
        probability, gmacs = random_views(model, pixels, RandomViews(tokens=2, seed=1))
        right.append(probability[0].argmax() == label)
        losses.append(-math.log(probability[0, label]))
        work.append(gmacs[0])
    np.testing.assert_array_equal(correct_images(found), right)
    assert found.pop("correct") == other.pop("correct")
    assert found == pytest.approx(other, abs=1e-6) and found["images"] == len(dataset.test)
    for name, values in (("top1", right), ("loss", losses), ("gmacs", work)):
        assert found[name] == pytest.approx(np.mean(values), rel=1e-4, abs=1e-9)


def trained(path: Path, workdir: Path, **augment: Any) -> Any:
    config = tiny_experiment(path)
    config.augment.update(augment)
    config.epochs, config.optim.warmup_steps = 3 * 12 / 87, 1
    settings = parse(config)
    dataset = open_dataset(settings.data)
    model = initial_model(settings, dataset)
    return nnx.to_pure_dict(nnx.state(train(settings, dataset, model, workdir).model))


def test_training_with_random_patches(tmp_path: Path) -> None:
    """With the law grid it is the training on the grid, with fewer tokens another one."""
    runs = [
        trained(tmp_path / "toy.npz", tmp_path / str(number), **augment)
        for number, augment in enumerate(
            [
                {},
                {"random_patches": 1.0, "random_law": "grid"},
                {"random_patches": 0.5, "random_tokens": 3},
            ]
        )
    ]

    def distance(a: Any, b: Any) -> float:
        return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))

    assert distance(runs[0], runs[1]) < 1e-5
    assert distance(runs[0], runs[2]) > 1e-3


def test_positions_do_not_depend_on_the_mesh() -> None:
    """Each image draws from its number in the batch, also if the batch is split over devices."""
    augment, key = AugmentSettings(random_patches=0.7), jax.random.key(1)
    whole = np.asarray(training_positions(key, 8, augment, STATIC))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    program = jax.jit(lambda key: training_positions(key, 8, augment, STATIC), out_shardings=rows)
    np.testing.assert_array_equal(program(key), whole)
    np.testing.assert_array_equal(training_positions(key, 5, augment, STATIC), whole[:5])


def test_training_draws_by_its_settings() -> None:
    key = jax.random.key(4)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 2), jnp.arange(40))
    for settings in ({"random_patches": 0.3}, {"random_law": "jitter", "random_patches": 1.0}, {"random_tokens": 4}):
        names = {"random_patches": "probability", "random_law": "law", "random_tokens": "tokens"}
        own = {"probability": 0.0} | {names[name]: value for name, value in settings.items()}
        found = training_positions(key, 40, AugmentSettings(**settings), STATIC)
        np.testing.assert_array_equal(found, draw_positions(keys, STATIC, **own))


def test_places_are_new_in_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def recorded(*arguments: Any) -> Any:
        positions = training_positions(*arguments)
        jax.debug.callback(lambda found: seen.append(np.asarray(found)), positions)
        return positions

    monkeypatch.setattr(step, "training_positions", recorded)
    trained(tmp_path / "toy.npz", tmp_path / "run", random_patches=1.0)
    jax.effects_barrier()
    assert len(seen) == 3
    assert all((a != b).any() for a, b in itertools.combinations(seen, 2))


def test_places_and_other_augmentation_have_keys_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr(mix, "draw_positions", lambda keys, *_, **__: taken.append(keys) or jnp.zeros((4, 6, 2), int))
    key = jax.random.key(3)
    training_positions(key, 4, AugmentSettings(random_patches=1.0), STATIC)
    for other in jax.random.split(key):  # of mixing and erasing
        of_images = jax.vmap(jax.random.fold_in, (None, 0))(other, jnp.arange(4))
        assert (jax.random.key_data(of_images) != jax.random.key_data(taken[0])).any(1).all()


def test_no_images_have_no_answers() -> None:
    model, none = spread_gate(STATIC), pictures()[:0]
    probabilities, gmacs = random_views(model, none, RandomViews())
    assert probabilities.shape == (0, 5) and gmacs.shape == (0,)
    for rule in (avit_jax.RandomPatches(0.5), avit_jax.RandomDrop(0.5, (1,))):
        assert answers(model.with_config(rule=rule), none).logits.shape == (0, 5)


def test_pixels_are_those_of_the_patch_embedding() -> None:
    model, images = AViT(STATIC, rngs=nnx.Rngs(0)), pictures()
    np.testing.assert_array_equal(cut(images, on_the_grid(3), 4), model.patch_embed.patches(images))


@pytest.mark.parametrize(
    ("augment", "model", "execution", "message"),
    [
        (
            {"random_tokens": 5},
            {},
            "auto",
            "config.augment.random_tokens is 5: give 0 (all) or a whole number up to the 4 patches",
        ),
        (
            {"random_patches": 0.5},
            {"rule": "positions(depths=3)", "gate_scale": None, "gate_center": None},
            "auto",
            "the rule positions has a depth for each cell of the grid and patches are cut at random",
        ),
        ({"random_tokens": 3}, {}, "planned", "config.execution is planned and config.augment.random_tokens 3"),
        (
            {"random_tokens": 3},
            {"rule": "tome(r=1)", "gate_scale": None, "gate_center": None},
            "auto",
            "config.augment.random_tokens is 3 and the rule tome fixes the number of tokens itself",
        ),
        (
            {"random_patches": 0.5},
            {"rule": "dynamicvit(keep_rate=0.7, layers=(2,))", "gate_scale": None, "gate_center": None},
            "auto",
            "config.loss.teacher_tokens_weight is 0.5 and patches are cut at random: the teacher's tokens are",
        ),
    ],
)
def test_what_cannot_be_is_said_before_training(
    augment: dict[str, Any], model: dict[str, Any], execution: str, message: str, tmp_path: Path
) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    config.augment.update(augment)
    for name, value in model.items():
        config.model[name] = value
    config.execution = execution
    settings = parse(config)
    dataset = open_dataset(settings.data)
    built = initial_model(settings, dataset)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=re.escape(message)):
        prepare(settings, built, mesh, len(dataset.train))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"law": "gird"}, "the law of random patches is 'gird': choose one of uniform, jitter, grid"),
        ({"views": 0}, "views is 0: give a whole number from 1 and below 2^31"),
        ({"tokens": -1}, "tokens is -1: give a whole number from 0 and below 2^31"),
        ({"seed": 2**40}, "seed is 1099511627776: give a whole number from 0 and below 2^31"),
    ],
)
def test_wrong_views_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RandomViews(**wrong)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="config.augment.random_patches is 1.5: it must be a probability"):
        AugmentSettings(random_patches=1.5)
    with pytest.raises(ValueError, match="config.augment.random_law 'anywhere' is unknown"):
        AugmentSettings(random_law="anywhere")
    with pytest.raises(ValueError, match="^tokens is 7: give 0"):
        random_views(spread_gate(STATIC), pictures(), RandomViews(tokens=7))
    with pytest.raises(ValueError, match="how is .*dict.*: give avit_jax.RandomViews"):
        check_views(spread_gate(STATIC), {"tokens": 3})
    by_position = spread_gate(STATIC).with_config(rule=avit_jax.PositionDepths(3.0))
    with pytest.raises(ValueError, match="the law of random patches is 'jitter' and the rule positions has a depth"):
        random_views(by_position, pictures(), RandomViews(law="jitter"))
    for probability in (2.0, math.nan):
        with pytest.raises(ValueError, match=f"the probability of random patches is {probability}: give a number"):
            draw_positions(KEYS, STATIC, probability=probability)
    for tokens in (2.5, True):
        with pytest.raises(ValueError, match=f"tokens is {tokens}: give 0 .all. or a whole number up to the 6"):
            check_tokens(tokens, STATIC, "tokens")
    with pytest.raises(ValueError, match="the rule tome fixes the number of tokens for 6 patches and there are 4"):
        random_views(spread_gate(STATIC).with_config(rule=avit_jax.ToMe(r=1)), pictures(), RandomViews(tokens=4))


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (on_the_grid(2), r"are int32 of shape \(2, 6, 2\): give integers \[3, patches, 2\]"),
        (on_the_grid(3).astype(jnp.float32), "are float32 of shape"),
        (on_the_grid(3)[..., 0], r"of shape \(3, 6\)"),
        (
            on_the_grid(3) + jnp.array([0, 1]),
            r"cut at \[0 1\] to \[8 5\], row and column: give corners from 0 to 8 and 4",
        ),
        (on_the_grid(3) - 1, r"cut at \[-1 -1\] to"),
    ],
)
def test_wrong_positions_are_named(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_positions(positions, 3, STATIC)


def test_the_model_checks_its_positions() -> None:
    with pytest.raises(ValueError, match="a patch is cut at"):
        spread_gate(STATIC).embed(pictures(), positions=on_the_grid(3) - 1)


def test_a_part_of_the_training_images(tmp_path: Path) -> None:
    config = tiny_experiment(tmp_path / "toy.npz")
    whole = open_dataset(parse(config).data)
    config.data.train_images = 30
    part = open_dataset(parse(config).data)
    assert len(part.train) == 30 and len(part.test) == len(whole.test)
    assert np.bincount(part.train.labels).min() >= 9, "they are spread over the classes"
    config.data.train_images = 88
    with pytest.raises(ValueError, match="config.data.train_images is 88 and there are 87 training images"):
        open_dataset(parse(config).data)


def test_fewer_patches_as_a_rule() -> None:
    """It is the model that is given the cells that it draws, and nothing else."""
    rule = avit_jax.RandomPatches(keep_rate=0.5)
    assert rule.counts(STATIC) == (4, 4, 4, 4)
    model, images = spread_gate(STATIC), pictures()
    output, reduced = shrunk(model, images, rule)
    cells = np.stack([np.flatnonzero(slots[1:] < 4) for slots in reduced.slots[0]])
    assert cells.shape == (3, 3) and len(np.unique(cells)) > 3
    positions = np.take_along_axis(np.asarray(on_the_grid(3)), cells[..., None], axis=1)
    np.testing.assert_allclose(output.logits, forward(model, images, jnp.asarray(positions)).logits, atol=1e-5)
    with pytest.raises(ValueError, match=r"RandomPatches' layers are \(1,\): leave them out"):
        avit_jax.RandomPatches(0.5, layers=(1,))


@pytest.mark.parametrize(("law", "expected"), [("uniform", 0.39), ("jitter", 0.275)])
def test_the_part_of_an_image_that_is_left_unseen(law: str, expected: float) -> None:
    """Of 28 x 28 pixels with 49 patches of 4 x 4, as docs/neighbours.md says."""
    config = AViTConfig(image_size=28, patch_size=4)
    unseen = []
    for places in np.asarray(draw_positions(KEYS, config, law=law)):
        seen = np.zeros((28, 28), bool)
        for top, left in places:
            seen[top : top + 4, left : left + 4] = True
        unseen.append(1 - seen.mean())
    assert np.mean(unseen) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    "rule", [avit_jax.RandomPatches(0.5), avit_jax.DynamicViT(0.5, (1, 3)), avit_jax.RandomDrop(0.5, (1,))]
)
def test_executed_depth_is_what_layers_read(rule: Any) -> None:
    """No layer computes a patch that was dropped before it; the rule's depths are what is executed."""
    model = spread_gate(STATIC).with_config(rule=rule)
    program = avit_jax.compile(model, 3)
    depth = np.asarray(program(pictures()).token_depth)
    assert program.executed(depth, 3).slots == depth.sum()
