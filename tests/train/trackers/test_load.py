"""Each expert's share over time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from gshardx.train.trackers.lines import Lines
from gshardx.train.trackers.load import LINES, ExpertLoad


def written(path, steps, loads, first=1):
    """Loads ``[layer, expert]`` of the steps from ``first`` on, and the lines that they give."""
    load = ExpertLoad(Lines(path, first), steps)
    for step, values in enumerate(loads, first):
        load.add(step, SimpleNamespace(load=np.float32(values)))
    load.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_holds_each_experts_share_of_all_choices_since_the_line_before(tmp_path):
    loads = [[[4, 0], [1, 1]], [[0, 4], [3, 1]], [[4, 4], [0, 2]], [[6, 2], [2, 2]]]
    lines = written(tmp_path / "load.jsonl", 2 * LINES, loads)
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["load"] == [[1.0, 1.0], [pytest.approx(4 / 3, abs=1e-3), pytest.approx(2 / 3, abs=1e-3)]]
    assert lines[1]["load"] == [[1.25, 0.75], [pytest.approx(2 / 3, abs=1e-3), pytest.approx(4 / 3, abs=1e-3)]]


@pytest.mark.parametrize(("steps", "lines"), [(7, 7), (LINES, LINES), (2 * LINES + 9, LINES + 4)])
def test_a_run_has_some_two_hundred_lines(tmp_path, steps, lines):
    assert len(written(tmp_path / "load.jsonl", steps, [[[1, 1]]] * steps)) == lines


def test_a_resumed_run_drops_the_lines_of_the_steps_it_repeats(tmp_path):
    written(tmp_path / "load.jsonl", 5, [[[2, 0]]] * 5)
    lines = written(tmp_path / "load.jsonl", 5, [[[0, 2]]] * 2, first=4)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["load"] for line in lines] == [[[2.0, 0.0]]] * 3 + [[[0.0, 2.0]]] * 2


def test_a_step_without_any_choice_is_no_division_by_zero(tmp_path):
    assert written(tmp_path / "load.jsonl", 1, [[[0, 0]]])[0]["load"] == [[0.0, 0.0]]
