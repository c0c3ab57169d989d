"""Scores of a data set whose texts do not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset
from fastmtl.inference.scores import Scores


def scored(scores: np.ndarray, labels: np.ndarray | None = None, ids: list[str] | None = None) -> Scores:
    """Return scores [n, ...] of n rows; ids: theirs, by default 0, 1, ..."""
    n = len(scores)
    ids = ids or [str(row) for row in range(n)]
    rows = Rows(Path("made"), ids, [f"text {row}" for row in range(n)], None, labels)
    dataset = TokenizedDataset(
        tokens=np.zeros(n, np.int32),
        offsets=np.arange(n + 1),
        second_text=np.ones(n, np.int32),
        sequences_per_example=1,
        labels=labels,
        ids=ids,
        truncated=0,
        skipped=[],
        path=rows.path,
        rows=rows,
    )
    return Scores(dataset, scores)
