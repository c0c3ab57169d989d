"""The encoder's layers, and its embeddings with them or not, on buffers of fixed addresses: a forward and a backward
that can be recorded and run again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.cuda_graphs.buffers.batch import Bucket, StaticBatch
from fastmtl.cuda_graphs.writes import RecordedWrites
from fastmtl.data.packed_batch import HostOffsets
from fastmtl.model.encoder.context import ForwardContext, place
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan


class StaticLayers:
    """`forward`, then `backward`, on what `fill` put into the buffers; N rows of a bucket, hidden size d.

    Two buffers of N rows are kept: the inputs, and one [N, d] in which forward leaves its result, and backward finds
    that one's gradient and leaves the inputs'.

    embeddings: None where the inputs are hidden states [n, d]; else they are ids, three times [n] (of words, types,
    positions), and what backward leaves are the gradients of the words' rows. parameters: the trained ones, without the
    words.
    sink: what their gradients go to, or None: then backward puts them into `gradients` [P], one after the other.
    words: their table [V, d], of the hidden states' width, dtype and device.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        embeddings: nn.Module | None,
        parameters: Sequence[nn.Parameter],
        bucket: Bucket,
        num_tasks: int,
        words: nn.Parameter,
        sink: StackSink | None,
        gradients: Tensor | None,
    ) -> None:
        rows, width, dtype, device = bucket.rows, words.shape[1], words.dtype, words.device
        self.batch = StaticBatch(bucket, num_tasks, device)
        self._layers, self._embeddings, self._parameters = layers, embeddings, list(parameters)
        if embeddings is None:
            self._inputs = [torch.zeros(rows, width, dtype=dtype, device=device, requires_grad=True)]
        else:
            self._inputs = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)]
        self._filled = 0
        self._rows = torch.zeros(rows, width, dtype=dtype, device=device)
        self._seeds = torch.zeros(place(len(layers), 0), dtype=torch.int64, device=device)
        self.writes: RecordedWrites | None = None
        if sink is not None:
            table = None if embeddings is None else words
            self.writes = RecordedWrites(sink, parameters, table, self.batch.segments.offsets, rows, dtype)
        # Of a backward, by `stores`.
        self.ways = (True,) if sink is None else (True, False)
        self._gradients = gradients
        context = self.batch.segments, self.writes, self.batch.cu_seqlens, self._seeds, self.batch.plan
        self._context = ForwardContext(*context)
        self._out: Tensor | None = None

    def fill(self, inputs: Sequence[Tensor], host: HostOffsets, plan: AttentionPlan, seeds: Tensor) -> None:
        """inputs: hidden states [n, d], or ids of words, types and positions, int64 [n] each, n <= N; the tail is
        zeros. seeds: int64 [places].
        """
        number = len(inputs[0])
        with torch.no_grad():
            for buffer, rows in zip(self._inputs, inputs, strict=True):
                buffer[:number] = rows
                if number < self._filled:  # what the batch before has left
                    buffer[number : self._filled].zero_()
            self._seeds.copy_(seeds)
        self._filled = number
        self.batch.fill(host, plan)

    def fill_empty(self) -> None:
        """With a batch without sequences: its gradients are zeros."""
        tasks = self.batch.segments.num_tasks
        host = HostOffsets((0,), (0,) * (tasks + 1), (0,) * (tasks + 1))
        bucket = self.batch.bucket
        # Where there are blocks there may be fewer tiles than it takes to give attention's zeros to every row.
        plan = AttentionPlan.make(host.cu_seqlens, min(bucket.rows, bucket.tiles * TILE))
        self.fill([buffer.detach()[:0] for buffer in self._inputs], host, plan, self._seeds.clone())

    def keeps(self, *, stores: bool) -> bool:
        """Whether `backward` of an empty batch leaves J as it is: adding zeros does."""
        return self.writes is None or not stores or self.writes.jacobian.is_new(self._parameters)

    def forward(self) -> None:
        with torch.enable_grad():
            hidden = self._inputs[0]
            if self._embeddings is not None:
                hidden = self._embeddings(*self._inputs, self._context)
            for layer in self._layers:
                hidden = layer(hidden, None, self._context)
        self._out = hidden
        self._rows.copy_(hidden.detach())

    def backward(self, *, stores: bool) -> None:
        """stores: see RecordedWrites; without a sink it makes no difference."""
        wanted = list(self._inputs)
        if self.writes is None:
            wanted += self._parameters
        else:
            self.writes.begin(stores=stores)
            if self._embeddings is not None:
                wanted = [self.writes.anchor]
        assert self._out is not None
        dx, *gradients = torch.autograd.grad(self._out, wanted, self._rows, retain_graph=True)
        if self._embeddings is not None:
            assert self.writes is not None and self.writes.rows is not None
            dx, self.writes.rows = self.writes.rows, None
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
