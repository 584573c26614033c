"""The playground page in a headless Chromium, against a server with made-up answers."""

import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from tests.infer.server.page_stub import EXPERTS, LAYERS, PAGES, SLOTS, WORDS, Stub, experts_of, served

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH")
pytestmark = [needs_chromium, pytest.mark.slow]

TOKENS = """return [...document.querySelectorAll(".token")].map((span) => {
  const style = getComputedStyle(span);
  return {text: span.textContent, fill: style.backgroundColor, stripe: style.backgroundImage};
})"""
LOAD = """return [...document.querySelectorAll("#load tbody tr")].map((row) => {
  const [name, bars, now, all] = row.cells, [nowBar, allBar] = bars.children;
  return {expert: name.textContent, counts: bars.title, now: now.textContent, all: all.textContent,
          fill: getComputedStyle(nowBar).backgroundColor, ink: getComputedStyle(allBar).backgroundColor,
          width: allBar.getBoundingClientRect().width};
})"""
CONTRASTS = """const paper = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function light(colour) {
  paper.fillStyle = colour;
  paper.fillRect(0, 0, 1, 1);
  const [r, g, b] = [...paper.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
return [...document.querySelectorAll(".token:not(.plain)")].map((span) => {
  const style = getComputedStyle(span);
  const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})"""
RECOLOURING = """const slider = document.getElementById("layer"), output = document.getElementById("output");
return Array.from({length: 20}, (_, i) => {
  const began = performance.now();
  slider.value = i % 3;
  slider.dispatchEvent(new Event("input"));
  getComputedStyle(output.lastChild.previousSibling).backgroundColor;
  output.getBoundingClientRect();
  return performance.now() - began;
})"""


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-background-networking"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """Of desktop size, in the light theme; its console must be empty in the end."""
    resize(chromium, 1280, 900)
    wear(chromium, "light")
    chromium.get_log("browser")
    yield chromium
    assert console(chromium) == []


@pytest.fixture
def stub():
    return Stub()


@pytest.fixture
def url(stub, browser):
    with served(stub) as base:
        yield base
        browser.get("about:blank")  # first, or its next poll is in the console


def resize(browser, width, height):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def wear(browser, theme):
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def console(browser):
    """What was written there since the last call."""
    return [entry["message"] for entry in browser.get_log("browser")]


def named(browser, name):
    return browser.find_element(By.ID, name)


def until(browser, ready):
    return WebDriverWait(browser, 30, poll_frequency=0.03).until(lambda _: ready())


def enter(browser, name, text):
    field = named(browser, name)
    field.clear()
    field.send_keys(text)


def open_page(browser, url):
    """Until it has heard from the server."""
    browser.get(url)
    until(browser, lambda: load(browser))


def ask(browser, prompt, max_tokens):
    enter(browser, "prompt", prompt)
    enter(browser, "max_tokens", str(max_tokens))
    named(browser, "generate").click()


def finish(browser):
    """Wait for the end; the line that says how it ended."""
    until(browser, lambda: named(browser, "generate").is_enabled() and named(browser, "status").text)
    return named(browser, "status").text


def answer(browser, url, prompt="Once upon a time", max_tokens=20):
    """To a page opened anew; the line that says how it ended."""
    open_page(browser, url)
    ask(browser, prompt, max_tokens)
    return finish(browser)


def tokens(browser):
    """Of each its text, fill (of the first choice) and stripe (of the others)."""
    return browser.execute_script(TOKENS)


def load(browser):
    return browser.execute_script(LOAD)


def choices(browser):
    """Of each expert in the chosen layer, since the last poll and since the start."""
    return [tuple(int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", row["counts"])) for row in load(browser)]


def to_layer(browser, layer):
    named(browser, "layer").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * layer)


def panel(browser):
    return named(browser, "panel").text


def told(place):
    """The panel's rows for the token at ``place``."""
    return [f"Layer {layer} {first} {second}" for layer, (first, second) in enumerate(experts_of(place))]


def rows(browser):
    return [" ".join(row.text.split()) for row in browser.find_elements(By.CSS_SELECTOR, "#panel li")]


def assert_coloured(browser, layer):
    """Each token but the last as its experts' bars are."""
    bars, seen = load(browser), tokens(browser)
    assert len({bar["fill"] for bar in bars}) == EXPERTS
    for place, token in enumerate(seen[:-1], 1):
        first, second = experts_of(place)[layer]
        assert token["fill"] == bars[first]["fill"]
        assert bars[second]["ink"] in token["stripe"]
    assert (seen[-1]["fill"], seen[-1]["stripe"]) == ("rgba(0, 0, 0, 0)", "none")


def test_tokens_come_one_by_one_and_wear_the_colours_of_their_experts(browser, url, stub):
    stub.pace = 0.03
    open_page(browser, url)
    browser.execute_script(
        """window.counts = [];
        const count = () => counts.push(document.querySelectorAll(".token").length);
        new MutationObserver(count).observe(document.getElementById("output"), {childList: true})"""
    )
    ask(browser, "Once upon a time", len(WORDS))
    assert re.fullmatch(rf"{len(WORDS)} tokens in [\d.]+ s; as many as asked for\.", finish(browser))
    assert [token["text"] for token in tokens(browser)] == list(WORDS)
    assert_coloured(browser, 0)
    counts = browser.execute_script("return counts")
    assert counts == sorted(counts)
    assert len(set(counts)) > len(WORDS) // 2
    assert named(browser, "output").text.startswith("Once upon a timeThe river ran down to the sea,")


def test_control_and_enter_send_what_the_fields_hold(browser, url, stub):
    open_page(browser, url)
    for name, text in (("max_tokens", "3"), ("temperature", "0.7"), ("seed", "5"), ("prompt", "two\nlines")):
        enter(browser, name, text)
    named(browser, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
    finish(browser)
    assert stub.asked == [
        {"model": "quickstart", "prompt": "two\nlines", "max_tokens": 3, "temperature": 0.7, "seed": 5, "stream": True,
         "experts": True}
    ]  # fmt: skip


def test_the_slider_recolours_without_a_new_request(browser, url, stub):
    answer(browser, url)
    before = tokens(browser)
    for layer in range(LAYERS):
        to_layer(browser, layer)
        assert_coloured(browser, layer)
        until(browser, lambda layer=layer: [row[1] for row in choices(browser)] == stub.load[layer])
    assert tokens(browser) != before
    assert len(stub.asked) == 1


def test_the_panel_tells_of_the_token_under_the_pointer_or_the_focus(browser, url):
    answer(browser, url)
    spans = browser.find_elements(By.CSS_SELECTOR, ".token")

    ActionChains(browser).move_to_element(spans[1]).perform()
    assert panel(browser).startswith('Token 2: " river"\n')
    assert rows(browser) == told(2)
    ActionChains(browser).move_to_element(named(browser, "prompt")).perform()
    assert not panel(browser)

    named(browser, "layer").send_keys(Keys.TAB)  # to the prompt, the first stop in the answer
    assert panel(browser).startswith("The last token of the prompt\n")
    assert rows(browser) == told(0)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT).perform()
    assert panel(browser).startswith('Token 2: " river"\n')
    ActionChains(browser).send_keys(Keys.END).perform()
    last = "The last one: nothing was drawn after it, so it went to no expert."
    assert panel(browser) == f'Token 20: " the"\n{last}'
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not panel(browser)


def test_stop_ends_the_request(browser, url, stub):
    stub.pace = 0.02
    open_page(browser, url)
    ask(browser, "Once", 2000)
    until(browser, lambda: len(tokens(browser)) > 5)
    assert stub.running == 1
    named(browser, "stop").click()
    assert re.fullmatch(r"Stopped after \d+ tokens\.", finish(browser))
    until(browser, lambda: stub.running == 0)
    assert stub.cut == 1
    assert stub.drawn < 2000
    assert browser.switch_to.active_element == named(browser, "generate")


def test_a_key_is_asked_for_where_the_server_wants_one(browser, url, stub):
    stub.key = "secret"
    browser.get(url)
    until(browser, lambda: named(browser, "key").is_displayed())
    enter(browser, "key", "guess\n")
    until(browser, lambda: named(browser, "key-said").text == "no such API key")
    assert all("401" in line for line in console(browser))
    enter(browser, "key", "secret\n")
    until(browser, lambda: not named(browser, "key").is_displayed() and load(browser))
    ask(browser, "Once", 3)
    assert finish(browser).startswith("3 tokens")
    kept = "return [Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.search]"
    assert browser.execute_script(kept) == [["secret"], [], "", ""]
    stub.key = "another"
    ask(browser, "Once", 3)
    assert finish(browser) == "Error: no such API key"
    assert named(browser, "key").is_displayed()
    browser.get("about:blank")
    assert all("401" in line for line in console(browser))


def test_no_key_is_asked_for_where_the_server_wants_none(browser, url):
    answer(browser, url)
    assert not named(browser, "key").is_displayed()


def test_errors_of_the_server_are_one_line(browser, url, stub):
    stub.fails_after = 2
    assert answer(browser, url) == "Error: the <b>device</b> is gone"
    assert len(tokens(browser)) == 2
    enter(browser, "prompt", " " + Keys.BACKSPACE)
    named(browser, "generate").click()
    assert finish(browser) == "Error: prompt: is empty"
    assert all("400" in line for line in console(browser))


def test_a_server_that_went_away_is_said(browser, stub):
    with served(stub) as url:
        open_page(browser, url)
    ask(browser, "Once", 3)
    assert finish(browser) == "Error: The server does not answer."
    until(browser, lambda: named(browser, "live-status").text == "The server does not answer.")
    browser.get("about:blank")
    assert all("ERR_CONNECTION_REFUSED" in line for line in console(browser))


def test_text_is_never_taken_for_html(browser, url, stub):
    image = "<img src=x onerror=window.hacked=1>"
    stub.words = (image, "<script>window.hacked=1</script>", "\u2028", '"&lt;')
    answer(browser, url, image, 8)
    assert [token["text"] for token in tokens(browser)] == list(stub.words) * 2
    ActionChains(browser).move_to_element(browser.find_element(By.CLASS_NAME, "token")).perform()
    assert image in panel(browser)
    assert browser.execute_script("return [document.images.length, window.hacked ?? 0]") == [0, 0]


def test_the_bars_are_the_servers_counts(browser, url, stub):
    answer(browser, url, max_tokens=50)
    until(browser, lambda: [row[1] for row in choices(browser)] == stub.load[0])
    bars, total = load(browser), sum(stub.load[0])
    assert [row["expert"] for row in bars] == [str(expert) for expert in range(EXPERTS)]
    assert [row["all"] for row in bars] == [f"{100 * count / total:.1f} %" for count in stub.load[0]]
    widths = sum(row["width"] for row in bars)
    assert [row["width"] / widths for row in bars] == pytest.approx([count / total for count in stub.load[0]], rel=0.05)

    until(browser, lambda: all(row[0] == 0 for row in choices(browser)))
    more = [0, 0, 0, 300, 100, 0, 0, 0]
    stub.load[0] = [count + added for count, added in zip(stub.load[0], more, strict=True)]
    bars = until(browser, lambda: (bars := load(browser))[3]["now"] == "75.0 %" and bars)
    assert [row["now"] for row in bars] == [f"{added / 4:.1f} %" for added in more]


def test_the_live_panel_tells_what_the_server_does(browser, url, stub):
    stub.running = 2
    open_page(browser, url)
    said = {name: named(browser, name).text for name in ("running", "waiting", "held", "evictable", "free")}
    assert said == {
        "running": f"2 of {SLOTS}", "waiting": "0", "held": "6", "evictable": "35", "free": f"{PAGES - 41:,}"
    }  # fmt: skip
    until(browser, lambda: named(browser, "rate").text == "0")
    stub.drawn += 500
    rate = until(browser, lambda: float(named(browser, "rate").text))
    assert 500 / 10 < rate <= 500, "tokens since the last poll, a second or, on a busy machine, some seconds before"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_from_every_colour(browser, url, theme):
    answer(browser, url, max_tokens=40)
    before = tokens(browser)
    wear(browser, theme)
    until(browser, lambda: (tokens(browser) != before) == (theme == "dark"))
    assert_coloured(browser, 0)
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) == 39
    assert min(contrasts) > 7


def test_a_phone_shows_all_of_it(browser, url):
    resize(browser, 360, 740)
    answer(browser, url, "W" * 200, 200)
    token = browser.find_elements(By.CLASS_NAME, "token")[107]
    browser.execute_script("arguments[0].scrollIntoView()", token)  # a click of its own can't scroll a reversed box
    token.click()
    inside = """const box = document.getElementById("panel").getBoundingClientRect();
    const {scrollWidth, clientWidth} = document.documentElement;
    return [scrollWidth - clientWidth, box.left > 0, box.right < 360, box.bottom < 740, box.height > 0]"""
    assert browser.execute_script(inside) == [0, True, True, True, True]


def test_fields_have_labels_and_only_status_lines_are_read_out(browser, url):
    answer(browser, url)
    fields = browser.find_elements(By.CSS_SELECTOR, "input, textarea, select")
    assert all(browser.execute_script("return arguments[0].labels.length", field) == 1 for field in fields)
    read_out = browser.find_elements(By.CSS_SELECTOR, "[aria-live], [role=status], [role=alert], [role=log]")
    assert {element.get_attribute("id") for element in read_out} == {"status", "live-status", "key-said"}


def test_two_thousand_tokens_change_colour_at_once(browser, url):
    answer(browser, url, max_tokens=2000)
    assert len(tokens(browser)) == 2000
    assert min(browser.execute_script(RECOLOURING)) < 150
