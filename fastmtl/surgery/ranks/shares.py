"""A rank's share of a tensor with a number for each column of J, and the whole from all shares.

The shares are those of `Together.scatter`: J's columns are cut into pieces (`column_pieces`), and
each rank has one of `world` equal parts of each piece, padded with zeros at the piece's end.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.surgery.ranks.collectives import all_gather, column_pieces, world_size


def own_share(whole: Tensor) -> Tensor:
    """Return this rank's share of [T, P], as `scatter` would give it."""
    world = world_size()
    if world == 1:
        return whole
    parts = []
    for piece in column_pieces(*whole.shape):
        share = -(-(piece.stop - piece.start) // world)
        padded = torch.nn.functional.pad(whole[:, piece], (0, share * world - piece.stop + piece.start))
        parts.append(padded[:, dist.get_rank() * share :][:, :share])
    return torch.cat(parts, 1)


def whole_of_shares(share: Tensor, columns: int) -> Tensor | None:
    """Return [T, columns] from all ranks' shares, on the CPU; None on the ranks after the first.

    The inverse of `own_share`. Every rank must call this function.
    """
    if world_size() == 1:
        return share.cpu()
    found, begin = [], 0
    for piece in column_pieces(len(share), columns):
        size = -(-(piece.stop - piece.start) // world_size())
        gathered = all_gather(share[:, begin : begin + size].contiguous())
        begin += size
        if dist.get_rank() == 0:
            found.append(torch.cat(gathered, 1)[:, : piece.stop - piece.start].cpu())
    return torch.cat(found, 1) if found else None


def own_columns(width: int) -> slice:
    """Return this rank's part of `width` columns; parts differ in size by at most one."""
    if world_size() == 1:
        return slice(0, width)
    rank, world = dist.get_rank(), world_size()
    return slice(width * rank // world, width * (rank + 1) // world)


def whole_columns(part: Tensor, width: int) -> Tensor | None:
    """Return [T, V, width] from all ranks' `own_columns` of it, on the CPU.

    The result is None on the ranks after the first. Every rank must call this function.
    """
    world = world_size()
    if world == 1:
        return part.cpu()
    sizes = [width * (rank + 1) // world - width * rank // world for rank in range(world)]
    found = []
    for of_task in part.unbind():  # one task at a time bounds the copies
        padded = torch.nn.functional.pad(of_task, (0, max(sizes) - of_task.shape[1]))
        gathered = all_gather(padded.contiguous())
        if dist.get_rank() == 0:
            found.append(torch.cat([one[:, :size] for one, size in zip(gathered, sizes, strict=True)], 1).cpu())
    return torch.stack(found) if found else None
