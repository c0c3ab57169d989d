"""10,000 requests by 50 clients and 1,000 random bodies for `fastmtl serve`, then SIGTERM.

No request may be lost, the memory stays flat, no answer is a 500, and the requests that wait at
SIGTERM are answered. The bodies are made by schemathesis, valid and invalid ones.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from saved_models import SENTENCES, save_random_model
from tiny_bert import save_tiny_bert

from fastmtl.measure.server_process import ServerProcess
from fastmtl.system.ports import free_port

TASKS: dict[str, dict[str, Any]] = {
    "tone": {"type": "classification", "num_labels": 3, "pooling": "mean", "data": {}},
    "kind": {"type": "binary", "data": {}},
    "tags": {"type": "tokens", "label_names": ["O", "X"], "data": {}},
}
FLAT = 24  # MiB that the memory may grow after the first thousand requests


def resident(process: int) -> float:
    """Return the resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def start(model: Path) -> ServerProcess:
    """Start `fastmtl serve` on a free port."""
    port = free_port()
    command = [sys.executable, "-c", "from fastmtl.cli import main; main()", "serve", str(model)]
    return ServerProcess([*command, "--port", str(port)], port)


async def load(server: ServerProcess, requests: int, clients: int) -> list[float]:
    """Send requests from many clients and check every answer; return the seconds of each."""
    waiting = iter(range(requests))
    seconds: list[float] = []
    tasks = list(TASKS)

    async def client() -> None:
        async with httpx.AsyncClient(timeout=60, verify=False) as http:  # certificates take 20 ms to load
            for number in waiting:
                wanted = tasks[: 1 + number % 3]
                texts = [SENTENCES[(number + shift) % len(SENTENCES)] for shift in range(1 + number % 4)]
                begun = time.perf_counter()
                answer = await http.post(f"{server.url}/predict", json={"texts": texts, "tasks": wanted})
                seconds.append(time.perf_counter() - begun)
                found = answer.json()["predictions"]
                assert answer.status_code == 200 and list(found) == wanted, answer.text
                assert all(len(one) == len(texts) for one in found.values()), answer.text

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds


async def stop_under_load(server: ServerProcess, clients: int) -> tuple[int, int]:
    """Send SIGTERM while clients send; return the numbers of answers and of closed connections."""
    answered = refused = 0

    async def client() -> None:
        nonlocal answered, refused
        async with httpx.AsyncClient(timeout=60, verify=False) as http:  # certificates take 20 ms to load
            while True:
                try:
                    answer = await http.post(f"{server.url}/predict", json={"texts": SENTENCES})
                # The server takes no new connection, or has closed this one while it was idle.
                except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
                    refused += 1
                    return
                assert answer.status_code == 200, answer.text
                answered += 1
                if answer.headers.get("connection") == "close":
                    return

    running = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.sleep(1)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.gather(*running)
    return answered, refused


def fuzz(server: ServerProcess, bodies: int) -> int:
    """Send bodies of schemathesis; return their number. Fails after an answer of 500 or more."""
    program = shutil.which("schemathesis")
    if program is None:
        raise SystemExit("the part needs schemathesis: pip install 'fastmtl-torch[soak]'")
    words = [program, "run", f"{server.url}/openapi.json", "--include-path", "/predict", "--phases", "fuzzing"]
    words += ["--max-examples", str(bodies), "--checks", "not_a_server_error", "--mode", "all", "--no-color"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    metrics = httpx.get(f"{server.url}/metrics").text
    statuses = [line for line in metrics.splitlines() if line.startswith('fastmtl_requests_total{path="/predict"')]
    assert not any('status="5' in line and 'status="503"' not in line for line in statuses), statuses
    return sum(int(float(line.split()[-1])) for line in statuses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--bodies", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmtl-serving-") as name:
        folder = Path(name)
        model = save_random_model(folder / "model", save_tiny_bert(folder / "bert"), TASKS, adapter={"name": "none"})
        with start(model) as server:
            asyncio.run(load(server, min(1000, given.requests), given.clients))
            before = resident(server.process.pid)
            begun = time.perf_counter()
            seconds = asyncio.run(load(server, given.requests, given.clients))
            rate = given.requests / (time.perf_counter() - begun)
            grown = resident(server.process.pid) - before
            assert len(seconds) == given.requests, "requests were lost"
            assert grown < FLAT, f"the memory grew by {grown:.1f} MiB"
            sent = fuzz(server, given.bodies) - given.requests - min(1000, given.requests)
            answered, refused = asyncio.run(stop_under_load(server, given.clients))
            assert answered and server.process.wait(60) in (0, -signal.SIGTERM)
        p50, p99 = 1e3 * np.percentile(seconds, [50, 99])
    print(
        json.dumps(
            {
                "requests": given.requests,
                "lost": 0,
                "requests per second": round(rate),
                "p50 ms": round(p50, 1),
                "p99 ms": round(p99, 1),
                "memory grew by MiB": round(grown, 1),
                "random bodies": sent,
                "answers while stopping": answered,
            }
        )
    )


if __name__ == "__main__":
    main()
