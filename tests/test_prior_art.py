"""The fine-tuned comparison of rules: its settings meet their budgets, its controls are what they say."""

import dataclasses
import json
import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avit_jax import AViT
from avit_jax.commands.typed_config import parse
from avit_jax.execution.work import shrinking_gmacs
from avit_jax.model.config import NO_RULE
from avit_jax.rules import parse_rule
from configs import prior_art, scattered
from tests.harness.builders import answers, small_config
from tests.harness.command_server import ROOT, run_command

FIXED = [(method, work) for method, settings in prior_art.SETTINGS.items() for work in settings]


def whole_layer(tokens: int) -> int:
    """Multiply-adds of a layer of the static model: width 64, MLP 256."""
    return tokens * (4 * 64**2 + 2 * 64 * 256) + 2 * tokens**2 * 64


@pytest.mark.parametrize(("method", "work"), FIXED)
def test_a_setting_meets_its_budget(method: str, work: str) -> None:
    rule = parse_rule(parse(prior_art.get_config(f"{method},{work}")).model.rule)
    assert rule.name == method
    assert prior_art.share(dataclasses.replace(prior_art.STATIC, rule=rule)) == pytest.approx(float(work), rel=0.01)


@pytest.mark.parametrize("method", scattered.SETTINGS)
def test_a_setting_for_scattered_items_meets_its_budget(method: str) -> None:
    config = scattered.get_config(method)
    vit = dataclasses.replace(prior_art.STATIC, image_size=config.model.image_size)
    rest = 196 * 16 * 64 + 64 * 10  # patch embedding and head
    whole = (12 * whole_layer(197) + rest) / 1e9
    found = shrinking_gmacs(dataclasses.replace(vit, rule=parse_rule(config.model.rule)), short_last_layer=True)
    assert found / whole == pytest.approx(float(scattered.WORK), rel=0.01)


def test_training_on_scattered_items_is_that_of_the_comparison() -> None:
    """The objective and the rates are the same; the data, the length and the static model are its own."""
    for method in scattered.METHODS:
        work = {"layers": str(scattered.LAYERS), "static": ""}.get(method, scattered.WORK)
        ours, theirs = scattered.get_config(method), prior_art.get_config(f"{method},{work}")
        assert (ours.loss, ours.optim, ours.batch_size) == (theirs.loss, theirs.optim, theirs.batch_size)
        assert (ours.epochs, ours.data.source, ours.teacher) == (1, "scattered", scattered.STATIC_MODEL)
    with pytest.raises(ValueError, match="'tme' is not one of dense, static, "):
        scattered.get_config("tme")


@pytest.mark.parametrize("work", ["0.71", "0.6", "0.49"])
def test_the_work_of_tome_counted_by_hand(work: str) -> None:
    """r tokens merge between attention and MLP of every layer; the last layer computes the class token alone."""
    rule = parse_rule(prior_art.SETTINGS["tome"][work])
    r = rule.r  # type: ignore[union-attr]
    rest = 49 * 16 * 64 + 64 * 10  # patch embedding and head
    first = sum(whole_layer(n) - r * 2 * 64 * 256 for n in range(50, 50 - 11 * r, -r))
    keys = 50 - 11 * r
    last = keys * 2 * 64**2 + 2 * 64**2 + 2 * keys * 64 + 2 * 64 * 256
    share = (first + last + rest) / (12 * whole_layer(50) + rest)
    assert share == pytest.approx(float(work), rel=0.01)
    assert prior_art.share(dataclasses.replace(prior_art.STATIC, rule=rule)) == pytest.approx(share, rel=1e-6)


def test_every_method_has_the_same_training() -> None:
    """Except for learning rate, rule and A-ViT's own keys, all configs agree."""

    def common(arg: str) -> dict[str, object]:
        config = prior_art.get_config(arg)
        loss = ("distillation", "distillation_weight", "distillation_temperature", "label_smoothing")
        return {
            "loss": [config.loss[name] for name in loss],
            "optim": {name: value for name, value in config.optim.items() if name != "learning_rate"},
            "length": (config.epochs, config.batch_size),
            "from": (config.init_from, config.teacher, config.data.to_dict(), config.augment.to_dict()),
        }

    static = common("static")
    assert static["length"] == (2, 100)
    for method in prior_art.RATES.keys() - {"act", "layers", "image", "dynamicvit_own"}:
        assert common(method if method in ("static", "confidence") else f"{method},0.49") == static, method


def test_rates_are_the_best_of_the_search() -> None:
    """Every method whose search is complete has the rate with the best validation top-1; ties go to the lower rate."""
    found: dict[str, dict[float, float]] = {}
    for file in (ROOT / "benchmarks" / "prior_art" / "rates").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["method"], {})[float(file.stem.rpartition("_")[2])] = result["validation_top1"]
    complete = {method: tops for method, tops in found.items() if tops.keys() == set(prior_art.RATES_TRIED)}
    assert "static" in complete
    for method, tops in complete.items():
        assert prior_art.RATES[method] == min(tops, key=lambda rate: (-tops[rate], rate)), method


def test_first_layers_are_those_of_the_model() -> None:
    """The shorter model's logits are head and norm of the whole model's tokens after as many layers."""
    model = AViT(small_config(**NO_RULE), rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).standard_normal((2, 12, 8, 2)).astype(np.float32)
    x, (graphdef, stacked) = model.embed(jnp.asarray(images)), nnx.split(model.blocks)
    for layer in range(3):
        x = nnx.merge(graphdef, jax.tree.map(operator.itemgetter(layer), stacked))(x)
    shorter = prior_art.first_layers(model, 3)
    assert shorter.config.depth == 3
    np.testing.assert_allclose(answers(shorter, images).logits, model.head(model.norm(x[:, 0])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("tme,0.71", "'tme' is not one of static, "),
        ("tome,0.7", "tome has no settings for work '0.7': give 0.71 or 0.6 or 0.49"),
        ("tome", "tome has no settings for work ''"),
        ("confidence,0.71", "confidence has no WORK: leave out ',0.71'"),
        ("layers,0.71", "'0.71' is not a number: layers,9 is the first 9 layers"),
        ("image", "'' is not a number: image,24 is images of 24x24 pixels"),
    ],
)
def test_what_is_not_there_is_named(arg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior_art.get_config(arg)


def test_positions_have_no_depths_of_their_own() -> None:
    with pytest.raises(ValueError, match="the rule positions lacks the field depths"):
        parse(prior_art.get_config("positions,0.71"))


@pytest.fixture(scope="module")
def listed() -> list[str]:
    """What --list prints."""
    return run_command(["benchmarks/prior_art.py", "--list"], environment=dict(os.environ)).stdout.splitlines()


def test_rows_have_names_of_their_own(listed: list[str]) -> None:
    names = [line.split()[0] for line in listed]
    assert len(names) == len(set(names)) > 30
    some = ("static_s0", "avit_0.49_s2", "tome_0.71_s0", "layers_9_s1", "pondernet_sampled_0.49_s0")
    assert {*some, "scattered_avit_0.6_at_0.5_s0"} <= set(names)
    wrong = run_command(["benchmarks/prior_art.py", "--list", "--only=static_s9"], environment=dict(os.environ))
    assert wrong.returncode == 2 and "static_s9" in wrong.stderr


def test_a_model_at_a_budget_it_was_not_trained_for_is_a_method_of_its_own(listed: list[str]) -> None:
    """On Scattered Fashion-MNIST, where every method has one training, it is the method itself."""
    label = {line.split()[0]: line[50:] for line in listed}
    assert label["tome_0.49_at_0.6_s0"] == "ToMe, trained at 49%"
    assert label["avit_hidden_0.49_at_0.71_s0"] == "A-ViT, gate from hidden units, trained at 49%"
    assert label["tome_0.49_s0"] == label["scattered_tome_0.6_at_0.5_s0"] == "tome"
