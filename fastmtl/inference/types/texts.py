"""Texts and rows in the report's tables of errors."""

from __future__ import annotations

import numpy as np

from fastmtl.errors import shortened
from fastmtl.inference.scores import Scores

ERRORS = 10  # rows of a table of errors
CHARACTERS = 240


def shown(text: str) -> str:
    """Return a text for a cell of the report: one short line, with escaped control characters."""
    return shortened(" ".join(text[: 4 * CHARACTERS].split()), CHARACTERS)


def text_columns(scores: Scores) -> list[str]:
    """Return the head of `text_cells`."""
    return ["row", "text"] if scores.rows.pair_texts is None else ["row", "text", "second text"]


def text_cells(scores: Scores, example: int) -> list[str]:
    """Return the id and the texts of an example's row."""
    rows, row = scores.rows, row_of(scores, example)
    texts = [rows.texts[row]] if rows.pair_texts is None else [rows.texts[row], rows.pair_texts[row]]
    return [shown(rows.ids[row]), *map(shown, texts)]


def row_of(scores: Scores, example: int) -> int:
    """Return the position in `scores.rows` of the row of an example."""
    of_examples = scores.dataset.row_of
    return example if of_examples is None else int(of_examples[example])


def worst(badness: np.ndarray, wrong: np.ndarray) -> list[int]:
    """Return the ERRORS positions with the greatest `badness` where `wrong` is true, worst first.

    badness: float [n]; wrong: bool [n]. Equal ones keep their order.
    """
    order = np.argsort(-badness, kind="stable")
    return order[wrong[order]][:ERRORS].tolist()
