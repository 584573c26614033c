"""Who is let in, who is refused, and whether those who come back when they were told to are let in."""

import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gshardx.errors import BadInput
from gshardx.infer.server import limits
from gshardx.infer.server.limits import LONGEST, Admission, Limits, Refused, ServiceRate
from gshardx.infer.server.worker import EngineDown, Seen
from tests.infer.server.running import serving

SLOTS = 4


class Clock:
    """``time``, as far as limits know it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(limits, "time", Clock())
    return limits.time


def worker(running=SLOTS, waiting=0, tokens=0, trouble=None):
    load = Seen(running=running, waiting=waiting, waiting_tokens=tokens)
    return SimpleNamespace(load=lambda: load, trouble=trouble)


def paced(each, **given):
    """Admission at a server where every ``each`` seconds a sequence ends."""
    admission = Admission(Limits(**given), SLOTS)
    for number in range(100):
        admission.rate.note(number * each, 1, waiting=True)
    return admission


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_limits_are_positive(name):
    with pytest.raises(BadInput, match=f"--{name} 0: must be more than 0"):
        Limits(**{name: 0})


@given(st.lists(st.tuples(st.floats(0.001, 0.5), st.integers(0, 5)), min_size=20, max_size=200))
def test_the_rate_is_that_of_those_that_ended_lately(steps):
    """Over much less than the ten seconds that are remembered, that of all."""
    rate, now = ServiceRate(), 0.0
    rate.note(now, 3, waiting=True)
    for passed, ended in steps:
        now += passed
        rate.note(now, ended, waiting=True)
    seconds, ended = sum(passed for passed, _ in steps), sum(count for _, count in steps)
    found = rate.seconds(7)
    if seconds < limits.REMEMBERED / 10 and ended >= 2:
        assert found == pytest.approx(7 * seconds / ended, rel=0.2)
    if found is not None:
        assert 0 < found <= 7 * seconds


@given(st.floats(0.01, 5), st.integers(1, 50))
def test_a_steady_rate_is_found_exactly(each, count):
    assert paced(each).rate.seconds(count) == pytest.approx(count * each)


def test_a_rate_that_changed_is_followed():
    rate = ServiceRate()
    for number in range(1000):
        rate.note(number * 0.1, 1, waiting=True)
    for number in range(100, 130):
        rate.note(float(number), 1, waiting=True)
    assert rate.seconds(1) == pytest.approx(1.0, rel=0.4)


def test_time_in_which_nobody_waits_says_nothing_of_the_rate():
    rate = ServiceRate()
    for hour in range(20):
        rate.note(hour * 3600.0, 9, waiting=True)
        rate.note(hour * 3600.0 + 2, 4, waiting=False)
    assert rate.seconds(1) == pytest.approx(0.5)


def test_nothing_is_known_before_one_ended():
    rate = ServiceRate()
    rate.note(0.0, 0, waiting=True)
    rate.note(1.0, 0, waiting=True)
    assert rate.seconds(1) is None


@given(st.integers(1, 20), st.integers(0, 30), st.integers(0, SLOTS), st.integers(1, 30))
def test_no_more_wait_than_may(most, waiting, running, count):
    """But for one request that comes when nobody waits: it is taken, however many it asks for."""
    admission = Admission(Limits(max_queue=most), SLOTS)
    behind = max(0, waiting - (SLOTS - running))
    if behind and behind + count > most:
        with pytest.raises(Refused, match=f"{behind} requests wait, and no more than {most} may"):
            admission.check(worker(running, waiting), count)
        assert admission.refused == 1
    else:
        admission.check(worker(running, waiting), count)
        assert admission.refused == 0


def test_no_more_tokens_wait_than_may():
    admission = Admission(Limits(max_queued_tokens=100), SLOTS)
    admission.check(worker(waiting=1, tokens=60), 1, 40)
    with pytest.raises(Refused, match="60 tokens wait, and 100 may"):
        admission.check(worker(waiting=1, tokens=60), 1, 41)
    admission.check(worker(waiting=0), 1, 4000)


def test_nobody_waits_longer_than_allowed():
    admission = paced(2.0, max_wait=10)
    admission.check(worker(waiting=4), 1)
    with pytest.raises(Refused, match="would wait for about 12 s, and 10 are allowed"):
        admission.check(worker(waiting=5), 1)


def test_an_engine_that_is_down_refuses_otherwise():
    with pytest.raises(EngineDown, match="it hangs"):
        Admission(Limits(max_queue=1), SLOTS).check(worker(waiting=5, trouble="it hangs"), 1)


def test_open_requests_of_one_owner_are_counted_until_they_end():
    admission = Admission(Limits(max_open=2), SLOTS)
    with admission.of("a"), admission.of("b"):
        with admission.of("a"), pytest.raises(Refused, match="2 requests of a are open"), admission.of("a"):
            raise AssertionError
        with admission.of("a"):
            pass
    assert not admission._open


def refused(admission, waiting, count=1):
    with pytest.raises(Refused) as error:
        admission.check(worker(waiting=waiting), count)
    return error.value.seconds


def test_who_is_refused_is_told_when_those_before_have_been_let_in(clock):
    admission = paced(1.0, max_queue=9)
    told = [refused(admission, 9) for _ in range(3)]
    assert told == [9, 11, 12], "one a 1 / 0.9 s from the ninth on, in whole seconds"
    clock.now += 5
    assert refused(admission, 9) == 9
    assert refused(admission, 9) == 11, "and later than all before, though time has passed"
    clock.now += 1000
    assert refused(admission, 9) == 9, "the past is past"


def test_nobody_is_told_more_than_clients_bear(clock):
    admission = paced(60.0, max_queue=1, max_wait=1e9)
    assert {refused(admission, 9) for _ in range(1000)} == {LONGEST}
    clock.now += LONGEST
    assert refused(admission, 1) <= LONGEST


arrivals = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60)), min_size=1, max_size=20)


@given(st.floats(0.02, 2.0), st.integers(4, 40), arrivals)
@example(0.05, 8, [(0.0, 60)] * 5)
def test_all_who_come_back_when_told_are_let_in(each, most, bursts):
    """However they came at first; once those who were let in then are gone, and if nobody else comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "time", Clock())
        admission, clock = paced(each, max_queue=most, max_wait=1e9), limits.time
        waiting, ended = most, clock.now
        back = []
        for pause, count in bursts:
            clock.now += pause
            waiting, ended = drained(waiting, ended, clock.now, each)
            for _ in range(count):
                try:
                    admission.check(worker(waiting=waiting), 1)
                    waiting += 1
                except Refused as error:
                    back.append((clock.now + error.seconds, error.seconds))
        empty, again = clock.now + waiting * each, []
        for at in sorted(at for at, told in back if told < LONGEST and at > clock.now):
            clock.now = at
            waiting, ended = drained(waiting, ended, at, each)
            if at >= empty and not let_in(admission, waiting):
                again.append(at)
            waiting = min(most, waiting + 1)
    assert not again, "refused though they came when they were told to"


def let_in(admission, waiting):
    try:
        admission.check(worker(waiting=waiting), 1)
    except Refused:
        return False
    return True


def drained(waiting, ended, now, each):
    """How many wait ``now``, where one was let in every ``each`` seconds while there were any; and when the last."""
    while waiting and ended + each <= now:
        waiting, ended = waiting - 1, ended + each
    return waiting, ended if waiting else now


@pytest.fixture
def held(engine, monkeypatch):
    """To call with limits: a server whose engine does not get beyond its first step, and a way to ask it for something
    that it takes on. In the end it goes on, and all of these are answered."""
    step, go_on, taken = engine.step, threading.Event(), []
    monkeypatch.setattr(engine, "step", lambda: (go_on.wait(30), step())[1])
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(16))

        def serve(**given):
            running = stack.enter_context(serving(engine, stall=60, **given))
            worker = running.server.worker

            def take(prompt="?", **more):
                ends, sent = time.monotonic() + 20, worker._sent
                taken.append(pool.submit(ask, running, prompt, **more))
                while worker._sent == sent:
                    assert time.monotonic() < ends
                    time.sleep(0.002)

            return running, take

        yield serve
        go_on.set()
        assert [one.result().status_code for one in taken] == [200] * len(taken)


def ask(running, prompt="?", address="127.0.0.1", **more):
    with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=30) as client:
        return client.post(f"{running.url}/v1/completions", json={"prompt": prompt, "max_tokens": 4, **more})


def check_refused(answer, why, seconds=1):
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= seconds
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("rate_limit_error", "overloaded", None)
    assert why in error["message"]


def test_who_finds_the_queue_full_is_told_when_to_come_back(held):
    running, take = held(max_queue=2)
    for _ in range(SLOTS + 2):
        take()
    check_refused(ask(running), "2 requests wait, and no more than 2 may")
    check_refused(ask(running, stream=True), "2 requests wait, and no more than 2 may")
    chat = {"messages": [{"role": "user", "content": "?"}]}
    check_refused(running.post("/v1/chat/completions", chat), "2 requests wait, and no more than 2 may")
    assert running.get("/health").status_code == 200
    assert "gshardx_refused_requests_total 3.0" in running.get("/metrics").text
    assert ask(running, n=100).status_code == 400, "it would never fit"


def test_continuations_count_one_by_one(held):
    running, take = held(max_queue=6)
    take(["a", "b"], n=3)
    take()
    check_refused(ask(running, ["a", "b"], n=2), "3 requests wait, and no more than 6 may")
    take(n=3)


def test_an_address_has_no_more_open_than_it_may(held):
    running, take = held(max_open=2)
    take()
    take()
    check_refused(ask(running), "2 requests of 127.0.0.1 are open")
    take(address="127.0.0.2")


def test_prompts_on_their_way_to_the_engine_count_as_waiting(held):
    running, take = held(max_queued_tokens=100)
    for _ in range(SLOTS + 1):
        take("x" * 18)
    check_refused(ask(running, "x" * 18), "prompts of 90 tokens wait, and 100 may")
    take("x" * 10)


def test_who_would_wait_too_long_is_refused(held):
    running, take = held(max_wait=10)
    for number in range(100):
        running.server.admission.rate.note(number * 4.0, 1, waiting=True)
    for _ in range(SLOTS + 2):
        take()
    check_refused(ask(running), "would wait for about 12 s, and 10 are allowed", seconds=8)
