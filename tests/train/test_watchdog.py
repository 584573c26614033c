"""A run that hangs is noticed, named, and ended where its config says so."""

from typing import ClassVar

import pytest

from gshardx.config import WatchdogConfig
from gshardx.errors import BadInput
from gshardx.sharding.peers import Peers
from gshardx.train import watchdog
from gshardx.train.events import Events
from gshardx.train.goodput import Goodput
from gshardx.train.watchdog import Watchdog


class Silent(Peers):
    """Other processes of which some are silent; it leaves by an exception."""

    quiet: ClassVar = {}

    @property
    def silent(self):
        return self.quiet

    def leave(self, line):
        raise SystemExit(line)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(watchdog, "time", made)
    return made


@pytest.fixture
def made(tmp_path, clock):
    """A watchdog in whose run 30 steps of a tenth of a second have ended."""

    def make(**config):
        goodput, dumps = Goodput(None), []
        goodput.enter("step")
        events = Events(tmp_path / "events.jsonl")
        dog = Watchdog(WatchdogConfig(**config), goodput, events, Silent(), lambda: dumps.append(1))
        dog.goodput, dog.dumps, dog.peers = goodput, dumps, dog._peers
        for step in range(1, 32):
            clock.now += 0.1
            dog.step(step)
        return dog

    return make


def test_a_slow_step_is_named_once_with_every_stack(made, clock, capsys, tmp_path):
    dog = made(factor=20, at_least=1)
    assert dog.limit == pytest.approx(2.0)
    clock.now += 1.9
    dog.look()
    assert (dog.dumps, capsys.readouterr().err) == ([], "")
    clock.now += 0.2
    dog.look()
    dog.look()
    assert dog.dumps == [1]
    assert capsys.readouterr().err == "watchdog: a step has taken 2 s so far, and the median is 0.1 s\n"
    dog.step(32)
    assert capsys.readouterr().err == "watchdog: step 32 has ended\n"
    assert [word in (tmp_path / "events.jsonl").read_text() for word in ('"hang"', '"going_on"')] == [True, True]
    assert dog._peers.doing == "step 33"


def test_a_short_hang_is_none(made, clock):
    dog = made(factor=20, at_least=60)
    clock.now += 59
    dog.look()
    assert not dog.dumps


@pytest.mark.parametrize("bucket", ["evaluation", "restore", "compile"])
def test_what_is_no_step_takes_as_long_as_it_takes(made, clock, bucket):
    dog = made(factor=20, at_least=1)
    with dog.goodput.spending(bucket):
        clock.now += 1000
        dog.look()
    assert not dog.dumps


def test_a_silent_process_is_named_also_in_an_evaluation(made, clock, capsys):
    dog = made(factor=20, at_least=30)
    dog.peers.quiet = {"process 1 (10.0.0.2), last heard of at step 32": 31.0}
    with dog.goodput.spending("evaluation"):
        dog.look()
    assert "; not heard of: process 1 (10.0.0.2), last heard of at step 32, 31 s ago\n" in capsys.readouterr().err


def test_it_ends_the_run_where_it_is_told_to(made, clock):
    dog = made(factor=20, at_least=1, action="exit")
    clock.now += 5
    with pytest.raises(SystemExit, match=r"the run hangs: a step has taken 5 s .*watchdog.action = exit"):
        dog.look()


def test_before_the_first_step_there_is_nothing_to_judge(clock):
    dumps = []
    dog = Watchdog(WatchdogConfig(at_least=1), Goodput(None), Events(None), Silent(), lambda: dumps.append(clock.now))
    clock.now += 1000
    dog.look()
    assert dumps == []


@pytest.mark.parametrize("bad", [{"factor": 1}, {"factor": float("inf")}, {"at_least": 0}])
def test_bad_values_are_named(bad):
    with pytest.raises(BadInput, match=f"watchdog.{next(iter(bad))} = "):
        WatchdogConfig(**bad)
