"""What a client is told when something is wrong: one body, OpenAI's, for every way in which it may be."""

import re
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from gshardx.errors import BadInput
from gshardx.infer.server.answering import ClientGone, Failed, told
from gshardx.infer.server.frames import error_body
from gshardx.infer.server.limits import Refused
from gshardx.infer.server.worker import EngineDown


class Trouble(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's form."""

    error: Trouble


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": said}
    for status, said in (
        (400, "what is wrong with the request"),
        (401, "no valid API key"),
        (404, "no such model, or no such path"),
        (408, "the body did not arrive in time"),
        (413, "the body is too large"),
        (429, "too much waits; Retry-After says when there should be room"),
        ("4XX", "something else is wrong with the request"),  # and so FastAPI adds no 422, which is never sent
        (500, "something went wrong in the server"),
        (503, "the engine is down, or the server about to be"),
        (504, "it took too long"),
    )
}
KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def add_errors(app: FastAPI) -> None:
    """One body for all of them; what went wrong inside is logged, not told."""

    def body(status: int, message: str, code: str | None = None, headers: Any = None) -> JSONResponse:
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return JSONResponse(error_body(message, kind, code), status, headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_form(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return body(400, _first(error))

    @app.exception_handler(BadInput)
    async def wrong_value(_: HttpRequest, error: BadInput) -> JSONResponse:
        return body(400, re.sub(r"^request \S+: ", "", " ".join(str(error).split())))

    @app.exception_handler(RecursionError)
    async def too_deep(_: HttpRequest, error: RecursionError) -> JSONResponse:
        return body(400, "the body is nested too deeply")

    @app.exception_handler(HTTPException)
    async def plain(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return body(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Refused)
    async def later(_: HttpRequest, error: Refused) -> JSONResponse:
        return body(429, str(error), "overloaded", {"Retry-After": str(error.seconds)})

    async def ended(_: HttpRequest, error: Exception) -> JSONResponse:
        status = {TimeoutError: 504, Failed: 500}.get(type(error), 503)
        message, _kind, code = told(error)
        return body(status, message, code, {"Retry-After": "5"} if status == 503 else None)

    for kind in (TimeoutError, Failed, EngineDown):
        app.add_exception_handler(kind, ended)

    @app.exception_handler(ClientGone)
    async def gone(_: HttpRequest, error: ClientGone) -> Response:
        return Response(status_code=499)  # nginx's number; nobody reads it

    @app.exception_handler(Exception)
    async def bug(_: HttpRequest, error: Exception) -> JSONResponse:
        return body(500, "something went wrong in the server")


def _first(error: RequestValidationError) -> str:
    """The first thing that is wrong, in one line, without the values that were sent."""
    found = error.errors()[0]
    if found["type"] == "json_invalid":
        return f"the body is not JSON: {found['ctx']['error']} at character {found['loc'][-1]}"
    where = ".".join(str(part)[:64] for part in found["loc"] if part != "body")
    said = str(found["msg"]).removeprefix("Value error, ")
    return f"{where}: {said}" if where else said
