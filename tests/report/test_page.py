"""The page asks for nothing, runs nothing that a run has written, and says what it lacks."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gshardx.report.charts import CURVE_POINTS, FEWEST_POINTS
from gshardx.report.page import page
from gshardx.report.read import read_run
from tests.report.runs import FAULTS, write_events, write_run

VOID = {"meta", "link", "img", "source", "br"}


class Tree(HTMLParser):
    """Elements in order, and whether each was closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    first = write_run(root / "first", steps=400, layers=2, sources=("books", "code/"), events=FAULTS)
    return first, write_run(root / "second", steps=200, layers=3, experts=16, seed=1)


@pytest.fixture(scope="module")
def one(folders):
    return page([read_run(folders[0])])


@pytest.fixture(scope="module")
def two(folders):
    return page([read_run(folder) for folder in folders])


def charts(html):
    """Data of the line charts by their title."""
    found = re.findall(
        r"<h3>([^<]*) <small>[^<]*</small></h3>.*?<script type=\"application/json\">(.*?)</script>", html
    )
    return {title: json.loads(data) for title, data in found if '"curves"' in data}


def test_it_is_well_formed_and_asks_for_nothing(one, two):
    for html in (one, two):
        tree = Tree(html)
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|url\(|@import", html.replace("http://www.w3.org/2000/svg", ""))
        assert {a.get("href") for a in tree.all("link")} == {"data:,"}
        assert all(a["src"].startswith("data:image/png;base64,") for a in tree.all("img"))
        assert all("src" not in a for a in tree.all("script"))
        assert "default-src 'none'" in tree.all("meta")[2]["content"]


def test_all_sections_are_there_in_order(one):
    text = " ".join(Tree(one).text)
    titles = ("Loss", "Held-out text", "Token accuracy", "By source", "Throughput", "Where the time went",
              "Expert load", "Dropped choices", "Router entropy", "Gradient norm", "Learning rate", "Events",
              "Starts and versions", "Config")  # fmt: skip
    places = [text.index(f"{title}") for title in titles]
    assert places == sorted(places)
    assert "No " not in text


def test_every_figure_and_table_says_what_it_is(one, two):
    for html in (one, two):
        tree = Tree(html)
        assert all(a.get("aria-label") for a in tree.all("svg") if a.get("role") == "img")
        assert all(a["aria-label"] for tag, a in tree.found if tag == "div" and a.get("role") == "img")
        assert html.count("<table") == html.count("<thead")
        assert all(a.get("scope") in ("row", "col") for a in tree.all("th"))
        labels = [a["alt"] for a in tree.all("img") if a["alt"]]
        assert len(labels) == len(set(labels)) > 0


def test_the_headline_tells_the_run(one):
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd class=\"r0\">(.*?) <small>", one))
    assert tiles["Step reached"] == "400"
    assert tiles["Goodput"] == "89.8%"
    assert tiles["Faults"] == "2"
    assert "of 400" in one
    assert "1 restart<" in one
    assert re.fullmatch(r"\d\.\d{3}", tiles["Last loss"])


def test_curves_hold_what_was_logged(folders, one):
    run = read_run(folders[0])
    loss = charts(one)["Loss"]["curves"][0]
    assert loss["x"] == list(range(1, 401))
    np.testing.assert_allclose(loss["y"], run.get("learning/loss").values, rtol=1e-4)
    assert [len(curve["x"]) for curve in charts(one)["Token accuracy"]["curves"]] == [20]
    names = [curve["name"] for curve in charts(one)["Router entropy"]["curves"]]
    assert names == ["MoE layer 0", "MoE layer 1"]
    assert "even: ln 8 = 2.08" in one


def test_curves_are_short_and_keep_spikes(tmp_path):
    folder = write_run(tmp_path / "run", steps=3000, layers=20)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2210] = json.dumps(json.loads(lines[2210]) | {"learning/loss": 77.7, "moe/layer_7/drop_fraction": 0.99})
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    found = charts(page([read_run(folder)]))
    assert max(found["Loss"]["curves"][0]["y"]) == 77.7
    assert len(found["Loss"]["curves"][0]["x"]) <= CURVE_POINTS
    assert all(len(curve["x"]) <= max(FEWEST_POINTS, 4000 // 20) for curve in found["Dropped choices"]["curves"])


def test_faults_are_lines_with_a_title_and_routine_is_not(one):
    marks = re.findall(r'<g class="mark (\w+) r0"><title>(.*?)</title>', one[: one.index("Held-out text")])
    assert marks == [
        ("fault", "step 60: skipped step, gradients are not finite"),
        ("fault", "step 120: rollback, back to step 100"),
        ("restart", "step 150: started again"),
    ]
    assert "checkpoint \N{MULTIPLICATION SIGN} 2" in one


def test_many_faults_share_lines(tmp_path):
    events = [(s, s, "skipped_step", "gradients") for s in range(1, 3001)]
    html = page([read_run(write_run(tmp_path / "run", steps=3000, events=events))])
    loss = html[: html.index("Held-out text")]
    assert 100 < loss.count('<g class="mark') <= 150
    assert "and 19 more up to step 20" in loss
    assert "skipped step \N{MULTIPLICATION SIGN} 3,000" in html
    assert ">3,000 <small>0 restarts" in html


def test_two_runs_are_told_apart_everywhere(two):
    text = " ".join(Tree(two).text)
    assert "first and second" in re.search(r"<title>(.*?)</title>", two)[1]
    found = charts(two)
    assert {curve["colour"] for curve in found["Loss"]["curves"]} == {"var(--run-0)", "var(--run-1)"}
    assert [curve["name"] for curve in found["Router entropy"]["curves"]] == ["first", "second"]
    assert two.count('<svg class="bar"') == 2
    assert "even: ln 8" in two
    assert "even: ln 16" in two
    differ = two[two.index("Config: what differs") : two.index("<details>")]
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', differ) == [
        "seed", "model.layers", "model.moe.num_experts", "train.steps", "optimizer.learning_rate",
    ]  # fmt: skip
    assert "4 layers of width 512, 8 experts" in text
    assert "first: " in text


def test_what_a_run_has_written_is_text_and_no_more(tmp_path):
    bad = "<script>alert(1)</script>"
    entity = '"><img src=x onerror=alert(2)>&amp;'
    folder = write_run(tmp_path / "<img src=x onerror=alert(3)>", steps=40, sources=(bad, entity), name=f"'{bad}'")
    write_events(folder, [(0, 0, "start", bad), (1, 9, bad, entity), (2, 30, "hang", bad)])
    with (folder / "events.jsonl").open("a") as out:
        about = {"event": "start", "versions": {bad: bad}, "devices": bad, "command": entity, "processes": [bad]}
        out.write(json.dumps(about) + "\n")
    (folder / "goodput.json").write_text(json.dumps({"seconds": {bad: 3.0, "step": 1.0}}))
    for html in (page([read_run(folder)]), page([read_run(folder)] * 2)):
        tree = Tree(html)
        assert len(tree.all("script")) == html.count("<script") == html.count("</script")
        assert bad in "".join(tree.text)
        assert all(a["src"].startswith("data:") for a in tree.all("img"))
        assert not [name for _, attributes in tree.found for name in attributes if name.startswith("on")]


def test_what_is_missing_is_said_in_a_line(tmp_path):
    folder = write_run(tmp_path / "run", steps=60)
    for name in ("config.yaml", "expert_load.jsonl", "goodput.json", "events.jsonl"):
        (folder / name).unlink()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.startswith("evaluation/")} for line in lines]
    kept[30]["guard/skipped_steps"] = 2.0
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    html = page([read_run(folder)])
    notes = re.findall(r"<p class=note>(.*?)</p>", html)
    assert len(notes) == 5
    assert "The run was not evaluated" in notes[0]
    assert [
        name in note
        for name, note in zip(
            ("goodput.json", "expert_load.jsonl", "events.jsonl", "config.yaml"), notes[1:], strict=True
        )
    ] == [True] * 4
    assert "step 31: skipped step, 2 times: gradients were not finite" in html
    Tree(html)


@pytest.mark.parametrize(
    "line",
    [
        {"step": 0, "learning/loss": 1.0},
        {"step": 5, "learning/loss": None},
        {"step": 1, "perf/mfu": 0.1},
        {"step": 2**52, "moe/layer_0/entropy": 1e-300},
        {"step": 3, "learning/loss": 1e300, "goodput/x": 1e-9},
    ],
)
def test_a_run_of_one_line_makes_a_page(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    assert Tree(page([read_run(tmp_path)])).all("h1")
    assert Tree(page([read_run(tmp_path)] * 2)).all("h1")
