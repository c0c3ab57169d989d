"""pool and what it replaces, through pytest-benchmark: fastmtl/bench/ops/pool.py."""

from __future__ import annotations

from collections.abc import Callable

OP = "pool"


def test_pool(measured: Callable[[], None]) -> None:
    measured()
