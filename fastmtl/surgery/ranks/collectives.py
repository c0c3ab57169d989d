"""Collectives of surgery: sums of small tensors, and the reduce-scatter of J's columns."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.measure.ranges import profile_range

BUCKET = 1 << 23  # numbers per collective: bounds the copy that a collective needs


def world_size() -> int:
    """Processes that train together, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Adds up a small tensor in place and returns it."""
    if world_size() > 1:
        with profile_range("communication"):
            dist.all_reduce(value)
    return value


def column_pieces(num_tasks: int, columns: int) -> list[slice]:
    """Of [T, columns]: what goes in one collective each."""
    world = world_size()
    size = max(1, BUCKET // (world * num_tasks)) * world
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


class Scattering:
    """A collective under way. sends: what it sends; result: what it fills, None where that is `sends` itself."""

    def __init__(self, work: dist.Work | None, sends: Tensor, result: Tensor | None) -> None:
        self._work, self._sends, self._result = work, sends, result
        self._share: Tensor | None = None

    def share(self) -> Tensor:
        """[T, ceil(n / world)]; waits for it (on a GPU what is computed next does). Nothing else is kept then."""
        if self._share is None:
            assert self._work is not None, "this process is in the group"
            self._work.wait()
            self._share = self._sends[dist.get_rank()].clone() if self._result is None else self._result
            self._work = self._result = None
            del self._sends
        return self._share


def start_scatter(piece: Tensor) -> Scattering:
    """Sends a copy of [T, n] of this rank; zeros are added at its end."""
    world, (num_tasks, columns) = world_size(), piece.shape
    share = -(-columns // world)
    if columns < share * world:
        piece = torch.nn.functional.pad(piece, (0, share * world - columns))
    by_rank = piece.new_empty(world, num_tasks, share)  # not by `contiguous`, which is J itself where there is one task
    by_rank.copy_(piece.unflatten(1, (world, share)).transpose(0, 1))
    if dist.get_backend() == "gloo":  # its reduce_scatter is an all_reduce inside; this one serves every version
        return Scattering(dist.all_reduce(by_rank, async_op=True), by_rank, None)
    result = torch.empty(num_tasks, share, dtype=piece.dtype, device=piece.device)
    return Scattering(dist.reduce_scatter_tensor(result, by_rank, async_op=True), by_rank, result)
