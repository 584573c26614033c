"""Real runs in which something breaks: processes killed and stopped, disks that are full or go away."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from gshardx.checkpoint.store import finished_steps
from gshardx.errors import OthersMissing
from gshardx.train.goodput import BUCKETS
from tests.checkpoint.good import newest_good_step
from tests.disks import small_disk
from tests.together import finish_both, start_both, without_notices
from tests.train.processes import STEPS, content, finish, learning, lines_of, start_anew, start_training, write_inputs

pytestmark = pytest.mark.slow  # real processes, each with its own start of JAX

MESH = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.expert", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("faults"))


def train_both(place, run, *more, anew=False):
    command = ["-m", "gshardx.train", "--config", "tiny.yaml", "--run_dir", str(run), *MESH, *more]
    return start_both(place, *command, anew=anew)


@pytest.fixture(scope="module")
def both(place):
    """An undisturbed run of two processes."""
    finish_both(train_both(place, place / "both", anew=True))
    return place / "both"


def wait_for_lines(run, count, processes):
    """Until ``count`` steps are in metrics.jsonl, or a process has ended."""
    while all(process.poll() is None for process in processes):
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") >= count:
            return True
        time.sleep(0.01)
    return False


def events_of(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.sweep)])
def test_the_others_name_the_process_that_was_killed_and_the_same_command_continues(place, both, victim):
    run = place / f"killed-{victim}"
    processes = train_both(place, run)
    assert wait_for_lines(run, 10, processes)
    killed, survivor = processes[victim], processes[1 - victim]
    killed.kill()
    started = time.monotonic()
    _, err = survivor.communicate(timeout=60)
    assert time.monotonic() - started < 60
    assert survivor.returncode == OthersMissing.exit_code
    assert f"error: process {victim} (127.0.0.1) is lost: its connection ended, so it was killed" in err
    if victim == 1:
        assert without_notices(err).count("\n") == 1
        assert events_of(run)[-1]["event"] == "lost_peer"
    finish_both(train_both(place, run))
    assert learning(run) == learning(both)
    assert content(run, STEPS) == content(both, STEPS)


@pytest.mark.sweep
def test_killed_ten_times_two_processes_end_bit_for_bit_where_they_would_have(place, both):
    run, draw = place / "killed-ten-times", random.Random(5)
    for kill in range(10):
        processes = train_both(place, run)
        while not (run / "events.jsonl").exists() or [e["event"] for e in events_of(run)].count("start") <= kill:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 4))  # compiling, stepping, saving
        processes[draw.randrange(2)].kill()
        codes = []
        for process in processes:
            process.communicate(timeout=60)
            codes.append(process.returncode)
        assert sorted(codes) == [-signal.SIGKILL, OthersMissing.exit_code]
    finish_both(train_both(place, run))
    assert learning(run) == learning(both)
    assert content(run, STEPS) == content(both, STEPS)


@pytest.mark.parametrize("action", ["exit", pytest.param("report", marks=pytest.mark.sweep)])
def test_a_stopped_process_is_named_by_the_watchdog(place, both, action):
    """SIGSTOP: it hangs, and does not die. With report it may go on later, and nothing is lost."""
    run = place / f"stopped-{action}"
    watchdog = ["--watchdog.at_least", "3", "--watchdog.factor", "5", "--watchdog.action", action]
    processes = train_both(place, run, *watchdog)
    assert wait_for_lines(run, 10, processes)
    processes[1].send_signal(signal.SIGSTOP)
    if action == "report":
        while "hang" not in [event["event"] for event in events_of(run)]:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGCONT)
        finish_both(processes)
        assert learning(run) == learning(both)
        return
    _, err = processes[0].communicate(timeout=60)
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == OthersMissing.exit_code
    lines = without_notices(err).splitlines()
    assert lines[0].startswith("watchdog: a step has taken ")
    assert "not heard of: process 1 (127.0.0.1), last heard of at step " in lines[0]
    assert any(line.startswith("Thread ") or line.startswith("Current thread ") for line in lines), "stacks"
    assert any("in run_steps" in line for line in lines)
    assert "(watchdog.action = exit)" in lines[-1]


@pytest.mark.sweep
def test_every_second_of_a_run_with_five_faults_is_accounted_for(place):
    run, alive = place / "accounted", 0.0
    for fault in range(6):
        started = time.monotonic()
        process = start_training(
            place, run, "--train.steps", "400", "--train.eval_every", "50", "--checkpoint.every", "20", start=start_anew
        )
        if fault < 5:
            assert wait_for_lines(run, 60 * (fault + 1), [process])
            process.kill()
            process.communicate()
        else:
            out, _ = finish(process)
        alive += time.monotonic() - started
    seconds = {name: lines_of(run)[-1][f"goodput/{name}"] for name in BUCKETS}
    kept = json.loads((run / "goodput.json").read_text())
    assert kept["starts"] == 6
    assert sum(kept["seconds"].values()) == pytest.approx(alive, rel=0.01)
    assert seconds["lost_work"] > 0.2
    assert all(seconds[name] > 0 for name in BUCKETS)
    assert f"{seconds['step'] / alive:.0%}"[:1] in out  # the summary's line
    assert "goodput " in out
    assert [event["event"] for event in events_of(run)] == ["start", *["killed", "start"] * 5, "end"]


def fill(file, leaving):
    """Until so many bytes of its disk are left, all at once: a save may take some of them meanwhile."""
    with file.open("wb") as out:
        while (free := shutil.disk_usage(file.parent).free) > leaving:
            with contextlib.suppress(OSError):
                os.posix_fallocate(out.fileno(), 0, os.fstat(out.fileno()).st_size + free - leaving)


def test_on_a_full_disk_a_run_goes_on_where_it_is_told_to(place):
    with small_disk(place / "full", "20m") as disk:
        run = disk / "run"
        process = start_training(place, run, "--checkpoint.on_error", "continue", "--train.steps", "100000")
        assert wait_for_lines(run, 10, [process])
        hog = disk / "hog"
        fill(hog, leaving=150_000)
        before = set(finished_steps(run / "checkpoints"))
        while "save_failed" not in [event["event"] for event in events_of(run)]:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        assert newest_good_step(run / "checkpoints", report=pytest.fail) in before | set(
            finished_steps(run / "checkpoints")
        )
        hog.unlink()
        failed = events_of(run)[-1]["step"]
        while not any(step > failed for step in finished_steps(run / "checkpoints")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = finish(process, expected=143)
        assert "the disk is full" in out
        assert "training goes on (checkpoint.on_error = continue)" in out
        assert newest_good_step(run / "checkpoints", report=pytest.fail) == lines_of(run)[-1]["step"]


@pytest.mark.parametrize("how", ["vanished", pytest.param("read-only", marks=pytest.mark.sweep)])
def test_a_disk_that_goes_away_stops_the_run_with_one_line_and_what_was_saved_stays(place, how):
    with small_disk(place / how, "40m") as disk:
        run = disk / "run"
        process = start_training(place, run, "--train.steps", "100000")
        assert wait_for_lines(run, 10, [process])
        if how == "vanished":
            subprocess.run(["umount", "-l", str(disk)], check=True)
        else:
            subprocess.run(["mount", "--bind", "-o", "ro", str(disk), str(disk)], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", str(disk)], check=True)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 2, (out, err)
        last = err.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "the checkpoint could not be saved" in last
        if how == "read-only":
            subprocess.run(["umount", "-l", str(disk)], check=True)
            assert newest_good_step(run / "checkpoints", report=lambda line: None) is not None
