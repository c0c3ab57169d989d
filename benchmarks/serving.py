"""Requests per second of `fastmtl serve` and of three transformers pipelines, over HTTP.

Each request asks for three tasks of one short text. Both servers run on this machine, one after the
other, with the same client; the rounds are interleaved.

    python benchmarks/serving.py --requests 1000 --clients 50 --rounds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fastmtl.measure.server_process import ServerProcess
from fastmtl.system.ports import free_port

TASKS = {
    "sentiment": {"type": "classification", "num_labels": 5, "pooling": "mean", "data": {}},
    "paraphrase": {"type": "binary", "pooling": "mean", "data": {}},
    "similarity": {"type": "regression", "range": [0, 5], "pooling": "mean", "data": {}},
}
# The other server: three text-classification pipelines in the same framework.
PIPELINES = """
import sys
import uvicorn
from fastapi import FastAPI
from transformers import pipeline
pipes = {name: pipeline("text-classification", model=f"{sys.argv[1]}/{name}", device="cpu", top_k=None)
         for name in ("sentiment", "paraphrase", "similarity")}
app = FastAPI()
@app.get("/health")
def health():
    return {"status": "ok"}
@app.post("/predict")
def predict(body: dict):
    return {"predictions": {name: pipe(body["texts"]) for name, pipe in pipes.items()}}
uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


def save_models(folder: Path) -> None:
    """Save a model of fastmtl without adapters, one with PALs, and three models of transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from fastmtl.config import Recipe
    from fastmtl.model.encoder.pretrained import encoder_directory, load_encoder, load_tokenizer
    from fastmtl.model.multitask import MultiTaskModel
    from fastmtl.model.saved_model import save_model

    torch.manual_seed(0)
    for name, adapter in (("shared", {"name": "none"}), ("pal", {"name": "pal", "size": 96})):
        recipe = Recipe.model_validate({"tasks": TASKS, "adapter": adapter})
        model = MultiTaskModel(recipe, load_encoder(recipe.encoder))
        save_model(folder / name, model, recipe, load_tokenizer(recipe.encoder))
    base = encoder_directory("minilm")
    for name, labels in (("sentiment", 5), ("paraphrase", 2), ("similarity", 1)):
        config = AutoConfig.from_pretrained(base, num_labels=labels)
        AutoModelForSequenceClassification.from_pretrained(base, config=config).save_pretrained(folder / name)
        load_tokenizer(recipe.encoder).save_pretrained(folder / name)


def texts(number: int) -> list[str]:
    """Return short sentences, 6 to 20 words, from the words of the demo corpus."""
    from fastmtl.data.corpus import demo_directory

    lines = (demo_directory() / "sentiment-train.csv").read_text(encoding="utf-8").splitlines()[1:]
    found = [line.split("\t")[2].strip('"') for line in lines]
    return [found[index % len(found)] for index in range(number)]


async def load(url: str, requests: int, clients: int) -> tuple[float, list[float]]:
    """Send the requests from `clients` connections; return requests/s and the seconds of each."""
    import httpx

    waiting = iter(texts(requests))
    seconds: list[float] = []

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120, verify=False) as http:  # certificates take 20 ms to load
            for text in waiting:
                begun = time.perf_counter()
                body = {"texts": [text]}
                answer = await http.post(f"{url}/predict", json=body)
                seconds.append(time.perf_counter() - begun)
                assert answer.status_code == 200 and len(answer.json()["predictions"]) == 3, answer.text

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return requests / (time.perf_counter() - begun), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmtl-serving-") as name:
        folder = Path(name)
        save_models(folder)
        (folder / "pipelines.py").write_text(PIPELINES)
        fastmtl = [sys.executable, "-c", "from fastmtl.cli import main; main()", "serve"]
        rates: dict[str, list[float]] = {}
        times: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            for kind in ("pipelines", "shared", "pal"):
                port = free_port()
                own = [*fastmtl, str(folder / kind), "--port", str(port)]
                other = [sys.executable, str(folder / "pipelines.py"), name, str(port)]
                with ServerProcess(other if kind == "pipelines" else own, port) as server:
                    asyncio.run(load(server.url, given.clients, given.clients))  # warm up
                    number = given.requests if kind != "pipelines" else max(given.clients, given.requests // 4)
                    rate, seconds = asyncio.run(load(server.url, number, given.clients))
                rates.setdefault(kind, []).append(rate)
                times.setdefault(kind, []).extend(seconds)
    base = statistics.median(rates["pipelines"])
    for kind, found in rates.items():
        middle = statistics.median(found)
        p50, p99 = np.percentile(times[kind], [50, 99])
        print(
            f"{kind:10} {middle:7.1f} requests/s ({min(found):.1f} to {max(found):.1f})  {middle / base:5.2f}x  "
            f"p50 {1e3 * p50:6.1f} ms  p99 {1e3 * p99:6.1f} ms"
        )
    print(json.dumps({"rates": rates, "cores": os.cpu_count()}))


if __name__ == "__main__":
    main()
