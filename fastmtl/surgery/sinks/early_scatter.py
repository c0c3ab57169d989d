"""J's columns on their way to the ranks while backward still runs (`storage: stacked`, `reduce: exact`).

J goes in pieces, each in a collective of its own, as it would after backward: the same pieces, so the same bits. One
may go when every parameter in it has been written for the last time in the step. All ranks have to send in one order,
whatever their backwards did first; it is the one in which the pieces were complete on rank 0 in the first step, as
torch's DistributedDataParallel orders its buckets (Li et al., PyTorch Distributed, 2020, section 4.2.3). At most two
are on their way at a time, which bounds the copies that they need: the next one waits for the first of them, and
backward with it, so that what is sent when depends on no clock. What was not complete in backward goes at its end.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.jacobian.dense import Jacobian
from fastmtl.surgery.ranks.collectives import Scattering, column_pieces, start_scatter
from fastmtl_kernels.upload import upload

IN_FLIGHT = 2


class EarlyScatter:
    """One step after the other: `begin` before the last backward, `complete` in it, `shares` after it.

    sent_early: how many pieces went before `shares`, in the last step that is over.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian = jacobian
        num_tasks, columns = jacobian.buffer.shape
        self._pieces = column_pieces(num_tasks, columns)
        self._order: list[int] = []  # of the pieces' numbers; none in the first step
        self._seen: list[int] = []  # pieces in the order in which they were complete, in the first step
        self._waits_for: list[set[int]] = []  # of each piece, parameters that will still be written; only after `begin`
        self._sent: dict[int, Scattering] = {}
        self.sent_early = 0

    def begin(self, expected: Collection[int]) -> None:
        """expected: ids of the parameters of which `complete` will tell. A piece with any other waits for `shares`."""
        spans, known = self._jacobian.spans(), set(expected)
        self._waits_for = [
            {key for key, span in spans.items() if span.start < piece.stop and span.stop > piece.start}
            for piece in self._pieces
        ]
        for waits in self._waits_for:
            if not waits <= known:
                waits.add(0)  # no parameter's id: it never comes

    def complete(self, key: int) -> None:
        """The parameter with this id has been written for the last time in this backward."""
        for number, waits in enumerate(self._waits_for):
            if key in waits:
                waits.remove(key)
                if not waits:
                    self._seen.append(number)
        while self._waits_for and len(self._sent) < len(self._order):
            number = self._order[len(self._sent)]
            if self._waits_for[number]:
                break
            self._send(number)

    def shares(self) -> Tensor:
        """[T, columns]: this rank's share of every piece of the sum of all ranks' J, zeros at the ends of pieces."""
        self.sent_early = len(self._sent)
        with profile_range("communication"):
            if not self._order:
                self._order = self._order_of_rank_0()
            for number in self._order[len(self._sent) :]:
                self._send(number)
            found = torch.cat([self._sent[number].share() for number in range(len(self._pieces))], dim=1)
        self.reset()
        return found

    def reset(self) -> None:
        """Forgets what is under way: of a step that has failed."""
        for one in self._sent.values():
            one.share()
        self._sent, self._waits_for, self._seen = {}, [], []

    def is_sent(self, key: int) -> bool:
        """Whether a part of the parameter's columns has gone."""
        span = self._jacobian.spans()[key]
        return any(span.start < self._pieces[n].stop and span.stop > self._pieces[n].start for n in self._sent)

    def _send(self, number: int) -> None:
        if len(self._sent) >= IN_FLIGHT:
            self._sent[self._order[len(self._sent) - IN_FLIGHT]].share()
        self._sent[number] = start_scatter(self._jacobian.columns(self._pieces[number]))

    def _order_of_rank_0(self) -> list[int]:
        rest = [number for number in reversed(range(len(self._pieces))) if number not in self._seen]
        order = upload(torch.tensor([*self._seen, *rest]), self._jacobian.buffer.device)
        dist.broadcast(order, 0)
        return order.tolist()
