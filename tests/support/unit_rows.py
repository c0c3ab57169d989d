"""Random tokenised rows of the task types whose head scores units."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmtl.data.tokenized import TokenizedDataset, UnitTable


def unit_rows(
    kind: str, rows: int, random: np.random.Generator, *, vocabulary: int, longest: int, tags: int = 4
) -> TokenizedDataset:
    """Return rows of a task type; `ranking` has its queries apart, as with `pairs: bi`.

    longest: most tokens of a sequence. tags: number of tags of a word. Each row has 1 to 4 texts.
    tokens: a word is one token, and one word of seven has no label.
    """
    texts = random.integers(1, 5, rows)
    sequences = {"choice": texts, "ranking": texts + 1}.get(kind)
    lengths = random.integers(4, longest + 1, rows if sequences is None else sequences.sum())
    offsets = {"tokens": lengths - 2, "span": lengths - 1}.get(kind, texts)
    units = UnitTable(
        _ends(offsets),
        {
            "tokens": np.concatenate([1 + np.arange(length - 2) for length in lengths]).astype(np.int32),
            "span": np.concatenate([np.arange(length - 1) for length in lengths]).astype(np.int32),
        }.get(kind),
        labelled=kind in ("tokens", "ranking"),
        query_first=kind == "ranking",
    )
    total = int(offsets.sum())
    tagged = random.integers(0, tags, total)
    tagged[::7] = -100
    labels: dict[str, np.ndarray] = {
        "tokens": tagged,
        "span": np.sort(random.integers(0, offsets[:, None], (rows, 2)), axis=1),
        "choice": random.integers(0, texts),
        "ranking": random.integers(0, 3, total).astype(np.float32),
    }
    return TokenizedDataset(
        tokens=random.integers(0, vocabulary, lengths.sum()).astype(np.int32),
        offsets=_ends(lengths),
        second_text=lengths.astype(np.int32),
        sequences_per_example=1,
        labels=labels[kind],
        ids=[str(row) for row in range(rows)],
        truncated=0,
        skipped=[],
        path=Path("random"),
        example_offsets=None if sequences is None else _ends(sequences),
        units=units,
        loss_terms=np.add.reduceat(tagged >= 0, units.offsets[:-1]).astype(np.int64) if kind == "tokens" else None,
    )


def _ends(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)])
