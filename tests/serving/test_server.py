"""The HTTP server: answers, bad input, limits, batches of many clients, metrics."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from saved_models import SENTENCES, save_random_model

import fastmtl
from fastmtl.serving.packed import PackedPredictor, Request

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
from fastapi.testclient import TestClient  # noqa: E402

from fastmtl.serving.app import Limits, build_app  # noqa: E402
from fastmtl.serving.batches import Batcher, Overloaded  # noqa: E402

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
        ("{", 422, "JSON"),
        ("[]", 422, "body: "),
        ("{}", 422, "texts: Field required"),
        ({"texts": [], "tasks": ["tone"]}, 422, "texts: the list is empty"),
        ({"texts": ["x"], "tasks": []}, 422, "tasks: the list is empty"),
        ({"texts": [3]}, 422, "texts.0"),
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
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, message in answer.json()["error"]) == (status, True), answer.text


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
    assert client.get("/nothing").status_code == 404
    assert "/predict" in client.get("/openapi.json").json()["paths"]
    text = client.get("/metrics").text
    assert 'fastmtl_requests_total{path="/predict",status="422"}' in text and "fastmtl_batch_requests_bucket" in text


class Model:
    """A predictor that records its batches. A batch lasts until `free` is set."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.free = threading.Event()

    def encode(self, texts: list[str], tasks: list[str]) -> Request:
        return Request({}, len(texts[0]))

    def predict(self, requests: list[Request]) -> list[dict[str, list[Any]]]:
        self.batches.append([request.tokens for request in requests])
        self.free.wait(5)
        if any(request.tokens == 13 for request in requests):
            raise RuntimeError("unlucky")
        return [{"tokens": [request.tokens]} for request in requests]


def test_batches_follow_the_budget_and_the_deadline() -> None:
    async def run() -> list[list[int]]:
        model = Model()
        batcher = Batcher(model, tokens=10, wait=0.05, queue=6)  # type: ignore[arg-type]
        batcher.start()

        async def ask(size: int) -> list[Any]:
            return (await batcher.answer(["x" * size], ["any"]))["tokens"]

        begun = time.monotonic()
        first = asyncio.create_task(ask(3))
        while not model.batches:
            await asyncio.sleep(0.005)
        assert time.monotonic() - begun >= 0.04  # it waited for more requests
        others = [asyncio.create_task(ask(size)) for size in (4, 6, 20, 2)]
        await asyncio.sleep(0.1)
        gone = asyncio.create_task(ask(1))
        await asyncio.sleep(0.02)
        gone.cancel()
        with pytest.raises(Overloaded):
            await asyncio.gather(*(batcher.answer(["x"], ["any"]) for _ in range(8)))
        model.free.set()
        assert await first == [3]
        assert [await one for one in others] == [[4], [6], [20], [2]]
        with pytest.raises(RuntimeError, match="unlucky"):
            await ask(13)
        assert await ask(5) == [5]  # the server goes on
        await batcher.stop()
        return model.batches

    batches = asyncio.run(run())
    assert batches[:3] == [[3], [4, 6], [20]] and batches[3][0] == 2
