"""The page as a file, and in a real browser where chromium is installed."""

import base64
import copy
import dataclasses
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import avit_jax
from avit_jax import AViT, Preprocessing
from avit_jax.data.preprocessing import normalize
from avit_jax.data.sources import Split
from avit_jax.evaluate.figures import evaluate
from avit_jax.evaluate.sweep import Sweep
from avit_jax.execution.compiled import predict
from avit_jax.execution.work import image_gmacs
from avit_jax.halting.confidence import ConfidenceExit
from avit_jax.reduction.tome import ToMe
from avit_jax.report import gallery, throughput, writer
from avit_jax.report.page import interval, percent, render
from avit_jax.report.writer import Subject, write_report
from avit_jax.runtime.files import read_json
from tests.harness.browser import chromium
from tests.harness.builders import small_config, spread_gate

EVIL = "<script>alert('x')</script>"
NAMES = (EVIL, 'cat & "dog"', "$x_{\ud800\x1b", "7", "é")
SHOWN = (EVIL, 'cat & "dog"', r"$x_{\ud800\x1b", "7", "é")
CONFIG = small_config(in_channels=1, class_names=NAMES, depth=3, preprocessing=Preprocessing((0.5,), (0.2,)))


def drawn_split(count: int, labelled: bool = True) -> Split:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 12, 8, 1)).astype(np.uint8)
    labels = np.arange(count) % 5 if labelled else np.full(count, -1)
    return Split(images, labels.astype(np.int32))


def written(folder: Path, model: AViT, split: Split, **more: Any) -> tuple[str, dict[str, Any]]:
    subject = Subject(EVIL, model, evaluate(model, split, 16, "packed"))
    page = write_report(folder, subject, split, data="<b>data</b>", batch_size=16, **more)
    return page.read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def short_timing() -> Iterator[None]:
    """One batch size and short samples: most of a small page's time would be timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "FACTORS", (1,))
        patch.setattr(throughput, "SAMPLE_SECONDS", 0.001)
        yield


RENDERED: list[tuple[dict[str, Any], dict[str, Any]]] = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fullest page, and in RENDERED what it was rendered from."""
    folder = tmp_path_factory.mktemp("report")

    def recording(report: dict[str, Any], pictures: dict[str, Any]) -> str:
        RENDERED.append((report, pictures))
        return render(report, pictures)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "render", recording)
        _write_fullest(folder)
    return folder


def _write_fullest(folder: Path) -> None:
    split, other = drawn_split(40), spread_gate(dataclasses.replace(CONFIG, gate_scale=None, gate_center=None), 1)
    baseline = Subject("dense & plain", other, evaluate(other, split, 16))
    written(folder, spread_gate(CONFIG), split, baseline=baseline, sweep=Sweep("gate_center", (1.0, 2.0)))


class Elements(HTMLParser):
    """All start tags, and the text outside script and style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_asks_nothing_of_anybody_and_names_stay_text(folder: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Elements(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert all(name in page.text for name in SHOWN) and "<b>data</b>" in page.text
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids)), "a chart refers to its own shapes"
    assert all(a.get("alt") is not None for tag, a in page.tags if tag == "img")
    assert len(html) < 1_000_000


def test_page_says_what_report_json_says(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    text = Elements((folder / "report.html").read_text(encoding="utf-8")).text
    split, model = drawn_split(40), spread_gate(CONFIG)
    depth = predict(model, normalize(split.images, CONFIG)).token_depth
    assert report["summary"]["gmacs"]["value"] == pytest.approx(np.asarray(image_gmacs(CONFIG, depth)).mean())
    for name in ("top1", "top5"):
        assert percent(report["summary"][name]["value"], 1) in text
    for row in report["by_class"]:
        assert row["name"] in text and f"{row['mean_depth']:.2f}" in text
    assert f"{100 * report['calibration']['ece']:.2f} %" in text
    assert set(report["speed"]["images_per_second"]) >= {"dense", "masked", "packed", "baseline"}
    assert [s["value"] for s in report["sweep"]["settings"]] == [1.0, 2.0]
    assert report["sweep"]["settings"][0]["mean_depth"] == pytest.approx(report["summary"]["mean_depth"]["value"])
    assert any(s["unbeaten"]["gmacs"] for s in report["sweep"]["settings"])
    assert report["sweep"]["baseline_images_per_second"] > 0, "timed in turn with the settings beside which it stands"
    found = report["baseline"]["disagreements"]
    assert len(report["galleries"]["disagreeing"]) == min(8, found["differ"])
    assert interval({"low": -0.01, "high": 0.2}, "percent") == "\N{MINUS SIGN}1.0 to 20.0 %"


def rendered(folder: Path, **changes: Any) -> str:
    """The text of the fullest page with other numbers, by section of the report."""
    assert (folder / "report.html").exists()
    report, pictures = copy.deepcopy(RENDERED[0])
    for section, values in changes.items():
        report[section] |= values
    return " ".join(Elements(render(report, pictures)).text.split())


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            {"low": 0.1, "high": 0.3, "finding": "more"},
            "Harder images cost more: the 9 that are classified wrongly ran 0.20",
        ),
        (
            {"low": -0.3, "high": -0.1, "finding": "less"},
            "Harder images cost less: the 9 that are classified wrongly ran 0.20",
        ),
        ({"low": -0.1, "high": 0.1, "finding": "no difference"}, "No difference seen: the 9 images"),
        ({"low": None, "high": None, "finding": None}, "These data cannot tell: too few images are classified wrongly"),
    ],
)
def test_the_page_claims_no_more_than_its_test_shows(folder: Path, found: dict[str, Any], sentence: str) -> None:
    gap = 0.2 if found["finding"] == "more" else -0.2
    text = rendered(folder, right_and_wrong={"wrong": 9, "depth_right": 2.0, "depth_wrong": 2.0 + gap} | found)
    assert sentence in text
    for word in ("easiest", "hardest", "Easiest", "Hardest"):
        assert word not in text, "that an image with few layers is easy is what the test is about"


@pytest.mark.parametrize(("allows", "above"), [(1.5, True), (2.5, False)])
def test_a_speed_up_above_the_saved_work_is_shown_and_said(folder: Path, allows: float, above: bool) -> None:
    speeds = {"dense": 100.0, "masked": 90.0, "packed": 200.0, "baseline": 110.0}
    text = rendered(
        folder,
        speed={
            "images_per_second": speeds,
            "best_batch": {"dense": 7, "masked": 9, "packed": 11, "baseline": 13},
            "speed_up": {"value": 2.0, "low": 1.9, "high": 2.1},
            "saved_work": {"allows": allows, "share": 1 / allows, "padding_counted": True, "batch": 16},
        },
    )
    assert "2.00 times the dense 100, each at its best batch (11, 7)" in text
    assert f"the saved work allows {allows:.2f} times" in text
    assert ("The measured figure is above that" in text) == above
    assert "The rounds differ a lot" not in text


def test_the_saved_work_is_denses_over_packeds(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    s, work = report["summary"], report["speed"]["saved_work"]
    assert work["padding_counted"] and work["allows"] == pytest.approx(s["gmacs_whole"] / s["executed_gmacs"])
    assert report["speed"]["speed_up"]["value"] == pytest.approx(
        max(row["images_per_second"] for row in report["speed"]["by_batch"]["packed"])
        / max(row["images_per_second"] for row in report["speed"]["by_batch"]["dense"])
    )


def test_errors_are_told_as_in_the_pictures(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    text = " ".join(Elements((folder / "report.html").read_text(encoding="utf-8")).text.split())
    assert report["galleries"]["confidently_wrong"]
    for image in report["galleries"]["confidently_wrong"]:
        assert image["said"] == f"answered {image['prediction']}, is {image['label']}" and image["said"] in text


def test_one_bar_is_a_sentence(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that never closes: all tokens run through all layers. Evaluated masked: no padding is known."""
    speeds = copy.deepcopy(RENDERED[0][0]["speed"])
    monkeypatch.setattr(writer, "measure_speeds", lambda *_: speeds)
    model, split = spread_gate(dataclasses.replace(CONFIG, gate_center=1000.0)), drawn_split(9)
    write_report(tmp_path, Subject("open", model, evaluate(model, split, 9)), split, data="data", batch_size=9)
    html, report = (tmp_path / "report.html").read_text(encoding="utf-8"), read_json(tmp_path / "report.json")
    text = " ".join(Elements(html).text.split())
    assert "All tokens of all images stop at layer 3 of 3." in text
    assert "All images have a mean depth of 3.00, so there are no fewest and most." in text
    assert "multiply-adds by the rule, without padding: the saved work allows 1.00 times." in text
    assert "strip" not in report and report["summary"]["one_depth"]
    assert html.count("<svg") == 1, "the reliability diagram alone"


def test_a_page_of_gates_speaks_of_no_stop(tmp_path: Path) -> None:
    """Tokens come back, so a layer's share is what it computes, and no picture hides what has stopped."""
    rule = avit_jax.Gates(token_bias=0.0, bias=0.0)
    config = dataclasses.replace(CONFIG, gate_scale=None, gate_center=None, rule=rule)
    html, report = written(tmp_path, spread_gate(config), drawn_split(9))
    text = " ".join(Elements(html).text.split())
    assert "how many layers computed each of its patches" in text and "number of layers" in text
    assert not re.search(r"\bstop", text) and "strip" not in report
    computed = [row["computed"] for row in report["by_layer"]]
    assert sum(computed) == pytest.approx(report["summary"]["mean_depth"]["value"], rel=1e-3)


def test_images_are_the_extremes(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    split, model = drawn_split(40), spread_gate(CONFIG)
    output = predict(model, normalize(split.images, CONFIG))
    depths, answers = np.asarray(output.token_depth).mean(1), np.asarray(output.logits.argmax(1))
    shown = {name: [entry["image"] for entry in images] for name, images in report["galleries"].items()}
    assert sorted(depths[shown["fewest_layers"]]) == pytest.approx(sorted(depths)[:8])
    assert sorted(depths[shown["most_layers"]]) == pytest.approx(sorted(depths)[-8:])
    p = np.exp(output.logits) / np.exp(output.logits).sum(1, keepdims=True)
    wrong = [i for i in np.argsort(-p.max(1)) if answers[i] != split.labels[i]]
    assert shown["confidently_wrong"] == wrong[:8]


@pytest.mark.parametrize(
    ("halts", "labelled", "count", "sentences"),
    [
        (False, True, 9, ["This is a dense model: it has no gate"]),
        (True, False, 1, ["The data have no labels", "a single image has no interval"]),
    ],
)
def test_pages_of_what_is_missing(
    tmp_path: Path, halts: bool, labelled: bool, count: int, sentences: list[str]
) -> None:
    gate = {} if halts else {"gate_scale": None, "gate_center": None}
    html, report = written(tmp_path, spread_gate(dataclasses.replace(CONFIG, **gate)), drawn_split(count, labelled))
    assert all(sentence in Elements(html).text for sentence in sentences)
    assert ("by_depth" in report) == labelled
    assert ("Mean depth of each patch" in html) == halts
    assert ("fewest_layers" in report["galleries"]) == (halts and count > 1)
    assert report["summary"].get("top1") is None or labelled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "sweep", "sentences"),
    [
        (
            ToMe(1),
            Sweep("r", (0.0, 2.0)),
            [
                "ToMe, r 1: tokens merge or are dropped, the same number in every image.",
                "shrinking: merged and dropped tokens are gone",
                "dense: rule taken out",
                "own is 1.",
            ],
        ),
        (
            ConfidenceExit(0.3),
            Sweep("threshold", (0.25, 0.3)),
            ["Rule: confidence exit above 0.3.", "packed: halted tokens are gone", "own is 0.3."],
        ),
    ],
)
def test_pages_of_other_rules(tmp_path: Path, rule: Any, sweep: Sweep, sentences: list[str]) -> None:
    config = dataclasses.replace(CONFIG, gate_scale=None, gate_center=None, rule=rule)
    html, report = written(tmp_path, spread_gate(config), drawn_split(12), sweep=sweep)
    text = " ".join(Elements(html).text.split())
    assert [sentence for sentence in sentences if sentence not in text] == []
    assert "gate" not in text.lower() and '<h2 id="depth-title">Depth</h2>' in html
    reduces = rule.name == "tome"
    assert report["model"]["execution"] == ("shrinking" if reduces else "packed")
    assert report["speed"]["images_per_second"].keys() == (
        {"dense", "shrinking"} if reduces else {"dense", "masked", "packed"}
    )
    assert ("finished images" in text, "Fewest layers" in text) == (not reduces, not reduces)
    costs = [setting["gmacs"] for setting in report["sweep"]["settings"]]
    assert costs[0] > costs[1] if reduces else costs[0] < costs[1]
    assert report["summary"]["gmacs"]["value"] < report["summary"]["gmacs_whole"]


def test_one_class(tmp_path: Path) -> None:
    dense: dict[str, Any] = {"gate_scale": None, "gate_center": None}
    config = dataclasses.replace(CONFIG, num_classes=1, class_names=("only",), **dense)
    split = dataclasses.replace(drawn_split(4), labels=np.zeros(4, np.int32))
    html, report = written(tmp_path, spread_gate(config), split)
    assert report["summary"]["top1"]["value"] == 1
    assert "Every image is classified correctly." in Elements(html).text


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


@pytest.mark.parametrize("distilled", [False, True])
def test_the_one_bright_patch_shows_up_in_its_own_place(distilled: bool) -> None:
    """Channel 0 is minus the patch's brightness: bright patches go on to layer 3, dark ones stop at layer 2."""
    gate = {"gate_scale": 1.0, "gate_center": 0.0}
    config = dataclasses.replace(CONFIG, distilled=distilled, preprocessing=Preprocessing((0.0,), (1.0,)), **gate)
    model = AViT(config, rngs=avit_jax.model.vit.nnx.Rngs(0))
    for linear in (model.blocks.attn.proj, model.blocks.mlp.fc2):
        linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    kernel = jnp.zeros_like(model.patch_embed.proj.kernel[...])
    model.patch_embed.proj.kernel[...] = kernel.at[:, 0].set(-100 / kernel.shape[0])
    model.patch_embed.proj.bias[...] = jnp.zeros_like(model.patch_embed.proj.bias[...])
    model.pos_embed[...] = jnp.zeros_like(model.pos_embed[...])
    images = np.zeros((1, 12, 8, 1), np.uint8)
    images[0, 4:8, 0:4] = 255  # second of three rows, left of two columns
    frame = gallery.frames(model, Split(images, np.zeros(1, np.int32)), [0])[0]
    brightness = pixels(frame.map).astype(int).sum(-1)
    assert brightness.shape == (3, 2)
    assert np.argwhere(brightness > brightness.min()).tolist() == [[1, 0]]
    depth = gallery.token_depths(model, Split(images, np.zeros(1, np.int32)), [0])[0]
    assert gallery.alive(depth, config) == [config.num_tokens, 1, 0]
    assert (pixels(gallery.covers(depth, config)[1])[..., 3] == 0).tolist() == [
        [False, False],
        [True, False],
        [False, False],
    ]
    both = np.asarray(gallery.side_by_side(images[0], depth, config)).astype(int)
    width = both.shape[0] * 8 // 12
    np.testing.assert_array_equal(both[:, :width, 0] == 255, both[:, :width, 0] > 0)  # the picture is as it was
    right = both[:, width + 8 : 2 * width + 8]
    rows, columns = np.nonzero(right.sum(-1) == right.sum(-1).max())
    assert (rows.min() / len(right), columns.max() / right.shape[1]) == pytest.approx((1 / 3, 0.5), abs=0.02)


@pytest.fixture(scope="module")
def browser(folder: Path) -> Iterator[Any]:
    with chromium() as driver:
        driver.get((folder / "report.html").as_uri())
        yield driver


def test_in_a_browser_nothing_fails_and_nothing_is_requested(browser: Any) -> None:
    assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.execute_script("return document.images.length") > 20
    assert browser.execute_script("return document.querySelectorAll('.chart svg').length") == 7
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert all(url.startswith(("file:", "data:")) for url in asked), asked
    # The policy is at work: not even a script of the page's own may ask.
    blocked = "fetch('http://127.0.0.1:9/').then(() => arguments[0]('went'), () => arguments[0]('refused'))"
    assert browser.execute_async_script(blocked) == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_in_a_browser_tables_sort_by_click_and_by_key(browser: Any) -> None:
    def column(index: int) -> list[str]:
        rows = "return [...document.querySelectorAll('#class-table tbody tr')]"
        return browser.execute_script(f"{rows}.map(row => row.cells[{index}].dataset.value)")

    buttons = browser.find_elements("css selector", "#class-table thead button")
    depths = [float(v) for v in column(3)]
    buttons[3].click()
    assert [float(v) for v in column(3)] == sorted(depths, reverse=True) != depths
    buttons[3].send_keys("\ue007")  # Enter
    assert [float(v) for v in column(3)] == sorted(depths)
    head = browser.find_elements("css selector", "#class-table thead th")[3]
    assert head.get_attribute("aria-sort") == "ascending"
    buttons[0].click()
    assert set(column(0)) == set(SHOWN) and column(0)[-1] == "é"


def test_in_a_browser_sliders_move(browser: Any) -> None:
    slider = browser.find_element("css selector", "#sweep-slider")
    visible = "return [...document.querySelectorAll('.setting')].filter(s => !s.hidden).map(s => s.dataset.value)"
    assert browser.execute_script(visible) == ["1"], "it starts at the checkpoint's own setting"
    slider.send_keys("\ue014")  # right arrow
    assert browser.execute_script(visible) == ["2"]
    assert browser.find_element("css selector", "#sweep-value").text == "2"
    marked = browser.execute_script("return [...document.querySelectorAll('.current')].map(p => p.id)")
    assert sorted(marked) == ["point-gmacs-1", "point-images_per_second-1"]
    opacity = "return getComputedStyle(document.querySelector('.frame .map')).opacity"
    assert browser.execute_script(opacity) == "0", "pictures are shown as they are"
    browser.find_element("css selector", "input.overlay").send_keys("\ue010")  # End: depths alone
    overlay = "return getComputedStyle(document.documentElement).getPropertyValue('--overlay')"
    assert browser.execute_script(overlay).strip() == "0.6", "the picture stays visible"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_it_fits_a_phone_in_light_and_dark(browser: Any, scheme: str) -> None:
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    colours = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (sum(map(int, c[4:-1].split(","))) for c in browser.execute_script(colours))
    assert (ink < paper) == (scheme == "light")
    label = "return getComputedStyle(document.querySelector('.chart text')).fill"
    assert browser.execute_script(label).startswith("rgb"), "a chart's colours are the page's"
