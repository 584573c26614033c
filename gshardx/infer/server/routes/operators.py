"""The operators': figures, whether it lives, and the playground, a page that shows both."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, Depends
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from gshardx.infer.server.frames import Json
from gshardx.infer.server.state import Server

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Ready(BaseModel):
    """status: what is wrong, if anything."""

    status: str


class Health(Ready):
    """steps: of the engine."""

    steps: int


def operator_routes(server: Server, known: Callable[..., Awaitable[str]]) -> APIRouter:
    """known: a dependency that gives a request's owner; neither /health, /ready nor the page asks for one."""
    routes = APIRouter()

    @routes.get("/stats")
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

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics(owner: str = Depends(known)) -> Response:
        return Response(generate_latest(server.registry), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/health", response_model=Health, responses={503: {"model": Health, "description": "what is wrong"}})
    async def health() -> JSONResponse:
        """200 while the engine moves."""
        trouble = server.worker.trouble
        return JSONResponse({"status": trouble or "ok", "steps": server.worker.steps}, 503 if trouble else 200)

    @routes.get("/ready", response_model=Ready, responses={503: {"model": Ready, "description": "what is wrong"}})
    async def ready() -> JSONResponse:
        """200 while requests are taken."""
        trouble = "shutting down" if server.draining else server.worker.trouble
        return JSONResponse({"status": trouble or "ready"}, 503 if trouble else 200)

    page = files("gshardx.infer.server").joinpath("page.html").read_text(encoding="utf-8")

    @routes.get("/", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    return routes
