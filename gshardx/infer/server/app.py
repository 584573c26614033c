"""The server as an ASGI application: who may ask, the routes (routes/), errors and bounds."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import Depends, FastAPI
from fastapi import Request as HttpRequest
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

import gshardx
from gshardx.infer.server.errors import ERRORS, add_errors
from gshardx.infer.server.keys import Keys
from gshardx.infer.server.routes.openai import openai_routes
from gshardx.infer.server.routes.operators import operator_routes
from gshardx.infer.server.routes.tokens import token_routes
from gshardx.infer.server.state import Server
from gshardx.infer.server.transport import Bounded

BEARER = HTTPBearer(auto_error=False, description="an API key; none is needed where the server has no keys")


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
    known = owner_by(server.keys)
    for routes in (openai_routes, token_routes, operator_routes):
        app.include_router(routes(server, known))
    app.add_middleware(Bounded, limit=server.limits.max_body, answered=server.timings.answered)
    return app


def owner_by(keys: Keys | None) -> Callable[..., Awaitable[str]]:
    """A dependency that gives the name of a request's key, or its address where there are no keys, and refuses others
    with 401."""

    async def known(http: HttpRequest, given: HTTPAuthorizationCredentials | None = Depends(BEARER)) -> str:  # noqa: B008
        if keys is None:
            return http.client.host if http.client else "somebody"
        owner = keys.owner(given.credentials if given else None)
        if owner is None:
            raise HTTPException(401, "give a valid API key: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        return owner

    return known
