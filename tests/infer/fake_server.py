"""A server with ``/v1/completions`` that does what a prompt asks of it, at known times."""

import asyncio
import contextlib
import json
import threading
import time

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

FIRST, NEXT = 0.05, 0.02  # seconds to the first text, and between two
RETRY_AFTER = 0.1


class FakeServer:
    """Remembers what it was sent.

    gone: prompts whose client left before the end of their answer. ports: the clients'. open: answers on their way.
    """

    def __init__(self):
        self.reset()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.list_models)
        self.app.post("/v1/completions")(self.complete)

    def reset(self):
        self.bodies, self.headers, self.ports, self.gone = [], [], [], []
        self.open = self.most_at_once = 0
        self.models = ["first-model", "second-model"]
        self.refused_before = False
        self.on_request = lambda: None

    async def list_models(self):
        return {"object": "list", "data": [{"id": name} for name in self.models]}

    async def complete(self, request: Request):
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers)
        self.ports.append(request.client.port)
        self.on_request()
        match body["prompt"]:
            case "slow to begin":
                await asyncio.sleep(1)
            case "broken":
                return JSONResponse({"error": {"message": "no\nsuch thing"}}, 500)
            case "busy, no word of when":
                return JSONResponse({"error": {"message": "busy"}}, 429)
            case "busy at first" if self.refused_before:
                pass
            case str(prompt) if prompt.startswith("busy"):
                self.refused_before |= prompt == "busy at first"
                after = prompt.removeprefix("busy for ") if prompt.startswith("busy for ") else str(RETRY_AFTER)
                return JSONResponse({"error": {"message": "busy"}}, 429, {"Retry-After": after})
        return StreamingResponse(self.stream(body), media_type="text/event-stream")

    async def stream(self, body):
        self.open += 1
        self.most_at_once = max(self.most_at_once, self.open)
        end = "\r\n\r\n" if body["prompt"] == "carriage returns" else "\n\n"
        try:
            async for event in events(body["prompt"], body["max_tokens"]):
                yield event + end
        except asyncio.CancelledError:
            self.gone.append(body["prompt"])
            raise
        finally:
            self.open -= 1


async def events(prompt, count):
    yield ": a comment, to keep the connection"
    if prompt.startswith("say: "):
        yield f"data: {prompt.removeprefix('say: ')}"
        return
    await asyncio.sleep(FIRST)
    if prompt == "stuck":
        await asyncio.sleep(60)
    if prompt != "empty":
        yield piece("one\u2028line" if prompt == "separators" else "text")
        for _ in range(count - 1):
            await asyncio.sleep(NEXT)
            yield piece("text")
    match prompt:
        case "error frame":
            yield f"data: {json.dumps({'error': {'message': 'out of memory', 'type': 'server_error'}})}"
            return
        case "error line":
            yield f"error: {json.dumps({'code': 500, 'message': 'context shift'})}"
            return
        case "malformed":
            yield "data: {"
            return
        case "cut off":
            return
        case "torn":
            raise ConnectionError("as if the server had died")
    yield piece("", "length")
    if prompt != "no usage":
        yield data({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}})
    yield "data: [DONE]"


def piece(text, finish_reason=None):
    return data({"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None})


def data(frame):
    return f"data: {json.dumps(frame, ensure_ascii=False)}"


@contextlib.contextmanager
def serving(app):
    """Its address."""
    config = uvicorn.Config(
        app, port=0, loop="asyncio", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(5)
