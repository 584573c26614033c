"""What a run tells: the names people look for, only useful FLOPs, and files that survive kills and full disks."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gshardx.layers.routing import RouterStats
from gshardx.train import metrics
from gshardx.train.metrics import PLAIN_LINE_SECONDS, Progress, Trackers, step_scalars
from gshardx.train.run_dir import RunDir
from gshardx.train.step import StepMetrics


def scalars(drop=(0.0, 0.0), load=(1.0, 3.0), tokens=100, seconds=2.0, flops=(10.0, 30.0), peak=1e4):
    """Two layers of 4 experts, top-2."""
    choices = np.full((2, 2), float(tokens))
    zeros, parts = np.zeros(2), np.zeros((2, 8))
    loads = np.float32([[load[layer], *[(4 - load[layer]) / 3] * 3] for layer in range(2)]) * 2 * tokens / 4
    stats = RouterStats(
        tokens=np.full(2, float(tokens)),
        choices=choices,
        dropped=choices * np.float32(drop)[:, None],
        load=loads,
        room=np.full(2, 2.5 * tokens),
        entropy=zeros,
        z=zeros,
        largest_logit=np.float32([3.0, 5.0]),
        choices_by_position=parts,
        dropped_by_position=parts,
    )
    aux = {"balance": np.float32([1.0, 1.2]), "z": np.float32([2.0, 4.0])}
    weight = np.float32([0.01, 0.03])
    step = StepMetrics(
        np.float32(2.5), np.float32(0.5), np.int32(tokens), aux, stats, weight, np.int32(0), np.int32(0), None
    )
    return step_scalars(step, 1e-3, seconds, flops, peak)


def test_a_step_has_the_names_that_people_look_for():
    assert {
        "learning/loss",
        "learning/aux_loss",
        "learning/grad_norm",
        "learning/current_learning_rate",
        "perf/step_seconds",
        "perf/tokens_per_second",
        "perf/mfu",
        "moe/drop_fraction",
        "moe/load_max_over_mean",
        "moe/layer_0/drop_fraction",
        "moe/layer_1/load_max_over_mean",
    } <= set(scalars())


def test_scalars_are_the_steps_values_and_means_over_layers():
    found = scalars(drop=(0.1, 0.3))
    expected = {
        "learning/loss": 2.5,
        "learning/grad_norm": 0.5,
        "learning/aux_loss": 1.1,
        "learning/current_learning_rate": 1e-3,
        "perf/step_seconds": 2.0,
        "perf/tokens_per_second": 50.0,
        "moe/drop_fraction": 0.2,
        "moe/load_max_over_mean": 2.0,
        "moe/layer_0/drop_fraction": 0.1,
        "moe/layer_1/drop_fraction": 0.3,
        "moe/layer_1/load_max_over_mean": 3.0,
        "learning/aux_z_loss": 3.0,
        "moe/balance_weight": 0.02,
        "moe/largest_logit": 5.0,
        "moe/layer_0/largest_logit": 3.0,
        "moe/layer_0/capacity_used": 0.72,
        "moe/layer_1/max_violation": 2.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert {type(value) for value in found.values()} == {float}


def test_dropped_choices_are_no_useful_flops():
    assert scalars()["perf/mfu"] == pytest.approx(3 * 100 * (10 + 30) / 2 / 1e4)
    assert scalars(drop=(0.5, 0.5))["perf/mfu"] == pytest.approx(3 * 100 * (10 + 15) / 2 / 1e4)
    assert scalars(drop=(1.0, 1.0))["perf/mfu"] == pytest.approx(3 * 100 * 10 / 2 / 1e4)
    assert scalars()["perf/useful_tflops_per_second"] == pytest.approx(6000 / 1e12)


def test_a_trace_that_cannot_be_written_is_said_once_and_ends_no_run(tmp_path, capsys):
    trackers = Trackers(RunDir(tmp_path), 1)
    (tmp_path / "routing").write_text("not a folder")
    rows = {"tokens": np.zeros((1, 2), int), "segments": np.ones((1, 2), int)}
    for step in (1, 2):
        trackers.trace(step, rows, np.zeros((1, 1, 2, 1), int))
    assert capsys.readouterr().out.count("can't be written any more") == 1
    trackers.close()


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path)


def steps_in(run):
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def write(run, steps, first=None, value=1.0):
    trackers = Trackers(run, first or steps[0])
    for step in steps:
        trackers.write(step, {"learning/loss": value})
    trackers.close()


def test_each_step_is_a_line_that_is_there_at_once(run):
    trackers = Trackers(run, 1)
    trackers.write(1, {"learning/loss": 2.5, "perf/mfu": 0.5})
    assert json.loads(run.metrics.read_text()) == {"step": 1, "learning/loss": 2.5, "perf/mfu": 0.5}
    trackers.write(2, {"learning/loss": 2.25})
    assert steps_in(run) == [1, 2]
    trackers.close()


def test_nan_and_infinity_become_null_so_that_every_line_is_json(run):
    trackers = Trackers(run, 1)
    trackers.write(1, {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1.0})
    trackers.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(run.metrics.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": None, "b": None, "c": None, "d": 1.0}


def test_a_resumed_run_drops_the_lines_of_the_steps_it_repeats(run):
    write(run, range(1, 8))
    write(run, [5, 6], value=2.0)
    assert steps_in(run) == [1, 2, 3, 4, 5, 6]
    losses = [json.loads(line)["learning/loss"] for line in run.metrics.read_text().splitlines()]
    assert losses == [1.0] * 4 + [2.0] * 2


@pytest.mark.parametrize(
    "rest", ['{"step": 3, "learn', '{"step": 3}', "{}", "[1]", "7", '{"step": "3"}', "\0\0\0\0", "\n\n"], ids=repr
)
def test_what_a_kill_left_half_written_goes(run, rest):
    write(run, [1, 2])
    before = run.metrics.read_text()
    run.metrics.write_text(before + rest)
    write(run, [3])
    assert steps_in(run) == [1, 2, 3]
    assert run.metrics.read_text().startswith(before)


def test_bytes_that_are_no_text_go_with_the_line_they_are_in(run):
    write(run, [1, 2])
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 3, \xff\xfe')
    write(run, [3])
    assert steps_in(run) == [1, 2, 3]


def events_in(file):
    """The events of a TensorBoard file: length, checksum, event, checksum; and again."""
    data, at = file.read_bytes(), 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16


def test_tensorboard_is_told_which_steps_a_resumed_run_repeats(run, monkeypatch):
    for start, (first, last) in enumerate([(1, 6), (4, 5)]):
        clock = SimpleNamespace(time=lambda start=start: 1_000_000_000.0 + start)  # part of the file's name
        monkeypatch.setattr("tensorboardX.event_file_writer.time", clock)
        write(run, range(first, last + 1), value=first)
    for file, (first, last) in zip(sorted(run.tensorboard.iterdir()), [(1, 6), (4, 5)], strict=True):
        version, started, *steps = events_in(file)
        assert version.file_version == "brain.Event:2"  # or TensorBoard forgets nothing
        assert (started.session_log.status, started.step) == (SessionLog.START, first)
        assert [event.step for event in steps] == list(range(first, last + 1))
        assert {(v.tag, v.simple_value) for event in steps for v in event.summary.value} == {("learning/loss", first)}


def full_metrics(run, monkeypatch):
    stand_in = SimpleNamespace(exists=lambda: False, open=lambda *_, **__: open("/dev/full", "w"))  # noqa: SIM115
    monkeypatch.setattr(RunDir, "metrics", stand_in)


def full_tensorboard(run, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115


def metrics_in_the_way(run, monkeypatch):
    run.metrics.mkdir()


def tensorboard_in_the_way(run, monkeypatch):
    run.tensorboard.write_text("a file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a full file is closed once more
@pytest.mark.parametrize("spoil", [full_metrics, full_tensorboard, metrics_in_the_way, tensorboard_in_the_way])
def test_metrics_that_cannot_be_written_are_said_once_and_end_no_run(run, monkeypatch, capsys, spoil):
    spoil(run, monkeypatch)
    trackers = Trackers(run, 1)
    for step in range(1, 200):
        trackers.write(step, {"learning/loss": 1.0})
    trackers.close()
    said = "".join(capsys.readouterr())
    assert said.count("\n") == said.count("can't be written any more") == 1
    assert "the run goes on" in said


def test_without_a_terminal_progress_is_a_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with Progress(40, 0) as progress:
        for step in range(1, 41):
            now[0] += PLAIN_LINE_SECONDS / 10
            progress.show(step, scalars(drop=(0.25, 0.25)))
        progress.say("a word")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/40", "11/40", "21/40", "31/40", "40/40"]
    assert all(part in lines[0] for part in ("loss 2.500", "50 tokens/s", "MFU", "dropped 25.0%", "load max/mean 2.00"))
    assert lines[-1] == "a word"
