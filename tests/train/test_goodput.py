"""Every second of a run is in one bucket, whatever ends it."""

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gshardx.train import goodput
from gshardx.train.goodput import BEAT, BUCKETS, Goodput, in_words, scalars_of
from tests.children import environment


class Clock:
    """Stands for the time module; it moves when told."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(goodput, "time", made)
    monkeypatch.setattr(goodput, "_process_age", lambda: 3.0)
    return made


def spend(ledger, clock, **seconds):
    for bucket, time_in_it in seconds.items():
        with ledger.spending(bucket):
            clock.now += time_in_it


def spent(ledger):
    return {name: seconds for name, seconds in ledger.seconds.items() if seconds}


def test_time_is_where_the_run_was_and_starts_with_the_process(clock, tmp_path):
    ledger = Goodput(tmp_path / "goodput.json")
    spend(ledger, clock, compile=5.0)
    ledger.enter("step")
    clock.now += 2.0
    spend(ledger, clock, data_wait=0.5)
    clock.now += 1.0
    assert spent(ledger) == {"init": 3.0, "compile": 5.0, "step": 3.0, "data_wait": 0.5}
    assert scalars_of(ledger.seconds)["goodput/compile"] == 5.0
    assert in_words(ledger.seconds) == "26.1% of 11.5 s were steps; compile 43.5%, init 26.1%, data wait 4.3%"


def test_what_a_killed_process_did_since_its_checkpoint_is_lost(clock, tmp_path):
    first = Goodput(tmp_path / "goodput.json")
    spend(first, clock, step=10.0, evaluation=1.0)
    first.saved(20)
    spend(first, clock, step=4.0, data_wait=1.0, compile=2.0)
    first.enter("step")
    first.write()  # and then it is killed
    clock.now += 100.0  # nobody runs

    second = Goodput(tmp_path / "goodput.json")
    spend(second, clock, restore=1.5)
    second.back_to(20)
    assert second.starts == 2
    assert spent(second) == pytest.approx(
        {"init": 6.0, "step": 10.0, "evaluation": 1.0, "compile": 2.0, "restore": 1.5, "lost_work": 5.0 + BEAT / 2}
    )


@pytest.mark.parametrize(("later", "lived"), [(-1.0, BEAT / 2), (0.1, BEAT / 2), (0.4, 0.4), (60.0, 2 * BEAT)])
def test_a_step_written_down_after_the_last_write_was_lived(clock, tmp_path, later, lived):
    """Up to two beats: what was written still later was not written by that process, or by another clock."""
    first, steps = Goodput(tmp_path / "goodput.json"), tmp_path / "metrics.jsonl"
    spend(first, clock, step=10.0)
    first.enter("step")
    first.write()
    steps.write_text("{}\n")
    os.utime(steps, (clock.now + later, clock.now + later))
    assert spent(Goodput(tmp_path / "goodput.json", steps)) == pytest.approx({"init": 6.0, "step": 10.0 + lived})
    assert spent(Goodput(tmp_path / "goodput.json", tmp_path / "none"))["step"] == 10.0 + BEAT / 2


ENDING = """
from pathlib import Path
from gshardx.cli import run_command
from gshardx.train import loop  # all that a run imports
from gshardx.train.goodput import Goodput

def main(argv):
    Goodput(Path(argv[0])).write(ended=True)
    return 0

run_command(main)
"""


def test_a_command_lives_on_for_little_after_its_last_write(tmp_path):
    """Looking for garbage in all that was imported took most of a second; a busy machine is tried again."""
    file = tmp_path / "goodput.json"

    def lives_on():
        subprocess.run([sys.executable, "-c", ENDING, str(file)], env=environment(), check=True)
        return time.time() - json.loads(file.read_text())["until"]

    assert any(lives_on() < 0.3 for _ in range(4))


def test_without_a_checkpoint_all_is_lost_and_a_proper_end_loses_nothing(clock, tmp_path):
    first = Goodput(tmp_path / "goodput.json")
    spend(first, clock, step=10.0)
    first.saved(5)
    first.write(ended=True)
    second = Goodput(tmp_path / "goodput.json")
    second.back_to(5)
    assert spent(second) == {"init": 6.0, "step": 10.0}
    second.back_to(0)
    assert spent(second) == {"init": 6.0, "lost_work": 10.0}


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["spend", "save", "kill", "back"]), st.sampled_from(BUCKETS), st.integers(0, 9)),
        max_size=30,
    )
)
def test_buckets_add_up_to_the_time_there_was(tmp_path_factory, moves):
    """Whatever is saved, killed and gone back to, no second is lost or counted twice."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(goodput, "time", clock)
        patch.setattr(goodput, "_process_age", lambda: 0.0)
        path = tmp_path_factory.mktemp("run") / "goodput.json"
        ledger, whole, step, saved = Goodput(path), 0.0, 0, [0]
        for what, bucket, amount in moves:
            if what == "spend":
                spend(ledger, clock, **{bucket: float(amount)})
                whole, step = whole + amount, step + 1
            elif what == "save":
                ledger.saved(step)
                saved = sorted({*saved, step})
            elif what == "kill":
                ledger.write()
                ledger, whole = Goodput(path), whole + BEAT / 2
                step = saved[-1]
                ledger.back_to(step)
            else:
                step = saved[amount % len(saved)]
                saved = [one for one in saved if one <= step]
                ledger.back_to(step)
            assert sum(ledger.seconds.values()) == pytest.approx(whole)
            assert min(ledger.seconds.values()) >= 0


@pytest.mark.parametrize("content", ["", "{", "[]", "7", '{"seconds": {"step": 2.0}}'])
def test_a_file_that_cannot_be_read_starts_again(tmp_path, content):
    path = tmp_path / "goodput.json"
    path.write_text(content)
    ledger = Goodput(path)
    ledger.write()
    assert set(json.loads(path.read_text())["seconds"]) == set(BUCKETS)


def test_a_disk_that_refuses_the_file_ends_no_run(tmp_path):
    Goodput(tmp_path / "gone" / "goodput.json").write(ended=True)
    assert not (tmp_path / "gone").exists()


def test_the_age_of_this_process_is_known():
    assert 0 < goodput._process_age() < time.clock_gettime(time.CLOCK_BOOTTIME)
