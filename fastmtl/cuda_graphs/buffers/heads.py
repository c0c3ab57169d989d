"""Heads and losses that read and write buffers at fixed addresses.

Their forward and backward can therefore be recorded and replayed for other batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastmtl.model.examples import HeadBatch, Vectors

Losses = Callable[[Vectors, HeadBatch], list[Tensor]]


class StaticHeads:
    """Heads and losses for batches of one size: call `fill`, then `forward`, then `backward`.

    losses: the function that computes the T tasks' summed losses, 0-dim each.
    parameters: those of the heads, in the dtype of the vectors.
    vectors, batch: examples of the inputs; only their sizes, dtypes and device are used.
    """

    def __init__(self, losses: Losses, parameters: Sequence[nn.Parameter], vectors: Vectors, batch: HeadBatch) -> None:
        self._function, self._parameters = losses, list(parameters)
        self._vectors = {
            name: torch.empty(x.shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)
            for name, x in vectors.items()
        }
        some = next(iter(vectors.values()))
        device = some.device
        # One buffer per dtype, so that `fill` is one copy per dtype.
        self._numbers = {
            dtype: torch.empty(sum(x.numel() for x in found), dtype=dtype, device=device)
            for dtype, found in _by_dtype(batch).items()
        }
        rest = dict(self._numbers)

        def placed(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            first, rest[tensor.dtype] = rest[tensor.dtype].tensor_split([tensor.numel()])
            return first.view(tensor.shape)

        labels, pairs = (tuple(placed(x) for x in tensors) for tensors in (batch.labels, batch.pairs))
        self._batch = HeadBatch(batch.seq_offsets, batch.counts, labels, pairs)
        # Forward writes the losses [T] here. `take` then overwrites them by their gradients.
        self._row = torch.empty(len(batch.counts), dtype=torch.promote_types(some.dtype, torch.float32), device=device)
        self._wanted = [x for x in (*self._vectors.values(), *self._parameters) if x.requires_grad]
        total = sum(x.numel() for x in self._wanted)
        self._gradients = torch.empty(total, dtype=some.dtype, device=device)
        self._reached = [True] * len(self._wanted)
        self._out: Tensor | None = None

    def fill(self, vectors: Vectors, batch: HeadBatch) -> None:
        """Copy the vectors, labels and pairs of a batch into the buffers."""
        with torch.no_grad():
            for name, x in vectors.items():
                self._vectors[name].copy_(x)
        for dtype, found in _by_dtype(batch).items():
            torch.cat(found, out=self._numbers[dtype])

    def forward(self) -> None:
        with torch.enable_grad():
            self._out = torch.stack(self._function(self._vectors, self._batch))
        self._row.copy_(self._out.detach())

    def backward(self) -> None:
        assert self._out is not None
        found = torch.autograd.grad(self._out, self._wanted, self._row, retain_graph=True, allow_unused=True)
        self._reached = [gradient is not None for gradient in found]
        flat = [gradient.reshape(-1) for gradient in found if gradient is not None]
        torch.cat(flat, out=self._gradients[: sum(len(gradient) for gradient in flat)])

    def losses(self) -> Tensor:
        """Return a copy of the losses [T] of the last `forward`."""
        return self._row.clone()

    def take(self, gradients: Tensor) -> None:
        """Copy the gradients of the losses [T] into the buffer that `backward` reads."""
        self._row.copy_(gradients)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of all vectors, followed by those of all parameters.

        A gradient is None if its tensor requires none or no loss depends on the tensor. The
        gradients are copied out of the buffer, so they may become `.grad`.
        """
        sizes = [x.numel() for x, reached in zip(self._wanted, self._reached, strict=True) if reached]
        parts = iter(self._gradients[: sum(sizes)].clone().split(sizes))
        given = iter(self._reached)
        places = [*self._vectors.values(), *self._parameters]
        return [next(parts).view(x.shape) if x.requires_grad and next(given) else None for x in places]

    def release(self) -> None:
        """Free the autograd graph of the last forward and the results saved in it for backward."""
        self._out = None


def _by_dtype(batch: HeadBatch) -> dict[torch.dtype, list[Tensor]]:
    """Return {dtype: flattened tensors}: the labels of all tasks, followed by their pairs."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (*batch.labels, *batch.pairs):
        if tensor is not None:
            found.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return found
