"""Task gradients over ranks: what has to be summed, and what every rank may keep to itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, is_first

BUCKET = 1 << 23  # numbers per collective: bounds the copy that a collective needs


class Ranks(Protocol):
    """What surgery asks of the other ranks for its Gramian."""

    @property
    def many(self) -> bool:
        """Whether J is a sum over more than one."""
        ...

    def scatter(self, piece: Tensor) -> Tensor:
        """[T, n] of this rank -> this rank's share of the columns of what it stands for."""
        ...

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """Of each table [V, d] its T tasks' rows from `coalesce` -> the sums of those that belong to the same J."""
        ...

    def total(self, value: Tensor) -> Tensor:
        """Adds up a small tensor over the shares, in place, and returns it."""
        ...


class Alone:
    """J is this rank's own: one process, or `reduce: local`, where each rank projects before DeepSpeed averages."""

    many = False

    def scatter(self, piece: Tensor) -> Tensor:
        return piece

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        return list(tables)

    def total(self, value: Tensor) -> Tensor:
        return value


class Together:
    """J is the sum over ranks, each of which keeps some of its columns (`reduce: exact`)."""

    @property
    def many(self) -> bool:
        return world_size() > 1

    def scatter(self, piece: Tensor) -> Tensor:
        """[T, ceil(n / world)], zeros at the end."""
        if not self.many:
            return piece
        with profile_range("communication"):
            return torch.cat([start_scatter(piece[:, columns]).share() for columns in column_pieces(*piece.shape)], 1)

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """The sums of all ranks' rows over equal ids. The host waits once, for the numbers of all ranks' rows."""
        if not self.many or not tables:
            return list(tables)
        firsts = [is_first(ids) for tasks in tables for ids, _ in tasks]
        sizes = torch.stack([first.sum() for first in firsts])
        with profile_range("communication"):
            of_ranks = torch.stack(_all_gather(sizes)).tolist()
            found, begin = [], 0
            for tasks, shape in zip(tables, shapes, strict=True):
                of_table = slice(begin, begin + len(tasks))
                parts = zip(tasks, firsts[of_table], of_ranks[dist.get_rank()][of_table], strict=True)
                packed = [_pack(rows, first, size) for rows, first, size in parts]
                ranks = _gather_rows(packed, [sizes_of_rank[of_table] for sizes_of_rank in of_ranks])
                found.append(coalesce(list(zip(*ranks, strict=True)), shape, packed[0][1]))
                begin = of_table.stop
            return found

    def total(self, value: Tensor) -> Tensor:
        return sum_over_ranks(value)


def _pack(rows: Rows, first: Tensor, size: int) -> Rows:
    """The `size` rows of `coalesce` that have sums."""
    places = (~first).byte().sort(stable=True).indices[:size]
    return rows[0][places], rows[1][places]


def _gather_rows(tasks: Sequence[Rows], sizes: Sequence[Sequence[int]]) -> list[list[Rows]]:
    """T tasks' rows of this rank, and the numbers of every rank's -> the T tasks' rows of every rank."""
    longest = max(map(sum, sizes))

    def gathered(mine: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat(list(mine))
        return _all_gather(torch.cat([joined, joined.new_zeros(longest - len(joined), *joined.shape[1:])]))

    ids, rows = map(gathered, zip(*tasks, strict=True))
    return [
        list(zip(its_ids[: sum(its)].split(its), its_rows[: sum(its)].split(its), strict=True))
        for its_ids, its_rows, its in zip(ids, rows, sizes, strict=True)
    ]


def _all_gather(value: Tensor) -> list[Tensor]:
    found = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(found, value)
    return found


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
