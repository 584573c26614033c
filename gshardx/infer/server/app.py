"""The routes of the server: OpenAI's, those of operators, and the playground."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException

import gshardx
from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput
from gshardx.infer.engine import Engine
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.server.answering import EventStream, Job, frames, whole
from gshardx.infer.server.chat import ChatTemplate
from gshardx.infer.server.errors import ERRORS, add_errors
from gshardx.infer.server.frames import Chat, Completions, Json, Voice
from gshardx.infer.server.keys import Keys
from gshardx.infer.server.limits import Admission, Limits
from gshardx.infer.server.metrics import ServerCollector, Timings, registry
from gshardx.infer.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, Sampling, TokenizeRequest
from gshardx.infer.server.tokens import TokenTexts
from gshardx.infer.server.transport import Bounded
from gshardx.infer.server.worker import LOGGER, Worker

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
LONG_TEXT = 4096
"""Characters from which texts are tokenised on another thread: some milliseconds in which others are served."""
COMPILING = 2
"""Schemas at once. One may take seconds, and texts are tokenised on the same threads."""


@dataclasses.dataclass
class Server:
    """What the routes share."""

    engine: Engine
    model: str
    template: ChatTemplate
    keys: Keys | None
    limits: Limits
    startup_compilations: int = 0
    log_prompts: bool = False
    draining: bool = False

    def __post_init__(self) -> None:
        self.tokenizer: Tokenizer = self.engine.tokenizer
        self.end = self.tokenizer.inner.id_to_token(self.tokenizer.end)
        self.texts, self.timings = TokenTexts(self.tokenizer), Timings()
        self.admission = Admission(self.limits, self.engine.sizes.slots * self.engine.sizes.shards)
        self.worker = Worker(self.engine, self.limits.stall, self.admission.ended)
        self.compiling = asyncio.Semaphore(COMPILING)
        collector = ServerCollector(self.worker, self.admission, self.timings, self.startup_compilations)
        self.registry = registry(collector)

    async def encode(self, texts: list[str]) -> list[Any]:
        """Tokens of each."""
        if sum(map(len, texts)) < LONG_TEXT:
            return [self.tokenizer.encode(text) for text in texts]
        # Unlike encode, which keeps all other threads waiting, the engine's too.
        found = await asyncio.to_thread(self.tokenizer.inner.encode_batch_fast, texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise HTTPException(404, f"no model {name[:64]!r} here; use {self.model!r}")

    def room(self, prompt: int) -> int:
        """Tokens that may follow ``prompt`` tokens; one at least, so that the engine says what is too long."""
        return max(1, self.engine.config.max_length - prompt)

    async def answer(
        self, http: HttpRequest, owner: str, body: Sampling, prompts: list[Any], params: SamplingParams, voice: Voice
    ) -> Response:
        """Admit, compute and answer; see :mod:`gshardx.infer.server.answering`."""
        arrived, id = time.monotonic(), f"{voice.prefix}-{uuid.uuid4().hex}"
        requests = [Request(f"{id}-{number}", prompt, params) for number, prompt in enumerate(prompts)]
        if self.log_prompts:
            for one in requests:
                LOGGER.info("%s prompt: %r", one.id, self.tokenizer.decode(one.prompt))
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.admission.of(owner))
            if params.json_schema is not None:  # compiled here, so that the engine finds it compiled
                async with self.compiling:
                    await asyncio.to_thread(self.engine.grammars.start, params.json_schema)
            self.admission.check(self.worker, len(prompts) * params.n, sum(map(len, prompts)))
            job = Job(self.worker, requests, arrived, self.limits.deadline, self.timings)
            await job.enter()
            stack.callback(job.leave)
            LOGGER.info("%s of %s: %d prompts, %d tokens", id, owner, len(prompts), sum(map(len, prompts)))
            if not body.stream:
                return await whole(http, job, voice, id, self.model)
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(frames(http, job, voice, id, self.model, usage), stack.pop_all().close)

    def check_load(self, prompts: int, n: int) -> None:
        """Before anything is tokenised.

        Raises:
            BadInput: more than could ever wait.
            Refused: too much waits.
            HTTPException: 503 on the way to the end.
        """
        if self.draining:
            raise HTTPException(503, "the server is shutting down", {"Retry-After": "5"})
        most = self.limits.max_queue + self.admission.slots
        if prompts * n > most:
            raise BadInput(f"{prompts} prompts of n = {n}: at most {most} continuations at once; send fewer")
        self.admission.check(self.worker, prompts * n)


def build_app(server: Server) -> FastAPI:
    """Its lifespan starts and ends the engine's thread."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await server.worker.stop()

    app = FastAPI(title="gshardx", version=gshardx.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  redirect_slashes=False, responses=ERRORS)  # fmt: skip
    add_errors(app)
    bearer = HTTPBearer(auto_error=False, description="an API key; none is needed where the server has no keys")

    async def known(http: HttpRequest, given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> str:  # noqa: B008
        if server.keys is None:
            return http.client.host if http.client else "somebody"
        owner = server.keys.owner(given.credentials if given else None)
        if owner is None:
            raise HTTPException(401, "give a valid API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        return owner

    @app.post("/v1/completions", responses=STREAMED)
    async def completions(http: HttpRequest, body: CompletionRequest, owner: str = Depends(known)) -> Response:
        server.check_model(body.model)
        given = body.prompts()
        server.check_load(len(given), body.n)
        written = [one for one in given if isinstance(one, str)]  # all or none
        prompts = await server.encode(written) if written else given
        silent = body.max_tokens == 0
        if silent and not body.echo:
            raise BadInput("max_tokens = 0: nothing is asked for; set echo, or ask for 1 or more")
        scored = body.logprobs if body.echo else None
        new = max(1, 16 if body.max_tokens is None else body.max_tokens)
        # With echo and logprobs one token is asked for whose log-probability is wanted whatever it is (lm_eval).
        only_scored = scored is not None and new == 1
        params = body.params(
            new, body.logprobs, prompt_logprobs=scored,
            ignore_end=body.ignore_eos or (only_scored and not body.response_format),
        )  # fmt: skip
        echoed: list[tuple[str, Any]] = []
        if body.echo:
            texts = [one if isinstance(one, str) else server.tokenizer.decode(one) for one in given]
            echoed = [(text, one) for text, one in zip(texts, prompts, strict=True) for _ in range(body.n)]
        voice = Completions(server.texts, body.logprobs is not None, echoed, silent)
        return await server.answer(http, owner, body, prompts, params, voice)

    @app.post("/v1/chat/completions", responses=STREAMED)
    async def chat(http: HttpRequest, body: ChatRequest, owner: str = Depends(known)) -> Response:
        server.check_model(body.model)
        server.check_load(1, body.n)
        prompt = await asyncio.to_thread(server.template.encode, body.messages, server.tokenizer)
        new = body.max_completion_tokens or body.max_tokens or server.room(len(prompt))
        params = body.params(new, body.alternatives())
        voice = Chat(server.texts, body.logprobs)
        return await server.answer(http, owner, body, [prompt], params, voice)

    @app.get("/v1/models")
    async def models(owner: str = Depends(known)) -> Json:
        about = {"max_model_len": server.engine.config.max_length, "owned_by": "gshardx"}
        return {"object": "list", "data": [{"id": server.model, "object": "model", "created": 0, **about}]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, owner: str = Depends(known)) -> Json:
        """As prompts are: special tokens in a text are text. The end token's text alone is the end token (lm_eval)."""
        alone = body.prompt == server.end
        tokens = [server.tokenizer.end] if alone else (await server.encode([body.prompt]))[0].tolist()
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.config.max_length}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, owner: str = Depends(known)) -> Json:
        return {"prompt": server.tokenizer.decode(body.tokens)}

    @app.get("/tokenizer_info")
    async def tokenizer_info(owner: str = Depends(known)) -> Json:
        """What lm_eval asks for with ``tokenizer_backend=remote``."""
        return {"eos_token": server.end, "bos_token": None, "chat_template": server.template.source}

    @app.get("/stats")
    async def stats(owner: str = Depends(known)) -> Json:
        """What the playground shows."""
        seen, found = server.worker.seen, server.engine.stats
        layers, experts = found.expert_load.shape
        return {
            "model": server.model,
            "layers": layers,
            "num_experts": experts,
            "top_k": server.engine.choices,
            "running": seen.running,
            "waiting": seen.waiting + server.worker.entering,
            "slots": server.admission.slots,
            "drawn_tokens": found.drawn_tokens,
            "pages": {"free": seen.free, "evictable": seen.evictable, "held": seen.held},
            "expert_load": found.expert_load.tolist(),
            "max_length": server.engine.config.max_length,
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(owner: str = Depends(known)) -> Response:
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/health", response_model=Health, responses={503: {"model": Health, "description": "what is wrong"}})
    async def health() -> JSONResponse:
        """200 while the engine moves."""
        trouble = server.worker.trouble
        return JSONResponse({"status": trouble or "ok", "steps": server.worker.steps}, 503 if trouble else 200)

    @app.get("/ready", response_model=Ready, responses={503: {"model": Ready, "description": "what is wrong"}})
    async def ready() -> JSONResponse:
        """200 while requests are taken."""
        trouble = "shutting down" if server.draining else server.worker.trouble
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    page = files("gshardx.infer.server").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    app.add_middleware(Bounded, limit=server.limits.max_body, answered=server.timings.answered)
    return app


class Ready(BaseModel):
    """status: what is wrong, if anything."""

    status: str


class Health(Ready):
    """steps: of the engine."""

    steps: int


STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "whole, or with stream in events", "content": {EventStream.media_type: {}}}
}
