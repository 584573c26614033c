"""Whatever a run's files hold, there is a page, or one line of what is wrong."""

import contextlib
import json
import re

import hypothesis
from hypothesis import given
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.report.page import page
from gshardx.report.read import read_run
from tests.report.runs import write_run
from tests.report.test_page import Tree

NAMES = (
    *("step", "learning/loss", "moe/layer_0/entropy", "moe/layer_0/dead_experts", "moe/entropy", "evaluation/loss"),
    *("evaluation/bits_per_byte", "evaluation/a/bits_per_byte", "evaluation/", "goodput/step", "starts", "devices"),
    *("perf/tokens_per_second", "guard/skipped_steps", "seconds", "load", "event", "text", "time", "versions"),
)
NUMBERS = (True, -1, 0, 1e308, -1e308, 1e59, -1e59, 1e-320, 10**400, 2**53 - 1, float("nan"), float("inf"))
LOADS = ([[1.0]], [[1e308, 1e308]], [[-1.0, 0.0]], [[]], {"step": -1}, {"step": 1e308, "x": 1e59}, {"jax": None})
VALUES = (
    st.sampled_from((*NUMBERS, *LOADS, None, "", "<b>", "\ud800", [], {}))
    | st.integers(0, 50)
    | st.floats()
    | st.text(max_size=5)
)
RECORDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=8).map(json.dumps) | st.text(max_size=20)
LINES = st.lists(RECORDS, max_size=12).map("\n".join)
KEYS = ("train.steps", "model.layers", "model.width", "model.moe.num_experts", "model.moe.top_k", "model.moe.router")


def refuse(constant):
    raise AssertionError(f"browsers read no {constant}")


def config(values):
    tree = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = tree
        for one in sections:
            section = section.setdefault(one, {})
        section[name] = value
    return json.dumps(tree)


@hypothesis.settings(max_examples=60)
@given(
    metrics=LINES, load=LINES, events=LINES, goodput=RECORDS, tail=st.booleans(),
    keys=st.dictionaries(st.sampled_from(KEYS), VALUES).map(config) | st.text(max_size=20),
)  # fmt: skip
def test_any_lines_make_a_page_or_one_line(tmp_path_factory, metrics, load, events, goodput, tail, keys):
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", steps=6, layers=1, experts=2)
    files = {"expert_load.jsonl": load, "events.jsonl": events, "goodput.json": goodput, "config.yaml": keys}
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with (folder / "metrics.jsonl").open("ab" if tail else "wb") as out:
        out.write(metrics.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(BadInput):
        run = read_run(folder)
        for runs in ([run], [run, run]):
            html = page(runs).encode("utf-8", "replace").decode()
            Tree(html)
            assert not re.search(r'(d|style|points)="[^"]*(nan|inf)', html)
            for data in re.findall(r'<script[^>]*type="application/json">(.*?)</script>', html):
                json.loads(data, parse_constant=refuse)
