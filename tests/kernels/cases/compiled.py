"""Checks of kernels that the fixture compile_ahead has compiled for sm_90."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

# Loads to registers, and asynchronous loads to shared memory for the next steps of a loop.
LOADS, AHEAD = "LDG.E.128", "LDGSTS.E.BYPASS.128"


class Vectors(NamedTuple):
    """The loads and stores of 16 bytes that a kernel needs at least, and the resources it may use.

    loads, stores: tensors that are read and written by vectors. registers, shared_kib: limits that
    leave room for the blocks its launcher expects. ahead: the exact number of asynchronous loads.
    """

    loads: int
    stores: int
    registers: int
    shared_kib: int
    ahead: int = 0


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def check_vectors(kernels: Sequence[Any], expected: Mapping[str, Vectors]) -> None:
    """Check these kernels, in this order: nothing spills, and memory is accessed by vectors."""
    assert [kernel.name for kernel in kernels] == list(expected)
    for kernel in kernels:
        limit, found = expected[kernel.name], kernel.instructions
        assert kernel.spilled == 0 and kernel.registers <= limit.registers, kernel
        assert kernel.shared <= limit.shared_kib << 10, kernel
        ahead = found.get(AHEAD, 0)
        assert found.get(LOADS, 0) + ahead >= limit.loads, kernel
        assert ahead == limit.ahead, kernel
        assert found.get("STG.E.128", 0) >= limit.stores, kernel
