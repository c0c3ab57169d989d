"""Prefetched batches: the same order, at most as many as requested, and no remaining thread."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmtl.config import parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.prefetch import ahead
from fastmtl.data.stream import BatchStream
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "fastmtl-data"]


def stream(**sampler: Any) -> BatchStream:
    task = {"type": "binary", "data": {"train": "x"}}
    values: dict[str, Any] = {"tasks": {"a": task, "b": task}, "sampler": {"batch_size": 4, **sampler}}
    recipe = parse_recipe({**values, "train": {"epochs": 3}, "engine": {"accumulation": 2}}, "test")
    return BatchStream([dataset(90), dataset(41)], recipe)


def dataset(rows: int) -> TokenizedDataset:
    lengths = np.random.default_rng(rows).integers(1, 20, rows)
    return TokenizedDataset(
        tokens=np.arange(lengths.sum(), dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=lengths // 2,
        sequences_per_example=1,
        labels=np.arange(rows, dtype=np.float32),
        ids=[str(row) for row in range(rows)],
        truncated=0,
        skipped=[],
        path=Path("made"),
    )


def contents(batch: PackedBatch) -> list[Any]:
    found: list[Any] = [batch.host, batch.group_counts]
    batch.map(lambda tensor: found.append((tensor.dtype, tensor.tolist())) or tensor)
    return found


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("tokens", [None, 60])
def test_a_run_of_epochs_is_the_same_however_far_ahead(depth: int, tokens: int | None) -> None:
    source = stream(batch_tokens=tokens)
    expected = [step for epoch in range(1, 3) for step in source.epoch(epoch, 2 if epoch == 1 else 0)]
    with ahead(stream(batch_tokens=tokens).rest(3, 1, 2), depth, CPU) as steps:
        found = list(steps)
        assert next(steps, None) is None
    assert len(found) == source.steps(1) - 2 + source.steps(2) == len(expected)
    for made, wanted in zip(found, expected, strict=True):
        assert list(map(contents, made)) == list(map(contents, wanted))


def test_no_more_than_the_depth_is_ahead() -> None:
    made, changed = 0, threading.Condition()

    def source() -> Iterator[list[PackedBatch]]:
        nonlocal made
        while True:
            with changed:
                made += 1
                changed.notify()
            yield []

    with ahead(source(), 3, CPU) as steps:
        for taken in range(6):
            with changed:
                assert changed.wait_for(lambda: made == taken + 3, timeout=10)  # noqa: B023 - it is called here
                assert not changed.wait_for(lambda: made > taken + 3, timeout=0.02)  # noqa: B023
            next(steps)


def test_an_error_comes_in_its_place() -> None:
    def source() -> Iterator[list[PackedBatch]]:
        yield []
        yield []
        raise UserError("row 7 of kind is broken")

    with ahead(source(), 2, CPU) as steps:
        assert [next(steps), next(steps)] == [[], []]
        with pytest.raises(UserError, match="row 7 of kind is broken"):
            next(steps)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_early_ends_the_thread(taken: int) -> None:
    ended = threading.Event()

    def source() -> Generator[list[PackedBatch], None, None]:
        try:
            yield from itertools.repeat([])
        finally:
            ended.set()

    with closing(source()) as endless:
        with pytest.raises(KeyError), ahead(endless, 2, CPU) as steps:
            for _ in itertools.islice(steps, taken):
                pass
            raise KeyError
        assert not ended.is_set()  # no thread runs it, so it can be closed here
    assert ended.is_set()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_are_whole_when_they_are_taken() -> None:
    """A busy device would expose a missing wait, or memory that is reused too early."""
    device, heavy = torch.device("cuda", 0), torch.randn(4096, 4096, device="cuda")
    kept = []
    with ahead(stream().rest(3, 0, 0), 2, device) as steps:
        for micro_batches in steps:
            heavy = torch.tanh(heavy @ heavy)
            kept.append([batch.map(torch.clone) for batch in micro_batches])
    for made, wanted in zip(kept, stream().rest(3, 0, 0), strict=True):
        assert [contents(batch) for batch in made] == [contents(batch) for batch in wanted]
