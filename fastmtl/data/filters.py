"""Which rows of a training file are used."""

from __future__ import annotations

import numpy as np

from fastmtl.data.readers import Rows


def drop_longest(rows: Rows, share: float) -> Rows:
    """Without the floor(share * n) rows of most words, those of both texts of a pair; of equal ones
    the last go first.

    "BERT: A Master of All Trades or Jack of None?", section 4.1, with 0.02: what bounds the memory
    of a batch of texts.
    """
    number = int(share * len(rows))
    if number == 0:
        return rows
    words = np.array([len(text.split()) for text in rows.texts])
    if rows.pair_texts is not None:
        words += [len(text.split()) for text in rows.pair_texts]
    kept = np.sort(np.argsort(words, kind="stable")[: len(rows) - number])
    return rows.take(kept.tolist(), f"{number} of {len(rows)} rows left out, the longest")
