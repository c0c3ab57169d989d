"""One or two linear maps per task by torch's matrix products.

fastmtl_kernels.task_maps.function has the formulas.

Each task that has rows is one matrix product, which writes into the task's rows of the result.
Nothing is split, padded or concatenated, and the parameters of a task without rows are not read.
Any device and floating dtype; torch chooses the dtype of accumulation. Besides the inputs, forward
keeps for backward the rows before and after `middle`, and those before `last`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fastmtl_kernels.dropout.api import dropout, dropout_into
from fastmtl_kernels.task_maps.common import Maps, Wants

# Up to this number of rows or columns, a product with a matrix that is contiguous along its shorter
# axis is slow on CPUs: up to 7 times slower at a size of 8.
NARROW = 64


def forward(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    call: Maps,
) -> tuple[Tensor | None, ...]:
    """Return y [N, d_out], h and z [n, r], and y before the activation `last`.

    n: the number of rows that have tasks. h, z: the rows before and after `middle`; None without a
    first map. The fourth result is None if `last` is "identity".
    """
    offsets = call.tasks.host
    h = z = before_last = None
    if first is not None:
        h = _maps(x, _along_longer_axis(first), first_bias, x.new_empty(offsets[-1], first.shape[2]), offsets)
        z = _activate(h, call.middle)
    y = x.new_empty(x.shape[0], second.shape[2])
    _maps(x if z is None else z, second, second_bias, y, offsets)
    if call.last != "identity":
        before_last = y[: offsets[-1]]
        y = torch.empty_like(y)
        y[: offsets[-1]] = _activate(before_last, call.last)
    y[offsets[-1] :] = 0
    if seed is not None:
        _drop(y, y, seed, call)
    return y, h, z, before_last


def backward(
    dy: Tensor,
    x: Tensor,
    first: Tensor | None,
    second: Tensor,
    second_bias: Tensor | None,
    seed: Tensor | None,
    h: Tensor | None,
    z: Tensor | None,
    before_last: Tensor | None,
    *,
    call: Maps,
    wants: Wants,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, first, first_bias, second and second_bias.

    A gradient that autograd does not need is None.
    """
    offsets = call.tasks.host
    if seed is not None:
        dy = _drop(dy, x.new_empty(dy.shape), seed, call)
    dy = dy[: offsets[-1]] if before_last is None else _derive(dy[: offsets[-1]], before_last, call.last)
    dsecond = _outer(x if z is None else z, dy, second, offsets) if wants.second else None
    dsecond_bias = _sums(dy, offsets) if wants.second_bias else None
    if first is None:
        dx = _row_gradients(dy, second, x, offsets) if wants.x else None
        return dx, None, None, dsecond, dsecond_bias
    assert h is not None
    dh = _derive(_maps(dy, _along_longer_axis(second).mT, None, torch.empty_like(h), offsets), h, call.middle)
    dx = _row_gradients(dh, first, x, offsets) if wants.x else None
    dfirst = _outer(x, dh, first, offsets) if wants.first else None
    dfirst_bias = _sums(dh, offsets) if wants.first_bias else None
    return dx, dfirst, dfirst_bias, dsecond, dsecond_bias


def _maps(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, offsets: Sequence[int]) -> Tensor:
    """Write rows weight_t + bias_t for the rows of every task t into `out`, and return `out`.

    Rows of `out` that have no task stay unchanged.
    """
    for task, (start, stop) in enumerate(pairwise(offsets)):
        if start == stop:
            continue
        if bias is None:
            torch.mm(rows[start:stop], weight[task], out=out[start:stop])
        else:
            torch.addmm(bias[task], rows[start:stop], weight[task], out=out[start:stop])
    return out


def _row_gradients(gradients: Tensor, weight: Tensor, rows: Tensor, offsets: Sequence[int]) -> Tensor:
    """Return the gradient of `rows` [N, in], the inputs of a map; zeros for rows of no task.

    gradients: those of the map's outputs. weight: that of the map.
    """
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _maps(gradients, _along_longer_axis(weight).mT, None, out, offsets)
    out[offsets[-1] :] = 0
    return out


def _along_longer_axis(weight: Tensor) -> Tensor:
    """Return weight [T, in, out] in a memory layout for which products are fast.

    A copy if its matrices are narrow (see NARROW) and contiguous along the shorter axis.
    """
    if min(weight.shape[1:]) > NARROW:
        return weight
    return weight.mT.contiguous().mT if weight.shape[1] > weight.shape[2] else weight.contiguous()


def _outer(rows: Tensor, gradients: Tensor, like: Tensor, offsets: Sequence[int]) -> Tensor:
    """Return rows^T gradients for every task, [T, in, out]: the gradient of a map's weight.

    like: the weight. The result has its memory layout, so that autograd does not copy it.
    """
    out = torch.empty_like(like)
    fast = _along_longer_axis(out)
    for task, (start, stop) in enumerate(pairwise(offsets)):
        torch.mm(rows[start:stop].t(), gradients[start:stop], out=fast[task])
    return out if fast.data_ptr() == out.data_ptr() else out.copy_(fast)


def _sums(gradients: Tensor, offsets: Sequence[int]) -> Tensor:
    out = gradients.new_empty(len(offsets) - 1, gradients.shape[1])
    for task, (start, stop) in enumerate(pairwise(offsets)):
        torch.sum(gradients[start:stop], 0, out=out[task])
    return out


def _activate(rows: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return torch.nn.functional.gelu(rows)
        case "relu":
            return rows.relu()
        case _:
            return rows


def _derive(gradients: Tensor, before: Tensor, activation: str) -> Tensor:
    """Return the gradient of the inputs of an activation.

    gradients: those of its outputs. before: its inputs.
    """
    match activation:
        case "gelu":
            return torch.ops.aten.gelu_backward(gradients, before)
        case "relu":
            return torch.ops.aten.threshold_backward(gradients, before, 0)
        case _:
            return gradients


def _drop(rows: Tensor, out: Tensor, seed: Tensor, call: Maps) -> Tensor:
    """Write dropout(rows) [N, d] into `out`, which may be `rows`, and return `out`.

    Rows of no task are undefined in `out`.
    """
    if len(set(call.rates)) == 1:
        return dropout_into(out, rows, call.rates[0], seed)
    for rate, (start, stop) in zip(call.rates, pairwise(call.tasks.host), strict=True):
        # The mask depends on the row's number among all rows, so earlier rows are drawn too.
        out[start:stop] = dropout(rows[:stop], rate, seed)[start:]
    return out
