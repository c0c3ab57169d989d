"""Masked batches: number, choice and replacement of tokens, and equal totals on all ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastmtl.config import Recipe, TaskConfig, parse_recipe
from fastmtl.data.masking import MaskedStream
from fastmtl.data.rows import Rows
from fastmtl.data.stream import BatchStream
from fastmtl.data.tokenized import TokenizedDataset, tokenize

WORDS = "the cat sat on a mat while it was red and the dog ran to it".split()


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(tiny_bert))


def recipe(**sections: Any) -> Recipe:
    task = {"type": "binary", "data": {"train": "x"}}
    tasks = {"one": task, "two": {**task, "pairs": "bi"}}
    return parse_recipe({"tasks": tasks, "sampler": {"batch_size": 6}, **sections}, "test")


@pytest.fixture(scope="module")
def data(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizedDataset]:
    draw = np.random.default_rng(0)

    def texts() -> list[str]:
        return [" ".join(draw.choice(WORDS, draw.integers(1, 30))) for _ in range(70)]

    def dataset(task: TaskConfig) -> TokenizedDataset:
        ids = [str(row) for row in range(70)]
        rows = Rows(Path("made"), ids, texts(), texts() if task.pairs == "bi" else None, np.zeros(70, np.float32))
        return tokenize(rows, tokenizer, task, 64, tmp_path_factory.mktemp("cache"))

    return [dataset(task) for task in recipe().tasks.values()]


def test_fifteen_in_a_hundred_tokens_of_each_sequence(
    data: list[TokenizedDataset], tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = BatchStream(data, recipe())
    kinds = {"masked": 0, "kept": 0, "other": 0}
    for epoch in range(3):
        for (before,), (masked,) in zip(
            plain.epoch(epoch), MaskedStream(data, recipe(), tokenizer).epoch(epoch), strict=True
        ):
            ids, now = before.input_ids.numpy(), masked.batch.input_ids.numpy()
            positions = masked.positions.numpy()
            assert (masked.targets.numpy() == ids[positions]).all()
            untouched = np.setdiff1d(np.arange(len(ids)), positions)
            assert (ids[untouched] == now[untouched]).all()
            assert not np.isin(ids[positions], tokenizer.all_special_ids).any()
            bounds = before.host.cu_seqlens
            for start, stop in zip(bounds, bounds[1:], strict=False):
                chosen = ((positions >= start) & (positions < stop)).sum()
                assert chosen == max(1, round(0.15 * (stop - start)))
            is_mask = now[positions] == tokenizer.mask_token_id
            kinds["masked"] += is_mask.sum()
            kinds["kept"] += (now[positions] == ids[positions]).sum()
            kinds["other"] += (~is_mask & (now[positions] != ids[positions])).sum()
    total = sum(kinds.values())
    shares = {name: number / total for name, number in kinds.items()}
    spread = 4 * (0.8 * 0.2 / total) ** 0.5
    assert shares["masked"] == pytest.approx(0.8, abs=spread)
    assert shares["kept"] == pytest.approx(0.1, abs=spread) and shares["other"] == pytest.approx(0.1, abs=spread)


def test_every_rank_knows_the_tokens_of_the_step_and_a_resumed_step_is_the_same(
    data: list[TokenizedDataset], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = recipe(engine={"accumulation": 2})
    steps = [list(MaskedStream(data, config, tokenizer, rank, 2).epoch(1)) for rank in range(2)]
    for groups in zip(*steps, strict=True):
        batches = [batch for group in groups for batch in group]
        assert {batch.group_counts for batch in batches} == {(sum(len(batch.targets) for batch in batches),)}
    rest = list(MaskedStream(data, config, tokenizer, 1, 2).epoch(1, start_step=2))
    assert len(rest) == len(steps[1]) - 2
    for group, again in zip(steps[1][2:], rest, strict=True):
        assert all((a.batch.input_ids == b.batch.input_ids).all() for a, b in zip(group, again, strict=True))
        assert all((a.positions == b.positions).all() for a, b in zip(group, again, strict=True))
    first, second = (next(MaskedStream(data, config, tokenizer).epoch(epoch)) for epoch in (0, 1))
    assert first[0].positions.tolist() != second[0].positions.tolist()
