"""What the routes share: the engine's thread, admission, and the way from a request to its answer."""

import asyncio
import contextlib
import dataclasses
import time
import uuid
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from gshardx.data.tokenizer import Tokenizer
from gshardx.errors import BadInput
from gshardx.infer.engine import Engine
from gshardx.infer.request import Request, SamplingParams
from gshardx.infer.server.answering import EventStream, Job, frames, whole
from gshardx.infer.server.chat import ChatTemplate
from gshardx.infer.server.frames import Voice
from gshardx.infer.server.keys import Keys
from gshardx.infer.server.limits import Admission, Limits
from gshardx.infer.server.metrics import ServerCollector, Timings, registry
from gshardx.infer.server.protocol import Sampling
from gshardx.infer.server.tokens import TokenTexts
from gshardx.infer.server.worker import LOGGER, Worker

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
