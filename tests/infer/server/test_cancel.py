"""Clients that go away, and deadlines, at every stage of a request.

What is asked each time: once the server has noticed (it calls ``Worker.leave``), no later than after the second step of
the engine from then on nothing of the request is left there: the first may have begun before. And its neighbours get
the text that they get alone.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import socket
import threading
import time

import pytest

from tests.infer.answers import assert_everything_is_back

VICTIM = 666
"""The seed of requests that end early."""
DEADLINE = 1.0
NUMBERS = itertools.count(100)
"""In the place of #: no prompt is in the prefix cache."""
PROMPT = "#: a prompt that many calls compute, as each takes no more than 32 tokens of it; " * 2
BODIES = {
    "completion": {"prompt": PROMPT},
    "completion, streamed": {"prompt": PROMPT, "stream": True},
    "chat": {"messages": [{"role": "user", "content": PROMPT}]},
    "chat, streamed": {"messages": [{"role": "user", "content": PROMPT}], "stream": True},
    "three choices": {"prompt": PROMPT, "n": 3},
    "two choices of two prompts, streamed": {"prompt": [PROMPT, f"not {PROMPT}"], "n": 2, "stream": True},
}
FAST = {"completion", "chat, streamed", "two choices of two prompts, streamed"}


@dataclasses.dataclass
class Held:
    """An engine that is held where a test wants it, and what was left of the victims after each of its steps.

    left: for each request that was given up, the steps that had ended when the server noticed. traces: after each step
    how many had ended, the victims that have something, and whether all pages and slots are somebody's.
    """

    worker: object
    stage: object = None
    reached: threading.Event = dataclasses.field(default_factory=threading.Event)
    go_on: threading.Event = dataclasses.field(default_factory=threading.Event)
    door: threading.Event = dataclasses.field(default_factory=threading.Event)
    left: dict = dataclasses.field(default_factory=dict)
    traces: list = dataclasses.field(default_factory=list)

    def sent(self, served, body):
        """A client whose request is on its way to the engine."""
        before = self.worker._sent
        client = Client(served, body)
        wait_for(lambda: self.worker._sent > before)
        return client

    def until_left(self, count):
        wait_for(lambda: len(self.left) >= count)

    def check_all_is_gone(self, victims):
        """Of ``victims`` requests."""
        assert len(self.left) == victims
        for id, noticed in self.left.items():
            assert all(step <= noticed + 1 for step, ids, _ in self.traces if id in ids)
        assert all(sound for *_, sound in self.traces)


def wait_for(something, seconds=15):
    ends = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < ends
        time.sleep(0.002)


def victims(engine):
    return [live.sequence for live in engine._live.values() if live.request.params.seed == VICTIM]


def is_sound(engine):
    """The scheduler has those that live and no others, and no page or slot is lost."""
    scheduler = engine.scheduler
    if {*scheduler.waiting, *scheduler.running} != engine._live.keys():
        return False
    return all(
        shard.pool.held == len({page for one in shard.running for page in one.lease.pages})
        and len(shard.slots) + len(shard.running) == engine.config.slots
        for shard in scheduler.shards
    )


@pytest.fixture
def held(served, monkeypatch):
    engine, worker = served.server.engine, served.server.worker
    step, submit, leave = engine.step, engine.submit, worker.leave
    held = Held(worker)

    def held_step():
        if held.stage is not None and held.stage(engine):
            held.stage = None
            held.reached.set()
            held.go_on.wait(15)
        said = step()
        ids = {live.request.id for live in engine._live.values() if live.request.params.seed == VICTIM}
        held.traces.append((worker.steps + 1, ids, is_sound(engine)))
        return said

    def held_submit(request):
        held.door.wait(15)
        submit(request)

    def noted_leave(caller):
        for id in caller.ids:
            if id in worker._callers:
                held.left[id] = worker.steps
        leave(caller)

    monkeypatch.setattr(engine, "step", held_step)
    monkeypatch.setattr(engine, "submit", held_submit)
    monkeypatch.setattr(worker, "leave", noted_leave)
    yield held
    held.door.set()
    held.go_on.set()
    served.until_idle()
    wait_for(lambda: not served.server.admission._open)
    assert worker.entering == 0
    assert_everything_is_back(engine)


class Client:
    """A connection on which one request was sent."""

    def __init__(self, served, body, cut=None):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        text = json.dumps({"max_tokens": 40, "ignore_eos": True, "seed": VICTIM, **body})
        raw = text.replace("#", str(next(NUMBERS))).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n"
        host, _, port = served.url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        self.read = b""
        self.socket.sendall((head.encode() + b"Content-Type: application/json\r\n\r\n" + raw)[:cut])

    def until(self, text):
        """Read so far at least."""
        while text not in self.read:
            more = self.socket.recv(65536)
            assert more, self.read
            self.read += more

    def rest(self):
        """Status, and the JSON of the body, of a stream that of the last frame."""
        while more := self.socket.recv(65536):
            self.read += more
        head, _, body = self.read.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body.rpartition(b"data: ")[2].partition(b"\n")[0])


def neighbour(served, number):
    body = {"prompt": f"neighbour {number}", "max_tokens": 60, "ignore_eos": True, "seed": number, "temperature": 0.8}
    return served.post("/v1/completions", body).json()["choices"][0]["text"]


@pytest.fixture(scope="module")
def alone(served):
    return [neighbour(served, number) for number in range(4)]


@contextlib.contextmanager
def beside(served, held, alone, count):
    """The first ``count`` neighbours, sent before what the block sends; the engine is not given any of them before the
    block opens the door."""
    sent = held.worker._sent
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = [pool.submit(neighbour, served, number) for number in range(count)]
        try:
            wait_for(lambda: held.worker._sent == sent + count)
            yield
        finally:
            held.door.set()
            held.go_on.set()
        assert [text.result() for text in texts] == alone[:count]


def queued(engine):
    """While others have all slots."""
    mine = victims(engine)
    return mine and len(engine.scheduler.running) == 4 and all(one.lease is None for one in mine)


def computing_prompt(engine):
    return any(one.lease is not None and 0 < one.stored < one.prompt - 1 for one in victims(engine))


def decoding(engine):
    return any(one.known > one.prompt + 3 for one in victims(engine))


@pytest.mark.parametrize("stage", [queued, computing_prompt, decoding])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in BODIES]
)
def test_a_client_that_goes_away_leaves_nothing(served, held, alone, name, stage):
    body, held.stage = BODIES[name], stage
    count = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    with beside(served, held, alone, 4 if stage is queued else 1):
        client = held.sent(served, body)
        held.door.set()
        assert held.reached.wait(15)
        if stage is decoding and "stream" in body:
            client.until(b"data:")
        client.socket.close()
        held.until_left(count)
    served.until_idle()
    held.check_all_is_gone(count)


def test_a_client_that_goes_away_before_the_engine_has_its_request(served, held, alone):
    with beside(served, held, alone, 1):
        held.sent(served, BODIES["two choices of two prompts, streamed"]).socket.close()
        held.door.set()
        held.until_left(2)
    served.until_idle()
    held.check_all_is_gone(2)


def test_a_client_that_goes_away_within_its_request(served, held):
    sent = held.worker._sent
    Client(served, BODIES["chat"], cut=-1).socket.close()
    held.door.set()
    assert Client(served, {"prompt": "somebody else", "max_tokens": 1}).rest()[0] == 200
    assert held.worker._sent == sent + 1


def every_stage(engine):
    """Of three requests in turn."""
    mine = sorted(victims(engine), key=lambda one: one.arrival)
    if len(mine) < 3 or mine[0].lease is None or mine[1].lease is None:
        return False
    return mine[0].known > mine[0].prompt and 0 < mine[1].stored < mine[1].prompt - 1 and mine[2].lease is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_requests_at_every_stage(served, held, alone, monkeypatch, stream):
    """One that decodes, one whose prompt is computed, one that waits for the budget, and one that the engine has not
    seen yet."""
    long, short = (
        {"prompt": PROMPT, "stream": stream},
        {"messages": [{"role": "user", "content": "?"}], "stream": stream},
    )
    held.stage = every_stage
    with beside(served, held, alone, 1):
        monkeypatch.setattr(served.server, "limits", dataclasses.replace(served.server.limits, deadline=DEADLINE))
        clients = [held.sent(served, body) for body in (short, long, {**short, "n": 2})]
        held.door.set()
        assert held.reached.wait(15)
        clients.append(held.sent(served, {"prompt": "x", "stream": stream}))
        late = time.monotonic() + DEADLINE
        held.until_left(3)
        wait_for(lambda: time.monotonic() > late)
        held.go_on.set()
        answers = [client.rest() for client in clients]
    assert [(status, answer["error"]["code"]) for status, answer in answers] == [
        (200 if stream else 504, "deadline")
    ] * 4
    served.until_idle()
    held.check_all_is_gone(4)


@pytest.mark.slow
def test_a_client_that_does_not_read_is_left_in_the_end(served, held, monkeypatch):
    """Its answer fills all buffers on the way; its place among the open requests is free again."""
    monkeypatch.setattr("gshardx.infer.server.answering.STUCK", 0.5)
    held.door.set()
    body = {"prompt": [f"# {number}" for number in range(8)], "n": 4, "logprobs": 20, "max_tokens": 200, "stream": True}
    client = held.sent(served, body)
    wait_for(lambda: not served.server.admission._open, 30)
    with contextlib.suppress(ConnectionError):
        while more := client.socket.recv(1 << 20):
            client.read = more
    assert b"[DONE]" not in client.read
