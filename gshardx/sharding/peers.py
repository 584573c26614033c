"""Processes that look after each other: one that is killed, hangs or fails is named by those who would wait for it.

XLA's collectives wait for ever for a process that has gone (gloo), or abort with a stack trace from C++, up to 100 s
later. So each process keeps a TCP connection to process 0, over which both tell every second what they do.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

from gshardx.errors import BadInput, OthersMissing

_BEAT = 1.0  # seconds between two messages
_GRACE = 10.0  # seconds to end by oneself after another process has said that it ends early


class Peers:
    """The other processes of a command; a context manager around what is done with them.

    A process whose connection ends without a word is lost: all others print a line that names it, call ``farewell`` and
    exit with 3 (:class:`gshardx.errors.OthersMissing`), whatever their main thread waits for. A process that leaves the
    context by an exception tells the others, who do the same after some seconds.

    Args:
        index: of this process.
        count: of processes.
        lines: a connection to process 0, or, on process 0, to each other one.

    Attributes:
        doing: what this process tells the others that it does, a few words.
        farewell: called with the line, before this process exits because of another one.
    """

    def __init__(self, index: int = 0, count: int = 1, lines: Mapping[int, socket.socket] | None = None) -> None:
        self.index, self.count, self.doing = index, count, "starting"
        self.farewell: Callable[[str], None] = lambda line: None
        self._lines = {other: _Line(other, connection) for other, connection in (lines or {}).items()}
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Peers":
        for line in self._lines.values():
            line.connection.setblocking(False)
            self._selector.register(line.connection, selectors.EVENT_READ, line)
        if self._lines:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._lines:
            return
        early = error is not None and not (isinstance(error, SystemExit) and error.code == 0)
        if early and not isinstance(error, BadInput):
            self._over.wait(2 * _BEAT)  # a lost process fails others' collectives, perhaps before its connection ends
        self._over.set()
        self._tell(f"end {' '.join(str(error).split()) or type(error).__name__}" if early else "end")

    def leave(self, line: str) -> None:
        """Tell the others, print ``line``, and exit with 3, from any thread."""
        self._tell(f"lost {line}")
        last = threading.Thread(target=self.farewell, args=(line,), daemon=True)
        last.start()
        last.join(5)  # where it writes may hang, too
        try:
            print(f"error: {line}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:  # who reads them may have gone
            os._exit(OthersMissing.exit_code)

    @property
    def silent(self) -> dict[str, float]:
        """Processes, by name and what they did last, that were not heard of for three beats or more, and seconds."""
        now = time.monotonic()
        return {
            f"{line.name}, last heard of at {line.doing}": now - line.heard
            for line in self._lines.values()
            if not line.ended and now - line.heard > 3 * _BEAT
        }

    def _watch(self) -> None:
        beat = time.monotonic()
        while not self._over.is_set():
            if time.monotonic() >= beat:
                self._tell(f"at {self.doing}")
                beat = time.monotonic() + _BEAT
            for key, _ in self._selector.select(max(0.0, beat - time.monotonic())):
                self._read(key.data)

    def _read(self, line: "_Line") -> None:
        try:
            received = line.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._selector.unregister(line.connection)
            if not line.ended and not self._over.is_set():
                self.leave(f"{line.name} is lost: its connection ended, so it was killed or its host went down")
            return
        line.heard = time.monotonic()
        *whole, line.rest = (line.rest + received).split(b"\n")
        for message in whole:
            self._hear(line, message.decode(errors="replace"))

    def _hear(self, line: "_Line", message: str) -> None:
        word, _, text = message.partition(" ")
        if word == "at":
            line.doing = text
        elif word == "lost":
            self.leave(text)
        elif word == "end":
            line.ended = True
            if text:
                waiting = threading.Timer(_GRACE, self._leave_after, (f"{line.name} has ended: {text}",))
                waiting.daemon = True
                waiting.start()

    def _leave_after(self, line: str) -> None:
        if not self._over.is_set():
            self.leave(line)

    def _tell(self, message: str) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # reading tells who has gone, silence who hangs
                line.connection.send(f"{message[:1000]}\n".encode())


class _Line:
    def __init__(self, other: int, connection: socket.socket) -> None:
        self.connection, self.rest, self.ended = connection, b"", False
        self.heard, self.doing = time.monotonic(), "starting"
        self.name = f"process {other} ({connection.getpeername()[0].removeprefix('::ffff:')})"
