"""The processes of benchmarks/serve_cpu.py: what serves, what asks, and the CPU that they take. All are bounded in
time, and killed at the end."""

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import NotMeasured

HERE = Path(__file__).resolve().parent
STARTING, ASKING = 600.0, 300.0
"""Seconds that a process may take until it serves, the first one compiling, and those that a load may take beyond its
own."""
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


class Serving(NamedTuple):
    """A process that listens on 127.0.0.1."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> tuple[int, str]:
        """Status and body.

        Raises:
            OSError, http.client.HTTPException: nobody answers.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name}(?:_total)? (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        if found is None:
            raise NotMeasured(f"/metrics has no {name}")
        return float(found[1])

    @property
    def front_cpu(self) -> float:
        """CPU seconds of its main thread so far, on which the event loop runs: HTTP, JSON, tokenizer. Linux only."""
        pid = self.process.pid
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Until the block ends; standard input and output are pipes, complaints go to ``log``."""
    with log.open("a") as complaints:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True, env=ENVIRONMENT
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def serving(command: list[str], log: Path, port: int | None = None) -> Iterator[Serving]:
    """Once its port answers; None: its first line names it.

    Raises:
        NotMeasured: it ended before, with its last complaint.
    """
    with running(command, log) as process:
        if port is None:
            named = re.search(r"http://127\.0\.0\.1:(\d+)", line_of(process, log))
            assert named
            port = int(named[1])
        server, ends = Serving(process, port), time.monotonic() + STARTING
        while not answers(server):
            if process.poll() is not None or time.monotonic() > ends:
                raise failed(log)
            time.sleep(0.01)
        yield server


def answers(server: Serving) -> bool:
    """Any of /ready's 200, or that there is no such path."""
    try:
        return server.get("/ready")[0] in (200, 404)
    except (OSError, http.client.HTTPException):
        return False


def line_of(process: subprocess.Popen[str], log: Path) -> str:
    """The next that it prints.

    Raises:
        NotMeasured: it ended instead.
    """
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise failed(log)
    return line


def failed(log: Path) -> NotMeasured:
    """With the last complaint."""
    said = log.read_text().strip().splitlines()
    return NotMeasured(f"{log.stem} ended: {said[-1][:300] if said else 'without a word'}")


def answer_of(command: list[str], seconds: float, told: str = "") -> Any:
    """What it prints, JSON, if that takes it no more than ``seconds`` and :data:`ASKING`.

    Raises:
        NotMeasured: it failed, or took longer.
    """
    try:
        done = subprocess.run(
            command, input=told, capture_output=True, text=True, env=ENVIRONMENT, timeout=seconds + ASKING, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"not done after {error.timeout:g} s") from error
    if done.returncode:
        raise NotMeasured((done.stderr.strip().splitlines() or ["failed without a word"])[-1][:300])
    return json.loads(done.stdout)


def closed_loop(
    server: Serving, path: str, bodies: list[dict[str, Any]], connections: int, seconds: float | None = None
) -> dict[str, Any]:
    """What serve_client.py found; ``front_cpu_seconds`` is what the server's main thread took meanwhile, ``front_ms``
    that of a request."""
    load = {
        "host": "127.0.0.1", "port": server.port, "path": path, "bodies": bodies, "connections": connections,
        "seconds": seconds,
    }  # fmt: skip
    before = server.front_cpu
    found: dict[str, Any] = answer_of(
        [sys.executable, "-S", str(HERE / "serve_client.py")], seconds or 0.0, json.dumps(load)
    )
    front = server.front_cpu - before
    return found | {"front_cpu_seconds": front, "front_ms": 1e3 * front / found["all"]}


def open_loop(server: Serving, seconds: float, *flags: str) -> dict[str, Any]:
    """What ``python -m gshardx.infer bench`` found.

    Raises:
        NotMeasured: some requests got no answer.
    """
    command = [sys.executable, "-m", "gshardx.infer", "bench", "--json", "--url", server.url, *flags]
    found: dict[str, Any] = answer_of(command, seconds)
    if found["completed"] == 0:
        raise NotMeasured(f"no request was answered: {found['failures']}")
    return found
