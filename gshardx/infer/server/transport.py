"""What a client may do to a connection: how long a request may take to arrive, how large it may be, where it ends."""

import asyncio
import collections
import time

import h11
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from gshardx.infer.server.frames import error_body

HEAD, UPLOAD = 30.0, 60.0
"""Seconds that a request may take to arrive: its head, from the connection or its first byte on, and its body."""
CLOSE = {"Connection": "close"}


class Connection(H11Protocol):
    """uvicorn's, which would wait for ever for a request's head once a byte, or none, has come."""

    _impatience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_waiting()
        elif self._impatience is None:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_waiting()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._impatience = self.loop.call_later(HEAD, self.timeout_keep_alive_handler)

    def _end_waiting(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None


class Bounded:
    """Refuses bodies that are too large or too slow, or whose end is told in two ways, and counts answers."""

    def __init__(self, app: ASGIApp, limit: int, answered: collections.Counter[tuple[str, int]]) -> None:
        self._app, self._limit, self._answered = app, limit, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        size, read, whole, started = int(headers.get("content-length", 0)), 0, False, False
        ends = time.monotonic() + UPLOAD
        # Who waits for a go-ahead sends no body after this, and what it sends next must not be taken for one.
        over = HTTPException(413, f"the body is over {self._limit} bytes", CLOSE if "expect" in headers else None)

        async def bounded() -> Message:
            nonlocal read, whole
            if size > self._limit:
                raise over
            try:
                message = await (receive() if whole else asyncio.wait_for(receive(), ends - time.monotonic()))
            except TimeoutError as error:
                raise HTTPException(408, f"the body did not arrive within {UPLOAD:g} s", CLOSE) from error
            if message["type"] == "http.request":
                read, whole = read + len(message.get("body", b"")), not message.get("more_body")
                if read > self._limit:
                    raise over
            return message

        def count(status: int) -> None:
            self._answered[getattr(scope.get("route"), "path", "other"), status] += 1

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                count(message["status"])
            await send(message)

        if "transfer-encoding" in headers and "content-length" in headers:
            said = error_body("give Content-Length or Transfer-Encoding, not both", "invalid_request_error")
            # A proxy may have taken the other one for the body's end: what follows here may be another's request.
            await JSONResponse(said, 400, CLOSE)(scope, receive, counted)
            return
        try:
            await self._app(scope, bounded, counted)
        except Exception:
            if not started:
                count(500)  # answered further out, see errors.py
            raise
