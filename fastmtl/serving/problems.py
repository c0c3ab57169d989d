"""Errors of a request as answers: a status, and {"error": a sentence}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fastmtl.errors import UserError
from fastmtl.serving.batches import Overloaded


class Problem(BaseModel):
    """A sentence that says what is wrong, and what to do."""

    error: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is no text"},
    413: {"model": Problem, "description": "The body is too large"},
    415: {"model": Problem, "description": "The header Content-Type is not application/json"},
    422: {"model": Problem, "description": "The body, a task or a text is not valid"},
    503: {"model": Problem, "description": "Too many requests or texts wait"},
}


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every error as a `Problem`."""

    @app.exception_handler(UserError)
    async def bad_text(_: Request, error: Exception) -> JSONResponse:
        return _answer(422, str(error))

    @app.exception_handler(RequestValidationError)
    async def bad_body(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not given.endswith(("/json", "+json")):
            return _answer(415, f"send the header Content-Type: application/json, not {given or 'none'}")
        return _answer(422, _sentence(error.errors()[0]))

    @app.exception_handler(HTTPException)
    async def bad_request(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # FastAPI does not say what it could not read
            return _answer(400, "the body is not JSON in UTF-8, or too deeply nested")
        what = f"{request.method} {request.url.path}: {error.detail}"
        return _answer(error.status_code, what, dict(error.headers or {}))

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Exception) -> JSONResponse:
        return _answer(503, f"{error}: try again later", {"Retry-After": "1"})

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _answer(500, f"the model failed: {type(error).__name__}; the server's log has the details")


def _answer(status: int, sentence: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": sentence}, status, headers=headers)


def _sentence(error: dict[str, Any]) -> str:
    """Return the first error of a body as a sentence that names the key."""
    place = list(error["loc"][1:])
    if error["type"] == "json_invalid":
        return f"body: no valid JSON from character {place[0]} on: {error.get('ctx', {}).get('error', error['msg'])}"
    if len(place) > 1 and place[0] == "texts":
        return f"texts[{place[1]}] is not a string, a pair, a list of words, or [question, [texts]]"
    return f"{'.'.join(map(str, place)) or 'body'}: {error['msg']}"
