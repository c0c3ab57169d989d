"""The encoder on buffers at fixed addresses.

Its forward and backward can therefore be recorded and replayed for other batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmtl.cuda_graphs.buffers.batch import Bucket, StaticBatch
from fastmtl.cuda_graphs.writes import RecordedWrites
from fastmtl.data.packed_batch import HostOffsets
from fastmtl.model.encoder.context import ForwardContext, Seeds, num_seeds
from fastmtl.model.encoder.encoder import PackedEncoder
from fastmtl.surgery.sinks.stack import StackSink
from fastmtl_kernels.varlen_attention.plan import TILE, AttentionPlan


class StaticLayers:
    """The encoder's layers, and its embeddings if given, for the batches of one bucket.

    The order of calls is `fill`, `forward`, `take`, `backward`. The buffers have N rows, as many as
    the bucket; a batch uses the first n of them; d is the hidden size. There are input buffers and
    one buffer `_rows` [N, d]. Forward writes the last hidden states into `_rows`. Backward reads
    their gradient there and overwrites it by the gradient of the input, which has a buffer of its
    own if its width is not d.

    embeds: False if the input is hidden states [n, d]. Otherwise the inputs are three tensors [n]:
        ids of words, token types and positions. The gradient of the input is then that of the
        looked-up rows of the word table [n, d].
    parameters: the trained parameters, without the word table. All buffers have the dtype and
        device of the word table.
    sink: takes the task gradients of the parameters. Without a sink, backward writes the gradients
        into `gradients` [P], one after another.
    """

    def __init__(
        self,
        encoder: PackedEncoder,
        embeds: bool,
        parameters: Sequence[nn.Parameter],
        bucket: Bucket,
        num_tasks: int,
        sink: StackSink | None,
        gradients: Tensor | None,
    ) -> None:
        words = encoder.words
        rows, width, dtype, device = bucket.rows, encoder.settings.hidden_size, words.dtype, words.device
        self.batch = StaticBatch(bucket, num_tasks, device)
        self._encoder, self._embeds, self._parameters = encoder, embeds, list(parameters)
        if not embeds:
            self._inputs = [torch.zeros(rows, width, dtype=dtype, device=device, requires_grad=True)]
        else:
            self._inputs = [torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)]
        self._filled = 0
        self._rows = torch.zeros(rows, width, dtype=dtype, device=device)
        projected = embeds and words.shape[1] != width
        self._dx = torch.zeros(rows, words.shape[1], dtype=dtype, device=device) if projected else self._rows
        self._seeds = torch.zeros(num_seeds(len(encoder.layers)), dtype=torch.int64, device=device)
        self.writes: RecordedWrites | None = None
        if sink is not None:
            table = words if embeds else None
            self.writes = RecordedWrites(sink, parameters, table, self.batch.segments.offsets, rows, dtype)
        # Backward is recorded once for each of these values of `stores`.
        self.ways = (True,) if sink is None else (True, False)
        self._gradients = gradients
        context = self.batch.segments, self.writes, self.batch.cu_seqlens, Seeds(self._seeds), self.batch.plan
        self._context = ForwardContext(*context)
        self._out: Tensor | None = None

    def fill(self, inputs: Sequence[Tensor], host: HostOffsets, plan: AttentionPlan, seeds: Tensor) -> None:
        """Copy a batch into the buffers: n <= N rows; the other rows of the inputs become zeros.

        inputs: hidden states [n, d], or ids of words, token types and positions, int64 [n] each.
        host: offsets of the batch. plan: its attention plan, as in `StaticBatch.fill`.
        seeds: dropout seeds, int64 [num_seeds(layers)] (see context.py).
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
        """Fill the buffers with a batch without sequences, whose gradients are zeros."""
        tasks = self.batch.segments.num_tasks
        host = HostOffsets((0,), (0,) * (tasks + 1), (0,) * (tasks + 1))
        bucket = self.batch.bucket
        # A bucket with blocks can have too few tiles for attention to write zeros to every row.
        plan = AttentionPlan.make(host.cu_seqlens, min(bucket.rows, bucket.tiles * TILE))
        self.fill([buffer.detach()[:0] for buffer in self._inputs], host, plan, self._seeds.clone())

    def keeps(self, *, stores: bool) -> bool:
        """Return True if a warm-up `backward` of an empty batch destroys no gradient in J.

        A backward that adds zeros destroys none. One that stores destroys those written before.
        """
        return self.writes is None or not stores or self.writes.jacobian.is_unwritten(self._parameters)

    def forward(self) -> None:
        with torch.enable_grad():
            hidden = self._inputs[0]
            if self._embeds:
                hidden = self._encoder.embeddings(*self._inputs, self._context)
            hidden = self._encoder.run_layers(hidden, self._context)
        self._out = hidden
        self._rows.copy_(hidden.detach())

    def backward(self, *, stores: bool) -> None:
        """Run backward from the gradient in `_rows` (see the class).

        stores: True to overwrite the task gradients in J, False to add to them. Without a sink it
        has no effect.
        """
        wanted = list(self._inputs)
        if self.writes is None:
            wanted += self._parameters
        else:
            self.writes.begin(stores=stores)
            if self._embeds:
                wanted = [self.writes.anchor]
        assert self._out is not None
        dx, *gradients = torch.autograd.grad(self._out, wanted, self._rows, retain_graph=True)
        if self._embeds:
            assert self.writes is not None and self.writes.rows is not None
            dx, self.writes.rows = self.writes.rows, None
        self._dx.copy_(dx)
        if self._gradients is not None:
            flat = [gradient.reshape(-1) for gradient in gradients]
            parts = self._gradients.split([len(part) for part in flat])
            torch._foreach_copy_(list(parts), flat)

    def result(self, num_rows: int) -> Tensor:
        """Return a copy of the last hidden states' first num_rows rows, after `forward`.

        The next replay does not change the copy.
        """
        return self._rows[:num_rows].clone()

    def input_gradient(self, num_rows: int) -> Tensor:
        """Return a copy of the first num_rows rows of the input's gradient, after `backward`."""
        return self._dx[:num_rows].clone()

    def take(self, dy: Tensor) -> None:
        """Copy the gradient [n, d] of the last hidden states into `_rows`, for `backward`.

        Rows from n on keep old values. They have no effect, because the backward of the last
        LayerNorm writes zeros for them.
        """
        self._rows[: len(dy)] = dy

    def parameter_gradients(self) -> list[Tensor]:
        """Return the parameters' gradients after a `backward` without a sink; [] with a sink.

        They are copied out of the buffer, so they may become `.grad`.
        """
        if self._gradients is None:
            return []
        parts = self._gradients.clone().split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def release(self) -> None:
        """Free the autograd graph of the last forward and the results saved in it for backward."""
        self._out = None
