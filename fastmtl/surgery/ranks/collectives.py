"""Collectives of surgery: sums of small tensors, and the reduce-scatter of J's columns."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.measure.ranges import profile_range

_Value = TypeVar("_Value")

BUCKET = 1 << 23  # most numbers in one collective, since each is sent from a copy


def world_size() -> int:
    """Return the number of processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum a small tensor over ranks in place and return it."""
    if world_size() > 1:
        with profile_range("communication"):
            dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """Replace the elements of a small tensor by their maxima over ranks in place and return it."""
    if world_size() > 1:
        with profile_range("communication"):
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def gather_over_ranks(value: _Value) -> list[_Value]:
    """Return the small objects of all ranks, in their order. The host waits for all ranks."""
    gathered = [value] * world_size()
    if world_size() > 1:
        with profile_range("communication"):
            dist.all_gather_object(gathered, value)
    return gathered


def all_gather(value: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, which have one shape, in the ranks' order."""
    found = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(found, value)
    return found


def union_over_ranks(values: set[_Value]) -> set[_Value]:
    """Return the union of the ranks' sets of small objects. The host waits for all ranks."""
    return set().union(*gather_over_ranks(values))


def column_pieces(num_tasks: int, columns: int) -> list[slice]:
    """Divide the columns of J [T, columns] into pieces; each is sent by one collective."""
    world = world_size()
    size = max(1, BUCKET // (world * num_tasks)) * world
    return [slice(start, min(start + size, columns)) for start in range(0, columns, size)]


class Scattering:
    """A reduce-scatter that has been started.

    sends: the tensor that is sent. result: the tensor that receives this rank's share; None if the
    sums of all shares are written into `sends`.
    """

    def __init__(self, work: dist.Work | None, sends: Tensor, result: Tensor | None) -> None:
        self._work, self._sends, self._result = work, sends, result
        self._share: Tensor | None = None

    def share(self) -> Tensor:
        """Wait for the collective and return this rank's share, [T, ceil(n / world)].

        On a GPU, later kernels wait instead of the host. The tensors that were sent are released.
        """
        if self._share is None:
            assert self._work is not None, "this process is in the group"
            self._work.wait()
            self._share = self._sends[dist.get_rank()].clone() if self._result is None else self._result
            self._work = self._result = None
            del self._sends
        return self._share


def start_scatter(piece: Tensor) -> Scattering:
    """Start to sum [T, n] over ranks; each rank gets one of `world` equal shares of the columns.

    A copy is sent, padded with zeros at its end.
    """
    world, (num_tasks, columns) = world_size(), piece.shape
    share = -(-columns // world)
    if columns < share * world:
        piece = torch.nn.functional.pad(piece, (0, share * world - columns))
    by_rank = piece.new_empty(world, num_tasks, share)  # `contiguous` would return J itself for one task
    by_rank.copy_(piece.unflatten(1, (world, share)).transpose(0, 1))
    if dist.get_backend() == "gloo":  # gloo's reduce_scatter is an all_reduce, and some versions lack it
        return Scattering(dist.all_reduce(by_rank, async_op=True), by_rank, None)
    result = torch.empty(num_tasks, share, dtype=piece.dtype, device=piece.device)
    return Scattering(dist.reduce_scatter_tensor(result, by_rank, async_op=True), by_rank, result)
