"""Benchmark of pool and its alternatives, which fastmtl/bench/ops/pool.py defines."""

from __future__ import annotations

from collections.abc import Callable

OP = "pool"


def test_pool(measured: Callable[[], None]) -> None:
    measured()
