"""The encoder's layers on buffers of fixed addresses: a forward and a backward that can be recorded and run again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.data.packed_batch import HostOffsets
from fastmtl.model.context import ForwardContext, place
from fastmtl.model.static_batch import Bucket, StaticBatch
from fastmtl.surgery.recorded_writes import RecordedWrites
from fastmtl.surgery.task_gradients import TaskGradients
from fastmtl_kernels.varlen_attention_plan import TILE, AttentionPlan


class StaticLayers:
    """`forward`, then `backward`, on what `fill` put into the buffers; N rows of a bucket, hidden size d.

    Two buffers [N, d] are kept: what the layers get, and one in which forward leaves its result, and backward finds
    that one's gradient and leaves the input's.

    parameters: the layers' trained ones. sink: what their gradients go to, or None: then backward puts them into
    `gradients` [P], one after the other. hidden: what the layers will get, of any number of rows.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        parameters: Sequence[nn.Parameter],
        bucket: Bucket,
        num_tasks: int,
        hidden: Tensor,
        sink: TaskGradients | None,
        gradients: Tensor | None,
    ) -> None:
        like = {"dtype": hidden.dtype, "device": hidden.device}
        self.batch = StaticBatch(bucket, num_tasks, hidden.device)
        self._layers, self._parameters = layers, list(parameters)
        self._hidden = torch.zeros(bucket.rows, hidden.shape[1], **like, requires_grad=True)  # type: ignore[call-overload]
        self._rows = torch.zeros(bucket.rows, hidden.shape[1], **like)  # type: ignore[call-overload]
        self._seeds = torch.zeros(place(len(layers), 0), dtype=torch.int64, device=hidden.device)
        self.writes: RecordedWrites | None = None
        if sink is not None:
            offsets = self.batch.segments.offsets
            self.writes = RecordedWrites(sink, parameters, offsets, bucket.rows, hidden.dtype)
        # Of a backward, by `stores`.
        self.ways = (True,) if sink is None else (True, False)
        self._gradients = gradients
        seeds = self._seeds.split(1)
        self._context = ForwardContext(self.batch.segments, self.writes, self.batch.cu_seqlens, seeds, self.batch.plan)
        self._out: Tensor | None = None

    def fill(self, hidden: Tensor, host: HostOffsets, plan: AttentionPlan, seeds: Sequence[Tensor]) -> None:
        """hidden [n, d], n <= N: the tail is zeros."""
        with torch.no_grad():
            self._hidden[: len(hidden)] = hidden
            self._hidden[len(hidden) :].zero_()
            torch.cat(list(seeds), out=self._seeds)
        self.batch.fill(host, plan)

    def fill_empty(self) -> None:
        """With a batch without sequences: its gradients are zeros."""
        tasks = self.batch.segments.num_tasks
        host = HostOffsets((0,), (0,) * (tasks + 1), (0,) * (tasks + 1))
        bucket = self.batch.bucket
        # Where there are blocks there may be fewer tiles than it takes to give attention's zeros to every row.
        plan = AttentionPlan.make(host.cu_seqlens, min(bucket.rows, bucket.tiles * TILE))
        self.fill(self._hidden.detach()[:0], host, plan, [self._seeds.clone()])

    def keeps(self, *, stores: bool) -> bool:
        """Whether `backward` of an empty batch leaves J as it is: adding zeros does."""
        return self.writes is None or not stores or self.writes.jacobian.is_new(self._parameters)

    def forward(self) -> None:
        hidden: Tensor = self._hidden
        with torch.enable_grad():
            for layer in self._layers:
                hidden = layer(hidden, None, self._context)
        self._out = hidden
        self._rows.copy_(hidden.detach())

    def backward(self, *, stores: bool) -> None:
        """stores: see RecordedWrites; without a sink it makes no difference."""
        wanted = [self._hidden]
        if self.writes is None:
            wanted += self._parameters
        else:
            self.writes.begin(stores=stores)
        assert self._out is not None
        dx, *gradients = torch.autograd.grad(self._out, wanted, self._rows, retain_graph=True)
        self._rows.copy_(dx)
        if self._gradients is not None:
            flat = [gradient.reshape(-1) for gradient in gradients]
            parts = self._gradients.split([len(part) for part in flat])
            torch._foreach_copy_(list(parts), flat)

    def result(self, num_rows: int) -> Tensor:
        """A copy of what `forward`, or `backward`, made of the first rows: nobody knows for how long it is held."""
        return self._rows[:num_rows].clone()

    def take(self, dy: Tensor) -> None:
        """For `backward`. The tail is left as it is: the last LayerNorm's backward gives zeros there."""
        self._rows[: len(dy)] = dy

    def parameter_gradients(self) -> list[Tensor]:
        """Of `backward` without a sink: views of one copy, which may become their `.grad`."""
        if self._gradients is None:
            return []
        parts = self._gradients.clone().split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def release(self) -> None:
        """Drops what forward keeps for backward."""
        self._out = None
