"""Packing, samplers and the batch stream: no row lost or repeated, equal draws on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtl.config import Recipe, parse_recipe
from fastmtl.data.packed_batch import PackedBatch
from fastmtl.data.packing import pack
from fastmtl.data.samplers import SAMPLERS, annealed
from fastmtl.data.schedule import BY_BATCH_SIZE
from fastmtl.data.stream import BatchStream, evaluation_batches
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.errors import UserError


def dataset(rows: int, seed: int = 0, per_example: int = 1, longest: int = 20) -> TokenizedDataset:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, rows * per_example)
    return TokenizedDataset(
        tokens=random.integers(0, 1000, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second_text=(lengths // 2).astype(np.int32),
        sequences_per_example=per_example,
        labels=np.arange(rows, dtype=np.float32),
        ids=[str(row) for row in range(rows)],
        truncated=0,
        skipped=[],
        path=Path("made"),
    )


def recipe(tasks: int, **sections: Any) -> Recipe:
    task = {"type": "binary", "data": {"train": "x"}}
    return parse_recipe({"tasks": {f"t{k}": task for k in range(tasks)}, **sections}, "test")


def rows_of(batches: list[PackedBatch], task: int) -> list[int]:
    return [row for batch in batches for row in batch.example_ids[task].tolist()]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6, unique=True), min_size=1, max_size=4),
    st.lists(st.sampled_from([1, 2]), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_token(rows: list[list[int]], per_example: list[int]) -> None:
    data = [dataset(10, seed, per) for seed, per in zip(range(len(rows)), per_example, strict=False)]
    batch = pack([(one, np.array(chosen, dtype=np.int64)) for one, chosen in zip(data, rows, strict=True)])
    assert batch.cu_seqlens.tolist() == list(batch.host.cu_seqlens)
    sequence = 0
    for t, (one, chosen) in enumerate(zip(data, rows, strict=True)):
        assert batch.host.seq_offsets[t] == sequence
        for number, row in enumerate(chosen):
            for k in range(one.sequences_per_example):
                source = row * one.sequences_per_example + k
                start, stop = batch.host.cu_seqlens[sequence : sequence + 2]
                expected = one.tokens[one.offsets[source] : one.offsets[source + 1]]
                assert batch.input_ids[start:stop].tolist() == expected.tolist()
                assert batch.position_ids[start:stop].tolist() == list(range(len(expected)))
                types = [int(p >= one.second_text[source]) for p in range(len(expected))]
                assert batch.token_type_ids[start:stop].tolist() == types
                if one.sequences_per_example == 2:
                    pairs = batch.pairs[t]
                    assert pairs is not None and pairs[number, k] == sequence
                sequence += 1
        assert batch.host.token_offsets[t + 1] == batch.host.cu_seqlens[sequence]
    alone = batch.task(0)
    assert alone.input_ids.tolist() == batch.input_ids[: batch.host.token_offsets[1]].tolist()
    assert alone.counts == (len(rows[0]), *[0] * (len(rows) - 1))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_proportional_takes_every_row_once(world: int, accumulation: int) -> None:
    data = [dataset(101, 1), dataset(37, 2), dataset(64, 3)]
    config = recipe(3, sampler={"batch_size": 4}, engine={"accumulation": accumulation})
    streams = [BatchStream(data, config, rank, world) for rank in range(world)]
    steps = [list(stream.epoch(0)) for stream in streams]
    assert all(len(s) == streams[0].steps_per_epoch for s in steps)
    for t, one in enumerate(data):
        seen = [row for rank_steps in steps for group in rank_steps for row in rows_of(group, t)]
        assert sorted(seen) == list(range(len(one)))
    for groups in zip(*steps, strict=True):
        batches = [batch for group in groups for batch in group]
        assert all(batch.num_tokens > 0 for batch in batches)
        totals = tuple(sum(batch.counts[t] for batch in batches) for t in range(3))
        assert all(batch.group_counts == totals for batch in batches)


def test_epochs_differ_and_seeds_repeat() -> None:
    data, config = [dataset(50, 1), dataset(50, 2)], recipe(2, sampler={"batch_size": 5})
    one, again = (list(BatchStream(data, config).epoch(0)) for _ in range(2))
    assert [rows_of(g, 0) for g in one] == [rows_of(g, 0) for g in again]
    assert [rows_of(g, 0) for g in one] != [rows_of(g, 0) for g in BatchStream(data, config).epoch(1)]


def test_round_robin_takes_the_batch_sizes_and_cycles_small_files() -> None:
    data = [dataset(100, 1), dataset(7, 2)]
    config = recipe(2, sampler={"name": "round_robin", "batch_size": {"t0": 6, "t1": 3}})
    stream = BatchStream(data, config)
    batches = [group[0] for epoch in range(2) for group in stream.epoch(epoch)]
    assert {batch.counts for batch in batches} == {(6, 3)}
    small = rows_of(batches, 1)
    for start in range(0, len(small) - 7, 7):  # permutations continue across epochs
        assert sorted(small[start : start + 3]) != sorted(set()) and len(set(small)) == 7
    counts = np.bincount(small, minlength=7)
    assert counts.max() - counts.min() <= 1


def test_sequential_takes_every_row_once_in_the_order_of_tasks() -> None:
    data = [dataset(50, 1), dataset(23, 2)]
    config = recipe(2, sampler={"name": "sequential", "batch_size": {"t0": 4, "t1": 3}}, engine={"accumulation": 2})
    streams = [BatchStream(data, config, rank, 2) for rank in range(2)]
    steps = [
        [batch for groups in each for batch in groups] for each in zip(*(s.epoch(0) for s in streams), strict=True)
    ]
    present = [tuple(sum(batch.counts[t] for batch in step) for t in range(2)) for step in steps]
    assert [t for t in range(2) for counts in present if counts[t]] == [0] * 4 + [1] * 2
    assert all(min(counts) == 0 for counts in present)
    assert all(batch.group_counts == counts for step, counts in zip(steps, present, strict=True) for batch in step)
    for t, one in enumerate(data):
        assert sorted(row for step in steps for row in rows_of(step, t)) == list(range(len(one)))


def test_a_subsample_is_another_one_each_epoch() -> None:
    data = [dataset(60, 1), dataset(11, 2)]
    stream = BatchStream(data, recipe(2, sampler={"batch_size": 4, "subsample": {"t0": 20}}, train={"epochs": 3}))
    drawn = [[row for group in stream.epoch(epoch) for row in rows_of(group, 0)] for epoch in range(3)]
    assert [len(rows) for rows in drawn] == [20] * 3
    assert sorted(sum(drawn, [])) == list(range(60))  # no row repeats before all have been drawn


def test_compromise_draws_whole_batches_on_every_rank() -> None:
    data = [dataset(200, 1), dataset(40, 2)]
    sampler = {"name": "compromise", "batch_size": {"t0": 2, "t1": 3}, "batches_per_step": 5}
    config = recipe(2, sampler=sampler, engine={"accumulation": 2})
    streams = [BatchStream(data, config, rank, 2) for rank in range(2)]
    for step, groups in enumerate(zip(*(stream.epoch(0) for stream in streams), strict=True)):
        counts = np.array([batch.counts for group in groups for batch in group]).sum(0)
        batches = counts / [4, 6]
        assert batches.sum() == 5 and (batches >= 1).all()
        weights = streams[1].loss_weights(0, step)
        assert weights == streams[0].loss_weights(0, step)
        np.testing.assert_allclose(list(weights.values()), batches / np.array([200, 40]) ** 0.2)


def test_annealed_shares() -> None:
    sizes = np.array([1000, 10])
    for epoch, exponent in ((0, 1.0), (1, 0.6), (2, 0.2)):
        np.testing.assert_allclose(annealed(sizes, sizes, epoch, 3), sizes.astype(float) ** exponent)
    np.testing.assert_allclose(annealed(sizes, sizes, 0, 1), sizes)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("tokens", [None, 64])
def test_resuming_in_mid_epoch_repeats_the_draw(name: str, tokens: int | None) -> None:
    if tokens and name in BY_BATCH_SIZE:
        pytest.skip("refused, see test_schedule.py")
    data = [dataset(90, 1), dataset(40, 2)]
    sampler: dict[str, Any] = {"name": name, "batch_size": 4, "batch_tokens": tokens}
    if name == "compromise":
        sampler["batches_per_step"] = 5
    config = recipe(2, sampler=sampler, train={"epochs": 3}, engine={"accumulation": 2})
    whole = list(BatchStream(data, config, 1, 2).epoch(1))
    rest = list(BatchStream(data, config, 1, 2).epoch(1, start_step=2))
    assert len(rest) == len(whole) - 2
    for group, same in zip(whole[2:], rest, strict=True):
        assert all((a.input_ids == b.input_ids).all() for a, b in zip(group, same, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_token_budget_is_kept(world: int) -> None:
    data = [dataset(300, 1), dataset(100, 2)]
    config = recipe(2, sampler={"batch_tokens": 80})
    for rank in range(world):
        sizes = [batch.num_tokens for group in BatchStream(data, config, rank, world).epoch(0) for batch in group]
        assert max(sizes) <= 80 and min(sizes) > 0
        assert np.mean(sizes) > 60


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_takes_every_row_once(world: int) -> None:
    one = dataset(57, 4, per_example=2)
    parts = [list(evaluation_batches(one, 1, 3, 90, rank, world)) for rank in range(world)]
    batches = [batch for part in parts for batch in part]
    assert sorted(rows_of(batches, 1)) == list(range(57))
    assert max(batch.num_tokens for batch in batches) <= 90


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"name": "proportionl"}, "Did you mean 'proportional'?"),
        ({"batch_size": {"t0": 4}}, "sampler.batch_size has no number for t1"),
        ({"batch_size": {"t0": 4, "t1": 0}}, "sampler.batch_size of t1 is 0"),
        ({"batch_size": {"t0": 4, "t1": 4, "t2": 1}}, "unknown task in sampler.batch_size 't2'"),
        ({"batch_tokens": 16}, "sampler.batch_tokens=16 is less than"),
        ({"batch_tokens": 80, "steps_per_epoch": 3}, "goes with sampler.batch_size"),
    ],
)
def test_settings_that_do_not_fit(sampler: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        BatchStream([dataset(20, 1), dataset(20, 2)], recipe(2, sampler=sampler))
    assert message in str(error.value)


def test_too_few_rows_for_the_ranks() -> None:
    with pytest.raises(UserError, match="lower engine.accumulation or the number of processes"):
        BatchStream([dataset(3, 1)], recipe(1, engine={"accumulation": 4}), 0, 2)
