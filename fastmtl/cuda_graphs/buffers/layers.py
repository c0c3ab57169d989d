"""The encoder on buffers of fixed addresses: a forward and a backward to record and replay."""

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
    """Layers, with or without the embeddings: `fill` the buffers, then `forward`, then `backward`.

    N rows of a bucket, hidden size d. There are two kinds of buffers of N rows: the inputs, and
    `rows` [N, d]. Forward writes its result into `rows`; backward reads the result's gradient there
    and writes the gradient of the inputs there.

    embeddings: None where the inputs are hidden states [n, d]. Otherwise the inputs are three times
        [n] ids (of words, types, positions), and backward leaves the gradients of the words' rows.
    parameters: the trained ones, without the words.
    words: their table [V, d]; it gives width, dtype and device.
    sink: takes the gradients of the parameters. Without one, backward writes them into `gradients`
        [P], one after another.
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
        # The values of `stores` that backward is recorded for.
        self.ways = (True,) if sink is None else (True, False)
        self._gradients = gradients
        context = self.batch.segments, self.writes, self.batch.cu_seqlens, self._seeds, self.batch.plan
        self._context = ForwardContext(*context)
        self._out: Tensor | None = None

    def fill(self, inputs: Sequence[Tensor], host: HostOffsets, plan: AttentionPlan, seeds: Tensor) -> None:
        """Fill the first n <= N rows of the inputs; the others are zeros.

        inputs: hidden states [n, d], or ids of words, types and positions, int64 [n] each.
        seeds: int64 [places].
        """
        number = len(inputs[0])
        with torch.no_grad():
            for buffer, rows in zip(self._inputs, inputs, strict=True):
                buffer[:number] = rows
                if number < self._filled:  # rows of the previous batch
                    buffer[number : self._filled].zero_()
            self._seeds.copy_(seeds)
        self._filled = number
        self.batch.fill(host, plan)

    def fill_empty(self) -> None:
        """Fill in a batch without sequences, whose gradients are zeros."""
        tasks = self.batch.segments.num_tasks
        host = HostOffsets((0,), (0,) * (tasks + 1), (0,) * (tasks + 1))
        bucket = self.batch.bucket
        # A bucket with blocks can have too few tiles for attention to write zeros to every row.
        plan = AttentionPlan.make(host.cu_seqlens, min(bucket.rows, bucket.tiles * TILE))
        self.fill([buffer.detach()[:0] for buffer in self._inputs], host, plan, self._seeds.clone())

    def keeps(self, *, stores: bool) -> bool:
        """Return whether `backward` of an empty batch leaves J unchanged, as adding zeros does."""
        return self.writes is None or not stores or self.writes.jacobian.is_unwritten(self._parameters)

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
        """Run backward. stores: see RecordedWrites; without a sink it has no effect."""
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
        """Return a copy of the first rows of the result; the caller may keep it for any time."""
        return self._rows[:num_rows].clone()

    def take(self, dy: Tensor) -> None:
        """Take the gradient [n, d] of the result for `backward`.

        The other rows need no zeros: the backward of the last LayerNorm writes zeros there.
        """
        self._rows[: len(dy)] = dy

    def parameter_gradients(self) -> list[Tensor]:
        """Return the gradients of a `backward` without a sink.

        They are views of one copy and may become `.grad`.
        """
        if self._gradients is None:
            return []
        parts = self._gradients.clone().split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def release(self) -> None:
        """Drop the results that forward saved for backward."""
        self._out = None
