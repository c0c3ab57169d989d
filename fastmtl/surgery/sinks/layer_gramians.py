"""The Gramian of each layer's task gradients, computed beside that of all shared parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastmtl.surgery.ranks.collectives import sum_over_ranks, world_size
from fastmtl.surgery.ranks.protocol import Ranks
from fastmtl_kernels import gramian


class LayerWatcher(Protocol):
    """Receiver of the Gramians of layers in some steps.

    layer_of: number of each shared parameter's layer, by the parameter's id.
    """

    layer_of: Mapping[int, int]

    def next_step(self) -> bool:
        """Begin a step; return True if its Gramians are wanted. Equal on all ranks."""
        ...

    def take(self, step: int, layers: LayerGramians) -> None:
        """Take the object that holds the step's Gramians once the step has computed them."""
        ...


class LayerGramians:
    """Gramians of L groups of parameters in one step; a sink adds to them in its `gramian`.

    layer_of: as in LayerWatcher. scale: the loss scale that the gradients contain. by_rank: True if
    each rank has a J of its own; the result is then the mean over ranks.

    found: float32 [L, T, T] of all ranks, with `scale`; None until `finish`.
    """

    def __init__(
        self, layer_of: Mapping[int, int], num_tasks: int, device: torch.device, *, scale: float, by_rank: bool
    ) -> None:
        self._layer_of, self._by_rank, self.scale = layer_of, by_rank, scale
        shape = (1 + max(layer_of.values()), num_tasks, num_tasks)
        self._share = torch.zeros(shape, device=device)
        self._of_tables = torch.zeros(shape, device=device)
        self.found: Tensor | None = None

    def add(self, key: int, gram: Tensor) -> None:
        """Add the Gramian [T, T] of this rank's share of a parameter's columns."""
        self._share[self._layer_of[key]] += gram

    def add_columns(self, columns: Tensor, spans: Iterable[tuple[int, slice]]) -> None:
        """Add the Gramians of this rank's columns [T, n].

        spans: pairs of a parameter's id and its part of the n columns.
        """
        parts: dict[int, list[slice]] = {}
        for key, span in spans:
            parts.setdefault(self._layer_of[key], []).append(span)
        rows = columns.unbind()
        for layer, of_layer in parts.items():
            self._share[layer] += gramian([[row[span] for span in of_layer] for row in rows])

    def add_table(self, key: int, gram: Tensor) -> None:
        """Add the Gramian of a sparse table, which is that of all ranks already."""
        self._of_tables[self._layer_of[key]] += gram

    def finish(self, ranks: Ranks) -> None:
        """Sum over the ranks, each of which must call this method."""
        found = ranks.total(self._share) + self._of_tables
        self.found = sum_over_ranks(found) / world_size() if self._by_rank else found
        del self._share, self._of_tables  # a diagnosis keeps this object
