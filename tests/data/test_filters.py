"""The longest rows are removed, the others keep their order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastmtl.data.filters import drop_longest
from fastmtl.data.rows import Rows


def rows(words: list[int], pair_words: list[int] | None = None) -> Rows:
    def texts(lengths: list[int]) -> list[str]:
        return [" ".join(["w"] * length) for length in lengths]

    ids = [str(row) for row in range(len(words))]
    pairs = None if pair_words is None else texts(pair_words)
    return Rows(Path("made"), ids, texts(words), pairs, np.arange(len(words), dtype=np.float32))


def test_the_longest_share_is_left_out() -> None:
    random = np.random.default_rng(0)
    words = random.permutation(100) + 1
    kept = drop_longest(rows(words.tolist()), 0.02)
    expected = [str(row) for row in range(100) if words[row] <= 98]
    assert kept.ids == expected and kept.labels.tolist() == [float(row) for row in expected]
    assert kept.notes == ["2 of 100 rows left out, the longest"]


def test_a_pair_counts_both_texts() -> None:
    kept = drop_longest(rows([5, 1, 4, 3], [1, 6, 1, 1]), 0.25)
    assert kept.ids == ["0", "2", "3"]  # 6, 7, 5, 4 words
    assert kept.pair_texts == ["w", "w", "w"]


def test_equal_lengths_and_small_shares() -> None:
    assert drop_longest(rows([2, 2, 2, 2]), 0.5).ids == ["0", "1"]
    assert drop_longest(rows([9, 1, 1]), 0.3).ids == ["0", "1", "2"]
