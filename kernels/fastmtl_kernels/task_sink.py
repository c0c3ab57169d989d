"""TaskSink, the receiver of gradients per task, and TaskRows, the rows that belong to each task.

An operation that should compute task gradients receives a sink in forward. Every row belongs to
one task, so backward can compute T gradients of a parameter, one per task. Backward gives them to
the sink and returns to autograd the gradient that the sink returns. `TaskSink` is a protocol, which
fastmtl implements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmtl_kernels.cast import cast
from fastmtl_kernels.checks import describe
from fastmtl_kernels.upload import upload


class Offsets(Protocol):
    """Token offsets on the device (offsets) and as integers (host), so that no copy is needed."""

    @property
    def offsets(self) -> Tensor: ...

    @property
    def host(self) -> tuple[int, ...]: ...


# T + 1 offsets: int32 on the rows' device, or integers on the host, or an object with both.
TokenOffsets = Tensor | Sequence[int] | Offsets


class TaskSink(Protocol):
    """A receiver of task gradients.

    anchor: a scalar that requires a gradient. Embeddings take it as an input, so that autograd runs
    their backward even if it is asked for no parameter's gradient.
    """

    anchor: Tensor

    def expect(self, *parameters: Any) -> None:
        """Announce parameters that a forward uses.

        Its backward will call `deliver` or `deliver_rows` once for each.
        """

    def deliver(self, parameter: Any, gradients: Tensor) -> Tensor | None:
        """Receive a parameter's task gradients; return its gradient for autograd.

        gradients: float32 [T, *shape]. None is returned if autograd is to get no gradient.
        parameter: the same Python object that `expect` received.
        """

    def deliver_rows(self, table: Any, ids: Tensor, rows: Tensor, token_offsets: tuple[int, ...]) -> Tensor | None:
        """Receive the task gradients of an embedding table [V, d]; return as `deliver` does.

        ids: int64 [N], rows of the table. rows: [N, d], their gradients; an id may occur several
        times. token_offsets: task t has the entries token_offsets[t]:token_offsets[t + 1] of both.
        """


@dataclass(frozen=True, eq=False)
class TaskRows:
    """The rows of T tasks: task t has the rows offsets[t]:offsets[t + 1].

    Rows past the last offset belong to no task. known: the offsets as integers, or None if they are
    only on the device.
    """

    offsets: Tensor
    num_rows: int
    known: tuple[int, ...] | None

    @property
    def num_tasks(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def host(self) -> tuple[int, ...]:
        """The offsets as integers. Waits for the device if they are only there."""
        return tuple(self.offsets.tolist()) if self.known is None else self.known

    @classmethod
    def make(cls, token_offsets: TokenOffsets | None, num_rows: int, device: torch.device) -> TaskRows:
        """Make TaskRows from offsets in any form; None stands for one task that has all rows.

        Raises:
            ValueError: token_offsets is not int32 [T + 1] on `device`, or values known on the host
                do not ascend from 0 to at most num_rows.
        """
        known: tuple[int, ...] | None = None
        if token_offsets is None:  # made on the device, since a copy from the host would wait for it
            offsets, known = torch.arange(2, dtype=torch.int32, device=device) * num_rows, (0, num_rows)
        elif isinstance(token_offsets, Tensor):
            offsets = token_offsets
        elif isinstance(token_offsets, Sequence):
            offsets, known = upload(torch.tensor(token_offsets, dtype=torch.int32), device), tuple(token_offsets)
        else:
            offsets, known = token_offsets.offsets, tuple(token_offsets.host)
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or len(offsets) < 2:
            raise ValueError(f"token_offsets must be int32 of shape [T + 1], T >= 1, got {describe(offsets)}")
        if offsets.device != device:
            raise ValueError(f"token_offsets must be on {device} like the rows, got {offsets.device}")
        if known is None and device.type == "cpu":
            known = tuple(offsets.tolist())
        if known is not None and (known[0] != 0 or list(known) != sorted(known) or known[-1] > num_rows):
            raise ValueError(f"token_offsets must ascend from 0 to at most the {num_rows} rows, got {list(known)}")
        return cls(offsets.contiguous(), num_rows, known)


def check_sink(token_offsets: TokenOffsets | None, task_grads: TaskSink | None) -> None:
    """Raise ValueError if a sink is given without token offsets."""
    if task_grads is not None and token_offsets is None:
        raise ValueError("token_offsets must be given with task_grads: they say which rows belong to which task")


def gradient(sink: TaskSink | None, parameter: Any, gradients: Tensor) -> Tensor | None:
    """Return autograd's gradient of a parameter, in its dtype, from `gradients` [T, *shape].

    The sink, if any, receives `gradients`. Without a sink the first axis may have the length 1, if
    an implementation has summed over the tasks already.
    """
    if sink is None:
        merged: Tensor | None = gradients[0] if len(gradients) == 1 else gradients.sum(0)
    else:
        merged = sink.deliver(parameter, gradients)
    return None if merged is None else cast(merged, parameter.dtype)


def common_dtype(*parameters: Tensor | None) -> torch.dtype:
    """Return the dtype that all parameters have; float32 if their dtypes differ."""
    dtypes = {parameter.dtype for parameter in parameters if parameter is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def table_gradient(
    sink: TaskSink | None, table: Any, table_rows: int, ids: Tensor, rows: Tensor, tasks: TaskRows
) -> Tensor | None:
    """Return autograd's gradient of an embedding table [table_rows, d].

    ids: [N], rows of the table. rows: [N, d], their gradients, which the sink receives if there is
    one. Without a sink the result is dense, in the table's dtype, summed in float32 or wider.
    """
    ids = cast(ids, torch.int64)
    if sink is not None:
        merged = sink.deliver_rows(table, ids, rows, tasks.host)
    else:
        rows = cast(rows, torch.promote_types(rows.dtype, torch.float32))
        merged = torch.ops.aten.embedding_dense_backward(rows, ids, table_rows, -1, False)
    return None if merged is None else cast(merged, table.dtype)


def per_task(parameter: Tensor, num_tasks: int, dtype: torch.dtype, sink: TaskSink | None) -> Tensor:
    """Return T copies of a parameter, [T, *shape] of `dtype`, for the reference implementations.

    Backward gives the T gradients of the copies to the sink.
    """
    return _PerTask.apply(None if sink is None else sink.anchor, parameter, num_tasks, dtype, sink)


class _PerTask(torch.autograd.Function):
    """See `per_task`. The anchor is an input: backward runs for its gradient alone, too."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor | None, parameter: Tensor, num_tasks: int, dtype: torch.dtype, sink: TaskSink | None
    ) -> Tensor:
        ctx.save_for_backward(anchor)
        ctx.parameter, ctx.sink = parameter, sink
        if sink is not None:
            sink.expect(parameter)
        return parameter.to(dtype).repeat(num_tasks, *[1] * parameter.dim())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor | None, ...]:
        (anchor,) = ctx.saved_tensors
        d_anchor = None if anchor is None else torch.zeros_like(anchor)
        wanted = ctx.needs_input_grad[1]
        d_parameter = gradient(ctx.sink, ctx.parameter, gradients) if wanted else None
        return d_anchor, d_parameter, None, None, None
