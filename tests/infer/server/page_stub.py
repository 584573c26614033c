"""A server with made-up answers behind the playground page: what the page asks of the real one, and no model."""

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

import gshardx.infer.server

PAGE = Path(gshardx.infer.server.__file__).parent / "page.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
LAYERS, EXPERTS, SLOTS, PAGES = 3, 8, 4, 1535
WORDS = ("The", " river", " ran", " down", " to", " the", " sea", ",", "\n", "and", " <b>bold</b>", " &amp;", " é", "")


def experts_of(place):
    """For each layer, where the token at ``place`` went, best first; place 0 is the last token of the prompt."""
    firsts = [(3 * place + 5 * layer + place // 7) % EXPERTS for layer in range(LAYERS)]
    return [[first, (first + 1 + (place + layer) % (EXPERTS - 1)) % EXPERTS] for layer, first in enumerate(firsts)]


@dataclasses.dataclass
class Stub:
    """What it answers with, and what it has seen."""

    words: tuple[str, ...] = WORDS
    pace: float = 0.0
    """Seconds before each token."""
    fails_after: int | None = None
    """Tokens before an error inside the stream."""
    key: str | None = None
    asked: list[dict] = dataclasses.field(default_factory=list)
    """Bodies of the requests for completions."""
    cut: int = 0
    """Streams that did not come to their end."""
    running: int = 0
    drawn: int = 0
    load: list[list[int]] = dataclasses.field(
        default_factory=lambda: [[100 + 7 * layer + 11 * e for e in range(EXPERTS)] for layer in range(LAYERS)]
    )

    def stats(self):
        held = 3 * self.running
        return {
            "model": "quickstart", "layers": LAYERS, "num_experts": EXPERTS, "top_k": 2, "running": self.running,
            "waiting": 0, "slots": SLOTS, "drawn_tokens": self.drawn, "max_length": 4096, "expert_load": self.load,
            "pages": {"free": PAGES - 35 - held, "evictable": 35, "held": held},
        }  # fmt: skip

    async def stream(self, count):
        self.running += 1
        self.cut += 1
        try:
            for place in range(count):
                await asyncio.sleep(self.pace)
                if place == self.fails_after:
                    yield frame({"error": {"message": "the <b>device</b>\nis gone", "type": "server_error"}})
                    break
                yield frame(self.draw(place, place == count - 1))
            yield "data: [DONE]\n\n"
            self.cut -= 1
        finally:
            self.running -= 1

    def draw(self, place, last):
        chosen = experts_of(place)
        for counts, experts in zip(self.load, chosen, strict=True):
            for expert in experts:
                counts[expert] += 1
        self.drawn += 1
        word = self.words[place % len(self.words)]
        reason = "length" if last else None
        choice = {"index": 0, "text": word, "finish_reason": reason, "tokens": [word], "experts": [chosen]}
        return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


def frame(value):
    return f"data: {json.dumps(value)}\n\n"


def build(stub):
    app = FastAPI()

    @app.middleware("http")
    async def check_key(request, answer):
        if request.url.path == "/" or stub.key is None or request.headers.get("authorization") == f"Bearer {stub.key}":
            return await answer(request)
        return JSONResponse({"error": {"message": "no such API key", "type": "invalid_request_error"}}, 401)

    @app.get("/")
    async def page():
        return HTMLResponse(PAGE.read_bytes(), headers={"Content-Security-Policy": POLICY})

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [{"id": "quickstart", "object": "model"}]}

    @app.get("/stats")
    async def stats():
        return stub.stats()

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        stub.asked.append(body)
        if not body["prompt"]:
            return JSONResponse({"error": {"message": "prompt: is empty", "type": "invalid_request_error"}}, 400)
        return StreamingResponse(stub.stream(body["max_tokens"]), media_type="text/event-stream")

    return app


@contextlib.contextmanager
def served(stub):
    """Serve on a free port of this machine; the base URL."""
    server = uvicorn.Server(uvicorn.Config(build(stub), port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
