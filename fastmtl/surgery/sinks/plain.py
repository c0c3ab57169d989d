"""Plain gradients of a parameter for autograd, summed over the tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmtl.surgery.jacobian.tables import whole_shape
from fastmtl.surgery.segments import Segments
from fastmtl_kernels.cast import cast

# (gradient of the layer's output [N, ...], rows of one task) -> this task's gradient of a parameter
Product = Callable[[Tensor, slice], Tensor]


def sum_of_products(dy: Tensor, product: Product, segments: Segments) -> Tensor:
    """Return the sum of the T tasks' products, and of that of the rows after the last task.

    If only the rows of one task carry a gradient, the sum has the bits of that task's product.
    """
    parts = [*segments.rows(), slice(segments.host[-1], len(dy))]
    first, *others = [rows for rows in parts if rows.stop > rows.start] or parts[:1]
    found = product(dy, first)
    for rows in others:
        found = found + product(dy, rows)
    return found


def sum_of_rows(table: nn.Parameter, ids: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of rows [n, d] over equal ids [n] as a dense table [V, d].

    It is in float32, since thousands of tokens share a token type.
    """
    zeros = rows.new_zeros(whole_shape(table), dtype=torch.float32)
    return zeros.index_add_(0, ids, cast(rows, torch.float32))


def table_gradient(table: nn.Parameter, ids: Tensor, rows: Tensor) -> Tensor:
    """Return the dense gradient [V, d] of a table, in float32 or wider.

    Thousands of tokens share a token type, and a bfloat16 sum of equal numbers stops growing after
    256 of them.
    """
    rows = cast(rows, torch.promote_types(rows.dtype, torch.float32))
    return torch.ops.aten.embedding_dense_backward(rows, ids, whole_shape(table)[0], -1, False)
