"""A closed loop of HTTP requests: as many as there are connections are open at once, each followed by the next.

A process of its own, of the standard library alone, which looks at nothing in an answer before all are there: beside a
server on few cores a client's work is the server's loss. Reads one JSON object, a :class:`Load`, from standard input
and prints one.
"""

import asyncio
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

WARM = 0.2
"""Share of the time at the start that no figure counts, where the load runs for a time."""
TOKENS = b'"completion_tokens":'


@dataclasses.dataclass(frozen=True)
class Load:
    """What to send to whom."""

    host: str
    port: int
    path: str
    bodies: list[dict[str, Any]]
    """One a request, in turn; none: all requests are GET."""
    connections: int
    seconds: float | None = None
    """Each connection goes on by itself until then, with the first body after the last; None: each body once, in waves
    of one a connection, where all wait for the last."""


class Answer(NamedTuple):
    """ended: on :func:`time.perf_counter`'s clock."""

    ended: float
    heard: bytes


class Connection(asyncio.Protocol):
    """Sends a request, keeps what comes, and tells when it is whole."""

    def __init__(self) -> None:
        self.heard, self.length = bytearray(), 0

        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def ask(self, request: bytes) -> asyncio.Future[None]:
        self.heard, self.length = bytearray(), 0
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self.done

    def data_received(self, data: bytes) -> None:
        self.heard += data
        if not self.length:
            head, found, _ = self.heard.partition(b"\r\n\r\n")
            if not found:
                return
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
            self.length = len(head) + 4 + int(length) if length else -1
        if len(self.heard) == self.length or (self.length < 0 and self.heard.endswith(b"\r\n0\r\n\r\n")):
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"closed by the server ({error})"))


def requests(load: Load) -> list[bytes]:
    """As they travel; one where there are no bodies."""
    host = f"Host: {load.host}\r\n"
    if not load.bodies:
        return [f"GET {load.path} HTTP/1.1\r\n{host}\r\n".encode()]
    head = f"POST {load.path} HTTP/1.1\r\n{host}Content-Type: application/json\r\nContent-Length: "
    texts = [json.dumps(body) for body in load.bodies]
    return [f"{head}{len(text)}\r\n\r\n{text}".encode() for text in texts]


async def drive(load: Load) -> tuple[list[Answer], float, float]:
    """The answers, when the first was asked for, and the CPU seconds that all took here."""
    loop, answers, whole = asyncio.get_running_loop(), list[Answer](), requests(load)
    made = [(await loop.create_connection(Connection, load.host, load.port))[1] for _ in range(load.connections)]
    begun, busy = time.perf_counter(), time.process_time()

    async def ask(connection: Connection, request: bytes) -> None:
        await connection.ask(request)
        answers.append(Answer(time.perf_counter(), bytes(connection.heard)))

    async def go_on(connection: Connection, seconds: float, again: Iterator[bytes]) -> None:
        while time.perf_counter() - begun < seconds:
            await ask(connection, next(again))

    if load.seconds is not None:
        again = itertools.cycle(whole)
        await asyncio.gather(*(go_on(connection, load.seconds, again) for connection in made))
    else:
        for first in range(0, len(whole), len(made)):
            await asyncio.gather(*map(ask, made, whole[first : first + len(made)]))
    return answers, begun, time.process_time() - busy


def summary(answers: list[Answer], begun: float, load: Load) -> dict[str, Any]:
    """Raises:
    SystemExit: an answer that is not 200, or none in time.
    """
    for answer in answers:
        if not answer.heard.startswith(b"HTTP/1.1 200"):
            raise SystemExit(f"answered {answer.heard[:300]!r}")
    last = max(answer.ended for answer in answers)
    since = begun if load.seconds is None else begun + WARM * load.seconds
    until = last if load.seconds is None else begun + load.seconds
    counted = [answer for answer in answers if since < answer.ended <= until]
    if not counted:
        raise SystemExit(f"no answer in {load.seconds} s; give it more of them")
    return {
        "all": len(answers),
        "seconds": until - since,
        "requests_per_second": len(counted) / (until - since),
        "tokens": sum(tokens(answer.heard) for answer in counted),
        "body": answers[0].heard.partition(b"\r\n\r\n")[2].decode(errors="replace"),
    }


def tokens(body: bytes) -> int:
    """By the server's last word; 0 if it counts none."""
    _, found, rest = body.rpartition(TOKENS)
    return int(rest.split(b",")[0].split(b"}")[0]) if found else 0


def main() -> None:
    load = Load(**json.load(sys.stdin))
    answers, begun, busy = asyncio.run(drive(load))
    print(json.dumps(summary(answers, begun, load) | {"client_cpu_seconds": busy}))


if __name__ == "__main__":
    main()
