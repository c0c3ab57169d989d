"""The numbers of a diagnosis: cosines, norms and conflicts by step, layer and pair of tasks.

Shapes: S steps, L layers and their sum as the last one, T tasks, K = T (T - 1) / 2 pairs of tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

ALL = "all layers"


class Measured:
    """Numbers of the measured steps.

    gramians: float64 [S, L - 1, T, T], the Gramians of the layers.

    layers: L names, the last of which is `ALL`. pairs: K pairs of tasks' numbers. steps: S numbers.
    norms: [S, L, T]. cosines: [S, L, K], NaN where a task has no gradient. left_out: number of
    steps whose gradients were not finite, of which there is nothing else here.
    """

    def __init__(self, tasks: Sequence[str], layers: Sequence[str], steps: Sequence[int], gramians: np.ndarray) -> None:
        finite = np.isfinite(gramians).all(axis=(1, 2, 3))
        gramians = gramians[finite]
        self.left_out = int((~finite).sum())
        self.tasks, self.layers = list(tasks), [*layers, ALL]
        self.steps = [step for step, good in zip(steps, finite, strict=True) if good]
        gramians = np.concatenate([gramians, gramians.sum(axis=1, keepdims=True)], axis=1)
        self.norms = np.sqrt(np.diagonal(gramians, axis1=2, axis2=3).clip(min=0))
        first, second = np.triu_indices(len(self.tasks), k=1)
        self.pairs = list(zip(first.tolist(), second.tolist(), strict=True))
        products = self.norms[:, :, first] * self.norms[:, :, second]
        missing = np.full(products.shape, np.nan)
        self.cosines = np.divide(gramians[:, :, first, second], products, out=missing, where=products > 0)

    @property
    def pair_names(self) -> list[str]:
        return [f"{self.tasks[i]}/{self.tasks[j]}" for i, j in self.pairs]

    def mean_cosines(self) -> np.ndarray:
        """Return [L, K], means over the steps in which both tasks have a gradient."""
        return mean(self.cosines, 0)

    def conflicts(self) -> np.ndarray:
        """Return [S, L, K], 1 for a negative cosine, else 0; NaN where there is no cosine."""
        return np.where(np.isnan(self.cosines), np.nan, self.cosines < 0)

    def as_json(self) -> dict[str, Any]:
        """Return all numbers, with None for NaN."""
        by_pair, by_task = self.pair_names, self.tasks
        return {
            "tasks": self.tasks,
            "layers": self.layers,
            "pairs": by_pair,
            "steps": self.steps,
            "steps_not_finite": self.left_out,
            "mean_cosines": self._by_name(self.mean_cosines(), by_pair),
            "conflict_rates": self._by_name(mean(self.conflicts(), 0), by_pair),
            "mean_norms": self._by_name(mean(self.norms, 0), by_task),
            "cosines": _plain(self.cosines),
            "norms": _plain(self.norms),
        }

    def _by_name(self, values: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        return {
            layer: dict(zip(names, of_layer, strict=True))
            for layer, of_layer in zip(self.layers, _plain(values), strict=True)
        }


def mean(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Return the means over all numbers that are not NaN; NaN where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an empty mean
        return np.nanmean(values, axis=axis)


def _plain(values: np.ndarray) -> list[Any]:
    """Return nested lists of numbers with 6 digits; None for NaN."""
    if values.ndim > 1:
        return [_plain(part) for part in values]
    return [None if np.isnan(value) else float(f"{value:.6g}") for value in values.tolist()]
