"""Micro-batches by tokens: every epoch has each row once, in whole steps, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.stream import BatchStream
from fastmtl.data.token_plan import filled, whole_steps
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError


def dataset(lengths: np.ndarray) -> TokenizedDataset:
    return TokenizedDataset(
        tokens=np.zeros(lengths.sum(), np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=lengths.astype(np.int32),
        sequences_per_example=1,
        labels=np.zeros(len(lengths), np.float32),
        ids=[str(row) for row in range(len(lengths))],
        truncated=0,
        skipped=[],
        path=Path("made"),
    )


def recipe(tasks: int, accumulation: int, **sampler: Any) -> Recipe:
    task = {"type": "binary", "data": {"train": "x"}}
    sections = {"sampler": sampler, "engine": {"accumulation": accumulation}, "train": {"epochs": 3}}
    return parse_recipe({"tasks": {f"t{k}": task for k in range(tasks)}, **sections}, "test")


def rows_of_epoch(streams: list[BatchStream], epoch: int, accumulation: int, budget: int | None) -> list[np.ndarray]:
    """Return the rows of each task on all ranks, sorted. Check steps, ranks and budget."""
    steps = list(zip(*(stream.epoch(epoch) for stream in streams), strict=True))
    assert len(steps) == streams[0].steps(epoch) > 0
    batches = [batch for groups in steps for group in groups for batch in group]
    assert len(batches) == len(steps) * len(streams) * accumulation
    assert min(sum(batch.counts) for batch in batches) > 0
    assert budget is None or max(batch.num_tokens for batch in batches) <= budget
    tasks = range(len(batches[0].counts))
    return [np.sort(np.concatenate([batch.example_ids[t].numpy() for batch in batches])) for t in tasks]


@given(
    st.sampled_from([("proportional", True), ("proportional", False), ("sequential", False)]),
    st.lists(st.integers(1, 90), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(16, 120),
    st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_every_row_once_in_an_epoch(
    sampler: tuple[str, bool], sizes: list[int], world: int, accumulation: int, budget: int, seed: int
) -> None:
    name, by_tokens = sampler
    random = np.random.default_rng(seed)
    data = [dataset(random.integers(1, 17, size)) for size in sizes]
    config = recipe(len(sizes), accumulation, name=name, batch_tokens=budget if by_tokens else None, batch_size=3)
    cells, total = world * accumulation, sum(sizes)
    try:
        streams = [BatchStream(data, config, rank, world) for rank in range(world)]
        found = [rows_of_epoch(streams, epoch, accumulation, budget if by_tokens else None) for epoch in range(3)]
    except UserError as error:
        assert "micro-batches of one step" in str(error)
        assert (total if name == "proportional" else min(sizes)) < cells
        return
    # Only rows that nearly fill a micro-batch each can wait for the next epoch, and fewer than a
    # step has.
    left_out = np.cumsum([total - sum(map(len, rows)) for rows in found])
    assert ((left_out >= 0) & (left_out < cells)).all()
    if not by_tokens or budget >= 64:  # four rows of 16 tokens: every full cell can be split
        assert not left_out.any()
    for t, size in enumerate(sizes):
        if not left_out.any():
            assert all((rows[t] == np.arange(size)).all() for rows in found)
        counts = np.bincount(np.concatenate([rows[t] for rows in found]), minlength=size)
        assert counts.max() - counts.min() <= 1


def test_rows_that_fill_no_step_open_the_next_epoch() -> None:
    data, config = [dataset(np.full(9, 16))], recipe(1, 4, batch_tokens=16)
    stream = BatchStream(data, config)
    seen = [rows_of_epoch([stream], epoch, 4, 16)[0] for epoch in range(4)]
    assert [len(rows) for rows in seen] == [8, 8, 8, 12]
    assert np.bincount(np.concatenate(seen)).tolist() == [4] * 9
    assert stream.notes(4) == [] and "leaves out 3 rows" in stream.notes(3)[0]
    alone = [batch.example_ids[0].tolist() for group in BatchStream(data, config).epoch(3, 1) for batch in group]
    whole = [batch.example_ids[0].tolist() for group in stream.epoch(3) for batch in group]
    assert alone == whole[4:]  # a process that resumes there has the same steps


@pytest.mark.parametrize("name", ["uniform", "sqrt", "annealed", "round_robin"])
def test_other_samplers_take_as_many_rows_as_the_files_hold(name: str) -> None:
    data = [dataset(np.random.default_rng(size).integers(1, 17, size)) for size in (61, 20)]
    streams = [BatchStream(data, recipe(2, 8, name=name, batch_tokens=40), rank, 3) for rank in range(3)]
    for epoch in range(3):
        assert sum(map(len, rows_of_epoch(streams, epoch, 8, 40))) == 81


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80), st.integers(1, 3), st.integers(1, 8), st.integers(16, 80))
@settings(max_examples=150, deadline=None)
def test_only_the_end_of_a_plan_is_made_anew(lengths: list[int], world: int, accumulation: int, budget: int) -> None:
    plan = filled(lengths, budget, world)
    whole = whole_steps(plan, lengths, accumulation, world)
    if len(plan) % accumulation == 0 and all(plan[-1]):
        assert whole == plan
    same = next((m for m, (one, other) in enumerate(zip(plan, whole, strict=False)) if one != other), len(whole))
    for parts in whole:
        assert len(parts) == world and all(parts)
        assert max(sum(lengths[index] for index in cell) for cell in parts) <= budget
    indexes = sorted(index for parts in whole for cell in parts for index in cell)
    assert indexes == list(range(len(indexes)))
    # No shorter end is possible: the steps after the first kept one have too few rows for their
    # cells.
    kept = same // accumulation * accumulation
    for begin in range(kept + accumulation, len(whole), accumulation):
        rows = sum(len(cell) for parts in plan[begin:] for cell in parts)
        assert rows < (len(whole) - begin) * world
    if len(indexes) < len(lengths):
        assert len(lengths) < (-(-len(plan) // accumulation)) * accumulation * world
