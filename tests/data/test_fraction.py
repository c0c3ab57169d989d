"""A share of the training rows: reproducible, nested, and without dev rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmtl.config import DataConfig, TaskConfig
from fastmtl.data.readers import read_rows


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    for split in ("train", "dev"):
        lines = ["id\ta\tb\tlabel", *(f"r{i}\tone {i}\ttwo {i}\t{i % 2}" for i in range(41))]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    columns = {"id": "id", "text": "a", "text_pair": "b", "label": "label"}
    return TaskConfig.model_validate(
        {"type": "binary", "data": {"train": "train.tsv", "dev": "dev.tsv", "columns": columns}}
    )


def test_rows_stay_whole_and_in_order(task: TaskConfig, tmp_path: Path) -> None:
    rows = read_rows(task, DataConfig(dir=str(tmp_path), fraction=0.5), "train")
    assert len(rows) == 20
    numbers = [int(row_id[1:]) for row_id in rows.ids]
    assert numbers == sorted(numbers) and numbers != list(range(20))
    assert rows.texts == [f"one {i}" for i in numbers]
    assert rows.pair_texts == [f"two {i}" for i in numbers]
    assert rows.labels is not None and np.array_equal(rows.labels, [i % 2 for i in numbers])


def test_a_smaller_share_is_part_of_a_larger_one(task: TaskConfig, tmp_path: Path) -> None:
    shares = [
        set(read_rows(task, DataConfig(dir=str(tmp_path), fraction=fraction), "train").ids)
        for fraction in (0.001, 0.2, 0.6, 1.0)
    ]
    assert [len(share) for share in shares] == [1, 8, 25, 41]
    assert all(small < large for small, large in zip(shares, shares[1:], strict=False))


def test_limit_counts_rows_of_the_share_and_dev_is_whole(task: TaskConfig, tmp_path: Path) -> None:
    data = DataConfig(dir=str(tmp_path), fraction=0.5)
    few = task.model_copy(update={"data": task.data.model_copy(update={"limit": 7})})
    assert read_rows(few, data, "train").ids == read_rows(task, data, "train").ids[:7]
    assert len(read_rows(few, data, "dev")) == 41
