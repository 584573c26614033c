"""The command as a process: how it starts, how it is told to go, and how it is killed."""

import concurrent.futures
import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from tests.children import environment

pytestmark = pytest.mark.sweep
LONG = 2500
"""Tokens of an answer that takes seconds."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where programs are kept; the first server compiles them, and is killed while it answers."""
    cache = tmp_path_factory.mktemp("cache")
    with running(cache) as server, contextlib.suppress(httpx.RemoteProtocolError):
        assert server.compiled > 5
        with httpx.stream("POST", f"{server.url}/v1/completions", json={"prompt": "x", "stream": True}) as answer:
            for _ in answer.iter_raw():
                server.process.kill()
    return cache


def start(cache, *flags):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.infer.server.child", "--port", "0", "--batch_size", "4", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment() | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
    )  # fmt: skip


class Process:
    """A server that has said where it listens."""

    def __init__(self, process):
        self.process = process
        self.said = process.stdout.readline()
        found = re.search(r"at (http://\S+) .* (\d+) programs compiled", self.said)
        assert found, self.said + process.stderr.read()
        self.url, self.compiled = found[1], int(found[2])
        threading.Thread(target=process.stderr.read, daemon=True).start()
        ends = time.monotonic() + 60
        while httpx.get(f"{self.url}/ready").status_code != 200:
            assert time.monotonic() < ends


@contextlib.contextmanager
def running(cache, *flags):
    process = start(cache, *flags)
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait()


def ask(url, stream, tokens):
    """How an answer ended: its last frame, or its only body."""
    body = {"prompt": "To be", "max_tokens": tokens, "ignore_eos": True, "stream": stream}
    found = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    if not stream or found.status_code != 200:
        return found.status_code, found.json()
    frames = [frame for frame in found.text.split("\n\n") if frame]
    return found.status_code, frames[-1]


def wait_until(condition, seconds=20):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def until_open(server, count):
    """Wait until so many requests are open there."""
    wait_until(lambda: f"gshardx_requests_open {count}.0" in httpx.get(f"{server.url}/metrics").text)


def test_told_to_go_it_lets_open_requests_end_and_takes_no_more(cache):
    with running(cache, "--drain", "300") as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, server.url, number % 2 == 0, LONG) for number in range(8)]
        until_open(server, 8)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused, said = ask(server.url, False, 5)
        assert (refused, said["error"]["message"]) == (503, "the server is shutting down")
        for number, (status, last) in enumerate(one.result() for one in asked):
            assert status == 200
            if number % 2 == 0:
                assert last == "data: [DONE]"
            else:
                assert last["usage"]["completion_tokens"] == LONG
        assert server.process.wait(10) == 0


def test_past_its_deadline_it_ends_open_requests_with_a_frame(cache):
    with running(cache, "--drain", "0.3") as server, concurrent.futures.ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask, server.url, number % 2 == 0, LONG) for number in range(24)]
        until_open(server, 24)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        ended = [one.result() for one in asked]
        assert server.process.wait(10) == 0
        assert time.monotonic() - told < 0.3 + 5
        cut = [last for number, (_, last) in enumerate(ended) if number % 2 == 0 and last != "data: [DONE]"]
        assert cut
        assert all(json.loads(last[6:])["error"]["message"] == "the server is shutting down" for last in cut)
        statuses = {status for number, (status, _) in enumerate(ended) if number % 2}
        assert statuses <= {200, 503}


def test_killed_and_started_again_it_compiles_nothing(cache):
    with running(cache) as again:
        assert again.compiled == 0
        assert ask(again.url, False, 5)[0] == 200
        assert "gshardx_compilations_total 0.0" in httpx.get(f"{again.url}/metrics").text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "0.0.0.0"], "there are no keys; give --api_keys FILE"),
        (["--api_keys", "nowhere"], "nowhere"),
        (["--chat_template", "nowhere"], "nowhere"),
        (["--max_queue", "0"], "--max_queue 0: must be more than 0"),
        (["--ahead_ms", "0"], "--ahead_ms 0: must be more than 0"),
        (["--ahead_ms", "nan"], "--ahead_ms nan: must be more than 0"),
        (["--port", "70000"], "--port 70000: must be 0 to 65535"),
        (["--host", "nowhere.invalid"], "no such address"),
    ],
)
def test_what_cant_be_served_is_told_in_one_line(cache, flags, said):
    process = start(cache, *flags)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said in errors.splitlines()[-1]
    assert out == ""


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(cache):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(cache, "--port", str(taken.getsockname()[1]))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "can't listen there" in errors
