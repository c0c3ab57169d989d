"""The tag of a word whose pieces have tags of their own (`tokens.subwords: all`).

A word has the tag of its first piece. With IOBES the last piece says whether the entity ends in
the word: first B-X and last I-X are B-X, first B-X and last E-X are S-X.
"""

from __future__ import annotations

import numpy as np

from fastmtl.config import TaskConfig
from fastmtl.config.types.tokens import split_tag


def word_scores(task: TaskConfig, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the scores of words from those of their first and last pieces.

    first, last, result: float32 [W, 1 + C], the tag's id and the probabilities of all tags. With
    IOBES the probability of B-X is that of B-X or S-X at the first piece, times that of B-X or I-X
    at the last piece among the tags of X, and likewise those of the other tags of X.
    """
    if task.tokens.subwords != "all" or task.tokens.scheme != "iobes":
        return first
    names = task.label_names or []
    tags = [split_tag(name) for name in names]
    tag_of = np.zeros((len(names), len(names)), dtype=np.int64)
    for one, (begin, kind) in enumerate(tags):
        for other, (end, other_kind) in enumerate(tags):
            ends = other_kind != kind or end in "ES"
            tag_of[one, other] = names.index(_tag(begin in "BS", ends, kind)) if kind else one
    result = first.copy()
    result[:, 0] = tag_of[first[:, 0].astype(np.int64), last[:, 0].astype(np.int64)]
    for kind in {kind for _, kind in tags if kind}:
        at = {prefix: 1 + names.index(f"{prefix}-{kind}") for prefix in "BIES"}
        goes_on, ends = (last[:, [at[a], at[b]]].sum(axis=1) for a, b in ("BI", "ES"))
        share = goes_on / np.maximum(goes_on + ends, np.finfo(np.float32).tiny)
        for begins, (a, b) in ((True, "BS"), (False, "IE")):
            p = first[:, [at[a], at[b]]].sum(axis=1)
            for closed, part in ((False, share), (True, 1 - share)):
                result[:, 1 + names.index(_tag(begins, closed, kind))] = p * part
    return np.where((first == last).all(axis=1, keepdims=True), first, result)


def _tag(begins: bool, ends: bool, kind: str) -> str:
    prefix = {(True, True): "S", (True, False): "B", (False, False): "I", (False, True): "E"}[begins, ends]
    return f"{prefix}-{kind}"
