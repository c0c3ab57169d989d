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
    """Raised for a request that finds the queue full; the message says of what."""


@dataclass(eq=False)
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
    batch of its own, which the predictor divides. A batch waits for more requests at most `wait`
    seconds after its first one came.
    queue, texts: the most requests that wait, and the most texts of all requests; a single request
    may have more. observe: called with (requests, tokens, seconds) of each batch.
    """

    predictor: PackedPredictor
    tokens: int
    wait: float
    queue: int
    texts: int
    observe: Callable[[int, int, float], None] = lambda requests, tokens, seconds: None
    _waiting: deque[Waiting] = field(default_factory=deque, init=False)
    _arrived: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _tokenizing: int = field(default=0, init=False)
    _texts: int = field(default=0, init=False)  # of the requests that are not answered

    def __post_init__(self) -> None:
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._runner = ThreadPoolExecutor(1, "predict")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer; call this inside of the event loop."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Answer the requests that wait, then end."""
        while self._texts:
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
        """Return {task: predictions}.

        A call that is cancelled leaves the queue. Raises UserError, Overloaded for a full queue,
        and the error of the model.
        """
        if self.length >= self.queue:
            raise Overloaded(f"{self.length} requests wait already")
        if self._texts and self._texts + len(texts) > self.texts:
            raise Overloaded(f"{self._texts} texts wait already")
        self._texts += len(texts)
        try:
            return await self._answer(texts, tasks)
        finally:
            self._texts -= len(texts)

    async def _answer(self, texts: Sequence[Any], tasks: Sequence[str]) -> dict[str, list[Any]]:
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
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            raise

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._waiting:
                self._arrived.clear()
                await self._arrived.wait()
            deadline = self._waiting[0].since + self.wait
            while self._waiting and self._total() < self.tokens and loop.time() < deadline:
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), deadline - loop.time())
                except asyncio.TimeoutError:
                    break
            batch = self._take()
            if batch:
                await self._predict(batch)

    async def _predict(self, batch: Sequence[Waiting]) -> None:
        """Answer the requests of a batch. After an error each runs alone, and fails alone."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            answers = await loop.run_in_executor(self._runner, self.predictor.predict, [w.request for w in batch])
        except Exception as error:  # the answer of the client; the server goes on
            if len(batch) > 1:
                for one in batch:
                    await self._predict([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        self.observe(len(batch), sum(one.request.tokens for one in batch), loop.time() - begun)
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)

    def _total(self) -> int:
        return sum(one.request.tokens for one in self._waiting)

    def _take(self) -> list[Waiting]:
        """Remove and return the oldest requests, up to the budget, at least one if any waits."""
        taken: list[Waiting] = []
        total = 0
        while self._waiting and (not taken or total + self._waiting[0].request.tokens <= self.tokens):
            taken.append(self._waiting.popleft())
            total += taken[-1].request.tokens
        return taken
