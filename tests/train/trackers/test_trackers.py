"""Each tracker fails alone, and once."""

import dataclasses
import json
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from gshardx.config import TrackingConfig
from gshardx.train import trackers as module
from gshardx.train.run_dir import RunDir
from gshardx.train.trackers import Trackers

LOAD = SimpleNamespace(load=np.ones((2, 4), np.float32))


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def full(path):
    """``path``, on a disk without room."""
    path.symlink_to("/dev/full")


def full_metrics(run, monkeypatch):
    monkeypatch.setattr("gshardx.train.trackers.lines.drop_lines_from", lambda *_: None)  # it would replace the link
    full(run.metrics)


def full_tensorboard(run, monkeypatch):
    monkeypatch.setattr("gshardx.train.trackers.tensorboard.time", SimpleNamespace(time=lambda: 1.0))
    run.tensorboard.mkdir()
    full(run.tensorboard / f"events.out.tfevents.1.{socket.gethostname()}.{os.getpid()}")


def metrics_in_the_way(run, monkeypatch):
    run.metrics.mkdir()


def tensorboard_in_the_way(run, monkeypatch):
    run.tensorboard.write_text("a file")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a full file is closed once more
@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (full_metrics, "metrics.jsonl"),
        (metrics_in_the_way, "metrics.jsonl"),
        (full_tensorboard, "tensorboard"),
        (tensorboard_in_the_way, "tensorboard"),
    ],
)
def test_one_that_cannot_be_written_is_said_once_and_the_other_goes_on(run, config, monkeypatch, capsys, spoil, name):
    spoil(run, monkeypatch)
    trackers = Trackers(run, config, 1)
    for step in range(1, 200):
        trackers.write(step, {"learning/loss": 1.0})
        trackers.load(step, LOAD)
    trackers.close()
    (line,) = "".join(capsys.readouterr()).splitlines()
    assert line.startswith(f"{name}: can't be written any more (")
    assert line.endswith("); the run goes on")
    assert len(run.expert_load.read_text().splitlines()) == 199
    if name == "tensorboard":
        assert len(run.metrics.read_text().splitlines()) == 199
    else:
        (file,) = run.tensorboard.iterdir()
        assert file.read_bytes().count(b"learning/loss") == 199


def test_the_experts_load_fails_alone(run, config, capsys):
    run.expert_load.mkdir()
    trackers = Trackers(run, config, 1)
    for step in (1, 2):
        trackers.write(step, {"learning/loss": 1.0})
        trackers.load(step, LOAD)
    trackers.close()
    assert capsys.readouterr().out.count("expert_load.jsonl: can't be written any more") == 1
    assert len(run.metrics.read_text().splitlines()) == 2


def test_a_trace_that_cannot_be_written_is_said_once(run, config, capsys):
    run.routing.write_text("not a folder")
    trackers = Trackers(run, config, 1)
    rows = {"tokens": np.zeros((1, 2), int), "segments": np.ones((1, 2), int)}
    for step in (1, 2, 3):
        trackers.trace(step, rows, np.zeros((1, 1, 2, 1), int))
        trackers.write(step, {"learning/loss": 1.0})
    trackers.close()
    assert capsys.readouterr().out.splitlines() == ["routing: can't be written any more (File exists); the run goes on"]
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 2, 3]


def test_without_trackers_there_are_the_lines(run, config):
    trackers = Trackers(run, dataclasses.replace(config, tracking=TrackingConfig(trackers=[])), 1)
    trackers.write(1, {"learning/loss": 1.0})
    trackers.close()
    assert json.loads(run.metrics.read_text()) == {"step": 1, "learning/loss": 1.0}
    assert not run.tensorboard.exists()


def test_processes_other_than_the_first_write_nothing(run, config, monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    trackers = Trackers(run, config, 1)
    trackers.write(1, {"learning/loss": 1.0})
    trackers.load(1, LOAD)
    trackers.trace(1, {"tokens": np.zeros((1, 2), int)}, np.zeros((1, 1, 2, 1), int))
    trackers.close()
    assert list(run.path.iterdir()) == []
