"""The best answer to each question from the logits of its windows.

A candidate is a pair of context tokens of one window with start <= end and at most `max_answer`
tokens; its score is the sum of the start's and the end's logit. No answer has the score of the
first token as start and end, and of several windows the least. So does Hugging Face's
transformers in its example run_qa.py. Probabilities are the softmax over all candidates of all
windows of a question, and over no answer where a question may have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spans:
    """The best candidates of R questions.

    rows: int64 [R], the question of each, ascending. spans: int64 [R, 2], first character and end
    in the context; (0, 0) if the context has no token. score, no_answer: float64 [R], the scores of
    the candidate and of no answer. total: the logarithm of the sum of exp(score) over all
    candidates.
    """

    rows: np.ndarray
    spans: np.ndarray
    score: np.ndarray
    no_answer: np.ndarray
    total: np.ndarray


def best_spans(logits: np.ndarray, offsets: np.ndarray, spans: np.ndarray, row_of: np.ndarray, longest: int) -> Spans:
    """Return the best candidates of all questions that have windows.

    logits: [U, 2]. offsets: int64 [n + 1], the units of each window. spans: int [U, 2] as in
    UnitTable, negative for tokens outside of the context. row_of: int64 [n], the question of each
    window. longest: the most tokens of an answer.
    """
    begins, counts = offsets[:-1], np.diff(offsets)
    inside = spans[:, 0] >= 0
    start, end = (np.where(inside, logits[:, column].astype(np.float64), -np.inf) for column in (0, 1))
    stop = np.repeat(offsets[1:], counts)

    def candidates() -> Iterator[tuple[int, np.ndarray]]:
        """Yield the scores of the candidates with 1, 2, ... tokens, by their first token."""
        for more in range(min(longest, int(counts.max(initial=0)))):
            # A window's context has no gaps, so a candidate is in it if both ends are.
            within = np.arange(len(start) - more) + more < stop[: len(start) - more]
            yield more, np.where(within, start[: len(start) - more] + end[more:], -np.inf)

    best, length = np.full(len(start), -np.inf), np.zeros(len(start), np.int64)
    for more, score in candidates():
        better = np.flatnonzero(score > best[: len(score)])
        best[better], length[better] = score[better], more
    score = np.maximum.reduceat(best, begins)  # of each window
    peak = np.repeat(np.where(np.isfinite(score), score, 0.0), counts)
    sums = np.zeros(len(start))
    for _, each in candidates():
        sums[: len(each)] += np.exp(each - peak[: len(each)])
    with np.errstate(divide="ignore"):  # a context without tokens has the sum 0
        total = np.log(np.add.reduceat(sums, begins)) + peak[begins]

    first = np.minimum.reduceat(np.where(best == np.repeat(score, counts), np.arange(len(best)), len(best)), begins)
    order = np.lexsort([np.arange(len(row_of)), -score, row_of])
    rows, place = np.unique(row_of[order], return_index=True)
    chosen = order[place]
    units = np.stack([first[chosen], first[chosen] + length[first[chosen]]])
    found = np.stack([spans[units[0], 0], spans[units[1], 1]], axis=1).astype(np.int64)
    found[~np.isfinite(score[chosen])] = 0
    nothing = logits[begins].astype(np.float64).sum(axis=1)
    return Spans(
        rows=rows,
        spans=found,
        score=score[chosen],
        no_answer=np.minimum.reduceat(nothing[order], place),
        total=np.logaddexp.reduceat(total[order], place),
    )
