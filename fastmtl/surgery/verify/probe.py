"""Sink that keeps a random projection of each parameter's task gradients, where no J is kept.

    S[t] = L g_t R,    L [16, r] and R [c, 16] of random signs / 4,    g_t seen as a matrix [r, c]

A projection is linear, so that it adds up over the uses of a parameter, and the expected square of
its norm is that of g_t: two gradients that differ have different projections, except with a
probability that does not matter. A gradient with one dimension is projected by R alone.

Source: Johnson and Lindenstrauss, Extensions of Lipschitz mappings into a Hilbert space, 1984.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.plain import Product
from fastmtl.surgery.sinks.sink import Sink
from fastmtl.surgery.verify.comparison import Comparison, compare_dense
from fastmtl_kernels.upload import upload

_SIZE = 16


class ProbeSink(Sink):
    """Sink for several backwards of equal forwards; autograd gets no gradient.

    task: None to record every gradient as that of its rows' task. A number for a backward of that
    task's loss alone: then the gradients of all rows add up to that task's gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_tasks: int) -> None:
        super().__init__(parameters, num_tasks)
        self.task: int | None = None
        self._dtypes = set[torch.dtype]()
        self._maps: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._found: dict[tuple[int, bool, int], Tensor] = {}  # by parameter id, "of all rows", task

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        for task, gradient in enumerate(gradients):
            self._add(parameter, task, gradient)
        return None

    def take_tasks(self, parameter: nn.Parameter, gradients: Mapping[int, Tensor]) -> Tensor | None:
        for task, gradient in gradients.items():
            if task >= 0 or self.task is not None:
                self._add(parameter, task, gradient)
        return None

    def take_products(self, parameter: nn.Parameter, dy: Tensor, product: Product, segments: Segments) -> Tensor | None:
        self._dtypes.add(dy.dtype)
        for task, rows in enumerate(segments.rows()):
            if rows.stop > rows.start:
                self._add(parameter, task, product(dy, rows))
        rest = slice(segments.host[-1], len(dy))
        if self.task is not None and rest.stop > rest.start:
            self._add(parameter, self.task, product(dy, rest))
        return None

    def take_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        self._dtypes.add(rows.dtype)
        left, right = self._maps_of(table, rows.device)
        projected = rows.float() @ right
        ends = [*token_offsets, len(ids)] if self.task is not None else token_offsets
        for task, (start, stop) in enumerate(zip(ends, ends[1:], strict=False)):
            if stop > start:
                assert left is not None, "a table has two dimensions"
                self._add_projection(table, task, left[:, ids[start:stop]] @ projected[start:stop])
        return None

    def comparison(self) -> Comparison:
        """Return the comparison of the backward of all tasks with the T backwards of one task."""
        zero = torch.zeros((), device=self.anchor.device)
        found = self._found
        norms = [
            [compare_dense(found.get((key, False, t)), found.get((key, True, t)), zero) for key in self._index]
            for t in range(self.num_tasks)
        ]
        narrow = any(dtype.itemsize < 4 for dtype in self._dtypes)
        return Comparison.of_norms(norms, narrow, "a repeated forward draws other random numbers, not of torch")

    def _add(self, parameter: nn.Parameter, task: int, gradient: Tensor) -> None:
        left, right = self._maps_of(parameter, gradient.device)
        flat = gradient.float().flatten(1) if left is not None else gradient.float().view(1, -1)
        self._add_projection(parameter, task, flat @ right if left is None else left @ (flat @ right))

    def _add_projection(self, parameter: nn.Parameter, task: int, projection: Tensor) -> None:
        key = (id(parameter), self.task is not None, task if self.task is None else self.task)
        self._found[key] = self._found[key] + projection if key in self._found else projection

    def _maps_of(self, parameter: nn.Parameter, device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return L and R of a parameter; L is None for a parameter with one dimension."""
        if id(parameter) not in self._maps:
            shape, generator = whole_shape(parameter), torch.Generator().manual_seed(self._index[id(parameter)])
            sizes = [shape[0], shape[1:].numel()] if len(shape) > 1 else [shape.numel()]
            signs = [torch.randint(0, 2, (_SIZE, size), generator=generator) * 0.5 - 0.25 for size in sizes]
            *left, right = [upload(matrix, device) for matrix in signs]
            self._maps[id(parameter)] = (left[0] if left else None), right.t()
        return self._maps[id(parameter)]
