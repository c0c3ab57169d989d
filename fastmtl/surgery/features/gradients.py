"""The tasks' gradients of features: from a backward of each loss, or from the backward of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastmtl.errors import UserError
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.features.edges import first_read, readers_of

# Gradients of each feature, by task; None where the task's loss does not depend on it.
Found = list[dict[str, Tensor]]


def backward_of_each(
    losses: Mapping[str, tuple[Tensor, float]], chains: Sequence[Sequence[GradientEdge]]
) -> tuple[list[GradientEdge], Found]:
    """Return the features' edges, and their gradients from a backward per task down to them.

    losses: each task's loss and its factor. chains: from `chains_of`.
    """
    places = [(k, edge) for k, chain in enumerate(chains) for edge in chain]
    found: list[dict[int, dict[str, Tensor]]] = [{} for _ in chains]
    for task, (loss, factor) in losses.items():
        gradients = differentiate([(loss, factor)], [edge for _, edge in places], {}, retain_graph=True)
        for number, ((k, _), gradient) in enumerate(zip(places, gradients, strict=True)):
            if gradient is not None:
                found[k].setdefault(number, {})[task] = gradient
    first = [min(of_edges, default=-1) for of_edges in found]
    _check_read([number >= 0 for number in first])
    edges = [places[number][1] for number in first]
    return edges, [of_edges[number] for of_edges, number in zip(found, first, strict=True)]


class Readers:
    """Gradients of features that one backward of all losses leaves, before it enters the trunk.

    losses: of each task. Raises UserError for an operation that reads a feature for several tasks.
    """

    def __init__(self, losses: Mapping[str, Tensor], chains: Sequence[Sequence[GradientEdge]]) -> None:
        first = first_read(losses, chains)
        _check_read([edge is not None for edge in first])
        self.edges = [edge for edge in first if edge is not None]
        self._readers = readers_of(losses, self.edges)
        self._left = 0
        self.found: Found = [{} for _ in self.edges]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record gradients of the backward inside the block."""
        self._left = len(self._readers)
        handles = [node.register_hook(self._recorder(inputs)) for node, inputs in self._readers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_complete(self) -> None:
        """Raise UserError if backward enters the trunk before all features have their gradients."""
        if self._left and len(self.edges) > 1:
            raise UserError(
                "features: backward reaches one of the tensors before the heads of another, and ZeRO 3 allows one "
                "backward pass only: run all heads after the trunk, give one tensor, or use ZeRO 0 to 2"
            )

    def _recorder(self, inputs: Mapping[int, tuple[str, int]]) -> Callable[[Sequence[Tensor | None], object], None]:
        def record(grad_inputs: Sequence[Tensor | None], _: object) -> None:
            self._left -= 1
            for k, (task, feature) in inputs.items():
                gradient, of_feature = grad_inputs[k], self.found[feature]
                if gradient is not None:
                    of_feature[task] = gradient if task not in of_feature else of_feature[task] + gradient

        return record


def by_task(found: Found, tasks: Sequence[str]) -> list[list[Tensor]]:
    """Return T lists with the gradients of all features; zeros where a task has none."""
    like = [next(iter(of_feature.values())) for of_feature in found]
    return [
        [
            of_feature[task].contiguous() if task in of_feature else torch.zeros_like(first)
            for of_feature, first in zip(found, like, strict=True)
        ]
        for task in tasks
    ]


def _check_read(read: Sequence[bool]) -> None:
    if not all(read):
        raise UserError(
            "features: no loss depends on one of the tensors: give the trunk's output that the heads read, as the "
            "forward returned it, and not a copy or a view of it that only you made"
        )
