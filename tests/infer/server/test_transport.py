"""Requests that are too large, too slow, or end in two ways; and that each answer is counted."""

import asyncio
import socket
import time

import httpx
import pytest

from gshardx.infer.server.frames import Completions
from gshardx.infer.server.serve import listening
from tests.infer.server.malformed import JSON, TOKENIZE, overheard, wire

BOUNDS = "gshardx.infer.server.transport"


def connected(served):
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 10)


def exchanged(served, sent):
    """All that comes back until the server ends the connection."""
    with connected(served) as sock:
        sock.sendall(sent)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def until_closed(sock, drip):
    """All that comes back until the server ends the connection, though a byte is sent ten times a second."""
    heard, ends = b"", time.monotonic() + 10
    sock.settimeout(0.1)
    while time.monotonic() < ends:
        try:
            sock.sendall(drip)
            got = sock.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            return heard
        if not got:
            return heard
        heard += got
    raise AssertionError(f"still open; heard {heard!r}")


def test_a_body_whose_end_is_told_in_two_ways_is_no_way_to_another_request(served):
    hidden = b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n"
    headers = [JSON, b"Content-Length: %d" % (5 + len(hidden)), b"Transfer-Encoding: chunked"]
    said = exchanged(served, wire("POST", TOKENIZE, headers, b"0\r\n\r\n" + hidden))
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1") == 1
    assert b"not both" in said


def test_a_body_that_would_be_too_large_is_refused_before_it_is_sent(served):
    headers = [JSON, b"Content-Length: %d" % (1 << 40), b"Expect: 100-continue"]
    said = exchanged(served, wire("POST", TOKENIZE, headers, b""))
    assert said.startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.UPLOAD", 0.1)
    said = exchanged(served, wire("POST", TOKENIZE, [JSON, b"Content-Length: 9"], b"{"))
    assert said.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_drips_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.UPLOAD", 0.5)
    with connected(served) as sock:
        sock.sendall(wire("POST", TOKENIZE, [JSON, b"Content-Length: 99"], b"{"))
        said = until_closed(sock, b" ")
    assert said.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX: "], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come_is_not_waited_for(served, monkeypatch, begun):
    monkeypatch.setattr(f"{BOUNDS}.HEAD", 0.5)
    with connected(served) as sock:
        sock.sendall(begun)
        assert until_closed(sock, begun[-1:]) == b""


def test_half_a_head_after_an_answer_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.HEAD", 0.5)
    with connected(served) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET")
        assert until_closed(sock, b"T").startswith(b"HTTP/1.1 200 ")


def test_an_answer_that_takes_longer_than_a_head_may_is_given(served, monkeypatch):
    monkeypatch.setattr(f"{BOUNDS}.HEAD", 0.05)
    answer = served.post("/v1/completions", {"prompt": "a", "max_tokens": 64, "ignore_eos": True})
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 64


def test_a_bug_is_counted_and_not_told(served, monkeypatch):
    monkeypatch.setattr(served.server, "template", None)
    before = served.server.timings.answered["/tokenizer_info", 500]
    with overheard():
        answer = served.get("/tokenizer_info")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "something went wrong in the server"
    assert "Traceback" not in answer.text
    assert served.server.timings.answered["/tokenizer_info", 500] == before + 1


def test_a_stream_that_breaks_is_counted_once(served, monkeypatch):
    answered = served.server.timings.answered
    before = answered["/v1/completions", 200], answered["/v1/completions", 500]
    monkeypatch.setattr(Completions, "choice", lambda *_: 1 / 0)
    with overheard() as errors, pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        served.post("/v1/completions", {"prompt": "a", "stream": True})
    assert any("ZeroDivisionError" in one for one in errors)
    assert (answered["/v1/completions", 200], answered["/v1/completions", 500]) == (before[0] + 1, before[1])


def test_answers_of_two_pieces_do_not_wait_for_acknowledgements():
    async def option():
        made = asyncio.get_running_loop().create_future()
        with listening("127.0.0.1", 0) as sock:
            server = await asyncio.start_server(lambda _, writer: made.set_result(writer), sock=sock)
            async with server:
                _, client = await asyncio.open_connection(*sock.getsockname())
                accepted = (await made).get_extra_info("socket")
                found = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                client.close()
                return found

    assert asyncio.run(option())
