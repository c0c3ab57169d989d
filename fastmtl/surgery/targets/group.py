"""A torch optimizer as a target, in several processes that have the same parameters."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl.measure.ranges import profile_range
from fastmtl.surgery.differentiate import differentiate
from fastmtl.surgery.merged import Merged, by_parameter
from fastmtl.surgery.ranks.collectives import BUCKET
from fastmtl.surgery.targets.optimizer import OptimizerTarget
from fastmtl.surgery.targets.same_parameters import check_same_parameters
from fastmtl_kernels.cast import cast
from fastmtl_kernels.upload import upload


class GroupTarget(OptimizerTarget):
    """Target that sums a step's gradients over the ranks and adds the sums to `.grad`.

    Each loss is divided by its rows over all ranks, so the ranks' gradients add up. Every rank then
    has the same `.grad`, and its optimizer makes the same update. SurgeryAdamW reads `.grad`, too,
    since its own merging knows this rank's task gradients only.

    Raises UserError if the parameters differ between ranks, or are those of FSDP1.
    """

    sums_ranks = True

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.merges, self._merging = False, None
        every = list({id(parameter): parameter for parameter in self._every()}.values())
        for parameter in every:
            if hasattr(parameter, "_fsdp_flattened"):
                raise UserError(
                    f"target: a parameter of shape {tuple(parameter.shape)} is of FullyShardedDataParallel (FSDP1), "
                    "which GradientSurgery does not support: use torch.distributed.fsdp.fully_shard, "
                    "DistributedDataParallel, or DeepSpeed's ZeRO"
                )
        check_same_parameters(every, self.device)
        self._sent = self.parameters  # in the order of J, where known, so that its parts need no copy
        self._held: list[Tensor | None] = []

    def arranged(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        shared = {id(parameter) for parameter in parameters}
        self._sent = [*parameters, *(parameter for parameter in self.parameters if id(parameter) not in shared)]
        return parameters

    def begin(self) -> None:
        super().begin()
        self._held = []

    def wants_float32(self) -> bool:
        """Return True: gradients are summed over ranks in float32, and rounded once afterwards."""
        return True

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add autograd's gradients over the micro-batches; the last one sums them over the ranks.

        `.grad` itself is no place for this rank's part, since it may hold sums of earlier steps.
        """
        self.check_trained()
        found = differentiate([(loss, 1.0)], self.parameters, self.names)
        before, self._held = self._held or [None] * len(found), []
        totals = [_add(total, gradient) for total, gradient in zip(before, found, strict=True)]
        del found, before
        if not last:
            self._held = totals
            return
        merged, reached = by_parameter(self.parameters, totals, exclusive=True)
        del totals
        with profile_range("communication"):
            self.hand_over(merged, self.sum_over_ranks(merged, reached))

    def sum_over_ranks(self, gradients: Merged, reached: Collection[int]) -> Collection[int]:
        """Sum all gradients over ranks, and find out which parameters any rank has reached.

        Gradients that are adjacent in memory are summed in place, others in copies of up to
        `BUCKET` numbers. The host waits only on a rank that has not reached every parameter.
        """
        flags = torch.tensor([id(parameter) in reached for parameter in self.parameters], dtype=torch.int32)
        all_here = bool(flags.all())
        flags = upload(flags, self.device)
        works: list[dist.Work | None] = [dist.all_reduce(flags, async_op=True)]
        for members in self._buckets():
            dtype = _wide(members[0])
            flat = cast(gradients.take_joined([id(parameter) for parameter in members]), dtype)
            works.append(dist.all_reduce(flat, async_op=True))
            parts = flat.split([parameter.numel() for parameter in members])
            gradients.update((id(p), part.view(p.shape)) for p, part in zip(members, parts, strict=True))
        for work in works:
            assert work is not None, "this process is in the group"
            work.wait()
        if all_here:
            return reached
        return {id(parameter) for parameter, count in zip(self.parameters, flags.tolist(), strict=True) if count}

    def _buckets(self) -> list[list[nn.Parameter]]:
        """Return the parameters in lists, for one collective each: equal on all ranks.

        A list has up to `BUCKET` numbers, more only for a single parameter, on one device and
        summed in one dtype.
        """
        found: list[list[nn.Parameter]] = []
        size = 0
        for parameter in self._sent:
            size += parameter.numel()
            last = found[-1][0] if found else None
            alike = last is not None and (last.device, _wide(last)) == (parameter.device, _wide(parameter))
            if alike and size <= BUCKET:
                found[-1].append(parameter)
            else:
                found.append([parameter])
                size = parameter.numel()
        return found


def _add(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, at least float32, since 16 bits would round every sum."""
    if total is None or gradient is None:
        return gradient if total is None else total
    return cast(total, torch.promote_types(total.dtype, torch.float32)) + gradient


def _wide(parameter: nn.Parameter) -> torch.dtype:
    """Return the dtype in which a parameter's gradient is summed over ranks, at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)
