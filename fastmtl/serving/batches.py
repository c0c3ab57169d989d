"""Batches of requests: by a budget of tokens and a deadline."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastmtl.serving.packed import PackedPredictor, Request


class Overloaded(Exception):
    """Raised for a request that finds the queue full."""


@dataclass
class Waiting:
    """A request in the queue. since: the loop's time of its arrival, in seconds."""

    request: Request
    answer: asyncio.Future[dict[str, list[Any]]]
    since: float


@dataclass
class Batcher:
    """Answers requests of many clients by packed batches.

    One thread tokenises, another runs the model, so that both work at the same time. When the model
    is free, the batch takes the oldest requests up to `tokens` tokens; a request with more is a
    batch of its own. It waits for more requests at most `wait` seconds after the first one came.
    queue: the most requests that wait. observe: called with (requests, tokens, seconds) of each
    batch.
    """

    predictor: PackedPredictor
    tokens: int
    wait: float
    queue: int
    observe: Callable[[int, int, float], None] = lambda requests, tokens, seconds: None
    _waiting: deque[Waiting] = field(default_factory=deque, init=False)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _tokenizing: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._runner = ThreadPoolExecutor(1, "predict")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer; call this inside of the event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer the requests that wait, then end."""
        while self._waiting or self._tokenizing:
            await asyncio.sleep(0.01)
        if self._task is not None:
            self._task.cancel()
        self._encoder.shutdown()
        self._runner.shutdown()

    @property
    def length(self) -> int:
        """The number of requests that wait for the model or are being tokenised."""
        return len(self._waiting) + self._tokenizing

    async def answer(self, texts: Sequence[Any], tasks: Sequence[str]) -> dict[str, list[Any]]:
        """Return {task: predictions}. Raises UserError, or Overloaded for a full queue."""
        if self.length >= self.queue:
            raise Overloaded
        loop = asyncio.get_running_loop()
        since = loop.time()
        self._tokenizing += 1
        try:
            request = await loop.run_in_executor(self._encoder, self.predictor.encode, texts, tasks)
        finally:
            self._tokenizing -= 1
        waiting = Waiting(request, loop.create_future(), since)
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            deadline = self._waiting[0].since + self.wait
            while self._total() < self.tokens and loop.time() < deadline:
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), deadline - loop.time())
                except asyncio.TimeoutError:
                    break
            batch = [one for one in self._take() if not one.answer.done()]  # a client may have gone
            if not batch:
                continue
            begun = loop.time()
            try:
                answers = await loop.run_in_executor(self._runner, self.predictor.predict, [w.request for w in batch])
            except Exception as error:  # the answer of each client; the server goes on
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                continue
            self.observe(len(batch), sum(one.request.tokens for one in batch), loop.time() - begun)
            for one, answer in zip(batch, answers, strict=True):
                if not one.answer.done():
                    one.answer.set_result(answer)

    def _total(self) -> int:
        return sum(one.request.tokens for one in self._waiting)

    def _take(self) -> list[Waiting]:
        """Remove and return the oldest requests, up to the budget, at least one."""
        taken = [self._waiting.popleft()]
        total = taken[0].request.tokens
        while self._waiting and total + self._waiting[0].request.tokens <= self.tokens:
            taken.append(self._waiting.popleft())
            total += taken[-1].request.tokens
        return taken
