"""The HTTP server of `fastmtl serve`, a FastAPI application."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastmtl.errors import UserError
from fastmtl.serving.batches import Batcher, Overloaded
from fastmtl.serving.packed import PackedPredictor
from fastmtl.version import __version__


@dataclass(frozen=True)
class Limits:
    """The limits of batches and requests.

    tokens: budget of a batch. wait: seconds that a batch waits for more requests. body: bytes of a
    request's body. texts: texts of a request. characters: those of a text, all its parts together.
    queue: requests that wait; the next one is refused.
    """

    tokens: int = 8192
    wait: float = 0.002
    body: int = 1 << 20
    texts: int = 256
    characters: int = 20_000
    queue: int = 1000


# A text, a pair, a list of words, or for choice and ranking (question, [texts]).
Text = str | list[str | list[str]]


class Asked(BaseModel):
    """The body of POST /predict."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[Text] = Field(
        description="as fastmtl.load(...).predict takes them: strings, pairs, lists of words, or [query, [texts]]"
    )
    tasks: list[str] | None = Field(None, description="default: all tasks of the model")


class Answer(BaseModel):
    """The answer of POST /predict: {task: one prediction per text, in order}."""

    predictions: dict[str, list[dict[str, Any]]]


class Problem(BaseModel):
    """A sentence that says what is wrong, and what to do."""

    error: str


class BodyLimit:
    """ASGI middleware that refuses bodies of more than `most` bytes, also without a length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = JSONResponse({"error": f"the body has more than {self._most} bytes: send fewer texts"}, 413)
        lengths = [value for key, value in scope["headers"] if key == b"content-length"]
        if lengths and lengths[0].isdigit() and int(lengths[0]) > self._most:
            await problem(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                await problem(scope, receive, send)
                return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


def build_app(predictor: PackedPredictor, limits: Limits) -> FastAPI:
    """Return the application that answers by `predictor`."""
    registry = CollectorRegistry()
    requests = Counter("fastmtl_requests", "Requests by path and status", ["path", "status"], registry=registry)
    seconds = Histogram("fastmtl_request_seconds", "Seconds from request to answer", registry=registry)
    sizes = Histogram(
        "fastmtl_batch_requests", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
    )
    tokens = Counter("fastmtl_tokens", "Tokens of all batches", registry=registry)
    model_seconds = Counter("fastmtl_model_seconds", "Seconds of the model", registry=registry)
    waiting = Gauge("fastmtl_waiting_requests", "Requests that wait", registry=registry)

    def observe(number: int, in_batch: int, took: float) -> None:
        sizes.observe(number)
        tokens.inc(in_batch)
        model_seconds.inc(took)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(predictor, limits.tokens, limits.wait, limits.queue, observe)
        waiting.set_function(lambda: app.state.batcher.length)
        app.state.batcher.start()
        yield
        await app.state.batcher.stop()

    app = FastAPI(
        title="fastmtl",
        version=__version__,
        description="Predictions of a multi-task model. One call answers one or several tasks for the same texts.",
        lifespan=life,
    )
    app.add_middleware(BodyLimit, most=limits.body)

    @app.middleware("http")
    async def measured(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begun = asyncio.get_running_loop().time()
        response = await call_next(request)
        route = request.scope.get("route")
        requests.labels(getattr(route, "path", "other"), str(response.status_code)).inc()
        if getattr(route, "path", "") == "/predict":
            seconds.observe(asyncio.get_running_loop().time() - begun)
        return response

    @app.exception_handler(UserError)
    async def bad_text(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return JSONResponse({"error": f"{place}: {first['msg']}"}, 422)

    @app.exception_handler(Overloaded)
    async def overloaded(_: Request, error: Exception) -> JSONResponse:
        problem = {"error": f"{limits.queue} requests wait already: try again later"}
        return JSONResponse(problem, 503, headers={"Retry-After": "1"})

    problems: dict[int | str, dict[str, Any]] = {
        413: {"model": Problem, "description": "The body is too large"},
        422: {"model": Problem, "description": "The body, a task or a text is not valid"},
        503: {"model": Problem, "description": "Too many requests wait"},
    }

    @app.post("/predict", responses=problems)
    async def predict(asked: Asked) -> Answer:
        """Predict the texts for one or several tasks."""
        check(asked, limits)
        answers = await app.state.batcher.answer(asked.texts, asked.tasks or predictor.recipe.task_names)
        return Answer(predictions={task: [dataclasses.asdict(one) for one in found] for task, found in answers.items()})

    @app.get("/tasks")
    async def tasks() -> dict[str, dict[str, Any]]:
        """Return the tasks of the model with their types and labels."""
        return {
            name: {"type": task.type, "labels": task.label_names, "range": task.range}
            for name, task in predictor.recipe.tasks.items()
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Return ok once the model is loaded."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics in Prometheus's format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def check(asked: Asked, limits: Limits) -> None:
    """Raise UserError for a request with no text, or with more or longer texts than allowed."""
    if not asked.texts:
        raise UserError("texts: the list is empty")
    if asked.tasks is not None and not asked.tasks:
        raise UserError("tasks: the list is empty; leave it out for all tasks")
    if len(asked.texts) > limits.texts:
        raise UserError(f"texts: {len(asked.texts)} texts, at most {limits.texts} in a request")
    for position, text in enumerate(asked.texts):
        if _characters(text) > limits.characters:
            raise UserError(
                f"texts[{position}] has {_characters(text)} characters, at most {limits.characters} are allowed"
            )


def _characters(text: Any) -> int:
    return len(text) if isinstance(text, str) else sum(map(_characters, text))
