"""The HTTP server: answers, bad input, limits, batches of many clients, metrics."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from saved_models import SENTENCES, save_random_model

import fastmtl
from fastmtl.errors import UserError
from fastmtl.inference.types.single import Prediction
from fastmtl.serving.command import bound, run_server
from fastmtl.serving.packed import PackedPredictor, Request

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from starlette.types import Message, Receive, Scope, Send  # noqa: E402

from fastmtl.serving.app import Limits, build_app  # noqa: E402
from fastmtl.serving.batches import Batcher, Overloaded  # noqa: E402
from fastmtl.serving.middleware import GONE, Measured, WholeBody  # noqa: E402

LIMITS = Limits(body=4000, texts=5, characters=300)
TASKS: dict[str, dict] = {
    "tone": {"type": "classification", "label_names": ["bad", "fair", "good"], "data": {}},
    "near": {"type": "regression", "range": [0, 5], "data": {}},
    "tags": {"type": "tokens", "label_names": ["O", "X"], "data": {}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Any:
    folder = save_random_model(tmp_path_factory.mktemp("model"), tiny_bert, TASKS, adapter={"name": "none"})
    return fastmtl.load(folder, device="cpu")


@pytest.fixture(scope="module")
def client(model: Any) -> Iterator[TestClient]:
    with TestClient(build_app(PackedPredictor(model), LIMITS)) as client:
        yield client


def test_one_call_answers_several_tasks(client: TestClient, model: Any) -> None:
    answer = client.post("/predict", json={"texts": SENTENCES, "tasks": ["near", "tone"]})
    assert answer.status_code == 200
    found = answer.json()["predictions"]
    assert list(found) == ["near", "tone"]
    expected = model.predict("tone", SENTENCES)
    assert [one["label"] for one in found["tone"]] == [one.label for one in expected]
    assert found["tone"][1]["probabilities"] == pytest.approx(expected[1].probabilities, abs=1e-5)
    assert client.post("/predict", json={"texts": ["he ran"]}).json()["predictions"].keys() == set(TASKS)
    words = client.post("/predict", json={"texts": [["he", "ran"]], "tasks": ["tags"]}).json()["predictions"]["tags"]
    assert words[0]["words"] == ["he", "ran"] and len(words[0]["tags"]) == 2


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("{", 422, "body: no valid JSON from character 1 on: Expecting property name"),
        ("[" * 20_000, 413, "the body has more than 4000 bytes"),
        (b'{"texts": ["\xff"]}', 400, "the body is not JSON in UTF-8"),
        ("[]", 422, "body: "),
        ("{}", 422, "texts: Field required"),
        ({"texts": [], "tasks": ["tone"]}, 422, "texts: the list is empty"),
        ({"texts": ["x"], "tasks": []}, 422, "tasks: the list is empty"),
        ({"texts": [3]}, 422, "texts[0] is not a string, a pair"),
        ({"texts": ["x", float("nan")]}, 422, "texts[1] is not a string, a pair"),
        ({"texts": ["x"], "task": "tone"}, 422, "task: Extra inputs are not permitted"),
        ({"texts": ["x"], "tasks": ["tome"]}, 422, "unknown task 'tome'. Did you mean 'tone'?"),
        ({"texts": ["x"] * 6, "tasks": ["tone"]}, 422, "texts: 6 texts, at most 5 in a request"),
        ({"texts": ["x" * 301], "tasks": ["tone"]}, 422, r"texts[0] has 301 characters, at most 300"),
        ({"texts": [["a", "b", "c"]], "tasks": ["tone"]}, 422, "texts[0] is not a pair of strings"),
        ({"texts": ["\ud800"], "tasks": ["tone"]}, 422, "surrogate"),
        ({"texts": ["x" * 5000], "tasks": ["tone"]}, 413, "the body has more than 4000 bytes"),
    ],
)
def test_bad_input_is_a_sentence(body: Any, status: int, message: str, client: TestClient) -> None:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    answer = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


def test_other_requests_are_a_sentence_too(client: TestClient) -> None:
    form = client.post("/predict", content='{"texts": ["x"]}', headers={"Content-Type": "text/plain"})
    assert (form.status_code, form.json()["error"]) == (
        415,
        "send the header Content-Type: application/json, not text/plain",
    )
    wrong = client.get("/predict")
    assert (wrong.status_code, wrong.json()["error"]) == (405, "GET /predict: Method Not Allowed")
    assert wrong.headers["allow"] == "POST"


def test_a_large_body_without_a_length_is_refused(client: TestClient) -> None:
    pieces = (b"x" * 1000 for _ in range(10))
    answer = client.post("/predict", content=pieces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_pages_beside_predictions(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/tasks").json()["tone"] == {
        "type": "classification",
        "labels": ["bad", "fair", "good"],
        "range": None,
    }
    assert (client.get("/nothing").status_code, client.get("/nothing").json()) == (
        404,
        {"error": "GET /nothing: Not Found"},
    )
    assert "/predict" in client.get("/openapi.json").json()["paths"]
    client.post("/predict", content="x" * 5000)
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    counted = {tuple(one.labels.values()): one.value for one in families["fastmtl_requests"].samples}
    assert counted["/predict", "422"] > 0 and counted["/predict", "413"] > 0 and counted["other", "404"] > 0
    assert "fastmtl_batch_requests" in families


def test_a_model_that_fails_is_a_500_and_nan_is_null(model: Any) -> None:
    class Broken(PackedPredictor):
        def predict(self, requests: Sequence[Request]) -> list[dict[str, list[Any]]]:
            if list(requests[0].datasets) == ["tone"]:
                raise RuntimeError("out of memory")
            return [{"near": [Prediction(math.nan)]}]

    with TestClient(build_app(Broken(model), LIMITS), raise_server_exceptions=False) as client:
        answer = client.post("/predict", json={"texts": ["x"], "tasks": ["near"]})
        assert answer.json() == {"predictions": {"near": [{"label": None, "probabilities": None}]}}
        answer = client.post("/predict", json={"texts": ["x"], "tasks": ["tone"]})
        assert (answer.status_code, "the model failed: RuntimeError" in answer.json()["error"]) == (500, True)
        assert 'path="/predict",status="500"} 1.0' in client.get("/metrics").text


def test_a_client_that_has_gone_cancels_its_work() -> None:
    async def run() -> tuple[list[str], list[tuple[str, int]]]:
        seen, counted = [], []
        messages: list[Message] = [{"type": "http.request", "body": b"{}", "more_body": False}]

        async def receive() -> Message:
            if not messages:
                await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}
            return messages.pop()

        async def send(message: Message) -> None:
            seen.append("answered")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            assert (await receive())["body"] == b"{}"
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        counts = Measured(WholeBody(app, 100), lambda path, status, seconds: counted.append((path, status)))
        await counts({"type": "http", "path": "/predict", "headers": []}, receive, send)
        return seen, counted

    assert asyncio.run(run()) == (["cancelled"], [("/predict", GONE)])


def test_the_port_is_bound_before_the_model_is_loaded(tmp_path: Path) -> None:
    (taken,) = bound("127.0.0.1", 0)
    with taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot serve on 127.0.0.1, port {port}: Address already in use: choose"):
            run_server(tmp_path / "no-model", "127.0.0.1", port, None, 10, 1.0, None)


class Model:
    """A predictor that records its batches. A batch lasts until `free` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()

    def encode(self, texts: list[str], tasks: list[str]) -> Request:
        return Request({}, len(texts[0]))

    def predict(self, requests: list[Request]) -> list[dict[str, list[Any]]]:
        self.batches.append([request.tokens for request in requests])
        self.free.wait(60)
        if any(request.tokens == 13 for request in requests):
            raise RuntimeError("unlucky")
        return [{"tokens": [request.tokens]} for request in requests]


def test_batches_follow_the_budget_and_the_deadline() -> None:
    async def run() -> list[list[int]]:
        model = Model()
        batcher = Batcher(model, tokens=10, wait=0.05, queue=6, texts=40)  # type: ignore[arg-type]
        batcher.start()

        async def ask(size: int) -> list[Any]:
            return (await batcher.answer(["x" * size], ["any"]))["tokens"]

        async def until_waiting(requests: int, batches: int) -> None:
            while (len(batcher._waiting), len(model.batches)) != (requests, batches):
                await asyncio.sleep(0.005)

        begun = time.monotonic()
        first = asyncio.create_task(ask(3))
        await until_waiting(0, 1)
        assert time.monotonic() - begun >= 0.04  # it waited for more requests
        others = [asyncio.create_task(ask(size)) for size in (4, 6, 20, 2)]
        await until_waiting(4, 1)
        gone = asyncio.create_task(ask(1))
        await until_waiting(5, 1)
        gone.cancel()
        await until_waiting(4, 1)
        with pytest.raises(Overloaded):
            await asyncio.gather(*(batcher.answer(["x"], ["any"]) for _ in range(8)))
        await until_waiting(6, 1)
        model.free.set()
        assert await first == [3]
        assert [await one for one in others] == [[4], [6], [20], [2]]
        assert batcher.length == 0
        with pytest.raises(Overloaded, match="1 texts wait already"):
            await asyncio.gather(ask(1), batcher.answer(["x"] * 40, ["any"]))
        with pytest.raises(RuntimeError, match="unlucky"):
            await ask(13)
        batcher.tokens = 100
        model.free.clear()
        before = len(model.batches)
        first = asyncio.create_task(ask(1))
        await until_waiting(0, before + 1)
        last = [asyncio.create_task(ask(size)) for size in (2, 13, 3)]
        await until_waiting(3, before + 1)
        model.free.set()
        assert [await one for one in (first, last[0], last[2])] == [[1], [2], [3]]  # 13 fails alone
        with pytest.raises(RuntimeError, match="unlucky"):
            await last[1]
        assert await ask(5) == [5]  # the server goes on
        await batcher.stop()
        return model.batches

    batches = asyncio.run(asyncio.wait_for(run(), 60))
    assert batches[:4] == [[3], [4, 6], [20], [2, 1, 1]] and batches[-2:] == [[3], [5]]
