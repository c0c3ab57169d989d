"""The scores of a model for the rows of a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastmtl.data.rows import Rows
from fastmtl.data.tokenized import TokenizedDataset


@dataclass(frozen=True)
class Scores:
    """The scores of a task's data set, in the order of its examples.

    scores: output of `MultiTaskModel.predict`, float32. One per example: [n, classes] for
    classification, [n, C] for multilabel, else [n]. One per unit of the examples (types tokens,
    span, choice and ranking): [U] or [U, ...]; example i has those from offsets[i] on.
    labels: those of the data set, one per example or unit; None if it has none.
    """

    dataset: TokenizedDataset
    scores: np.ndarray

    @property
    def labels(self) -> np.ndarray | None:
        return self.dataset.labels

    @property
    def rows(self) -> Rows:
        """The rows of the file, which a data set for evaluation has."""
        assert self.dataset.rows is not None
        return self.dataset.rows

    @property
    def offsets(self) -> np.ndarray:
        """int64 [n + 1]; example i has the units offsets[i] to offsets[i + 1] - 1."""
        assert self.dataset.units is not None
        return self.dataset.units.offsets
