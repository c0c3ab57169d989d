"""Heads and losses on buffers of fixed addresses: a forward and a backward to record and replay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastmtl.model.heads.batch import HeadBatch, Vectors

Losses = Callable[[Vectors, HeadBatch], list[Tensor]]


class StaticHeads:
    """Heads and losses for batches of one size: call `fill`, then `forward`, then `backward`.

    losses: returns the sums of the T tasks, 0-dim.
    parameters: those of the heads, of the vectors' dtype.
    vectors, batch: give the sizes.
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
        # The losses, after `take` their gradients.
        self._row = torch.empty(len(batch.counts), dtype=torch.promote_types(some.dtype, torch.float32), device=device)
        self._wanted = [x for x in (*self._vectors.values(), *self._parameters) if x.requires_grad]
        total = sum(x.numel() for x in self._wanted)
        self._gradients = torch.empty(total, dtype=some.dtype, device=device)
        self._reached = [True] * len(self._wanted)
        self._out: Tensor | None = None

    def fill(self, vectors: Vectors, batch: HeadBatch) -> None:
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
        """Take the gradients of the losses [T] for `backward`."""
        self._row.copy_(gradients)

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the vectors, then of the parameters.

        They are views of one copy and may become `.grad`. None for a tensor that requires none, and
        for one on which no loss depends.
        """
        sizes = [x.numel() for x, reached in zip(self._wanted, self._reached, strict=True) if reached]
        parts = iter(self._gradients[: sum(sizes)].clone().split(sizes))
        given = iter(self._reached)
        places = [*self._vectors.values(), *self._parameters]
        return [next(parts).view(x.shape) if x.requires_grad and next(given) else None for x in places]

    def release(self) -> None:
        """Drop the results that forward saved for backward."""
        self._out = None


def _by_dtype(batch: HeadBatch) -> dict[torch.dtype, list[Tensor]]:
    """Return the labels of all tasks, then their pairs, flattened, by dtype."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in (*batch.labels, *batch.pairs):
        if tensor is not None:
            found.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
    return found
