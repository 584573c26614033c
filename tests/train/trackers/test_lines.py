"""Files of lines survive kills, and a run that goes on drops what it repeats."""

import json

import pytest

from gshardx.train.trackers.lines import Lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path, steps, value=1.0):
    lines = Lines(path, steps[0])
    for step in steps:
        lines.write(step, {"learning/loss": value})
    lines.close()


def test_each_step_is_a_line_that_is_there_at_once(path):
    lines = Lines(path, 1)
    lines.write(1, {"learning/loss": 2.5, "perf/mfu": 0.5})
    assert json.loads(path.read_text()) == {"step": 1, "learning/loss": 2.5, "perf/mfu": 0.5}
    lines.write(2, {"learning/loss": 2.25})
    assert steps_in(path) == [1, 2]
    lines.close()


def test_nan_and_infinity_become_null_so_that_every_line_is_json(path):
    lines = Lines(path, 1)
    lines.write(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0})
    lines.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_a_resumed_run_drops_the_lines_of_the_steps_it_repeats(path):
    write(path, range(1, 8))
    write(path, [5, 6], value=2.0)
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]
    losses = [json.loads(line)["learning/loss"] for line in path.read_text().splitlines()]
    assert losses == [1.0] * 4 + [2.0] * 2


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "learn', '{"step": 3}', "{}", "[1]", "7", '{"step": "3"}', "\0\0\0\0", "\n\n"], ids=repr
)
def test_what_a_kill_left_half_written_goes(path, rest):
    write(path, [1, 2])
    before = path.read_text()
    path.write_text(before + rest)
    write(path, [3])
    assert steps_in(path) == [1, 2, 3]
    assert path.read_text().startswith(before)


def test_bytes_that_are_no_text_go_with_the_line_they_are_in(path):
    write(path, [1, 2])
    with path.open("ab") as file:
        file.write(b'{"step": 3, \xff\xfe')
    write(path, [3])
    assert steps_in(path) == [1, 2, 3]
