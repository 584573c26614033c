"""Traces for xprof: the steps asked for, and the parts of a layer by name."""

import gzip
import json
import re
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from gshardx.config import ProfileConfig
from gshardx.train import profile as module
from gshardx.train.profile import Profile
from tests.together import finish_both, start_both
from tests.train.processes import finish, lines_of, start_training, write_inputs


def run_steps(config, folder, steps):
    """What is said at each step."""
    with Profile(config, folder) as profile:
        said = []
        for step in steps:
            profile.before(step)
            said.append(profile.after(step, jnp.ones(3) * step))
    return said


def traces_in(folder):
    return sorted(folder.rglob("*.xplane.pb"))


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig(start=9)], ids=["none", "beyond the end"])
def test_without_a_step_to_trace_there_is_no_trace(tmp_path, config, capsys):
    assert run_steps(config, tmp_path / "profile", range(1, 6)) == [""] * 5
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "profile").exists()


def test_other_processes_write_none(tmp_path, monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 1)
    assert run_steps(ProfileConfig(start=1), tmp_path / "profile", range(1, 6)) == [""] * 5
    assert not (tmp_path / "profile").exists()


def test_one_that_has_begun_elsewhere_is_said_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    assert run_steps(ProfileConfig(start=2, steps=2), tmp_path / "profile", range(1, 6)) == [""] * 5
    assert capsys.readouterr().out == (
        "profile: can't be written (Only one profile may be run at a time.); the run goes on\n"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("profile"))


@pytest.mark.slow
def test_a_trace_names_the_parts_of_a_layer(place):
    out, _ = finish(start_training(place, "run", "--train.steps", "6", "--profile.start", "3", "--profile.steps", "2"))
    assert "wrote a trace of steps 3 to 4; look (pip install xprof): xprof --logdir run/profile" in out
    (trace,) = traces_in(place / "run/profile")
    scopes = set(re.findall(rb"jit\(\w+\)/[\w()/.]*?(gate|dispatch|experts|combine|attention)/", trace.read_bytes()))
    assert scopes == {b"gate", b"dispatch", b"experts", b"combine", b"attention"}
    (events,) = trace.parent.glob("*.trace.json.gz")
    marks = [event.get("args", {}) for event in json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]]
    assert [mark["step_num"] for mark in marks if "step_num" in mark] == ["3", "4"]


@pytest.mark.slow
def test_a_signal_in_mid_trace_closes_it(place):
    flags = ["--train.steps", "100000", "--profile.start", "3", "--profile.steps", "100000"]
    process = start_training(place, "ended", *flags)
    until = time.monotonic() + 200
    while not (place / "ended/metrics.jsonl").exists() or len(lines_of(place / "ended")) < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process, expected=128 + signal.SIGTERM)
    assert "wrote a trace of steps 3 as far as it went" in out
    assert len(traces_in(place / "ended/profile")) == 1


@pytest.mark.sweep
def test_of_two_processes_the_first_writes_one(place):
    command = ["-m", "gshardx.train", "--config", "tiny.yaml", "--run_dir", "both", "--train.steps", "3"]
    (out, _), (silent, _) = finish_both(start_both(place, *command, "--profile.start", "2", "--profile.steps", "1"))
    assert out.count("wrote a trace of steps 2 to 2") == 1
    assert silent == ""
    assert len(traces_in(place / "both/profile")) == 1
