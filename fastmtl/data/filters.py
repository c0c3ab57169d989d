"""Filters of the rows of a training file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmtl.data.rows import Rows


def drop_longest(rows: Rows, share: float) -> Rows:
    """Return the rows without the floor(share * n) rows that have the most words.

    n: the number of rows. The words of both texts of a pair count, and those of all
    candidates. Among rows with equally many
    words the last are dropped. Dropping the longest rows bounds the memory of a batch. Source:
    "BERT: A Master of All Trades or Jack of None?", section 4.1, with the share 0.02.
    """
    number = int(share * len(rows))
    if number == 0:
        return rows
    words = _words(rows.texts)
    if rows.items is not None:
        of_items = np.concatenate([[0], np.cumsum(_words(rows.items.texts))])
        words += np.diff(of_items[rows.items.offsets])
    if rows.pair_texts is not None:
        words += _words(rows.pair_texts)
    kept = np.sort(np.argsort(words, kind="stable")[: len(rows) - number])
    return rows.take(kept, f"{number} of {len(rows)} rows left out, the longest")


def _words(texts: Sequence[str]) -> np.ndarray:
    return np.fromiter((len(text.split()) for text in texts), np.int64, len(texts))
