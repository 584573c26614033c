"""OpenAI's: completions, chats, and the model's name."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Depends
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from gshardx.errors import BadInput
from gshardx.infer.request import SamplingParams
from gshardx.infer.server.answering import EventStream
from gshardx.infer.server.frames import Chat, Completions, Json
from gshardx.infer.server.protocol import ChatRequest, CompletionRequest
from gshardx.infer.server.state import Server

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "whole, or with stream in events", "content": {EventStream.media_type: {}}}
}


def openai_routes(server: Server, known: Callable[..., Awaitable[str]]) -> APIRouter:
    """known: a dependency that gives a request's owner."""
    routes = APIRouter()

    @routes.post("/v1/completions", responses=STREAMED)
    async def completions(http: HttpRequest, body: CompletionRequest, owner: str = Depends(known)) -> Response:
        server.check_model(body.model)
        given = body.prompts()
        server.check_load(len(given), body.n)
        written = [one for one in given if isinstance(one, str)]  # all or none
        prompts = await server.encode(written) if written else given
        echoed: list[tuple[str, Any]] = []
        if body.echo:
            texts = [one if isinstance(one, str) else server.tokenizer.decode(one) for one in given]
            echoed = [(text, one) for text, one in zip(texts, prompts, strict=True) for _ in range(body.n)]
        voice = Completions(server.texts, body.logprobs is not None, echoed, silent=body.max_tokens == 0)
        return await server.answer(http, owner, body, prompts, completion_params(body), voice)

    @routes.post("/v1/chat/completions", responses=STREAMED)
    async def chat(http: HttpRequest, body: ChatRequest, owner: str = Depends(known)) -> Response:
        server.check_model(body.model)
        server.check_load(1, body.n)
        prompt = await asyncio.to_thread(server.template.encode, body.messages, server.tokenizer)
        new = body.max_completion_tokens or body.max_tokens or server.room(len(prompt))
        params = body.params(new, body.alternatives())
        voice = Chat(server.texts, body.logprobs)
        return await server.answer(http, owner, body, [prompt], params, voice)

    @routes.get("/v1/models")
    async def models(owner: str = Depends(known)) -> Json:
        about = {"max_model_len": server.engine.config.max_length, "owned_by": "gshardx"}
        return {"object": "list", "data": [{"id": server.model, "object": "model", "created": 0, **about}]}

    return routes


def completion_params(body: CompletionRequest) -> SamplingParams:
    """What the engine is asked for.

    Raises:
        BadInput: nothing is asked for.
    """
    if body.max_tokens == 0 and not body.echo:
        raise BadInput("max_tokens = 0: nothing is asked for; set echo, or ask for 1 or more")
    scored = body.logprobs if body.echo else None
    new = max(1, 16 if body.max_tokens is None else body.max_tokens)
    # With echo and logprobs one token is asked for whose log-probability is wanted whatever it is (lm_eval).
    only_scored = scored is not None and new == 1
    return body.params(
        new, body.logprobs, prompt_logprobs=scored,
        ignore_end=body.ignore_eos or (only_scored and not body.response_format),
    )  # fmt: skip
