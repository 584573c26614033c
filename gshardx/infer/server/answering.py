"""From an admitted request to its answer, whole or streamed, and to its end wherever the client goes away."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from gshardx.infer.request import Output, Request
from gshardx.infer.server.frames import DONE, Json, Usage, Voice, envelope, error_body, event, part
from gshardx.infer.server.metrics import Timings
from gshardx.infer.server.worker import LOGGER, Caller, EngineDown, Worker

STUCK = 60.0
"""Seconds in which a client must take something of a stream, once all buffers on the way are full."""


class ClientGone(Exception):
    """Nobody is there to be answered."""


class Failed(Exception):
    """The engine failed on this request alone."""


class Job:
    """One HTTP request's requests to the engine.

    Args:
        requests: in order of their prompts; choice c of number i is index i n + c.
        arrived: on ``time.monotonic``'s clock.
        deadline: seconds from then.
    """

    def __init__(
        self, worker: Worker, requests: list[Request], arrived: float, deadline: float, timings: Timings
    ) -> None:
        self._worker, self.requests = worker, requests
        self._arrived, self._ends, self._timings = arrived, arrived + deadline, timings
        self._first = {one.id: number * one.params.n for number, one in enumerate(requests)}
        self.usage = Usage({one.id: len(one.prompt) for one in requests})
        self._caller: Caller | None = None

    async def enter(self) -> None:
        """Raises:
        BadInput: the engine refuses one.
        EngineDown: it can't take any.
        """
        self._caller = await self._worker.submit(self.requests)

    def leave(self) -> None:
        """Cancel what is left of it."""
        assert self._caller is not None
        self._worker.leave(self._caller)

    @contextlib.contextmanager
    def watched(self, http: HttpRequest) -> Iterator[None]:
        """Meanwhile the client's going, and the deadline, end it."""
        caller = self._caller
        assert caller is not None

        def interrupt(why: Exception) -> None:
            caller.inbox.put_nowait(why)
            self._worker.leave(caller)

        async def until_gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass
            interrupt(ClientGone())

        watching = asyncio.create_task(until_gone())
        left = max(0.0, self._ends - time.monotonic())
        timer = asyncio.get_running_loop().call_later(left, interrupt, TimeoutError())
        try:
            yield
        finally:
            watching.cancel()
            timer.cancel()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """What is said of each index, as it comes.

        Raises:
            ClientGone, TimeoutError, EngineDown: it ended before its end.
            Failed: one of its requests did.
        """
        assert self._caller is not None
        open_ = sum(one.params.n for one in self.requests)
        left = {one.id: one.params.n for one in self.requests}
        before: dict[int, float] = {}
        while open_:
            output, at = await self._caller.next()
            index = self._first[output.id] + output.choice
            if output.finish_reason == "error":
                LOGGER.error("%s: %s", output.id, output.error)
                raise Failed("the engine failed on this request")
            self.usage.add(output)
            if output.tokens:
                self._timings.tokens(at, before.get(index, self._arrived), len(output.tokens), index not in before)
                before[index] = at
            if output.finish_reason:
                open_ -= 1
                left[output.id] -= 1
                if not left[output.id]:
                    self._worker.forget(output.id)
            if output.tokens or output.text or output.finish_reason or output.prompt_logprobs:
                yield index, output
        self._timings.ended(time.monotonic() - self._arrived)


async def whole(http: HttpRequest, job: Job, voice: Voice, id: str, model: str) -> Response:
    """All in one body.

    Raises:
        as :meth:`Job.outputs`.
    """
    said: dict[int, list[Output]] = {}
    with job.watched(http):
        async for index, output in job.outputs():
            said.setdefault(index, []).append(output)
    choices = [voice.choice(index, part(outputs, True), False) for index, outputs in sorted(said.items())]
    return JSONResponse(envelope(id, voice.whole, model, choices) | {"usage": job.usage.json(voice.silent)})


async def frames(
    http: HttpRequest, job: Job, voice: Voice, id: str, model: str, usage: bool
) -> AsyncGenerator[bytes, None]:
    """One by one as the engine says them; what goes wrong on the way is the last frame."""
    begun: set[int] = set()

    def chunk(choices: list[Json], counted: Json | None) -> bytes:
        return event(envelope(id, voice.chunk, model, choices) | ({"usage": counted} if usage else {}))

    with job.watched(http):
        try:
            async for index, output in job.outputs():
                yield chunk([voice.choice(index, part([output], index not in begun), True)], None)
                begun.add(index)
            if usage:
                yield chunk([], job.usage.json(voice.silent))
            yield DONE
        except (Failed, TimeoutError, EngineDown) as error:
            yield event(error_body(*told(error)))
        except ClientGone:
            return


def told(error: Exception) -> tuple[str, str, str]:
    """Message, type and code for a client."""
    if isinstance(error, TimeoutError):
        return "the request took longer than this server allows", "timeout_error", "deadline"
    if isinstance(error, Failed):
        return str(error), "server_error", "request_failed"
    return str(error), "server_error", "engine_down"


class EventStream(Response):
    """Server-sent events. ``done`` is called when they have ended, however that came about."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], done: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events, self._done = events, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, since = asyncio.get_running_loop(), float("inf")
        looking: asyncio.TimerHandle

        async def sent(message: Message) -> None:
            nonlocal since
            since = loop.time()
            await send(message)
            since = float("inf")

        def look() -> None:  # now and then: a timer for each frame is a tenth of what a frame takes
            nonlocal looking
            if loop.time() - since > STUCK:
                patience.reschedule(loop.time())
            else:
                looking = loop.call_later(STUCK / 4, look)

        looking = loop.call_later(STUCK / 4, look)
        try:
            async with asyncio.timeout(None) as patience:
                await sent({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for body in self._events:
                    await sent({"type": "http.response.body", "body": body, "more_body": True})
                await sent({"type": "http.response.body", "body": b""})
        except TimeoutError:
            LOGGER.info("a client took nothing for %g s; it is left", STUCK)
        finally:
            looking.cancel()
            await self._events.aclose()
            self._done()
