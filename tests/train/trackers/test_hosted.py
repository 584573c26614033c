"""Weights & Biases and trackio, as stand-ins with their signatures and, where they are installed, themselves."""

import dataclasses
import importlib.util
import json
import os
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from gshardx.config import TrackingConfig
from gshardx.errors import BadInput
from gshardx.train.run_dir import RunDir
from gshardx.train.trackers import Trackers, check_trackers, hosted
from tests.train.processes import finish, start_training, write_inputs

STAND_IN = """
import json, os, sys, time

told = open(os.environ["TOLD"], "a")


class Run:
    def log(self, {log}):
        print("a word of a tracker")
        {body}
        told.write(json.dumps([step, {first}]) + "\\n")


def init({init}):
    {start}
    given = {{name: value for name, value in locals().items() if value is not None}}
    told.write(json.dumps(["init", given]) + "\\n")
    return Run()


def finish({finish}):
    told.write('["finish"]\\n')
    told.flush()
    {end}
"""
SIGNATURES = {  # of wandb 0.31 and trackio 0.43, as far as they are used
    "wandb": {
        "init": "project=None, dir=None, id=None, name=None, config=None, allow_val_change=None, resume=None",
        "log": "data, step=None, commit=None",
        "first": "data",
        "finish": "exit_code=None, quiet=None",
    },
    "trackio": {
        "init": "project, name=None, group=None, config=None, resume='never'",
        "log": "metrics, step=None",
        "first": "metrics",
        "finish": "",
    },
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a stand-in where both this process and those that it starts find it; gives the file that it fills."""

    def put(module, body="pass", start="pass", end="pass"):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        source = STAND_IN.format(**SIGNATURES[module], body=body, start=start, end=end)
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", str(folder))
        monkeypatch.setenv("TOLD", str(tmp_path / "told"))
        return tmp_path / "told"

    return put


def with_trackers(config, *names, **more):
    return dataclasses.replace(config, tracking=TrackingConfig(trackers=list(names), **more))


def write(run, config, steps):
    trackers = Trackers(run, config, steps[0])
    for step in steps:
        trackers.write(step, {"learning/loss": 1.0 / step})
    trackers.close()


def told_by(told):
    return [json.loads(line) for line in told.read_text().splitlines()]


def lines_in(run):
    return len(run.metrics.read_text().splitlines())


@pytest.mark.parametrize("module", ["wandb", "trackio"])
def test_it_is_told_the_config_each_step_and_the_end(run, config, install, module, capsys):
    told = install(module)
    write(run, with_trackers(config, module, project="p"), range(1, 6))
    (_, given), *steps, last = told_by(told)
    assert (given["project"], given["name"], given["config"]["mesh"]["expert"]) == ("p", "run", 4)
    assert steps == [[step, {"learning/loss": 1.0 / step}] for step in range(1, 6)]
    assert last == ["finish"]
    assert capsys.readouterr().out == ""
    assert "a word of a tracker" in (run.path / f"{module}.log").read_text()


def test_wandb_goes_on_with_a_run_by_an_id_that_no_other_has(run, config, install):
    told, config = install("wandb"), with_trackers(config, "wandb")
    write(run, config, range(1, 4))
    write(run, config, range(3, 5))
    write(run, config, range(1, 2))
    first, second, anew = [given for word, given, *_ in (line for line in told_by(told) if line[0] == "init")]
    assert first["id"] == second["id"] != anew["id"]
    assert {given["resume"] for given in (first, second, anew)} == {"allow"}
    assert Path(first["dir"]) == run.path


def test_trackio_goes_on_with_a_run_by_its_name(run, config, install):
    told, config = install("trackio"), with_trackers(config, "trackio", name="mine")
    write(run, config, range(1, 4))
    write(run, config, range(3, 5))
    given = [line[1] for line in told_by(told) if line[0] == "init"]
    assert [(one["name"], one["resume"]) for one in given] == [("mine", "never"), ("mine", "allow")]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"start": "raise RuntimeError('not logged in')"},
        {"body": "raise RuntimeError('not logged in')"},
        {"end": "raise RuntimeError('not logged in')"},
        {"start": "input()"},
        {"body": "sys.exit('not logged in')"},
    ],
    ids=["init", "log", "finish", "asks", "exits"],
)
def test_one_that_fails_is_said_once_with_its_reason(run, config, install, capsys, spoilt):
    install("wandb", **spoilt)
    config = with_trackers(config, "wandb", "tensorboard")
    trackers = Trackers(run, config, 1)
    for step in range(1, 40):
        trackers.write(step, {"learning/loss": 1.0})
        time.sleep(0.02)
    trackers.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("wandb: can't be written any more (")
    assert ("EOF" if "input()" in spoilt.values() else "not logged in") in line
    assert f"see {run.path / 'wandb.log'}" in line
    assert lines_in(run) == 39


@pytest.mark.parametrize("where", ["start", "body", "end"])
def test_one_that_blocks_for_ever_ends_within_the_limit(run, config, install, monkeypatch, capsys, where):
    monkeypatch.setattr(hosted, "GOODBYE", 1.0)
    install("wandb", **{where: "time.sleep(1e6)"})
    trackers = Trackers(run, with_trackers(config, "wandb"), 1)
    since = time.monotonic()
    for step in range(1, 1001):
        trackers.write(step, {f"metric {n}": 1.0 for n in range(50)})  # more than a pipe holds
    handed_over = time.monotonic()
    trackers.close()
    assert time.monotonic() - handed_over < 2.5
    assert handed_over - since < 5
    assert capsys.readouterr().out.count("wandb: can't be written any more (it did not end within 1 s") == 1
    assert lines_in(run) == 1000


def test_one_that_is_too_far_behind_is_left(run, config, install, monkeypatch, capsys):
    monkeypatch.setattr(hosted, "WAITING", 10)
    install("trackio", start="time.sleep(1e6)")
    trackers = Trackers(run, with_trackers(config, "trackio"), 1)
    for step in range(1, 1001):
        trackers.write(step, {f"metric {n}": 1.0 for n in range(50)})
    trackers.close()
    assert capsys.readouterr().out == "trackio: can't be written any more (it is 10 steps behind); the run goes on\n"
    assert lines_in(run) == 1000


def test_one_that_is_not_installed_is_named_even_where_its_folder_lies(config, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(hosted.sys.modules, "wandb", raising=False)
    with pytest.raises(BadInput, match=r"wandb is not there; pip install 'gshardx\[wandb\]', or leave it out"):
        check_trackers(with_trackers(config, "wandb").tracking)


def test_a_clusters_signal_ends_it_no_sooner_than_the_run(run, config, install):
    told = install("wandb", start="print('started', file=sys.stderr, flush=True)")
    trackers = Trackers(run, with_trackers(config, "wandb"), 1)
    until = time.monotonic() + 30
    while not (run.path / "wandb.log").read_text() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(trackers._open["wandb"]._process.pid, signal.SIGTERM)
    trackers.write(1, {"learning/loss": 2.5})
    trackers.close()
    assert told_by(told)[1:] == [[1, {"learning/loss": 2.5}], ["finish"]]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("wandb", "trackio")), reason="wandb and trackio: not installed"
)
def test_the_real_ones_hold_a_run_and_its_continuation(tmp_path, monkeypatch):
    place = write_inputs(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for steps in ("4", "6"):
        flags = ["--tracking.trackers", "[tensorboard,wandb,trackio]", "--train.steps", steps]
        out, _ = finish(start_training(place, "run", *flags))
        assert "can't be written" not in out
    assert not (place / "wandb").exists()
    identity = (place / "run/wandb.id").read_text()
    stored = sorted((place / "run/wandb").glob(f"offline-run-*/run-{identity}.wandb"))
    assert [b"learning/loss" in file.read_bytes() for file in stored] == [True, True]
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as tables:
        found = tables.execute("select run_name, step from metrics order by step").fetchall()
        configs = [json.loads(text) for (text,) in tables.execute("select config from configs")]
    assert found == [("run", step) for step in range(1, 7)]
    assert configs[-1]["train"]["steps"] == 6
