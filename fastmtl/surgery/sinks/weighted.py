"""`storage: replay`, second pass: the sink that gives autograd the merged gradient."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmtl.surgery.segments import Segments
from fastmtl.surgery.sinks.plain import Product, table_gradient
from fastmtl.surgery.sinks.sink import Sink
from fastmtl_kernels.cast import cast
from fastmtl_kernels.upload import upload


class WeightedSink(Sink):
    """Sink that gives autograd sum_t weights[t] g_t of every shared parameter.

    Only the parameters' gradients are weighted, not those of the layers' inputs, which the layers
    below need. weights: [T].
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        num_tasks: int,
        weights: Tensor,
        *,
        sparse: Sequence[nn.Parameter] = (),
    ) -> None:
        super().__init__(parameters, num_tasks, sparse=sparse)
        self._weights = weights.float()

    def take(self, parameter: nn.Parameter, gradients: Tensor) -> Tensor | None:
        gradients = cast(gradients, torch.promote_types(gradients.dtype, torch.float32))
        return torch.einsum("t,t...->...", self._weights.to(gradients.dtype), gradients)

    def take_products(self, parameter: nn.Parameter, dy: Tensor, product: Product, segments: Segments) -> Tensor | None:
        return product(self._weighted(dy, segments), segments.all_rows())

    def linears(
        self,
        weights: Sequence[nn.Parameter],
        biases: Sequence[nn.Parameter],
        rows: Tensor,
        x: Tensor,
        segments: Segments,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Return the merged gradients of k Linears, from a single product if all are shared."""
        if not all(map(self.takes, [*weights, *biases])):
            return super().linears(weights, biases, rows, x, segments, needed)
        self.check_active()
        rows, x, number = self._weighted(rows, segments), x[segments.all_rows()], len(weights)
        gradients = [*rows.t().mm(x).chunk(number), *rows.sum(0).chunk(number)]
        return [gradient if wanted else None for gradient, wanted in zip(gradients, needed, strict=True)]

    def take_rows(
        self, table: nn.Parameter, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]
    ) -> Tensor | None:
        rows = cast(rows, torch.promote_types(rows.dtype, torch.float32))
        counts = upload(torch.tensor([stop - start for start, stop in pairwise(token_offsets)]), rows.device)
        per_row = self._weights.repeat_interleave(counts, output_size=token_offsets[-1])
        return table_gradient(table, ids[: token_offsets[-1]], rows[: token_offsets[-1]] * per_row[:, None])

    def _weighted(self, dy: Tensor, segments: Segments) -> Tensor:
        """Return each row of dy times the weight of its task, in the dtype of dy.

        The multiplication is in float32: the rounding error of a bfloat16 weight would be the same
        in every row.
        """
        per_row = segments.per_row(self._weights).view(-1, *[1] * (dy.dim() - 1))
        return (dy[segments.all_rows()] * per_row).to(dy.dtype)
