"""pool and its alternatives: pytest-benchmark of fastmtl/bench/ops/pool.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "pool"


def test_pool(measured: Callable[[], None]) -> None:
    measured()
