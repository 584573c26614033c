"""A process that is killed, fails or stops is named by the others, whatever they wait for."""

import signal
import sys
import time
from pathlib import Path

import pytest

from gshardx.errors import BadInput, OthersMissing
from gshardx.sharding import meeting
from tests.children import PIPES, ROOT, environment
from tests.together import flags, free_port
from tests.warm import Fork

COUNT = 3


def start(what, count=COUNT):
    """``what`` each process does, by its index, once all are there."""
    port = free_port()
    return [
        Fork(
            [str(Path(__file__)), what.get(index, "wait"), *flags(index, port, count)],
            cwd=ROOT,
            env=environment(),
            **PIPES,
        )
        for index in range(count)
    ]


def act(argv):
    where, (what,) = meeting.take_flags(argv)
    lines = meeting._meet(where.coordinator, where.num_processes, where.process_id, where.timeout)
    with meeting.Peers(where.process_id, where.num_processes, lines) as peers:
        peers.farewell = lambda line: print("farewell:", line, flush=True)
        peers.doing = f"step {where.process_id}"
        time.sleep(1.5)  # all have heard of all
        print("ready", flush=True)
        if what == "done":
            return
        if what == "refuse":
            raise BadInput("no such file")
        if what == "fail":
            raise KeyError("a bug")
        if what == "listen":
            while not peers.silent:
                time.sleep(0.1)
            print(*peers.silent, flush=True)
            return
        time.sleep(60)


def ends(processes, but=()):
    """Exit codes, outputs and errors of the others, killed in the end."""
    try:
        return {
            index: (process.wait(40), *process.communicate())
            for index, process in enumerate(processes)
            if index not in but
        }
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_is_named_by_all_others(victim):
    processes = start({})
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    processes[victim].send_signal(signal.SIGKILL)
    others = ends(processes, but=[victim])
    assert time.monotonic() - started < 10
    said = f"process {victim} (127.0.0.1) is lost: its connection ended, so it was killed or its host went down"
    for code, out, err in others.values():
        assert (code, out, err) == (OthersMissing.exit_code, f"farewell: {said}\n", f"error: {said}\n")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "why"), [("refuse", "no such file"), ("fail", "'a bug'")])
def test_one_that_ends_early_is_waited_for_no_longer(what, why):
    others = ends(start({1: what}), but=[1])
    for code, _, err in others.values():
        assert code == OthersMissing.exit_code
        assert err == f"error: process 1 (127.0.0.1) has ended: {why}\n"


@pytest.mark.slow
def test_one_that_is_done_is_no_loss():
    assert [code for code, _, _ in ends(start(dict.fromkeys(range(COUNT), "done"))).values()] == [0] * COUNT
    assert ends(start({1: "done", 0: "done"}, 2))[0][0] == 0


@pytest.mark.slow
def test_one_that_stops_is_silent_and_what_it_did_last_is_known():
    processes = start({0: "listen", 2: "done"})
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[1].send_signal(signal.SIGSTOP)
    code, out, _ = ends(processes, but=[1, 2])[0]
    assert (code, out) == (0, "process 1 (127.0.0.1), last heard of at step 1\n")


def test_alone_there_is_nobody_to_watch():
    with meeting.join() as peers:
        assert (peers.count, peers.silent) == (1, {})


if __name__ == "__main__":
    act(sys.argv[1:])
