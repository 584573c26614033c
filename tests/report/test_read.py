"""What a run's folder says, with lines cut off, null, or written twice."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.report.read import read_run, standing
from tests.report.runs import write_run


def write_metrics(folder, lines):
    folder.mkdir(exist_ok=True)
    text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metrics.jsonl").write_text("\n".join(text))
    return folder


def test_all_files_of_a_run_are_read(tmp_path):
    run = read_run(write_run(tmp_path / "one", steps=40, layers=3, experts=4, sources=("a", "b/c/")))
    assert run.name == "one"
    assert run.span == (1, 40)
    assert run.config["model.moe.num_experts"] == 4
    assert run.load.values.shape == (40, 3, 4)
    assert run.goodput["step"] == 410
    assert run.starts == 1
    assert [event.kind for event in run.events] == ["start", "end"]
    assert run.sources() == ["a", "b/c/"]
    assert len(run.layers("entropy")) == 3
    assert run.missing == {}


def test_lines_that_are_cut_off_or_hold_something_else_are_passed_over(tmp_path):
    lines = ["", "[]", '{"step": "7", "learning/loss": 1}', '{"step": -1, "learning/loss": 1}', "null", "[" * 100_000,
             {"step": 1, "learning/loss": 5.0}, "\x00\x00", {"step": True, "learning/loss": 0.5},
             {"step": 2, "learning/loss": 4.0, "other": "words"}, '{"step": 3, "learning/lo']  # fmt: skip
    loss = read_run(write_metrics(tmp_path, lines)).get("learning/loss")
    assert loss.steps.tolist() == [1, 2]
    assert loss.values.tolist() == [5.0, 4.0]


def test_null_infinity_and_words_are_not_finite_but_logged(tmp_path):
    lines = [
        {"step": step, "learning/loss": value} for step, value in enumerate([1.0, None, "high", [2], 10**400, 3.0])
    ]
    lines.append('{"step": 6, "learning/loss": Infinity}')
    loss = read_run(write_metrics(tmp_path, lines)).get("learning/loss")
    assert loss.steps.tolist() == list(range(7))
    assert np.isfinite(loss.values).tolist() == [True, False, False, False, False, True, False]
    assert loss.last == 3.0


def test_figures_that_only_some_lines_have_keep_their_steps(tmp_path):
    lines = [
        {"step": s, "learning/loss": float(s)} | ({"evaluation/loss": -s} if s % 3 == 0 else {}) for s in range(1, 10)
    ]
    run = read_run(write_metrics(tmp_path, lines))
    assert run.get("evaluation/loss").steps.tolist() == [3, 6, 9]
    assert run.get("evaluation/loss").values.tolist() == [-3, -6, -9]
    assert run.get("learning/loss").values.tolist() == list(range(1, 10))


def test_many_lines_are_read_in_pieces(tmp_path):
    lines = [{"step": step, "learning/loss": step / 7} for step in range(1, 5002)]
    loss = read_run(write_metrics(tmp_path, lines)).get("learning/loss")
    np.testing.assert_array_equal(loss.steps, np.arange(1, 5002))
    np.testing.assert_array_equal(loss.values, np.arange(1, 5002) / 7)


def test_steps_that_a_resumed_run_made_again_count_once(tmp_path):
    lines = [{"step": s, "learning/loss": 1.0} for s in range(1, 9)] + [
        {"step": s, "learning/loss": 2.0} for s in (5, 6)
    ]
    loss = read_run(write_metrics(tmp_path, lines)).get("learning/loss")
    assert loss.steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert loss.values.tolist() == [1, 1, 1, 1, 2, 2]


@given(st.lists(st.integers(0, 20), max_size=30))
def test_what_stands_ascends_and_ends_with_the_last_line(steps):
    steps = np.array(steps, np.int64)
    kept = steps[standing(steps)].tolist()
    assert kept == sorted(set(kept))
    assert kept[-1:] == steps.tolist()[-1:]


@pytest.mark.parametrize("name", ["config.yaml", "expert_load.jsonl", "goodput.json", "events.jsonl"])
@pytest.mark.parametrize("text", [None, "", "[1, 2", "- 3\n- 4\n", '{"seconds": 5, "load": 3}', "\udcff: {"])
def test_a_file_that_is_missing_or_spoilt_is_left_out_with_a_reason(tmp_path, name, text):
    path = write_run(tmp_path / "run", steps=5) / name
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    run = read_run(tmp_path / "run")
    assert set(run.missing) <= {name}
    if name in run.missing:
        assert run.missing[name].startswith("No ")
        assert name in run.missing[name]
        assert "\n" not in run.missing[name]
    else:  # events may be none, and a config of any keys
        assert name in ("events.jsonl", "config.yaml")


def test_lines_of_loads_that_do_not_fit_are_passed_over(tmp_path):
    folder = write_metrics(tmp_path, [{"step": 9, "learning/loss": 1.0}])
    lines = [{"step": 1, "load": [[1, 1], [2, 0]]}, {"step": 2, "load": [[1, 1]]},
             {"step": 3, "load": [[1], [2, 0]]},
             {"step": 4, "load": [[None, 1], [1, 1]]}, {"step": 5, "load": [["a", 1], [1, 1]]},
             {"step": 6, "load": [[0, 2]] * 2}]  # fmt: skip
    (folder / "expert_load.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 7, "load": [[1,')
    load = read_run(folder).load
    assert load.steps.tolist() == [1, 6]
    assert load.values.tolist() == [[[1, 1], [2, 0]], [[0, 2], [0, 2]]]


def test_seconds_of_the_metrics_stand_in_for_goodput_json(tmp_path):
    lines = [{"step": s, "goodput/step": 10.0 * s, "goodput/compile": 3.0, "goodput/init": None} for s in (1, 2)]
    run = read_run(write_metrics(tmp_path, lines))
    assert run.goodput == {"step": 20.0, "compile": 3.0}
    assert "goodput.json" not in run.missing


def test_events_need_only_a_name(tmp_path):
    folder = write_metrics(tmp_path, [{"step": 1, "learning/loss": 1.0}])
    (folder / "events.jsonl").write_text(
        '{"event": "hang"}\n{"step": 3}\n{"event": "x", "step": "y", "time": null, "text": 3}\n{"e'
    )
    events = read_run(folder).events
    assert [(event.kind, event.step, event.time, event.text) for event in events] == [
        ("hang", None, None, ""),
        ("x", None, None, ""),
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.write_text(""), "no such folder"),
        (lambda folder: folder.mkdir(), "no such file"),
        (lambda folder: write_metrics(folder, []), "no line of it is a step"),
        (lambda folder: write_metrics(folder, ['{"step": 1, "lear']), "no line of it is a step"),
        (lambda folder: (folder / "metrics.jsonl").mkdir(parents=True), "can't be read"),
    ],
)
def test_what_is_no_run_is_bad_input(tmp_path, make, words):
    make(tmp_path / "run")
    with pytest.raises(BadInput, match=words):
        read_run(tmp_path / "run")


def test_an_absent_figure_is_empty(tmp_path):
    run = read_run(write_metrics(tmp_path, [{"step": 1, "learning/loss": math.nan}]))
    assert run.get("perf/mfu").last is None
    assert run.get("learning/loss").last is None
    assert run.layers("entropy") == []
