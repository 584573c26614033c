"""Clients in a process of their own, lest they take the server's time: ``python -m tests.infer.server.crowd SETTINGS``.

SETTINGS is JSON; ``what`` in it says which: ``wander``, ``closed`` or ``open``, below. Prints JSON.
"""

import asyncio
import dataclasses
import json
import random
import subprocess
import sys
import time

WORDS = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "in", "mind", "suffer"]


@dataclasses.dataclass
class Said:
    """An answer. Times are ``time.monotonic``'s, which all processes share."""

    sent: float
    status: int = 0
    retry_after: float | None = None
    first: float | None = None
    ended: float = 0.0
    tokens: int = 0
    reasons: list = dataclasses.field(default_factory=list)
    error: str = ""
    again: bool = False


class Gone(Exception):
    """The connection ended before the answer did."""


class Connections:
    """Kept alive, and used again."""

    def __init__(self, port):
        self._port, self._idle = port, []
        self.opened = 0

    async def take(self):
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing()):
                return reader, writer
        self.opened += 1
        return await asyncio.open_connection("127.0.0.1", self._port)

    def give(self, connection):
        self._idle.append(connection)

    def close(self):
        for _, writer in self._idle:
            writer.close()


async def ask(connection, path, body):
    """Send, and read to the end.

    Raises:
        Gone: the server closed it in between.
    """
    reader, writer = connection
    raw, said = json.dumps(body).encode(), Said(time.monotonic())
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    try:
        writer.write(head.encode() + raw)
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        said.status = int(lines[0].split()[1])
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        said.retry_after = float(headers["retry-after"]) if "retry-after" in headers else None
        if "content-length" in headers:
            frames = [await reader.readexactly(int(headers["content-length"]))]
            hear(said, json.loads(frames[0]))
        else:
            await hear_stream(said, reader)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Gone from error
    said.ended = time.monotonic()
    return said


async def hear_stream(said, reader):
    """Chunked; each chunk holds whole frames, as this server sends them."""
    done = False
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunk = (await reader.readexactly(size + 2)).decode()
        for frame in chunk.strip().split("\n\n"):
            data = frame.removeprefix("data: ")
            done |= data == "[DONE]"
            if data != "[DONE]":
                hear(said, json.loads(data))
    await reader.readexactly(2)
    if not (done or said.error):
        said.error = "a stream without an end"


def hear(said, found):
    if "error" in found:
        said.error = found["error"]["message"]
        return
    said.reasons += [one["finish_reason"] for one in found["choices"] if one["finish_reason"]]
    if found["choices"] and said.first is None:
        said.first = time.monotonic()
    if usage := found.get("usage"):
        said.tokens = usage["completion_tokens"]


async def wander(port, clients, seconds, seed):
    """Clients that ask for one thing after another, and now and then go away: how often what became of it, and what was
    wrong."""
    counts, wrong = dict.fromkeys(("whole", "left", "refused", "opened", "reused"), 0), []
    ends = time.monotonic() + seconds

    async def one(draw):
        connection = None
        while time.monotonic() < ends:
            path, body, sequences = drawn(draw)
            counts["reused" if connection else "opened"] += 1
            connection = connection or await asyncio.open_connection("127.0.0.1", port)
            patience = draw.choice([0.0, draw.expovariate(20), draw.expovariate(1)]) if draw.random() < 0.3 else 120.0
            try:
                async with asyncio.timeout(patience):
                    said = await ask(connection, path, body)
            except TimeoutError:
                counts["left"] += 1
                if patience == 120.0:
                    wrong.append([body, "nothing for two minutes"])
                if draw.random() < 0.5:
                    connection[1].transport.abort()
                connection[1].close()
                connection = None
                continue
            except Gone:
                wrong.append([body, "the server closed the connection"])
                connection = None
                continue
            if said.status == 429:
                counts["refused"] += 1
                await asyncio.sleep(draw.expovariate(5))
            elif said.status == 200 and said.reasons == ["length"] * sequences:
                counts["whole"] += 1
                if said.tokens != sequences * body["max_tokens"]:
                    wrong.append([body, dataclasses.asdict(said)])
            else:
                wrong.append([body, dataclasses.asdict(said)])
            if draw.random() < 0.1:
                connection[1].close()
                connection = None
        if connection is not None:
            connection[1].close()

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(one(random.Random(seed * 1000 + number)))
    return {**counts, "wrong": wrong}


def drawn(draw):
    """Path, body, and how many continuations it asks for."""

    def text():
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    prompts, n = draw.choice([1, 1, 1, 2]), draw.choice([1, 1, 1, 2])
    same = {"max_tokens": draw.randint(1, 24), "ignore_eos": True, "n": n, "seed": draw.randint(0, 1000)}
    if draw.random() < 0.5:
        same |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 0.2:
        same |= {"temperature": 0.7, "presence_penalty": 0.5}
    if draw.random() < 0.4:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text()}], **same}, n
    return "/v1/completions", {"prompt": [text() for _ in range(prompts)], **same}, prompts * n


async def closed(port, clients, seconds, body):
    """So many clients, each asking again once it is answered: the answers."""
    connections, said, ends = Connections(port), [], time.monotonic() + seconds

    async def one():
        connection = await connections.take()
        while time.monotonic() < ends:
            said.append(await ask(connection, "/v1/completions", body))
        connections.give(connection)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(clients):
            tasks.create_task(one())
    connections.close()
    return [dataclasses.asdict(one) for one in said]


async def open_(port, rate, seconds, body, seed, obey):
    """Requests at random moments, ``rate`` a second on average: the answers. obey: who is refused comes back once after
    the time told."""
    connections, said, draw = Connections(port), [], random.Random(seed)

    async def one():
        for again in (False, True):
            connection = await connections.take()
            answer = await ask(connection, "/v1/completions", body)
            connections.give(connection)
            answer.again = again
            said.append(answer)
            if not obey or answer.retry_after is None:
                return
            await asyncio.sleep(answer.retry_after)

    async with asyncio.TaskGroup() as tasks:
        began = due = time.monotonic()
        while due < began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            tasks.create_task(one())
            due += draw.expovariate(rate)
    connections.close()
    return [dataclasses.asdict(one) for one in said]


def crowd(running, **settings):
    """Start one; its process, whose output is what it prints."""
    settings |= {"port": int(running.url.rpartition(":")[2])}
    command = [sys.executable, "-m", "tests.infer.server.crowd", json.dumps(settings)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answers(process):
    """What came of it; raises where it failed."""
    out, _ = process.communicate()
    assert process.returncode == 0
    return json.loads(out)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(asyncio.run({"wander": wander, "closed": closed, "open": open_}[given.pop("what")](**given))))
