"""Typed settings: what a config may hold, what a refusal says, and what a resumed run may change."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from avit_jax.commands.config_files import load_config
from avit_jax.commands.config_help import config_help
from avit_jax.commands.typed_config import config_dict, parse
from avit_jax.data.settings import AugmentSettings, DataSettings
from avit_jax.halting.avit import AViTGate
from avit_jax.halting.avit_losses import AViTLoss
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.reduction.tome import ToMe
from avit_jax.rules import RuleLosses, losses_of
from avit_jax.runtime.files import write_json
from avit_jax.runtime.mesh import MeshSettings
from avit_jax.runtime.settings import Settings, flat, keys, part, setting
from avit_jax.train.objective import ClassificationLoss
from avit_jax.train.optim import OptimSettings
from avit_jax.train.run_folder import check_folder
from avit_jax.train.settings import TrainSettings

KEYS = keys(TrainSettings)
# Every shipped config, as version 0.1 gave it (commit c280a57): mnist_dense whole, of the others what differs from it.
RECORDED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "config_values.json").read_text())


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Every key joined by dots, as JSON has it."""
    return flat(json.loads(json.dumps(config)))


def nested(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


def refusal(key: str, value: Any) -> str:
    """What a config says in which one key has this value; empty where it is taken."""
    try:
        TrainSettings.from_config(nested(key, value))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("spec", RECORDED)
def test_every_shipped_config_has_the_values_that_it_always_had(spec: str) -> None:
    settings = parse(load_config(spec))
    expected = plain(TrainSettings().to_config()) | RECORDED["mnist_dense"] | RECORDED[spec]
    assert plain(settings.to_config()) == expected
    assert plain(load_config(spec).to_dict()) == expected


def test_a_key_of_today_is_not_among_the_recorded_ones_by_mistake() -> None:
    assert RECORDED["mnist_dense"].keys() <= KEYS.keys()


def test_the_base_config_holds_every_key_and_its_default() -> None:
    config = load_config("base")
    assert plain(config.to_dict()) == plain(TrainSettings(name="base").to_config())
    assert plain(config.to_dict()).keys() == KEYS.keys()
    assert config.model.get_type("depth") is int and config.model.get_type("dtype") is str


def test_every_key_is_explained_in_a_line() -> None:
    for name, field in KEYS.items():
        text = field.metadata["help"]
        assert 10 < len(text) < 160 and text.endswith(".") and "\n" not in text, name
        assert field.metadata["resume"] in ("never", "free", "log"), name


BOUNDS: list[tuple[str, float, float, str]] = [  # the key, the bound, a value beyond it, what is said
    *((name, 1, 0, "at least 1") for name in ("batch_size", "eval_batch_size", "log_every", "eval_every")),
    *((name, 1, 0, "at least 1") for name in ("checkpoint_every", "keep_checkpoints", "accumulation")),
    *((name, 0, -1, "at least 0") for name in ("keep_every", "keep_best", "epochs", "gate_start.images")),
    *((f"loss.{name}", 0, -0.1, "at least 0") for name in ("ponder_weight", "prior_weight", "label_smoothing")),
    *((f"loss.{name}_weight", 0, -0.1, "at least 0") for name in ("keep_ratio", "teacher_logits", "teacher_tokens")),
    *((f"loss.{name}_weight", 0, -0.1, "at least 0") for name in ("second_pass", "agreement")),
    ("loss.distillation_weight", 0, -0.1, "at least 0"),
    ("loss.geometric_weight", 0, -0.1, "at least 0"),
    ("loss.gate_weight", 0, -0.1, "at least 0"),
    *((f"loss.{part}_target", 0, -0.1, "at least 0") for part in ("token", "head", "sublayer")),
    *((f"loss.{part}_target", 1, 1.1, "at most 1") for part in ("token", "head", "sublayer")),
    ("augment.random_tokens", 0, -1, "at least 0"),
    ("data.train_images", 0, -1, "at least 0"),
    ("loss.distillation_weight", 1, 1.1, "at most 1"),
    *((f"optim.{name}", 0, -0.1, "at least 0") for name in ("learning_rate", "final_learning_rate", "weight_decay")),
    *((f"optim.{name}", 0, -0.1, "at least 0") for name in ("clip_norm", "beta1", "beta2", "ema_decay", "rule_factor")),
    *((f"optim.{name}", 0, -1, "at least 0") for name in ("warmup_steps", "warmup_epochs", "frozen_steps")),
    *((f"optim.{name}", 0, -1, "at least 0") for name in ("reference_batch", "warmup_learning_rate")),
    *((f"augment.{name}", 0, -0.1, "at least 0") for name in ("color_jitter", "mixup", "cutmix")),
    ("data.repeated_augmentation", 1, 0, "at least 1"),
    # These bounds are excluded: just inside is taken, the bound itself is refused.
    ("loss.prior_deviation", 1e-9, 0, "above 0"),
    ("loss.distillation_temperature", 1e-9, 0, "above 0"),
    *((f"optim.{name}", 1 - 1e-9, 1, "below 1") for name in ("beta1", "beta2", "ema_decay")),
    ("loss.label_smoothing", 1 - 1e-9, 1, "below 1"),
]


@pytest.mark.parametrize(("key", "good", "bad", "rule"), BOUNDS)
def test_a_number_is_taken_at_its_bound_and_refused_beyond(key: str, good: float, bad: float, rule: str) -> None:
    kind = float if KEYS[key].type is float else int
    assert refusal(key, kind(good)) == ""
    assert refusal(key, kind(bad)) == f"config.{key} is {kind(bad)!r}: it must be {rule}"
    if kind is float:
        assert refusal(key, float("nan")) == f"config.{key} is nan: it must be " + (
            # of two bounds the lower is asked for first
            "at least 0" if KEYS[key].metadata.get("least") == 0 else rule
        )
        assert refusal(key, float("inf")) != ""


def test_every_bound_is_tried_above() -> None:
    bounds = ("least", "above", "most", "below")
    declared = {(name, bound) for name, field in KEYS.items() for bound in bounds if bound in field.metadata}
    words = {"at least": "least", "above": "above", "at most": "most", "below": "below"}
    assert declared == {(key, words[rule.rpartition(" ")[0]]) for key, _, _, rule in BOUNDS}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("epocs", 1, "config has no key 'epocs': did you mean 'epochs'?"),
        ("optim.learning_rat", 1, "config.optim has no key 'learning_rat': did you mean 'learning_rate'?"),
        ("loss.pondr_weight", 1, "config.loss has no key 'pondr_weight': did you mean 'ponder_weight'?"),
        ("loss.distilation", "", "config.loss has no key 'distilation': did you mean 'distillation'?"),
        ("loss", 3, "config.loss is 3: it must hold keys and values"),
        ("epochs", "many", "config.epochs is 'many': it must be a finite number"),
        ("epochs", float("inf"), "config.epochs is inf: it must be a finite number"),
        ("augment.rotate", float("nan"), "config.augment.rotate is nan: it must be a finite number"),
        ("batch_size", 2.5, "config.batch_size is 2.5: it must be a whole number"),
        ("batch_size", True, "config.batch_size is True: it must be a whole number"),
        ("optim.compare_ema", 1, "config.optim.compare_ema is 1: it must be True or False"),
        ("name", None, "config.name is None: it must be text"),
        ("on_nan", "go on", "config.on_nan 'go on' is unknown: choose 'stop' or 'roll back'"),
        ("loss.prior", "bell", "config.loss.prior 'bell' is unknown: choose 'official' or 'kl'"),
        ("loss.distillation", "sof", "config.loss.distillation 'sof' is unknown: choose 'none', 'hard' or 'soft'"),
        ("optim.schedule", "day", "config.optim.schedule 'day' is unknown: choose 'step' or 'epoch'"),
        ("data.source", "foldr", "config.data.source 'foldr' is unknown: did you mean 'folder'?"),
        ("data.on_bad_image", "x", "config.data.on_bad_image 'x' is unknown: choose 'raise' or 'skip'"),
        ("mesh.data", 0, "config.mesh is data=0, fsdp=1: give numbers of devices, or data=-1 for the rest"),
        ("mesh.fsdp", 0, "config.mesh is data=-1, fsdp=0: give numbers of devices, or data=-1 for the rest"),
        ("accumulation", 3, "config.batch_size 100 is not a multiple of config.accumulation 3"),
        ("profile", "20", "--profile or config.profile '20' is not START:STEPS: give two numbers from 1, as 20:5"),
        (
            "teacher",
            "x",
            "config.teacher is 'x' and config.loss.distillation 'none': give a teacher and hard or soft, or neither",
        ),
        ("model.depth", 1.5, "config.model.depth is 1.5: it must be a whole number or None"),
        ("model.image_size", "big", "config.model.image_size is 'big': it must be a number, or (height, width)"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_key_the_value_and_the_fix(key: str, value: Any, sentence: str) -> None:
    assert refusal(key, value) == sentence


def test_a_room_checks_its_settings_without_a_config_too() -> None:
    for make, key in (
        (lambda: OptimSettings(beta1=1.0), "config.optim.beta1 is 1.0"),
        (lambda: AViTLoss(prior="bell"), "config.loss.prior 'bell'"),
        (lambda: ClassificationLoss(label_smoothing=-0.5), "config.loss.label_smoothing is -0.5"),
        (lambda: DataSettings(crop_fraction=2.0), "config.data.crop_fraction is 2.0"),
        (lambda: AugmentSettings(flip=1.5), "config.augment.flip is 1.5"),
        (lambda: MeshSettings(fsdp=0), "config.mesh is data=-1, fsdp=0"),
        (lambda: dataclasses.replace(TrainSettings(), accumulation=7), "config.batch_size 100 is not a multiple"),
    ):
        with pytest.raises(ValueError, match=re.escape(key)):
            make()


def test_one_section_fills_two_rooms_and_keeps_its_keys() -> None:
    settings = TrainSettings.from_config({"loss": {"label_smoothing": 0.25, "ponder_weight": 2}})
    assert settings.classification == ClassificationLoss(label_smoothing=0.25)
    assert settings.rule_loss.of(AViTGate(10.0, 30.0)) == AViTLoss(ponder_weight=2.0)
    assert settings.rule_loss.of(ConfidenceExit(0.9)) is None
    assert settings.to_config()["loss"].keys() >= RECORDED_LOSS
    assert TrainSettings.from_config(settings.to_config()) == settings
    assert parse(config_dict(settings)) == settings


RECORDED_LOSS = {name.removeprefix("loss.") for name in RECORDED["mnist_dense"] if name.startswith("loss.")}


def test_values_are_kept_in_their_fields_types() -> None:
    settings = TrainSettings.from_config({"epochs": 3, "data": {"mean": [0, 1], "class_names": ["a"]}, "model": {}})
    assert type(settings.epochs) is float
    assert settings.data.mean == (0.0, 1.0) and type(settings.data.mean[0]) is float
    assert settings.data.class_names == ("a",)
    assert hash(settings) == hash(TrainSettings.from_config(settings.to_config()))


def test_no_two_rooms_own_one_key() -> None:
    names = [field.name for kind in (ClassificationLoss, RuleLosses) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_a_rule_brings_its_own_keys_of_the_loss() -> None:
    @dataclasses.dataclass(frozen=True)
    class GeometricLoss(Settings):
        section = "loss"
        divergence_weight: float = setting(0.01, "Weight of the divergence.", least=0)

        def __post_init__(self) -> None:
            super().__post_init__()
            self.check("divergence_weight", self.divergence_weight != 7, "anything but 7")

    class Geometric(ConfidenceExit):
        loss_settings = GeometricLoss

    losses = losses_of([AViTGate, Geometric, AViTGate, ToMe])
    found = losses.from_config({"divergence_weight": 2, "prior": "official"})
    assert found.of(Geometric(0.9)) == GeometricLoss(2.0)
    assert found.of(AViTGate(10.0, 30.0)) == AViTLoss(prior="official")
    assert found.of(ToMe(8)) is None and found.of(None) is None
    for wrong, sentence in ((-1, "must be at least 0"), (7, "must be anything but 7")):
        with pytest.raises(ValueError, match=rf"config\.loss\.divergence_weight is {wrong}\.0: it {sentence}"):
            losses.from_config({"divergence_weight": wrong})


# Runs that go on

MAY_CHANGE = [
    "checkpoint_every",
    "data.path",
    "data.threads",
    "data.workers",
    "keep_best",
    "keep_checkpoints",
    "keep_every",
    "mesh.data",
    "mesh.fsdp",
    "on_nan",
    "peak_tflops",
    "profile",
]
CHANGE_THE_LOG = ["eval_batch_size", "eval_every", "log_every"]


def other(value: Any) -> Any:
    """Another value of the type, which a run may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if value > 0 else 1
    if isinstance(value, float):
        return 0.3 if value == 0.5 else value / 2 + 0.25
    return (0.5,)


OTHERS = {
    "data.source": "idx", "data.interpolation": "nearest", "data.on_bad_image": "skip", "data.class_names": ("a",),
    "augment.crop_ratio": (1.0, 2.0), "augment.crop_scale": (0.5, 1.0), "on_nan": "roll back", "profile": "3:4",
    "gate_start.features": "hidden", "loss.prior": "official", "optim.schedule": "epoch",
    "model.preset": "deit_tiny_patch16_224",
    "augment.randaugment": "rand-m9-mstd0.5-inc1", "loss.distillation": "soft", "model.pool": "norm_mean",
    "model.dtype": "bfloat16", "model.rule": "tome(r=2)", "data.mean": (0.5,), "data.std": (0.5,),
    "accumulation": 2, "execution": "masked", "mesh.data": 1, "loss.gate_form": "paper", "augment.random_law": "jitter",
}  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run of the defaults that has a checkpoint."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    write_json(tmp_path / "train_config.json", {"config": TrainSettings().to_config()})
    return tmp_path


@pytest.mark.parametrize("key", KEYS)
def test_what_a_resumed_run_may_change(key: str, begun: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = plain(TrainSettings().to_config())[key]
    if key in OTHERS or not isinstance(now, str | None):
        value = OTHERS[key] if key in OTHERS else other(now)
    else:
        kind = str(KEYS[key].type)
        value = True if "bool" in kind else 0.5 if "float" in kind else 2 if "str" not in kind else "another"
    config = nested(key, value)
    if key in ("teacher", "loss.distillation"):  # neither without the other
        config = {"teacher": "another", "loss": {"distillation": "soft"}}
        key, now = "loss.distillation", "none"
    settings = TrainSettings.from_config(config)
    if key in MAY_CHANGE:
        check_folder(settings, begun, resume=True)
        assert capsys.readouterr().out == ""
    elif key in CHANGE_THE_LOG:
        check_folder(settings, begun, resume=True)
        assert f"config.{key} was {now!r} and is now {value!r}: the log changes from here on" in capsys.readouterr().out
    else:
        shown = json.loads(json.dumps(OTHERS.get(key, value)))
        sentence = f"{begun} holds a run with config.{key}={now!r}, this one has {shown!r}: give another --workdir"
        with pytest.raises(ValueError, match=re.escape(sentence)):
            check_folder(settings, begun, resume=True)


def test_an_old_run_that_lacks_keys_goes_on_with_their_defaults(begun: Path) -> None:
    old = TrainSettings().to_config()
    for section, name in (("optim", "compare_ema"), ("model", "pool"), ("data", "repeated_augmentation")):
        del old[section][name]
    del old["accumulation"], old["mesh"]
    write_json(begun / "train_config.json", {"config": old})
    check_folder(TrainSettings(), begun, resume=True)
    with pytest.raises(ValueError, match=r"config\.accumulation=1, this one has 2"):
        check_folder(TrainSettings(accumulation=2), begun, resume=True)


def test_a_key_of_a_later_version_is_not_forgotten(begun: Path) -> None:
    write_json(begun / "train_config.json", {"config": TrainSettings().to_config() | {"new_key": 7}})
    with pytest.raises(ValueError, match=r"holds a run with config\.new_key=7, this one has None"):
        check_folder(TrainSettings(), begun, resume=True)


@pytest.mark.parametrize("name", ["mnist_dense", "fashion_mnist_dense", "fashion_mnist_avit"])
def test_the_shipped_runs_of_earlier_versions_go_on(name: str, tmp_path: Path) -> None:
    """A run with the settings in their files, which have fewer keys."""
    old = json.loads((Path(__file__).parents[1] / "checkpoints" / name / "train_config.json").read_text())
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    write_json(tmp_path / "train_config.json", old)
    known = {key: value for key, value in flat(old["config"]).items() if key in KEYS}
    config: dict[str, Any] = {}
    for key, value in known.items():
        section, _, last = key.rpartition(".")
        (config.setdefault(section, {}) if section else config)[last] = value
    assert known == flat(old["config"]), "no key was ever taken away"
    check_folder(TrainSettings.from_config(config), tmp_path, resume=True)


# --help_config


def table(page: str) -> dict[str, str]:
    """Each key of the page with its line."""
    lines = [line for line in page.splitlines() if line[:2] in ("  ", "* ") and line[2:3].strip()]
    return {line[2:].split()[0]: line for line in lines[1:]}


@pytest.mark.parametrize("columns", ["60", "80", "120", "200"])
def test_help_config_prints_every_key_with_value_default_and_meaning(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    config = load_config("fashion_mnist:avit")
    page = config_help(config)
    found = table(page)
    assert found.keys() == KEYS.keys()
    given, defaults = flat(config.to_dict()), flat(TrainSettings().to_config())
    for key, line in found.items():
        assert line.startswith("* ") == (given[key] != defaults[key]), key
    assert found["epochs"].split()[:4] == ["*", "epochs", "6.0", "100.0"]
    words = " ".join(page.split())
    for part_of_help in ("Passes over the training images.", "Images in a training step, over all devices."):
        assert part_of_help in words
    if int(columns) >= 80:
        assert max(map(len, page.splitlines())) <= int(columns)


def test_help_config_shows_what_the_command_line_changed() -> None:
    config = load_config("base")
    assert sum(line.startswith("* ") for line in config_help(config).splitlines()) == 1, "its name"
    config.optim.beta1 = 0.25
    line = table(config_help(config))["optim.beta1"]
    assert line.split()[:4] == ["*", "optim.beta1", "0.25", "0.9"]


def test_help_config_of_evaluation_shows_what_it_reads() -> None:
    shown = table(config_help(load_config("mnist_avit"), ("name", "data", "eval_batch_size")))
    assert shown.keys() == {key for key in KEYS if key in ("name", "eval_batch_size") or key.startswith("data.")}


def test_settings_may_be_nested_by_anyone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Inner(Settings):
        section = "inner"
        size: int = setting(3, "A size.", least=2)
        names: tuple[str, ...] = setting((), "Names.")

    @dataclasses.dataclass(frozen=True)
    class Outer(Settings):
        inner: Inner = part(Inner)
        rate: float | None = setting(None, "A rate.", below=1)

    assert Outer.from_config({}).to_config() == {"inner": {"size": 3, "names": ()}, "rate": None}
    assert Outer.from_config({"inner": {"size": 5}, "rate": 0}).inner.size == 5
    assert list(keys(Outer)) == ["rate", "inner.size", "inner.names"]
    with pytest.raises(ValueError, match=r"^config\.inner\.size is 1: it must be at least 2$"):
        Outer.from_config({"inner": {"size": 1}})
    with pytest.raises(ValueError, match=r"^config\.rate is 'x': it must be a finite number or None$"):
        Outer.from_config({"rate": "x"})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "mnist"),
        ({"source": "folder", "path": "/data/birds/"}, "birds"),
        ({"source": "tfds", "name": "cifar10:3.0.2"}, "cifar10:3.0.2"),
        ({"source": "scattered", "path": "/data/fashion"}, "scattered fashion"),
        ({"source": "scattered"}, "scattered"),
    ],
)
def test_data_have_a_short_name(fields: dict[str, str], name: str) -> None:
    assert DataSettings(**fields).shown_name == name
