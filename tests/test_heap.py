from __future__ import annotations

import platform

import pytest
import torch

from fastmtl import heap
from fastmtl.bench.harness import MIB, in_own_process, resident_bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_holes_go_back_to_the_system() -> None:
    with_holes, without = in_own_process(around_a_trim, preload="fastmtl.bench.kernels")
    assert with_holes - without > 30 * MIB


def around_a_trim() -> tuple[int, int]:
    """Resident bytes. Every other one of many small blocks is freed: none of the holes is at the heap's end."""
    blocks = [torch.ones(MIB // 32) for _ in range(800)]
    del blocks[::2]
    before = resident_bytes()
    heap.trim()
    after = resident_bytes()
    assert before is not None and after is not None and len(blocks) == 400
    return before, after
