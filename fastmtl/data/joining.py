"""Several small data sets as one, for a batch that answers several requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fastmtl.data.tokenized import TokenizedDataset, UnitTable


def joined(datasets: Sequence[TokenizedDataset]) -> TokenizedDataset:
    """Return the examples of all data sets, one data set after the other.

    The data sets are of one task, or of tasks that encode texts alike. The result has no labels and
    no rows.
    """
    if len(datasets) == 1:
        return datasets[0]
    first = datasets[0]
    units = [dataset.units for dataset in datasets if dataset.units is not None]
    return dataclasses.replace(
        first,
        tokens=np.concatenate([dataset.tokens for dataset in datasets]),
        offsets=_offsets(datasets, lambda dataset: dataset.offsets),
        second_text=np.concatenate([dataset.second_text for dataset in datasets]),
        labels=None,
        ids=[row for dataset in datasets for row in dataset.ids],
        example_offsets=None
        if first.example_offsets is None
        else _offsets(datasets, lambda dataset: np.asarray(dataset.example_offsets)),
        units=_units(units) if units else None,
        loss_terms=None,
        rows=None,
        row_of=None,
    )


def _units(tables: Sequence[UnitTable]) -> UnitTable:
    def together(name: str) -> np.ndarray | None:
        arrays = [getattr(table, name) for table in tables]
        return None if arrays[0] is None else np.concatenate(arrays)

    return dataclasses.replace(
        tables[0],
        offsets=_offsets(tables, lambda table: table.offsets),
        places=together("places"),
        items=together("items"),
        spans=together("spans"),
    )


def _offsets(parts: Sequence, of: Callable[..., np.ndarray]) -> np.ndarray:
    sizes = [np.diff(of(part)) for part in parts]
    return np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
