"""Requests that nobody should send, drawn from a seed, and what every answer must be like."""

import builtins
import contextlib
import copy
import http.client
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

import gshardx

JSON = b"Content-Type: application/json"
COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
GOOD = {
    COMPLETIONS: {
        "model": "tiny", "prompt": "To be", "max_tokens": 2, "n": 1, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
        "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1, "repetition_penalty": 1.1, "logprobs": 2,
        "logit_bias": {"5": 1.5, "7": -100}, "seed": 3, "stop": ["xyz", "\n\n"], "stop_token_ids": [9], "echo": True,
        "stream": False, "stream_options": {"include_usage": True}, "experts": True, "user": "me",
        "response_format": {"type": "text"},
    },
    CHAT: {
        "model": "tiny", "messages": [{"role": "system", "content": "Be calm."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "me"}], "max_completion_tokens": 2,
        "logprobs": True, "top_logprobs": 2, "temperature": 1, "stream": False, "tools": [], "metadata": {"a": "b"},
    },
    TOKENIZE: {"model": "tiny", "prompt": "To be"},
    DETOKENIZE: {"model": "tiny", "tokens": [1, 2, 3]},
}  # fmt: skip
"""Bodies that are answered with 200."""
FORMS = {
    COMPLETIONS: {"id", "object", "created", "model", "choices", "usage"},
    CHAT: {"id", "object", "created", "model", "choices", "usage"},
    TOKENIZE: {"tokens", "count", "max_model_len"},
    DETOKENIZE: {"prompt"},
    "/health": {"status", "steps"},
}
"""Fields of answers."""
DEEP = 100_000
TEXTS = [
    *("null", "true", "false", "0", "-0.0", "-1", "1", "2", "0.5", "1e5", "1e400", "-1e400", "1e-320", "NaN"),
    *("Infinity", "-Infinity", "2147483647", "2147483648", "18446744073709551616", "9" * 400, "9" * 5000, '""', '"1"'),
    *('"a"', r'"\ud800"', r'"\udfff\ud800"', r'"\u0000"', '"\U0010ffff\u200b\ufeff"', '"<|endoftext|>"'),
    *('"{{ 7 * 7 }}"', '"../../etc/passwd"', '"%s%n"', "[]", "[[]]", "[null]", '[""]', "[0]", "[257]", "[258]"),
    *("[-1]", "[[0], [1]]"),
    *('["a", 1]', "{}", '{"a": null}', r'{"\ud800": 1}', '{"-1": 1}', '{"1e3": 1}', '{"5": NaN}', "[[[[[[0]]]]]]"),
]
"""JSON values, and some that are none."""
LARGE = [
    *("[" * DEEP + "]" * DEEP, "[" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "[" * 300 + "]" * 300),
    *('{"items":' * 200 + "{}" + "}" * 200, f'"{"a" * 100_000}"', f'"{"é" * 50_000}"', f"[{'1,' * 100_000}1]"),
    *(f"[{'null,' * 100_000}1]", f"[{'[],' * 100_000}1]", f"[{'-1,' * 100_000}1]", f"[{'[1],' * 100_000}1]"),
    *(json.dumps({str(n): 1 for n in range(20_000)}), json.dumps({f"x{n}": 1 for n in range(20_000)})),
    *(f'["{"a" * 50_000}"]', json.dumps(["aaaaaaaa"] * 10_000), "9" * 100_000),
]
NAMES = ["prompt", "messages", "tools", "tool_choice", "functions", "response_format", "max_token", "\ud800", "", "a\0"]
TYPES = [
    *("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "application/json; charset=utf-16"),
    *("application/json, text/plain", ";;", "\xff", "a" * 5000, ""),
]
METHODS = ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "post", "A" * 900]
PATHS = [
    *("*", "//", "?", "/" * 3000, f"{TOKENIZE}/", f"{TOKENIZE}%20", f"{TOKENIZE}?a=b", "/%00", "/%ff%0d%0aX:1"),
    *("http://x/", "/docs", "/..%2f..%2fetc/passwd"),
]
LINES = [b"a\0b: c", b"a : b", b": b", b"\xff: b", b" a", b"a: \x01"]


class Trial(NamedTuple):
    """wire: what is sent. whole: so that it must be answered; else it is cut off after it was sent."""

    method: str
    path: str
    wire: bytes
    whole: bool = True


class Answer(NamedTuple):
    status: int
    headers: str
    type: str
    body: bytes


def trial(draw, most):
    """One that :class:`random.Random` draws; ``most``: of the server's max_body."""
    path = draw.choice([*GOOD, COMPLETIONS, COMPLETIONS, CHAT])
    body = _body(draw, path)
    if draw.random() < 0.25:
        return _transfer(draw, path, body, most)
    return Trial("POST", path, wire("POST", path, [JSON, b"Content-Length: %d" % len(body)], body))


def wire(method, path, headers, body, version="1.1"):
    lines = [f"{method} {path} HTTP/{version}".encode(), b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _body(draw, path):
    """A good body, changed in places."""
    body, texts = copy.deepcopy(GOOD[path]), {}

    def anything():
        if draw.random() < 0.02:
            return {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
        texts[f"@{len(texts)}@"] = draw.choice(LARGE if draw.random() < 0.03 else TEXTS)
        return f"@{len(texts) - 1}@"

    for _ in range(draw.randint(1, 3)):
        parent = body
        while True:
            places = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            place = draw.choice(places) if places else None
            inner = parent[place] if places else None
            if not isinstance(inner, dict | list) or draw.random() < 0.4:
                break
            parent = inner
        do = draw.random()
        if places and do < 0.65:
            parent[place] = anything()
        elif places and do < 0.75:
            del parent[place]
        elif isinstance(parent, dict):
            parent[draw.choice(NAMES)] = anything()
        else:
            parent.insert(0, anything())
    if path == CHAT:
        body.setdefault("max_tokens", 2)  # the default is all that there is room for
    text = json.dumps(body)
    for mark, value in texts.items():
        text = text.replace(f'"{mark}"', value)
    return _bytes(draw, text) if draw.random() < 0.2 else text.encode()


def _bytes(draw, text):
    """As it should not be written."""
    raw = text.encode()
    at = draw.randrange(len(raw))
    return draw.choice([
        lambda: raw[:at],
        lambda: raw[:at] + draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b",", b"}", b'"']) + raw[at:],
        lambda: raw[:at] + bytes([raw[at] ^ 1 << draw.randrange(8)]) + raw[at + 1 :],
        lambda: raw + raw,
        lambda: b"\xef\xbb\xbf" + raw,
        lambda: text.encode(draw.choice(["utf-16", "utf-32", "utf-16-be"])),
        lambda: raw[:-1] + b"," + raw[1:],
        lambda: b"[" + raw + b"]",
        lambda: draw.randbytes(64),
        lambda: b"",
    ])()  # fmt: skip


def _transfer(draw, path, body, most):
    """A body in a request of another form."""
    size = b"Content-Length: %d" % len(body)
    over = b"a" * (most + 1)

    def post(headers, sent, whole=True, **more):
        return Trial("POST", path, wire("POST", path, headers, sent, **more), whole)

    def other(method, where, whole=True):
        return Trial(method, where, wire(method, where, [JSON, size], body), whole)

    def chunks(length, ext=b"", end=b"0\r\n\r\n"):
        pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]
        sent = b"".join(b"%x%s\r\n%s\r\n" % (max(0, len(piece) + length), ext, piece) for piece in pieces) + end
        return post([JSON, b"Transfer-Encoding: chunked"], sent, length == 0 and b"0" in end)

    return draw.choice([
        lambda: post([size], body),
        lambda: post([b"Content-Type: " + draw.choice(TYPES).encode("latin-1"), size], body),
        lambda: post([JSON, b"Content-Encoding: gzip", size], body),
        lambda: post([JSON, size], body, version=draw.choice(["1.0", "2.0", "0.9", "9.9"])),
        lambda: post([JSON, size], body, version=draw.choice(["1", "x.y", "1.1 1.1", "-1.1"])),
        lambda: post([JSON, b"Content-Length: %d" % len(over)], over),
        lambda: post([JSON, b"Content-Length: %d" % (1 << 40)], body, False),
        lambda: post([JSON, b"Transfer-Encoding: chunked"], b"%x\r\n%s\r\n0\r\n\r\n" % (len(over), over)),
        lambda: post([JSON, size, b"Expect: 100-continue"], body),
        lambda: post([JSON, size, b"Expect: 200-ok"], body),
        lambda: post([JSON, b"Content-Length: %d" % (len(body) + 10)], body, False),
        lambda: post([JSON, size], body[: len(body) // 2], False),
        lambda: post([JSON, b"Content-Length: " + draw.choice([b"-1", b"+1", b"1e3", b"0x10", b"", b"9" * 30])], body),
        lambda: post([JSON, size, b"Content-Length: 3"], body),
        lambda: post([JSON, size, b"Transfer-Encoding: chunked"], b"0\r\n\r\n"),
        lambda: post([JSON, b"Transfer-Encoding: " + draw.choice([b"gzip", b"chunked, chunked", b"xchunked"])], body),
        lambda: chunks(0),
        lambda: chunks(0, b";a=b", b"0\r\nA: b\r\n\r\n"),
        lambda: chunks(draw.choice([-1, 1, 1 << 40])),
        lambda: chunks(0, end=b""),
        lambda: chunks(0, end=b"zz\r\n"),
        lambda: post([JSON, size, b"X: " + b"a" * draw.choice([10_000, 60_000, 600_000])], body, False),
        lambda: post([JSON, size, *[b"X-%d: a" % n for n in range(draw.choice([100, 5000]))]], body, False),
        lambda: post([JSON, size, draw.choice(LINES)], body, False),
        lambda: post([JSON, size, b"Host: y"], body),
        lambda: post([JSON, size, b"Authorization: Bearer \xff\xfe"], body),
        lambda: Trial("GET", "/health", wire("GET", "/health", [b"Connection: upgrade", b"Upgrade: websocket"], b"")),
        lambda: other(draw.choice(METHODS), path),
        lambda: other(draw.choice(["", "PO ST", "P\0ST", "\xff", "{}"]), path, False),
        lambda: other("POST", draw.choice(PATHS)),
        lambda: other("POST", draw.choice(["/\xff", "a b", "/\x7f"]), False),
        lambda: Trial("GET", "/", b"GET /health\r\n", False),
        lambda: Trial("GET", "/", draw.randbytes(200) + b"\r\n\r\n", False),
        lambda: Trial("GET", "/", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", False),
        lambda: Trial("GET", "/", b"", False),
    ])()  # fmt: skip


def send(url, trial):
    """The first answer; None: the connection was ended without one.

    Raises:
        TimeoutError: there is none, and the connection stays open.
    """
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 30) as sock:
        with contextlib.suppress(ConnectionError):  # it may have answered before it has read all
            sock.sendall(trial.wire)
        if not trial.whole:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        found = http.client.HTTPResponse(sock, method=trial.method)
        try:
            found.begin()
            body = found.read()
        except (ConnectionError, http.client.HTTPException) as error:
            # One who refuses what is still being sent may be cut off before the answer has been read.
            reset = isinstance(error, ConnectionError) and len(trial.wire) > 10_000
            assert reset or not trial.whole, "no answer"
            return None
        return Answer(found.status, str(found.headers), found.headers.get_content_type(), body)


BELOW = b"Invalid HTTP request received."
"""uvicorn's own answer to what is not HTTP."""
CLASSES = [name for name, one in vars(builtins).items() if isinstance(one, type) and issubclass(one, BaseException)]
INSIDE = re.compile(
    "|".join([
        "Traceback", 'File "', re.escape(str(Path(gshardx.__file__).parents[1])), "site-packages",
        rf"\b({'|'.join(CLASSES)}|\w+DecodeError|\w*ValidationError|BadInput|EngineDown|ClientGone|HTTPException)\b",
    ])
)  # fmt: skip
"""What no client should learn of."""


def check(trial, answer):
    """Of the form that the schema says, and silent about the inside."""
    assert answer.status < 500
    text = answer.body.decode()
    assert not INSIDE.search(answer.headers + text)
    if answer.body in (BELOW, b""):
        assert answer.status in (400, 403) or trial.method == "HEAD"
    elif answer.type == "text/event-stream":
        assert answer.status == 200
        *events, end = [one.removeprefix("data: ") for one in text.split("\n\n")[:-1]]
        assert end == "[DONE]"
        assert all(FORMS[COMPLETIONS] - {"usage"} <= _parsed(one).keys() for one in events)
    elif answer.status == 200:
        assert FORMS[trial.path.split("?")[0]] <= _parsed(text).keys()
    else:
        error = _parsed(text)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert "\n" not in error["message"]
        assert len(error["message"]) < 2000


def _parsed(text):
    """Strictly: no NaN."""
    return json.loads(text, parse_constant=lambda name: 1 / 0)


@contextlib.contextmanager
def watched(url):
    """Meanwhile /health is asked twenty times a second: a list of the seconds from one answer to the next."""
    gaps, over = [], threading.Event()

    def poll():
        host, port = url.removeprefix("http://").split(":")
        asked = http.client.HTTPConnection(host, int(port), timeout=60)
        last = time.monotonic()
        while not over.wait(0.05):
            asked.request("GET", "/health")
            answer = asked.getresponse()
            answer.read()
            now = time.monotonic()
            gaps.append(now - last if answer.status == 200 else float("inf"))
            last = now
        asked.close()

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield gaps
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def overheard():
    """What is logged as an error meanwhile."""
    said = []

    class Handler(logging.Handler):
        def emit(self, record):
            said.append(f"{record.getMessage()} {record.exc_info}")

    handler = Handler(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio", "gshardx")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
