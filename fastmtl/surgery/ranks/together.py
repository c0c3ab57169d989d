"""`reduce: exact`: one Gramian of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.jacobian.compact_rows import Rows, coalesce, is_first
from fastmtl.surgery.ranks.collectives import all_gather, column_pieces, start_scatter, sum_over_ranks, world_size


class Together:
    """Ranks for a J that is the sum over all ranks, each of which has a share of the columns."""

    @property
    def many(self) -> bool:
        return world_size() > 1

    def scatter(self, piece: Tensor) -> Tensor:
        """Sum columns over ranks; return this rank's share [T, ceil(n / world)], padded with 0."""
        if not self.many:
            return piece
        with profile_range("communication"):
            return torch.cat([start_scatter(piece[:, columns]).share() for columns in column_pieces(*piece.shape)], 1)

    def spans_of_share(
        self, spans: Sequence[tuple[int, slice]], num_tasks: int, columns: int
    ) -> list[tuple[int, slice]]:
        if not self.many:
            return list(spans)
        found, place = [], 0
        for piece in column_pieces(num_tasks, columns):
            size = -(-(piece.stop - piece.start) // world_size())
            first = piece.start + dist.get_rank() * size
            for key, span in spans:
                start, stop = max(span.start, first), min(span.stop, first + size, piece.stop)
                if start < stop:
                    found.append((key, slice(place + start - first, place + stop - first)))
            place += size
        return found

    def gather_rows(self, tables: Sequence[list[Rows]], shapes: Sequence[torch.Size]) -> list[list[Rows]]:
        """Return the sums of all ranks' rows over equal ids, as `coalesce` does.

        The host waits once, for the row counts of all ranks.
        """
        if not self.many or not tables:
            return list(tables)
        firsts = [is_first(ids) for tasks in tables for ids, _ in tasks]
        sizes = torch.stack([first.sum() for first in firsts])
        with profile_range("communication"):
            of_ranks = torch.stack(all_gather(sizes)).tolist()
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
    """Return the `size` ids and rows that hold sums, without repeated ids. first: `is_first`."""
    places = (~first).byte().sort(stable=True).indices[:size]
    return rows[0][places], rows[1][places]


def _gather_rows(tasks: Sequence[Rows], sizes: Sequence[Sequence[int]]) -> list[list[Rows]]:
    """Return, for every rank, the (ids, rows) pairs of its T tasks.

    tasks: the T pairs of this rank. sizes: number of rows of each rank and task.
    """
    longest = max(map(sum, sizes))

    def gathered(mine: Sequence[Tensor]) -> list[Tensor]:
        joined = torch.cat(list(mine))
        return all_gather(torch.cat([joined, joined.new_zeros(longest - len(joined), *joined.shape[1:])]))

    ids, rows = map(gathered, zip(*tasks, strict=True))
    return [
        list(zip(rank_ids[: sum(counts)].split(counts), rank_rows[: sum(counts)].split(counts), strict=True))
        for rank_ids, rank_rows, counts in zip(ids, rows, sizes, strict=True)
    ]
