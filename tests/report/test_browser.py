"""The page in a headless Chromium: no errors, a crosshair that reads, nothing wider than the screen."""

import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from gshardx.report.page import page
from gshardx.report.read import read_run
from gshardx.report.text import TIMES
from tests.report.runs import FAULTS, write_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
pytestmark = [needs_chromium, pytest.mark.slow]

WIDER = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
OVERLAPS = """const found = [];
for (const axis of document.querySelectorAll(".x, .y")) {
  const boxes = [...axis.children].map((label) => label.getBoundingClientRect());
  for (const [i, a] of boxes.entries()) for (const b of boxes.slice(i + 1))
    if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push(axis.textContent);
}
return found;"""


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Addresses of the page of one run and that of two."""
    root = tmp_path_factory.mktemp("pages")
    first = read_run(write_run(root / "first", steps=440, layers=2, sources=("books", "code"), events=FAULTS))
    second = read_run(write_run(root / "second", steps=300, layers=3, experts=96, seed=1, collapsed=True))
    for name, runs in (("one", [first]), ("two", [first, second])):
        (root / f"{name}.html").write_text(page(runs), encoding="utf-8")
    return {name: (root / f"{name}.html").as_uri() for name in ("one", "two")}


def resize(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wear(browser, theme):
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def point(browser, plot, x, y):
    """Move the pointer to shares of a plot's sides; what is read there."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    width, height = plot.rect["width"], plot.rect["height"]
    ActionChains(browser, duration=20).move_to_element_with_offset(
        plot, round((x - 0.5) * width), round((y - 0.5) * height)
    ).perform()
    return browser.find_element(By.ID, "reading").text


@pytest.mark.parametrize("width", [390, 820, 1400])
@pytest.mark.parametrize("name", ["one", "two"])
def test_it_fits_and_no_labels_overlap(chromium, pages, name, width):
    resize(chromium, width)
    for theme in ("light", "dark"):
        wear(chromium, theme)
        chromium.get(pages[name])
        assert chromium.execute_script(WIDER) == 0
        assert chromium.execute_script(OVERLAPS) == []
        assert chromium.get_log("browser") == []
    asked = re.findall(
        r'"url":"(?!file:|data:)([^"]+)"', " ".join(line["message"] for line in chromium.get_log("performance"))
    )
    assert [url for url in asked if url != "about:blank"] == []


def test_the_crosshair_reads_steps_values_and_faults(chromium, pages):
    resize(chromium, 1400)
    chromium.get(pages["one"])
    loss = chromium.find_element(By.CSS_SELECTOR, "figure .plot")
    said = point(chromium, loss, 0.5, 0.5)
    assert re.search(r"step (219|220|221)\n", said)
    assert re.search(r"training, as logged\s+\d\.\d+", said)
    assert "rollback, back to step 100" in point(chromium, loss, 120 / 440, 0.5)
    assert len([cross for cross in chromium.find_elements(By.CLASS_NAME, "cross") if cross.is_displayed()]) > 5
    ActionChains(chromium).move_to_element(chromium.find_element(By.TAG_NAME, "h1")).perform()
    assert not chromium.find_element(By.ID, "reading").is_displayed()
    assert chromium.get_log("browser") == []


def test_the_heat_map_reads_exact_loads(chromium, pages):
    resize(chromium, 1400)
    chromium.get(pages["two"])
    panels = chromium.find_elements(By.CSS_SELECTOR, ".panel .plot")
    said = point(chromium, panels[0], 0.25, 0.55)
    assert re.fullmatch(rf"steps \d+ to \d+\nexpert 4: \d\.\d\d {TIMES} the mean", said)
    assert f"48.00 {TIMES} the mean" in point(chromium, panels[-1], 0.97, 0.005)
    assert f": 0.00 {TIMES} the mean" in point(chromium, panels[-1], 0.97, 0.5)
    assert chromium.get_log("browser") == []


def test_arrow_keys_move_the_crosshair(chromium, pages):
    resize(chromium, 1400)
    chromium.get(pages["one"])
    for plot in chromium.find_elements(By.CSS_SELECTOR, "figure .plot")[::4]:
        chromium.execute_script("arguments[0].focus()", plot)
        plot.send_keys(Keys.ARROW_RIGHT)
        first = chromium.find_element(By.ID, "reading").text
        plot.send_keys(*[Keys.ARROW_RIGHT] * 8)
        assert chromium.find_element(By.ID, "reading").text not in ("", first)
        plot.send_keys(Keys.ESCAPE)
        assert not chromium.find_element(By.ID, "reading").is_displayed()


def test_it_reads_without_scripts(chromium, pages):
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        chromium.get(pages["one"])
        text = chromium.find_element(By.TAG_NAME, "body").text
    finally:
        chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "Router entropy" in text
    assert "even: ln 8 = 2.08" in text
    assert "rollback" in text
