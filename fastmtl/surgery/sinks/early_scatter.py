"""Reduce-scatter of J's columns during backward (`storage: stacked`, `reduce: exact`).

J is sent in the same pieces, with one collective each, as it would be after backward, so the result
has the same bits. A piece can be sent once the gradients of every parameter in it have been written
for the last time in the step.

All ranks must send in one order, whatever the order of their backwards. It is the order in which
rank 0 completed the pieces in the first step, as torch's DistributedDataParallel orders its buckets
(Li et al., PyTorch Distributed, 2020, section 4.2.3).

At most two pieces are in flight, which bounds the copies. Before the next piece, backward waits for
the older of the two, so the schedule depends on no clock. Pieces that are incomplete at the end of
backward are sent then.
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
    """Reduce-scatter of J in each step, while the step's last backward still computes.

    `begin` is called before that backward, `complete` during it, `shares` after it. sent_early:
    number of pieces that the last finished step sent before `shares`.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        self._jacobian = jacobian
        num_tasks, columns = jacobian.buffer.shape
        self._pieces = column_pieces(num_tasks, columns)
        self._order: list[int] = []  # piece numbers in sending order; empty in the first step
        self._completed: list[int] = []  # piece numbers in order of completion, in the first step
        self._pending: list[set[int]] = []  # per piece, parameters yet to be written; set by `begin`
        self._sent: dict[int, Scattering] = {}
        self.sent_early = 0

    def begin(self, expected: Collection[int]) -> None:
        """Start the overlap for one backward.

        expected: ids of the parameters that will be passed to `complete`. A piece that contains any
        other parameter is sent after backward, by `shares`.
        """
        spans, known = self._jacobian.spans(), set(expected)
        self._pending = [
            {key for key, span in spans.items() if span.start < piece.stop and span.stop > piece.start}
            for piece in self._pieces
        ]
        for pending in self._pending:
            if not pending <= known:
                pending.add(0)  # an id of no parameter, so the piece is never complete

    @property
    def begun(self) -> bool:
        """True from `begin` to `shares` or `reset`."""
        return bool(self._pending)

    def complete(self, key: int) -> None:
        """Record that this backward has written the parameter with id `key` for the last time."""
        for number, pending in enumerate(self._pending):
            if key in pending:
                pending.remove(key)
                if not pending:
                    self._completed.append(number)
        while self._pending and len(self._sent) < len(self._order):
            number = self._order[len(self._sent)]
            if self._pending[number]:
                break
            self._send(number)

    def shares(self) -> Tensor:
        """Send the remaining pieces, wait, and return this rank's columns of J summed over ranks.

        The result is [T, columns]: this rank's share of each piece, padded with zeros.
        """
        self.sent_early = len(self._sent)
        keeps_order = bool(self._order or self._pending)  # without `begin`, no order of completion is found
        with profile_range("communication"):
            if not self._order:
                self._order = self._order_of_rank_0()
            for number in self._order[len(self._sent) :]:
                self._send(number)
            found = torch.cat([self._sent[number].share() for number in range(len(self._pieces))], dim=1)
        self.reset()
        if not keeps_order:
            self._order = []
        return found

    def reset(self) -> None:
        """Wait for the pieces in flight and drop all results, for example after a failed step."""
        for scattering in self._sent.values():
            scattering.share()
        self._sent, self._pending, self._completed = {}, [], []

    def is_sent(self, key: int) -> bool:
        """Return True if any column of the parameter with id `key` has been sent."""
        span = self._jacobian.spans()[key]
        return any(span.start < self._pieces[n].stop and span.stop > self._pieces[n].start for n in self._sent)

    def _send(self, number: int) -> None:
        if len(self._sent) >= IN_FLIGHT:
            self._sent[self._order[len(self._sent) - IN_FLIGHT]].share()
        self._sent[number] = start_scatter(self._jacobian.columns(self._pieces[number]))

    def _order_of_rank_0(self) -> list[int]:
        rest = [number for number in reversed(range(len(self._pieces))) if number not in self._completed]
        order = upload(torch.tensor([*self._completed, *rest]), self._jacobian.buffer.device)
        dist.broadcast(order, 0)
        return order.tolist()
