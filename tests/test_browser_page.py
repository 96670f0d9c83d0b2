"""examples/browser/ in a real browser: it says what Python says, asks nobody else for anything, and fits a phone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import avit_jax
from tests.harness.browser import CHROMIUM, DRIVER, chromium, served
from tests.harness.builders import answers

pytest.importorskip("onnx")
pytestmark = pytest.mark.slow
SOURCE = Path("examples/browser")
SEVEN = [(0.25, 0.22), (0.75, 0.22), (0.62, 0.45), (0.42, 0.85)]
THREE = [
    (0.3, 0.2),
    (0.6, 0.16),
    (0.7, 0.3),
    (0.6, 0.44),
    (0.45, 0.48),
    (0.65, 0.54),
    (0.72, 0.7),
    (0.58, 0.85),
    (0.3, 0.82),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as its README makes it: npm ci, prepare.py."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    if shutil.which("npm") is None:
        pytest.skip("no npm here, which fetches ONNX Runtime Web: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("page") / "browser"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("node_modules", "models"))
    installed = SOURCE / "node_modules"
    if installed.is_dir() and _versions(installed / ".package-lock.json") == _versions(SOURCE / "package-lock.json"):
        (folder / "node_modules").symlink_to(installed.absolute())
    else:
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder, check=True, timeout=300
        )
    subprocess.run([sys.executable, SOURCE / "prepare.py", "--to", folder / "models"], check=True, timeout=300)
    return folder


def _versions(lock: Path) -> dict[str, str]:
    packages = json.loads(lock.read_text())["packages"]
    return {name: package["integrity"] for name, package in packages.items() if name}


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with chromium() as driver:
        driver.set_window_size(1280, 1000)
        driver.set_script_timeout(60)
        yield driver


@pytest.fixture
def browser(opened: Any, address: str) -> Iterator[Any]:
    """The page, ready, with digits; whatever a test does, nothing fails in it, and it asks nobody else for anything."""
    opened.get_log("browser"), opened.get_log("performance")
    opened.get(address)
    wait(opened, "ready")
    yield opened
    assert opened.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in urls if not url.startswith((address, "data:", f"blob:{address}"))]
    assert any(url.endswith(".wasm") for url in urls) and not elsewhere


def wait(browser: Any, state: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    def reached(driver: Any) -> bool:
        found = driver.execute_script(
            "return [document.body.dataset.state, document.getElementById('state').textContent]"
        )
        assert found[0] != "failed" or state == "failed", found
        return found[0] == state

    WebDriverWait(browser, 60, 0.05).until(reached)


def draw(browser: Any, points: list[tuple[float, float]]) -> None:
    """One stroke on the pad, points with sides from 0 to 1, by the mouse."""
    from selenium.webdriver.common.action_chains import ActionChains

    pad = browser.find_element("id", "pad")
    width, height = pad.size["width"], pad.size["height"]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", pad)
    actions = ActionChains(browser, duration=20)
    offsets = [(round((x - 0.5) * width), round((y - 0.5) * height)) for x, y in points]
    actions.move_to_element_with_offset(pad, *offsets[0]).click_and_hold()
    for x, y in offsets[1:]:
        actions.move_to_element_with_offset(pad, x, y)
    actions.release().perform()


def shown(browser: Any) -> dict[str, Any]:
    """What the page showed: the picture as its model file got it, and what came out."""
    wait(browser, "done")
    found = browser.execute_script("return window.shown")
    found["pixels"] = np.array(found["pixels"], np.uint8).reshape(found["height"], found["width"])
    return found


def check(found: dict[str, Any], checkpoint: str) -> int:
    """Raises AssertionError unless Python says the same of the same pixels; returns the class."""
    model = avit_jax.load(f"checkpoints/{checkpoint}_avit")
    wanted = answers(model, avit_jax.preprocess(found["pixels"], model.config))
    # ONNX Runtime's pixels may be one level of 255 off Pillow's, see docs/deploy.md.
    np.testing.assert_allclose(found["logits"], wanted.logits[0], atol=0.05)
    depth = np.asarray(wanted.token_depth[0])
    np.testing.assert_array_equal(found["depths"], np.minimum(depth, depth[0]))
    assert len(set(found["depths"])) > 2 and all(time > 0 for time in found["milliseconds"])
    return int(np.argmax(found["logits"]))


@pytest.mark.parametrize(("points", "digit"), [(SEVEN, "7"), (THREE, "3")])
def test_a_drawn_digit_is_what_it_is_in_python(browser: Any, points: list[tuple[float, float]], digit: str) -> None:
    draw(browser, points)
    found = shown(browser)
    assert str(check(found, "mnist")) == digit == browser.find_element("id", "answer").text
    # It lies as MNIST's digits do: 20 of 28 pixels large, its mass in the middle.
    rows, columns = np.nonzero(found["pixels"] > 60)
    sides = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert max(sides) == pytest.approx(20 / 28 * found["height"], abs=4)
    centre = [np.average(axis, weights=found["pixels"][rows, columns]) + 0.5 for axis in (rows, columns)]
    np.testing.assert_allclose(centre, found["height"] / 2, atol=3)
    counts = [int(number) for number in browser.find_element("id", "layers").text.split()[::2]]
    assert counts == [sum(depth >= layer for depth in found["depths"]) for layer in range(1, 13)]


def test_the_layers_can_be_played_and_a_new_drawing_starts_afresh(browser: Any) -> None:
    draw(browser, SEVEN)
    wait(browser, "done")
    browser.execute_script(
        "const s = document.getElementById('layer'); s.value = 4; s.dispatchEvent(new Event('input'))"
    )
    assert browser.find_element("id", "at").text == "after layer 4"
    assert len(browser.find_elements("css selector", "#layers .reached")) == 4
    browser.find_element("id", "play").click()
    wait_for = "return document.querySelectorAll('#layers .reached').length"
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(browser, 10, 0.02).until(lambda driver: driver.execute_script(wait_for) == 12)
    browser.find_element("id", "clear").click()
    assert browser.find_element("id", "answer").text == "\N{EN DASH}"
    assert browser.execute_script(wait_for) == 0


def test_a_dropped_picture_is_what_it_is_in_python(browser: Any, tmp_path: Path) -> None:
    """A wide picture on a bright ground, in colour: its middle is cropped, and its negative is seen."""
    browser.find_element("css selector", "[data-model=clothes]").click()
    wait(browser, "ready")
    sheet = Image.open(SOURCE / "pictures/clothes.png")
    trousers = Image.fromarray(255 - np.asarray(sheet.crop((28, 0, 56, 28)))).resize(
        (140, 140), Image.Resampling.BICUBIC
    )
    wide = Image.new("RGB", (200, 140), "white")
    wide.paste(trousers, (30, 0))
    wide.save(tmp_path / "trousers.png")
    browser.find_element("id", "file").send_keys(str(tmp_path / "trousers.png"))
    found = shown(browser)
    assert check(found, "fashion_mnist") == 1 and browser.find_element("id", "answer").text == "trousers"
    np.testing.assert_array_equal(found["pixels"], 255 - np.asarray(wide.convert("L")))


@pytest.mark.parametrize("model", ["digits", "clothes"])
def test_an_example_is_the_test_image(browser: Any, model: str) -> None:
    browser.find_element("css selector", f"[data-model={model}]").click()
    wait(browser, "ready")
    browser.find_elements("css selector", "#examples button")[9].click()
    found = shown(browser)
    row = np.asarray(Image.open(SOURCE / f"pictures/{model}.png"))
    np.testing.assert_array_equal(found["pixels"], row[:, -28:])
    assert check(found, {"digits": "mnist", "clothes": "fashion_mnist"}[model]) == 9


def test_what_is_no_picture_is_said_and_the_page_goes_on(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    browser.find_element("id", "file").send_keys(str(tmp_path / "notes.png"))
    from selenium.webdriver.support.wait import WebDriverWait

    sentence = "notes.png is no picture that this browser can read: drop a PNG, JPEG or WebP file."
    WebDriverWait(browser, 10, 0.05).until(lambda driver: driver.find_element("id", "state").text == sentence)
    draw(browser, SEVEN)
    assert check(shown(browser), "mnist") == 7
    assert browser.find_element("id", "state").text == ""


@pytest.mark.parametrize(("missing", "sentence"), [("models", "prepare.py"), ("node_modules", "npm ci")])
def test_a_missing_part_is_named(opened: Any, folder: Path, tmp_path: Path, missing: str, sentence: str) -> None:
    shutil.copytree(folder, tmp_path / "page", symlinks=True)
    part = tmp_path / "page" / missing
    part.unlink() if part.is_symlink() else shutil.rmtree(part)
    with served(tmp_path / "page") as address:
        opened.get(address)
        wait(opened, "failed")
        assert sentence in opened.find_element("id", "state").text
    opened.get_log("browser")  # the browser's own word on the missing file


def test_on_a_phone_nothing_is_cut_off(browser: Any) -> None:
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for model in ("digits", "clothes"):
            browser.execute_script(f"document.querySelector('[data-model={model}]').click()")
            wait(browser, "ready")
            browser.execute_script("document.querySelector('#examples button').click()")
            wait(browser, "done")
            script = (
                "return [document.documentElement.scrollWidth, innerWidth, document.getElementById('pad').clientWidth]"
            )
            width, window, pad = browser.execute_script(script)
            assert width == window == 390 and pad > 340
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
