"""The tokenizer's: text to tokens and back, as vLLM's server and lm_eval's client have it."""

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Depends

from gshardx.infer.server.frames import Json
from gshardx.infer.server.protocol import DetokenizeRequest, TokenizeRequest
from gshardx.infer.server.state import Server


def token_routes(server: Server, known: Callable[..., Awaitable[str]]) -> APIRouter:
    """known: a dependency that gives a request's owner."""
    routes = APIRouter()

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest, owner: str = Depends(known)) -> Json:
        """As prompts are: special tokens in a text are text. The end token's text alone is the end token (lm_eval)."""
        alone = body.prompt == server.end
        tokens = [server.tokenizer.end] if alone else (await server.encode([body.prompt]))[0].tolist()
        return {"tokens": tokens, "count": len(tokens), "max_model_len": server.engine.config.max_length}

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, owner: str = Depends(known)) -> Json:
        return {"prompt": server.tokenizer.decode(body.tokens)}

    @routes.get("/tokenizer_info")
    async def tokenizer_info(owner: str = Depends(known)) -> Json:
        """What lm_eval asks for with ``tokenizer_backend=remote``."""
        return {"eos_token": server.end, "bos_token": None, "chat_template": server.template.source}

    return routes
