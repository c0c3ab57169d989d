"""The HTTP server of `fastmtl serve`, a FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json
from starlette.routing import Route

from fastmtl.errors import UserError
from fastmtl.serving.batches import Batcher
from fastmtl.serving.middleware import Measured, WholeBody
from fastmtl.serving.packed import PackedPredictor
from fastmtl.serving.problems import PROBLEMS, add_handlers
from fastmtl.version import __version__


@dataclass(frozen=True)
class Limits:
    """The limits of batches and requests.

    tokens: budget of a batch. wait: seconds that a batch waits for more requests. body: bytes of a
    request's body. texts: texts of a request. characters: those of a text, all its parts together.
    queue, waiting_texts: requests that wait, and their texts; the next one is refused.
    """

    tokens: int = 8192
    wait: float = 0.002
    body: int = 1 << 20
    texts: int = 256
    characters: int = 20_000
    queue: int = 1000
    waiting_texts: int = 4096


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
        app.state.batcher = Batcher(predictor, limits.tokens, limits.wait, limits.queue, limits.waiting_texts, observe)
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

    def count(path: str, status: int, took: float) -> None:
        requests.labels(path if path in known else "other", str(status)).inc()
        if path == "/predict":
            seconds.observe(took)

    app.add_middleware(WholeBody, most=limits.body)
    app.add_middleware(Measured, observe=count)  # around the other
    add_handlers(app)

    @app.post("/predict", responses=PROBLEMS, response_model=Answer)
    async def predict(asked: Asked) -> Response:
        """Predict the texts for one or several tasks."""
        check(asked, limits)
        answers = await app.state.batcher.answer(asked.texts, asked.tasks or predictor.recipe.task_names)
        # pydantic writes this in one call; FastAPI would copy up to a million numbers in Python.
        return Response(to_json({"predictions": answers}, inf_nan_mode="null"), media_type="application/json")

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

    known = {route.path for route in app.routes if isinstance(route, Route)}
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
