"""An engine that dies, hangs, moves again, or fails on one request alone: everybody is told, and nobody waits."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import threading
import time

import httpx
import jax
import numpy as np
import pytest

from gshardx.infer.server.limits import Limits
from tests.infer.answers import assert_everything_is_back
from tests.infer.server.running import serving

STALL = 2.0
TOLD = 1.0
"""Seconds within which everybody knows what the server knows."""
BODIES = [
    ("/v1/completions", {"prompt": "To be"}),
    ("/v1/completions", {"prompt": "To be", "stream": True}),
    ("/v1/completions", {"prompt": ["or", "not", "to", "be"], "n": 2, "stream": True}),
    ("/v1/completions", {"prompt": ["or", "not"], "n": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}], "stream": True}),
]
SEQUENCES = 16
"""Of these, more than there are slots."""
NEW = "/v1/completions", {"prompt": "That is", "max_tokens": 20, "seed": 1}


def open_(running, pool):
    """How each of them will be answered: status, headers, and the last thing that is said."""

    def ask(path, body):
        body = {"max_tokens": 200, "ignore_eos": True, "seed": 1, **body}
        with httpx.stream("POST", f"{running.url}{path}", json=body, timeout=30) as response:
            lines = [line for line in response.iter_lines() if line]
        return response.status_code, response.headers, lines[-1]

    return [pool.submit(ask, path, body) for path, body in BODIES]


def check_told(answers, ends):
    """Each that the engine is down, be it in a last frame, before the clock shows ``ends``."""
    for answer in answers:
        status, headers, last = answer.result(timeout=max(0.0, ends - time.monotonic()))
        if headers["content-type"].startswith("text/event-stream"):
            assert status == 200
            assert last.startswith("data: ")
        else:
            assert status == 503
            assert int(headers["retry-after"]) > 0
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_down"


def wait_until(something, seconds):
    ends = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < ends
        time.sleep(0.01)


def is_well(running):
    return running.get("/health").status_code == 200


def check_refuses(running):
    for path, body in BODIES:
        assert running.post(path, body).status_code == 503
    assert running.get("/ready").status_code == 503
    assert "gshardx_up 0.0" in running.get("/metrics").text


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        yield pool


@pytest.fixture
def engine(engine):
    yield engine
    for live in list(engine._live.values()):
        engine.cancel(live.request.id)
    list(engine.run())
    assert_everything_is_back(engine)


@pytest.fixture
def broken(engine, monkeypatch):
    """To call before the engine's fourth step from now, and each one after it."""
    step, steps, actions = engine.step, itertools.count(), []

    def broken_step():
        if next(steps) >= 3:
            for action in actions:
                action()
        return step()

    monkeypatch.setattr(engine, "step", broken_step)
    return actions.append


@contextlib.contextmanager
def full(engine, pool):
    """A server whose queue is full, and the answers to come."""
    with serving(engine, stall=STALL) as running:
        answers = open_(running, pool)
        wait_until(lambda: running.server.worker._sent == SEQUENCES, 20)
        running.server.admission.limits = Limits(max_queue=1)
        yield running, answers


@pytest.mark.slow
def test_when_the_engine_dies_everybody_is_told(engine, broken, pool, caplog):
    """Those that run, those that wait, and those that come later: not that the queue is full."""
    moves, died = threading.Event(), []

    def die():
        moves.wait(20)
        died.append(time.monotonic())
        raise RuntimeError("planted")

    broken(die)
    with full(engine, pool) as (running, answers):
        moves.set()
        wait_until(lambda: died and not is_well(running), 5)
        check_told(answers, died[0] + 5)
        check_refuses(running)
        assert time.monotonic() < died[0] + 5
        assert running.server.worker.open == 0
        wait_until(lambda: not running.server.admission._open, TOLD)
    assert "planted" in caplog.text


@pytest.mark.slow
def test_while_the_engine_hangs_everybody_is_told_and_when_it_moves_all_is_well(engine, broken, pool):
    moves, hung = threading.Event(), []

    def hang():
        hung.append(time.monotonic())
        moves.wait(60)

    with serving(engine) as running:
        before = running.post(*NEW).json()["choices"]
        running.until_idle()
    broken(hang)
    with full(engine, pool) as (running, answers):
        wait_until(lambda: hung, 20)
        wait_until(lambda: not is_well(running), STALL + TOLD)
        check_told(answers, hung[0] + STALL + TOLD)
        check_refuses(running)
        worker = running.server.worker
        steps = worker.steps
        moves.set()
        wait_until(lambda: is_well(running), TOLD)
        running.until_idle()
        assert worker.steps <= steps + 3, "the one that hung, and those that tell of the cancelled"
        assert_everything_is_back(engine)
        running.server.admission.limits = Limits()
        assert running.post(*NEW).json()["choices"] == before
        moves.clear()
        answers = open_(running, pool)
        check_told(answers, time.monotonic() + 20)
        began = time.monotonic()
    assert time.monotonic() < began + STALL + 5, "it ends while the engine hangs"
    moves.set()
    wait_until(lambda: not worker._thread.is_alive(), 20)


def test_a_fault_of_one_request_ends_it_alone(engine, pool, monkeypatch):
    """Its scores are no numbers; the other prompts of the same request end with it."""
    admit = engine._admit

    def admit_with_nan(sequence, params):
        admit(sequence, params)
        if len(sequence.tokens[: sequence.prompt]) == 3:
            bias = np.array(engine._state.bias)
            bias[sequence.shard, sequence.slot] = np.nan
            place = engine._state.bias.sharding
            engine._state = dataclasses.replace(engine._state, bias=jax.device_put(bias, place))

    monkeypatch.setattr(engine, "_admit", admit_with_nan)
    path, body = NEW[0], NEW[1] | {"logit_bias": {65: 1}}
    with serving(engine) as running:
        alone = running.post(path, body).json()["choices"]
        others = [pool.submit(running.post, path, body) for _ in range(3)]
        whole = running.post(path, {**body, "prompt": ["good", "bad"]})
        assert whole.status_code == 500
        assert whole.json()["error"]["code"] == "request_failed"
        last = running.post(path, {**body, "prompt": "bad", "stream": True, "n": 2}).text.rstrip().rpartition("\n")[2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_failed"
        assert [other.result().json()["choices"] for other in others] == [alone] * 3
        running.until_idle()


def test_what_the_engine_cant_take_in_for_reasons_of_its_own_ends_alone(engine, monkeypatch):
    submit = engine.submit

    def submit_or_not(request):
        submit(request)
        if len(request.prompt) == 3:
            raise RuntimeError("planted")

    monkeypatch.setattr(engine, "submit", submit_or_not)
    with serving(engine) as running:
        assert running.post(NEW[0], {"prompt": ["good", "bad", "good"], "n": 2}).status_code == 500
        running.until_idle()
        assert running.post(*NEW).status_code == 200
        assert is_well(running)
