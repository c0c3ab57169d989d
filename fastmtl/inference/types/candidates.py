"""Rows with several texts each, of the task types choice and ranking."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastmtl.data.candidates import items_of
from fastmtl.data.rows import Rows
from fastmtl.errors import UserError, quoted
from fastmtl.inference.metrics import check_finite
from fastmtl.inference.scores import Scores
from fastmtl.inference.types.single import check_unicode
from fastmtl.inference.types.spec import Table


def check_scores(scores: Scores) -> np.ndarray:
    """Return the labels. Raises UserError if there are none, or if a score is not finite."""
    if scores.labels is None:
        raise UserError(f"{scores.dataset.path}: there are no labels to evaluate against")
    check_finite(scores.scores)
    return scores.labels


def given_rows(texts: Sequence[Any], *, least: int, alone: bool) -> Rows:
    """Return the rows of what users give to `Predictor.predict`.

    texts: pairs (text, [candidates]), or with `alone` also lists of candidates. least: the least
    number of candidates. Raises UserError for anything else.
    """
    if isinstance(texts, str):
        raise UserError("predict takes a list of rows, not one string: write [(text, [candidates])]")
    paired = not alone or _is_pair(texts[0])
    wanted = "a pair (text, [candidates])" if paired else "a list of texts"
    queries, candidates = [], []
    for position, row in enumerate(texts):
        if not (_is_pair(row) if paired else _are_texts(row)):
            first = " like the first one" if alone else ""
            raise UserError(f"texts[{position}] is not {wanted}{first}: {quoted(row)}")
        query, own = row if paired else ("", row)
        if len(own) < least:
            raise UserError(
                f"texts[{position}] has {len(own)} candidates, and the least number is {least}: {quoted(row)}"
            )
        for text in (query, *own):
            check_unicode(position, text)
        queries.append(query)
        candidates.append(list(own))
    return Rows(
        path=Path("texts"),
        ids=[str(position) for position in range(len(texts))],
        texts=queries,
        pair_texts=None,
        labels=None,
        items=items_of(candidates, labelled=False),
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _is_pair(row: Any) -> bool:
    return isinstance(row, list | tuple) and len(row) == 2 and isinstance(row[0], str) and _are_texts(row[1])


def counted(scores: Scores) -> Iterator[tuple[str, int, str]]:
    """Yield the id of its row, its number in the row and the text of each candidate."""
    items = scores.rows.items
    assert items is not None
    for row, row_id in enumerate(scores.dataset.ids):
        for number, text in enumerate(items.of(row)):
            yield row_id, number, text


def table_of_sizes(name: str, sizes: np.ndarray, values: Mapping[str, np.ndarray]) -> Table:
    """Return a table of mean values by number of candidates, in at most five ranges of numbers.

    name: what the candidates are, for the head. sizes: int64 [n]. values: {metric: float [n]}.
    """
    different = np.unique(sizes)
    bounds = [(part[0], part[-1]) for part in np.array_split(different, min(5, len(different)))]
    rows = []
    for low, high in bounds:
        here = (low <= sizes) & (sizes <= high)
        means = [f"{value[here].mean():.4f}" for value in values.values()]
        rows.append([f"{low}" if low == high else f"{low} to {high}", str(int(here.sum())), *means])
    return Table([name, "rows", *values], rows)
