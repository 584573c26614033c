"""One request of a load generator over HTTP: sent, its answer timed as it comes, its end put under one name."""

import asyncio
import contextlib
import dataclasses
import json
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, NamedTuple

import httpx

from gshardx.errors import BadInput
from gshardx.infer.measure import Outcome, Record

KEPT_SECONDS = 2.0
"""How long an idle connection may be used again: below the 5 s after which uvicorn closes it, lest both meet."""
LOOK_UP_SECONDS = 10.0
SAID = 200
"""Characters that are kept of what a server says of a failure."""


class _Left(Exception):
    """The client has vanished, as planned."""


class _End(NamedTuple):
    outcome: Outcome
    why: str = ""
    said: str = ""
    retry_after: float | None = None


@dataclasses.dataclass(slots=True)
class _Heard:
    """What has come of an answer so far."""

    begun: bool = False
    finished: bool = False
    texts: list[float] = dataclasses.field(default_factory=list)
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Clients:
    """Clients of one connection each, one for each open request, used again when it is answered.

    httpcore's pool of many connections goes over all of them, squared, for each request: hundreds keep a core busy.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._url, self._headers = url, headers
        self._verify = httpx.create_ssl_context()
        self._idle: list[httpx.AsyncClient] = []

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[httpx.AsyncClient]:
        client = self._idle.pop() if self._idle else self._open()
        try:
            yield client
        finally:
            self._idle.append(client)

    async def aclose(self) -> None:
        """All connections; no request may be open."""
        for client in self._idle:
            await client.aclose()

    def _open(self) -> httpx.AsyncClient:
        # With a transport of its own, a client goes past a proxy that the environment names.
        limits = httpx.Limits(max_connections=1, keepalive_expiry=KEPT_SECONDS)
        transport = httpx.AsyncHTTPTransport(verify=self._verify, limits=limits)
        return httpx.AsyncClient(base_url=self._url, headers=self._headers, timeout=None, transport=transport)


async def find_model(clients: Clients, url: str, wanted: str | None) -> str:
    """``wanted``, or else the first model that the server lists.

    Raises:
        BadInput: nobody answers at ``url``, or no model is wanted and none is listed.
    """
    try:
        async with clients.one() as client:
            response = await client.get("/v1/models", timeout=LOOK_UP_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        said = str(error) or type(error).__name__
        raise BadInput(f"--url {url}: can't be reached ({said}); start the server, or mend the address") from error
    if wanted is not None:
        return wanted
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise BadInput(
            f"--url {url}: GET /v1/models lists no model (HTTP {response.status_code}: {_message(response.content)}); "
            "give --model, or --api_key if it asks for one"
        ) from error


async def send(
    clients: Clients,
    body: Mapping[str, Any],
    leave_after: int | None,
    timeout: float,
    scheduled: float,
    retry: bool = False,
) -> Record:
    """Ask for a completion now and read it to its end.

    Args:
        leave_after: close the connection after so many pieces of text, with 0 once the request is sent; None: never.
        timeout: seconds for all of it.
        scheduled: see :class:`Record`.
    """
    heard = _Heard()
    sent = time.perf_counter()
    try:
        async with asyncio.timeout(timeout), clients.one() as client:
            end = await _converse(client, body, leave_after, heard)
    except _Left:
        end = _End("cancelled")
    except TimeoutError:
        end = _End("failed", "timeout")
    except asyncio.CancelledError:  # not passed on: what was seen until now is to be reported, and nothing follows
        end = _End("interrupted")
    except httpx.HTTPError as error:
        end = _End("failed", "cut off" if heard.begun else "no answer", f"{type(error).__name__}: {error}")
    return Record(
        scheduled=scheduled,
        sent=sent,
        ended=time.perf_counter(),
        outcome=end.outcome,
        why=end.why,
        said=" ".join(end.said.split())[:SAID],
        retry=retry,
        retry_after=end.retry_after,
        texts=heard.texts,
        prompt_tokens=heard.prompt_tokens,
        output_tokens=heard.output_tokens,
    )


async def _converse(client: httpx.AsyncClient, body: Mapping[str, Any], leave_after: int | None, heard: _Heard) -> _End:
    extensions = {"trace": _leave_once_sent} if leave_after == 0 else {}
    async with client.stream("POST", "/v1/completions", json=body, extensions=extensions) as response:
        heard.begun = True
        if response.status_code == 429:
            await response.aread()
            return _End("refused", retry_after=_seconds(response.headers.get("Retry-After")))
        if response.status_code != 200:
            return _End("failed", f"HTTP {response.status_code}", _message(await response.aread()))
        async for field, data in _fields(response):
            try:
                error = _hear(heard, field, data)
            except (ValueError, LookupError, TypeError, AttributeError):
                return _End("failed", "malformed", data.decode(errors="replace"))
            if error is not None:
                return error
            if leave_after is not None and len(heard.texts) >= leave_after and not heard.finished:
                raise _Left
    if not heard.finished:
        return _End("failed", "cut off", "the stream ended without a finish_reason")
    return _End("completed") if heard.texts else _End("failed", "empty", "a finish_reason and no text")


async def _leave_once_sent(event: str, info: object) -> None:
    """A callback of httpcore."""
    if event == "http11.send_request_body.complete":
        raise _Left


async def _fields(response: httpx.Response) -> AsyncIterator[tuple[bytes, bytes]]:
    """Names and values of a stream of server-sent events; httpx's own lines end at U+2028 too, which JSON may hold."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.partition(b":")
            yield name, value.strip()


def _hear(heard: _Heard, field: bytes, data: bytes) -> _End | None:
    """Note what a line says; its end if it is an error.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: it is nothing that a completion has.
    """
    if field == b"error":  # llama.cpp's, before it put them under data
        return _failure(json.loads(data))
    if field != b"data" or data == b"[DONE]":
        return None
    now, frame = time.perf_counter(), json.loads(data)
    if frame.get("error") is not None:
        return _failure(frame["error"])
    for choice in frame.get("choices") or ():
        if choice.get("text"):
            heard.texts.append(now)
        heard.finished |= choice.get("finish_reason") is not None
    if usage := frame.get("usage"):
        heard.prompt_tokens, heard.output_tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return None


def _failure(error: Any) -> _End:
    if not isinstance(error, dict):
        return _End("failed", "error frame", str(error))
    kind = error.get("code") or error.get("type")
    return _End("failed", f"error frame {kind}" if kind else "error frame", str(error.get("message", "")))


def _message(body: bytes) -> str:
    """What an answer that is no stream says."""
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:SAID]


def _seconds(header: str | None) -> float | None:
    """Those of Retry-After; None for a date or nothing."""
    try:
        value = float(header or "")
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None
