"""The check that all ranks begin with the same parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmtl.errors import UserError
from fastmtl_kernels.upload import upload

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_parameters(parameters: Sequence[nn.Parameter], device: torch.device) -> None:
    """Raise UserError on every rank, naming the first parameter that differs between ranks.

    Each rank sends two numbers, then four per parameter: a sum of its bits, and a hash of its
    shape, its dtype and whether it is trained.
    """
    if not _equal(upload(torch.tensor([len(parameters)]), device))[0]:
        raise UserError(
            f"target: the optimiser has {len(parameters)} parameters on rank {dist.get_rank()}, and another number on "
            "other ranks: give every rank the same model and the same parameters"
        )
    kinds = [hash((*p.shape, p.element_size(), p.dtype.is_floating_point, p.requires_grad)) for p in parameters]
    sums = torch.stack([_sum_of_bits(parameter).to(device) for parameter in parameters])
    same = zip(_equal(upload(torch.tensor(kinds), device)), _equal(sums), strict=True)
    for number, (parameter, (same_kind, same_numbers)) in enumerate(zip(parameters, same, strict=True)):
        if not same_kind or not same_numbers:
            what = "its numbers" if same_kind else "its shape, its dtype or requires_grad"
            raise UserError(
                f"target: parameter number {number} of the optimiser, of shape {tuple(parameter.shape)} on rank "
                f"{dist.get_rank()}, is not the same on all ranks ({what}): start every rank from the same weights "
                "(the same seed or file, or DistributedDataParallel, which copies those of rank 0), with the "
                "optimiser's parameters in the same order"
            )


@torch.no_grad()
def _sum_of_bits(parameter: nn.Parameter) -> Tensor:
    """Return the sum of the elements as integers, int64; any order of adding gives the same."""
    real = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    return real.detach().view(_INTEGERS[real.element_size()]).sum(dtype=torch.int64)


def _equal(numbers: Tensor) -> list[bool]:
    """Return, for each of the integers [n], whether all ranks have the same. `~x` is -x - 1."""
    extremes = torch.stack([numbers, ~numbers])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[0], ~extremes[1]
    return (largest == smallest).tolist()
